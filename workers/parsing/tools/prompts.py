"""Tools in the prompt: through the model's chat template if it knows tools, else as LM Studio tells any model about them."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lmweb.errors import InvalidRequest, TemplateError
from workers.parsing.tools.families import DEFAULT, Syntax, native_syntax, written
from workers.schemas import ChatMessage, Tool, ToolCall
from workers.templates import ChatTemplate

#: Mistral's templates refuse ids of another length.
_SHORT_ID = 9

_DEFAULT_PROMPT = """\
You are a tool-calling AI. You can request calls to available tools with this EXACT format:
[TOOL_REQUEST]{"name": "tool_name", "arguments": {"param1": "value1"}}[END_TOOL_REQUEST]

AVAILABLE TOOLS:
%s

RULES:
- Only use tools from AVAILABLE TOOLS
- Include all required arguments
- Use one [TOOL_REQUEST] block per tool
- Never use [TOOL_RESULT]
- If you decide to call one or more tools, there should be no other text in your message

Examples:
"Check Paris weather"
[TOOL_REQUEST]{"name": "get_weather", "arguments": {"location": "Paris"}}[END_TOOL_REQUEST]

"Send email to John about meeting and open browser"
[TOOL_REQUEST]{"name": "send_email", "arguments": {"to": "John", "subject": "meeting"}}[END_TOOL_REQUEST]
[TOOL_REQUEST]{"name": "open_browser", "arguments": {}}[END_TOOL_REQUEST]

Respond conversationally if no matching tools exist."""

_PROBE_TOOL = Tool(
    name="probe_tool", description="d", parameters='{"type": "object", "properties": {"probe_key": {"type": "string", "description": "d"}}}'
)
_PROBE_CALL = ToolCall(id="probe0001", name="probe_tool", arguments='{"probe_key": "probe_value"}')
_PROBE_TALK = (
    ChatMessage(role="user", content="u"),
    ChatMessage(role="assistant", content="", tool_calls=(_PROBE_CALL,)),
    ChatMessage(role="tool", content="probe_result", tool_call_id="probe0001"),
)


@dataclass(frozen=True, slots=True)
class _Style:
    """How a template wants to be told of tools and calls.

    Calls have their arguments as data, as JSON text, or stand in the content whole. Tools come as the list ``tools``, or as JSON
    text: in the variable ``functions``, or in the system message.
    """

    calls: Literal["data", "text", "content"]
    empty_content: str | None = None
    tools: Literal["tools", "functions", "system"] = "tools"


_CALLS: tuple[tuple[Literal["data", "text", "content"], str | None], ...] = (
    ("data", None), ("data", ""), ("text", None), ("text", ""), ("content", None),
)  # fmt: skip
_STYLES = [_Style(calls, empty, tools) for tools in ("tools", "functions", "system") for calls, empty in _CALLS]


class ToolPrompt:
    """Renders conversations with tools for one model. ``syntax`` is how that model writes calls."""

    def __init__(self, template: ChatTemplate, source: str) -> None:
        """Find out what the template can do, by rendering a small conversation in a few ways."""
        self._template, self._source = template, source
        self._short_ids = "|length != 9" in source.replace(" ", "").replace("|length!=9", "|length != 9")
        native = native_syntax(source)
        self._style = self._find_style(native) if native else None
        self.syntax = native if native and self._style else DEFAULT
        self._takes_system = self._renders([{"role": "system", "content": "probe_system"}, {"role": "user", "content": "u"}])

    @property
    def is_needed(self) -> bool:
        """Whether the template wants its list of tools even if it is empty."""
        return self._style is not None and self._style.tools == "functions"

    def render(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Tool],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the prompt. Raises ``TemplateError`` if the template refuses it."""
        if self._style is None:
            data = self._default_messages(messages, tools)
            extra: dict[str, Any] = {}
        else:
            data, extra = self._native(messages, tools, self.syntax, self._style)
        return self._template.render_data(data, add_generation_prompt=add_generation_prompt, variables={**(variables or {}), **extra})

    def _find_style(self, syntax: Syntax) -> _Style | None:
        """Return the first way of passing calls that comes out in the prompt; None if the template does not tell of tools."""
        for style in _STYLES:
            if style.calls == "content" and not syntax.can_be_written:
                continue
            try:
                data, extra = self._native(_PROBE_TALK[:1], (_PROBE_TOOL,), syntax, style)
                before = self._template.render_data(data, add_generation_prompt=False, variables=extra)
                data, extra = self._native(_PROBE_TALK, (_PROBE_TOOL,), syntax, style)
                after = self._template.render_data(data, variables=extra)
            except TemplateError:
                continue
            if (
                "probe_tool" in before
                and after.count("probe_value") == before.count("probe_value") + 1
                and "{'probe_key': 'probe_value" not in after
            ):
                return style
        return None

    def _native(
        self, messages: Sequence[ChatMessage], tools: Sequence[Tool], syntax: Syntax, style: _Style
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Return messages and variables as the template wants them."""
        data = self._native_messages(messages, syntax, style)
        listing = [_as_openai(tool) for tool in tools]
        text = json.dumps([tool["function"] for tool in listing], ensure_ascii=False)
        if style.tools == "functions":
            return data, {"functions": text, "datetime": time.strftime("%Y-%m-%d")}
        if not tools:
            return data, {}
        if style.tools == "system":
            if not data or data[0]["role"] != "system":
                data.insert(0, {"role": "system", "content": ""})
            data[0]["tools"] = text
            return data, {}
        return data, {"tools": listing}

    def _renders(self, messages: list[dict[str, Any]]) -> bool:
        try:
            return messages[0]["content"] in self._template.render_data(messages, add_generation_prompt=True)
        except TemplateError:
            return False

    def _native_messages(self, messages: Sequence[ChatMessage], syntax: Syntax, style: _Style) -> list[dict[str, Any]]:
        names = {call.id: call.name for message in messages for call in message.tool_calls}
        ids = {given: self._id(given, f"functions.{name}:{i}" if syntax.numbered else "") for i, (given, name) in enumerate(names.items())}
        data = []
        for message in messages:
            entry: dict[str, Any] = {"role": message.role, "content": message.content}
            if message.tool_calls and style.calls == "content":
                entry["content"] = _with_calls(message, syntax)
            elif message.tool_calls:
                entry["content"] = message.content or style.empty_content
                entry["tool_calls"] = [_native_call(call, ids[call.id], style) for call in message.tool_calls]
            elif message.role == "tool":
                given = message.tool_call_id
                entry |= {"tool_call_id": ids.get(given) or self._id(given), "name": names.get(given, "")}
            data.append(entry)
        return data

    def _id(self, given: str, numbered: str = "") -> str:
        """Return a call's id as the template takes it."""
        if numbered:
            return numbered
        fits = len(given) == _SHORT_ID and given.isalnum()
        return given if fits or not self._short_ids else hashlib.blake2b(given.encode()).hexdigest()[:_SHORT_ID]

    def _default_messages(self, messages: Sequence[ChatMessage], tools: Sequence[Tool]) -> list[dict[str, Any]]:
        data: list[dict[str, Any]] = []
        for i, message in enumerate(messages):
            if message.role == "tool":
                result = f"[TOOL_RESULT]{message.content}[END_TOOL_RESULT]"
                if i and messages[i - 1].role == "tool":
                    data[-1]["content"] += f"\n{result}"
                else:
                    data.append({"role": "user", "content": result})
            else:
                data.append({"role": message.role, "content": _with_calls(message, DEFAULT)})
        return self._with_system(data, tools) if tools else data

    def _with_system(self, data: list[dict[str, Any]], tools: Sequence[Tool]) -> list[dict[str, Any]]:
        """Tell of the tools in the system prompt, or in the first message where the template has none."""
        listing = json.dumps({"type": "toolArray", "tools": [_as_openai(tool) for tool in tools]}, indent=2, ensure_ascii=False)
        text = _DEFAULT_PROMPT % listing
        if data and data[0]["role"] in {"system", "developer"}:
            text, data = f"{data[0]['content']}\n\n{text}", data[1:]
        if self._takes_system:
            return [{"role": "system", "content": text}, *data]
        if data and data[0]["role"] == "user":
            return [{"role": "user", "content": f"{text}\n\n{data[0]['content']}"}, *data[1:]]
        return [{"role": "user", "content": text}, *data]


def _with_calls(message: ChatMessage, syntax: Syntax) -> str:
    """Return a message's text with its calls as the model would have written them."""
    if not message.tool_calls:
        return message.content
    calls = written(syntax, [(call.name, json.dumps(_arguments(call), ensure_ascii=False)) for call in message.tool_calls])
    return f"{message.content}\n{calls}" if message.content else calls


def _native_call(call: ToolCall, given_id: str, style: _Style) -> dict[str, Any]:
    arguments = call.arguments if style.calls == "text" else _arguments(call)
    return {"id": given_id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _arguments(call: ToolCall) -> dict[str, Any]:
    """Return a call's arguments as data; whatever a client sent that is no JSON object goes into one."""
    try:
        arguments = json.loads(call.arguments)
    except (ValueError, RecursionError):
        arguments = call.arguments
    return arguments if isinstance(arguments, dict) else {"arguments": arguments}


def _as_openai(tool: Tool) -> dict[str, Any]:
    """Return a tool as OpenAI's API writes it, which chat templates expect. Raises ``InvalidRequest`` for a schema that is no JSON."""
    try:
        parameters = json.loads(tool.parameters)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"The parameters of the tool '{tool.name}' are not valid JSON.", param="tools") from error
    function = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return {"type": "function", "function": function}
