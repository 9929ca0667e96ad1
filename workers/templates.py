"""Chat templates: Jinja that came with a model file, so code from a stranger.

Rendered in the runner process only, in an immutable sandbox, with limits on time and on the size of every intermediate
string. Nothing but plain data is passed in.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from functools import partial
from types import FrameType, GeneratorType
from typing import Any

from jinja2 import TemplateError as JinjaError, meta, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lmweb.errors import TemplateError
from workers.schemas import ChatMessage

MAX_TEMPLATE_CHARS = 512 * 1024
MAX_STRING_CHARS = 16 * 1024 * 1024
TIME_LIMIT_SECONDS = 2.0
MAX_INDENT = 1000
#: String methods and filters that make long strings out of short arguments.
FORBIDDEN_METHODS = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs", "format_map"})
FORBIDDEN_FILTERS = ("center", "format", "wordwrap", "pprint", "xmlattr", "urlize", "filesizeformat")

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class _CodeGenerator(CodeGenerator):
    """Compiles ``a ~ b`` into a call that can be bounded."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802  (Jinja's own hook)
        """Join through the environment instead of Jinja's unbounded ``str_join``."""
        self.write("environment.join_bounded((")
        for argument in node.nodes:
            self.visit(argument, frame)
            self.write(", ")
        self.write("))")


class _Generation(Extension):
    """``{% generation %}``: marks what the assistant wrote, for training (transformers). Its content stays, the marks mean nothing."""

    tags = {"generation"}  # noqa: RUF012  (as Jinja declares it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return what stands between the marks."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _join_bounded(parts: Iterable[Any]) -> str:
    texts = [str(part) for part in parts]
    _check_size(sum(map(len, texts)))
    return "".join(texts)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with everything that joins or repeats strings and lists bounded."""

    intercepted_binops = frozenset({"*", "**", "%", "+"})
    code_generator_class = _CodeGenerator
    concat = staticmethod(_join_bounded)
    join_bounded = staticmethod(_join_bounded)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Refuse operations whose result would be huge."""
        if operator == "%" and isinstance(left, str):
            raise SecurityError("string formatting is not allowed in a chat template")
        if operator == "**":
            raise SecurityError("powers are not allowed in a chat template")
        if operator == "*":
            _check_size(_repeated(left, right))
        if operator == "+" and isinstance(left, Sized) and isinstance(right, Sized):
            _check_size(len(left) + len(right))
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Hide string methods that pad or format. Lists may grow, one by one, for as long as the time limit lets them."""
        if isinstance(obj, list) and attr == "append":
            return True
        return not (isinstance(obj, str) and attr in FORBIDDEN_METHODS) and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Bound ``str.format``: only plain fields, whose size is known, and nothing that pads."""
        if super().wrap_str_format(value) is None:
            return None
        if value.__name__ != "format":
            raise SecurityError("this way of formatting is not allowed in a chat template")
        return partial(_format, value.__self__)

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Bound the string methods that grow with the product of their arguments."""
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str) and getattr(obj, "__name__", "") == "replace" and len(args) > 1:
            _check_size(len(owner) + owner.count(str(args[0])) * len(str(args[1])))
        if isinstance(owner, str) and getattr(obj, "__name__", "") == "join" and args:
            return _join(args[0], owner)
        return super().call(context, obj, *args, **kwargs)


def _join(values: Iterable[Any], separator: str = "") -> str:
    """The ``join`` filter, bounded."""
    texts = [str(value) for value in values]
    _check_size(sum(map(len, texts)) + len(separator) * len(texts))
    return str(separator).join(texts)


def _replace(value: object, old: object, new: object) -> str:
    """The ``replace`` filter, bounded."""
    text, before, after = str(value), str(old), str(new)
    _check_size(len(text) + text.count(before) * len(after))
    return text.replace(before, after)


def _indent(value: object, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    """The ``indent`` filter, bounded."""
    text, indention = str(value), width if isinstance(width, str) else " " * min(int(width), MAX_INDENT)
    lines = text.split("\n")
    _check_size(len(text) + len(indention) * len(lines))
    indented = [indention + line if (line or blank) and (number or first) else line for number, line in enumerate(lines)]
    return "\n".join(indented)


def _format(template: str, *args: Any) -> str:
    """``str.format`` with ``{}`` and nothing else."""
    parts = str(template).split("{}")
    if any("{" in part or "}" in part for part in parts) or len(parts) - 1 > len(args):
        raise SecurityError("only plain {} may be formatted in a chat template")
    return _join_bounded(text for pair in zip(parts, [*map(str, args[: len(parts) - 1]), ""], strict=True) for text in pair)


def _repeated(left: Any, right: Any) -> int:
    for value, times in ((left, right), (right, left)):
        if isinstance(value, (str, list, tuple)) and isinstance(times, int):
            return len(value) * times
    return 0


def _check_size(n: int) -> None:
    if n > MAX_STRING_CHARS:
        raise SecurityError("the chat template makes too long a text")


def _tojson(
    value: Any,
    indent: int | None = None,
    ensure_ascii: bool = False,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Like transformers' filter: plain JSON, not escaped for HTML."""
    value = list(value) if isinstance(value, GeneratorType) else value  # what the filter ``map`` returns
    width = None if indent is None else min(int(indent), 8)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=width, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(str(message)[:1000], param="messages")


class ChatTemplate:
    """A compiled template. ``bos_token`` and ``eos_token`` are the texts of the model's special tokens."""

    def __init__(self, source: str, *, bos_token: str, eos_token: str) -> None:
        """Compile. Raises ``TemplateError`` if it is too long or no valid Jinja."""
        if len(source) > MAX_TEMPLATE_CHARS:
            raise TemplateError("The model's chat template is too long.")
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
        for name in FORBIDDEN_FILTERS:
            environment.filters.pop(name, None)
        environment.filters.update(tojson=_tojson, join=_join, replace=_replace, indent=_indent)
        environment.globals.update(raise_exception=_raise_exception, strftime_now=lambda pattern: time.strftime(str(pattern)[:64]))
        environment.globals.pop("lipsum", None)
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        try:
            with _time_limit(TIME_LIMIT_SECONDS):
                self._template = environment.from_string(source or CHATML)
                #: The names of the variables that the template reads.
                self.variables = frozenset(meta.find_undeclared_variables(environment.parse(source or CHATML)))
        except (JinjaError, RecursionError) as error:
            raise TemplateError(f"The model's chat template is not valid: {error}") from error

    def render(
        self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = True, variables: Mapping[str, Any] | None = None
    ) -> str:
        """Return the prompt of a conversation. Raises ``TemplateError`` if the template refuses it or breaks a limit."""
        data = [{"role": message.role, "content": message.content} for message in messages]
        return self.render_data(data, add_generation_prompt=add_generation_prompt, variables=variables)

    def render_data(
        self, data: list[dict[str, Any]], *, add_generation_prompt: bool = True, variables: Mapping[str, Any] | None = None
    ) -> str:
        """Return the prompt of messages in the form that templates read. Raises ``TemplateError`` as ``render`` does."""
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
