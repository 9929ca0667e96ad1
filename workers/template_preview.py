"""Tries a chat template out in a process of its own: the sandbox of ``workers.templates``, with a limit on memory and no environment.

``preview`` is for everybody who is no runner (a template that a person has typed must not run in the web process); the child is
this module run as a program.
"""

from __future__ import annotations

import contextlib
import resource
import subprocess
import sys
from pathlib import Path

import msgspec

from lmweb.decoding import decode_json
from lmweb.errors import LmwebError, TemplateError
from workers.parsing.tools.families import DEFAULT
from workers.prompting import Prompter
from workers.schemas import ChatMessage, GenerationRequest, Tool, ToolCall

MAX_SECONDS = 20.0
MAX_MEMORY_BYTES = 1 << 30
MAX_PROMPT_CHARACTERS = 200_000

_TOOL = Tool(
    name="get_weather",
    description="Get the current weather in a city",
    parameters='{"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}',
)
_CALL = ToolCall(id="call00001", name="get_weather", arguments='{"city": "Rome"}')
_SYSTEM = ChatMessage(role="system", content="You are a helpful assistant.")
_TALK = (
    ChatMessage(role="user", content="Hello!"),
    ChatMessage(role="assistant", content="Hello! How can I help you?"),
    ChatMessage(role="user", content="What is the weather in Rome?"),
)
_TOOL_TALK = (
    ChatMessage(role="assistant", content="", tool_calls=(_CALL,)),
    ChatMessage(role="tool", content='{"temperature": 21}', tool_call_id=_CALL.id),
)


class TemplatePreview(msgspec.Struct, frozen=True, kw_only=True):
    """What a template makes of a sample conversation.

    Attributes:
        prompt: the prompt of a system message, two turns and a question; special tokens stand as ``{bos}`` and ``{eos}``.
        takes_system: whether the system message is part of it (some templates refuse one; then the prompt is without it).
        tools_prompt: the same with a tool, a call of it and its result.
        knows_tools: whether the template has a way of its own for tools; else they are described to the model in LM Studio's format.
        error: why there is no prompt; empty if there is one.
    """

    prompt: str = ""
    takes_system: bool = False
    tools_prompt: str = ""
    knows_tools: bool = False
    error: str = ""


def preview(source: str) -> TemplatePreview:
    """Return what the template makes of a sample conversation. Raises ``TemplateError`` if it cannot make a prompt of it."""
    try:
        child = subprocess.run(
            [sys.executable, "-m", "workers.template_preview"],
            input=source.encode(),
            capture_output=True,
            env={},
            cwd=Path(__file__).resolve().parent.parent,
            timeout=MAX_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise TemplateError("The chat template took too long.", param="chat_template") from None
    if child.returncode:
        raise TemplateError("The chat template needs too much memory or time.", param="chat_template")
    found = decode_json(child.stdout, TemplatePreview)
    if found.error:
        raise TemplateError(found.error, param="chat_template")
    return found


def try_out(source: str) -> TemplatePreview:
    """Render the sample in this process."""
    try:
        prompter = Prompter(source, bos_token="{bos}", eos_token="{eos}")  # noqa: S106  (no password)
        try:
            prompt, has_system = _render(prompter, (_SYSTEM, *_TALK)), True
        except TemplateError:
            prompt, has_system = _render(prompter, _TALK), False
        if _TALK[-1].content not in prompt:
            return TemplatePreview(error="The chat template leaves out what the user says, so the model would never see it.")
        knows_tools = prompter.syntax is not DEFAULT
        with_tools = _render(prompter, (*_TALK, *_TOOL_TALK), (_TOOL,))
    except LmwebError as error:
        return TemplatePreview(error=error.message)
    return TemplatePreview(
        prompt=prompt[:MAX_PROMPT_CHARACTERS],
        takes_system=has_system and _SYSTEM.content in prompt,
        tools_prompt=with_tools[:MAX_PROMPT_CHARACTERS],
        knows_tools=knows_tools,
    )


def _render(prompter: Prompter, messages: tuple[ChatMessage, ...], tools: tuple[Tool, ...] = ()) -> str:
    return prompter.render(GenerationRequest(model="preview", messages=list(messages), tools=tools), messages)


def main() -> None:
    """Read a template from the standard input, write its preview as JSON to the standard output."""
    for kind, limit in ((resource.RLIMIT_AS, MAX_MEMORY_BYTES), (resource.RLIMIT_CPU, int(MAX_SECONDS))):
        with contextlib.suppress(ValueError, OSError):  # a limit that is lower already, or unknown to the system
            resource.setrlimit(kind, (limit, limit))
    source = sys.stdin.buffer.read().decode("utf-8", "replace")
    sys.stdout.buffer.write(msgspec.json.encode(try_out(source)))


if __name__ == "__main__":
    main()
