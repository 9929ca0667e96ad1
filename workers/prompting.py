"""All that depends on one chat template: the prompts it makes, and how the answers of its model are to be read.

A model may have several in its time: the one of its file, and those that an admin puts in its place. The runner keeps one
``Prompter`` for each that is in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from lmweb.errors import InvalidRequest
from workers.parsing.harmony import speaks_harmony
from workers.parsing.reasoning import tags_of
from workers.parsing.tools.families import Syntax
from workers.parsing.tools.prompts import ToolPrompt
from workers.parsing.tools.requests import usable_tools
from workers.schemas import ChatMessage, GenerationRequest, Tool
from workers.templates import ChatTemplate

#: The variables by which templates switch thinking on and off, and those by which they set how much.
_SWITCHES = ("enable_thinking", "thinking")
_LEVELS = ("reasoning_effort", "thinking_effort")


class Prompter:
    """Makes prompts with one template. ``bos_token`` and ``eos_token`` are the texts of the model's special tokens.

    ``tags`` enclose the thoughts of the template's model; None stands for the channels of gpt-oss.
    """

    def __init__(self, source: str, *, bos_token: str, eos_token: str) -> None:
        """Compile the template. Raises ``TemplateError`` if it is no valid one."""
        self._source = source
        self._template = ChatTemplate(source, bos_token=bos_token, eos_token=eos_token)

        self.tags = None if speaks_harmony(source) else tags_of(source)

    def starts_reasoning(self, prompt: str) -> bool:
        """Return whether a prompt ends with the tag that opens the model's thoughts."""
        return self.tags is not None and prompt.rstrip().endswith(self.tags.open.rstrip())

    @property
    def syntax(self) -> Syntax:
        """How the model writes calls of tools."""
        return self._tool_prompt.syntax

    @cached_property
    def _tool_prompt(self) -> ToolPrompt:
        return ToolPrompt(self._template, self._source)

    def render(self, request: GenerationRequest, messages: Sequence[ChatMessage]) -> str:
        """Return the prompt of these messages, with the tools and variables of the request.

        Raises ``TemplateError`` if the template refuses them, ``InvalidRequest`` for a setting of reasoning that it does not know.
        """
        tools = usable_tools(request)
        variables = {**self._reasoning(request), **request.template_kwargs}
        with_tools = tools or any(message.tool_calls or message.role == "tool" for message in messages)
        if with_tools or ("functions" in self._source and self._tool_prompt.is_needed):
            return self._tool_prompt.render(messages, tools, variables=variables)
        return self._template.render(messages, variables=variables)

    def render_opening(self, messages: Sequence[ChatMessage], tools: tuple[Tool, ...]) -> str:
        """Return how a prompt with these first messages and these tools begins. Raises ``TemplateError`` as ``render`` does."""
        if tools:
            return self._tool_prompt.render(messages, tools, add_generation_prompt=False)
        return self._template.render(messages, add_generation_prompt=False)

    def _reasoning(self, request: GenerationRequest) -> dict[str, Any]:
        """Return the template's variables for the wanted reasoning: a level where it knows levels, else whether to think."""
        wanted = request.reasoning
        if wanted is None:
            return {}
        known = self._template.variables
        variables: dict[str, Any] = {name: wanted != "off" for name in _SWITCHES if name in known}
        levels = [name for name in _LEVELS if name in known]
        if wanted not in {"off", "on"}:
            variables |= dict.fromkeys(levels, wanted)
        if not variables and not (levels and wanted == "on"):
            raise InvalidRequest(f"The reasoning of this model cannot be set to '{wanted}'.")
        return variables
