"""What a request with tools asks for, in terms of readers and grammars."""

from __future__ import annotations

import json
from collections.abc import Callable

from lmweb.errors import InvalidRequest
from workers.parsing.tools.families import Syntax
from workers.parsing.tools.grammar import forced_grammar, unit_grammar
from workers.schemas import GenerationRequest, NamedTool, OutputFormat, Tool


def usable_tools(request: GenerationRequest) -> tuple[Tool, ...]:
    """Return the tools that the model is told of."""
    return () if request.tool_choice == "none" else request.tools


def callable_tools(request: GenerationRequest) -> tuple[Tool, ...]:
    """Return the tools that the model may call. Raises ``InvalidRequest`` if the named one is not there, or a name not unique."""
    names = [tool.name for tool in request.tools]
    if len(set(names)) < len(names):
        raise InvalidRequest("The names of the tools must be different.", param="tools")
    if not isinstance(request.tool_choice, NamedTool):
        if request.tool_choice == "required" and not request.tools:
            raise InvalidRequest("'tool_choice' is required, but there are no tools.", param="tool_choice")
        return usable_tools(request)
    if request.tool_choice.name not in names:
        raise InvalidRequest(f"'tool_choice' names the tool '{request.tool_choice.name}', which is not there.", param="tool_choice")
    return tuple(tool for tool in request.tools if tool.name == request.tool_choice.name)


def call_limit(request: GenerationRequest) -> int | None:
    """Return after how many calls the answer ends; None for no limit."""
    return 1 if isinstance(request.tool_choice, NamedTool) or not request.parallel_tool_calls else None


def grammars(request: GenerationRequest, syntax: Syntax, literal: Callable[[str], str]) -> tuple[str, str]:
    """Return the grammars of a unit and of the forced beginning of the answer (empty if it is free).

    Raises ``InvalidRequest`` for schemas that cannot be used, and for a format beside the tools that is not JSON.
    """
    tools = callable_tools(request)
    must_call = request.tool_choice == "required" or isinstance(request.tool_choice, NamedTool)
    instead = None if must_call else _json_format(request.output_format)
    unit = unit_grammar(syntax, tools, literal)
    return unit, forced_grammar(syntax, tools, literal, instead=instead) if must_call or instead else ""


def _json_format(wanted: OutputFormat | None) -> OutputFormat | None:
    if wanted is None or wanted.kind == "json_object":
        return wanted
    if wanted.kind != "json_schema":
        raise InvalidRequest("With tools, the response format must be JSON.", param="response_format")
    try:
        return OutputFormat(kind="json_schema", value=json.dumps(json.loads(wanted.value)))  # nothing but JSON may get into the grammar
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("The response format cannot be used: the schema is not valid JSON.", param="response_format") from error
