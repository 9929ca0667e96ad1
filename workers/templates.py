"""Chat templates: Jinja that came with a model file, so code from a stranger.

Rendered in the runner process only, in an immutable sandbox, with limits on time and on the size of every intermediate
string. Nothing but plain data is passed in.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from jinja2 import TemplateError as JinjaError
from jinja2.exceptions import SecurityError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lmweb.errors import TemplateError
from workers.schemas import ChatMessage

MAX_TEMPLATE_CHARS = 512 * 1024
MAX_STRING_CHARS = 16 * 1024 * 1024
TIME_LIMIT_SECONDS = 2.0
#: String methods and filters that make long strings out of short arguments.
FORBIDDEN_METHODS = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map"})
FORBIDDEN_FILTERS = ("center", "format", "indent", "wordwrap", "pprint", "xmlattr", "urlize", "filesizeformat")

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with products and joins of strings bounded."""

    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Refuse operations whose result would be huge."""
        if operator == "%" and isinstance(left, str):
            raise SecurityError("string formatting is not allowed in a chat template")
        if operator == "**":
            raise SecurityError("powers are not allowed in a chat template")
        if operator == "*":
            _check_size(_repeated(left, right))
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            _check_size(len(left) + len(right))
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Hide string methods that pad or format."""
        return not (isinstance(obj, str) and attr in FORBIDDEN_METHODS) and super().is_safe_attribute(obj, attr, value)

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str) and getattr(obj, "__name__", "") in {"replace", "join"} and args:
            grown = max((len(str(argument)) for argument in args), default=0) * (len(owner) + 1)
            _check_size(grown)
        return super().call(context, obj, *args, **kwargs)


def _repeated(left: Any, right: Any) -> int:
    for value, times in ((left, right), (right, left)):
        if isinstance(value, (str, list, tuple)) and isinstance(times, int):
            return len(value) * times
    return 0


def _check_size(n: int) -> None:
    if n > MAX_STRING_CHARS:
        raise SecurityError("the chat template makes too long a text")


def _tojson(value: Any, indent: int | None = None, **_options: Any) -> str:
    """Like transformers' filter: plain JSON, not escaped for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    raise TemplateError(str(message)[:1000], param="messages")


class ChatTemplate:
    """A compiled template. ``bos_token`` and ``eos_token`` are the texts of the model's special tokens."""

    def __init__(self, source: str, *, bos_token: str, eos_token: str) -> None:
        """Compile. Raises ``TemplateError`` if it is too long or no valid Jinja."""
        if len(source) > MAX_TEMPLATE_CHARS:
            raise TemplateError("The model's chat template is too long.")
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        for name in FORBIDDEN_FILTERS:
            environment.filters.pop(name, None)
        environment.filters["tojson"] = _tojson
        environment.globals.update(raise_exception=_raise_exception, strftime_now=lambda pattern: time.strftime(str(pattern)[:64]))
        environment.globals.pop("lipsum", None)
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        try:
            with _time_limit(TIME_LIMIT_SECONDS):
                self._template = environment.from_string(source or CHATML)
        except (JinjaError, RecursionError) as error:
            raise TemplateError(f"The model's chat template is not valid: {error}") from error

    def render(self, messages: list[ChatMessage], *, add_generation_prompt: bool = True, variables: Mapping[str, Any] | None = None) -> str:
        """Return the prompt of a conversation. Raises ``TemplateError`` if the template refuses it or breaks a limit."""
        data = [{"role": message.role, "content": message.content} for message in messages]
        parts, size = [], 0
        try:
            with _time_limit(TIME_LIMIT_SECONDS):
                for part in self._template.generate(
                    **(variables or {}), messages=data, add_generation_prompt=add_generation_prompt, **self._tokens
                ):
                    size += len(part)
                    _check_size(size)
                    parts.append(part)
        except (JinjaError, ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError) as error:
            raise TemplateError(f"The model's chat template failed: {str(error)[:500]}") from error
        return "".join(parts)


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise ``TemplateError`` in the main thread when the body takes too long (a template may loop for ever)."""

    def expire(_signal: int, _frame: FrameType | None) -> None:
        raise TemplateError("The model's chat template took too long.")

    previous: Callable[..., Any] | int | None = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
