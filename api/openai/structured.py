"""Tools and the form of the answer, in requests: from OpenAI's words to ours."""

from __future__ import annotations

from typing import Any

import msgspec

from api.openai.checks import without_nul
from api.openai.schemas import ChatCompletionRequest, Message, ResponseFormat, ToolChoice
from lmweb.errors import InvalidRequest

#: A grammar may also come under the names that vLLM and llama-server have for it.
_FOREIGN_FORMATS = {"guided_regex": "regex", "guided_grammar": "grammar", "grammar": "grammar"}
_CHOICES = ("auto", "none", "required")


def tools(request: ChatCompletionRequest) -> list[dict[str, Any]]:
    """Return the tools as ``workers.schemas.Tool`` has them. Raises ``InvalidRequest`` for those that are no functions."""
    found = []
    for index, tool in enumerate(request.tools or []):
        where = f"tools[{index}]"
        if tool.type != "function" or tool.function is None:
            raise InvalidRequest(f"'{where}' is not a function; this server knows no other tools.", param=where)
        function = tool.function
        schema = function.parameters if function.parameters is not None else {"type": "object", "properties": {}}
        found.append(
            {
                "name": without_nul(function.name, f"{where}.function.name"),
                "description": without_nul(function.description or "", f"{where}.function.description"),
                "parameters": msgspec.json.encode(schema).decode(),
                "strict": bool(function.strict),
            }
        )
    return found


def tool_choice(request: ChatCompletionRequest) -> str | dict[str, str]:
    """Return the choice as ``GenerationRequest`` has it. Raises ``InvalidRequest`` for a tool that is not there."""
    choice = request.tool_choice
    names = [tool.function.name for tool in request.tools or [] if tool.function]
    if choice is None or isinstance(choice, str):
        if choice is not None and choice not in _CHOICES:
            raise InvalidRequest(f"'tool_choice' must be one of {', '.join(_CHOICES)}, or name a function.", param="tool_choice")
        if choice == "required" and not names:
            raise InvalidRequest("'tool_choice' is 'required', but there are no tools.", param="tool_choice")
        return choice or "auto"
    return {"name": _named(choice, names)}


def _named(choice: ToolChoice, names: list[str]) -> str:
    if choice.type != "function" or choice.function is None:
        raise InvalidRequest("'tool_choice' must name a function.", param="tool_choice")
    if choice.function.name not in names:
        raise InvalidRequest(f"'tool_choice' names '{choice.function.name[:100]}', which is not among the tools.", param="tool_choice")
    return choice.function.name


def tool_calls(message: Message, where: str) -> list[dict[str, str]]:
    """Return the calls of an assistant's message as ``workers.schemas.ToolCall`` has them. Raises ``InvalidRequest``."""
    if message.tool_calls and message.role != "assistant":
        raise InvalidRequest(f"'{where}.tool_calls' belongs to messages of the assistant.", param=f"{where}.tool_calls")
    found = []
    for index, call in enumerate(message.tool_calls or []):
        here = f"{where}.tool_calls[{index}]"
        if call.type != "function" or call.function is None:
            raise InvalidRequest(f"'{here}' is not a call of a function.", param=here)
        texts = {"id": call.id, "name": call.function.name, "arguments": call.function.arguments}
        found.append({name: without_nul(text, f"{here}.{name}") for name, text in texts.items()})
    return found


def tool_call_id(message: Message, where: str) -> str:
    """Return which call a message answers; empty if none. Raises ``InvalidRequest`` if a tool's message does not say."""
    if message.role != "tool":
        return ""
    if not message.tool_call_id:
        raise InvalidRequest(f"'{where}.tool_call_id' is missing.", param=f"{where}.tool_call_id")
    return without_nul(message.tool_call_id, f"{where}.tool_call_id")


def output_format(request: ChatCompletionRequest) -> dict[str, str] | None:
    """Return what the answer must look like, or None. Raises ``InvalidRequest`` for formats that we do not know, or two of them."""
    given = {name: value for name in _FOREIGN_FORMATS if (value := getattr(request, name))}
    wanted = _response_format(request.response_format) if request.response_format else None
    if len(given) + (wanted is not None) > 1:
        raise InvalidRequest("There can be one format of the answer only.", param=next(iter(given)))
    for name, value in given.items():
        return {"kind": _FOREIGN_FORMATS[name], "value": without_nul(value, name)}
    return wanted


def _response_format(given: ResponseFormat) -> dict[str, str] | None:
    if given.type == "text":
        return None
    if given.type == "json_object":
        return {"kind": "json_object"}
    if given.type != "json_schema":
        raise InvalidRequest("'response_format.type' must be one of text, json_object, json_schema.", param="response_format")
    schema = given.json_schema.schema if given.json_schema else None
    if schema is None:
        raise InvalidRequest("'response_format.json_schema.schema' is missing.", param="response_format")
    return {"kind": "json_schema", "value": msgspec.json.encode(schema).decode()}


def top_logprobs(request: ChatCompletionRequest) -> int | None:
    """Return how many alternatives to report for each token, None for no report. Raises ``InvalidRequest``."""
    if request.logprobs:
        return request.top_logprobs or 0
    if request.top_logprobs:
        raise InvalidRequest("'top_logprobs' needs 'logprobs' to be true.", param="top_logprobs")
    return None
