"""How families of models write calls of tools, told apart by what their chat templates contain.

Each family is data: the text around the name and around the arguments, which are JSON in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Syntax:
    """A way of writing calls. ``head``, ``between`` and ``tail`` are patterns (``patterns.py``).

    Attributes:
        marker: begins a unit, that is a call or a list of calls; empty where calls begin the answer without one.
        head: what comes before the name.
        between: what may come between the name and the arguments; the first is what a forced call is written with.
        tail: what may come after the arguments.
        section: comes before the first marker.
        listed: whether a unit is a JSON list.
        bare: whether a call may begin without the marker.
        ignored: markers that mean nothing once calls are found.
    """

    marker: str
    head: str
    between: tuple[str, ...]
    tail: tuple[str, ...]
    section: str = ""
    listed: bool = False
    bare: bool = False
    ignored: tuple[str, ...] = ()


_OBJECT = {"head": ' { "name" : "', "between": ('" , "arguments" : ',), "tail": (" }",)}

#: LM Studio's format for models that know no tools.
DEFAULT = Syntax(marker="[TOOL_REQUEST]", ignored=("[END_TOOL_REQUEST]",), **_OBJECT)  # type: ignore[arg-type]
HERMES = Syntax(marker="<tool_call>", ignored=("</tool_call>",), **_OBJECT)  # type: ignore[arg-type]
LLAMA_3 = Syntax(
    marker="<|python_tag|>",
    head=' { "name" : "',
    between=('" , "parameters" : ', '" , "arguments" : '),
    tail=(" }",),
    bare=True,
    ignored=("<|eom_id|>",),
)
MISTRAL_LIST = Syntax(
    marker="[TOOL_CALLS]",
    head=' { "name" : "',
    between=('" , "arguments" : ',),
    tail=(" }", ' , "id" : "~" }'),
    listed=True,
)
MISTRAL_ARGS = Syntax(marker="[TOOL_CALLS]", head="", between=("[ARGS]", "[CALL_ID]~[ARGS]"), tail=("",))
DEEPSEEK_R1 = Syntax(
    section="<｜tool▁calls▁begin｜>",
    marker="<｜tool▁call▁begin｜>",
    head="function<｜tool▁sep｜>",
    between=("\n```json\n",),
    tail=("\n```",),
    ignored=("<｜tool▁calls▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"),
)
DEEPSEEK_V3_1 = Syntax(
    section="<｜tool▁calls▁begin｜>",
    marker="<｜tool▁call▁begin｜>",
    head="",
    between=("<｜tool▁sep｜>",),
    tail=("",),
    ignored=("<｜tool▁calls▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"),
)
#: Granite 3.x and Phi-4-mini.
TAGGED_LIST = Syntax(marker="<|tool_call|>", listed=True, ignored=("<|/tool_call|>",), **_OBJECT)  # type: ignore[arg-type]

#: gpt-oss: the rest of a header (``workers.parsing.harmony``).
HARMONY = Syntax(
    section="<|channel|>commentary",
    marker=" to=functions.",
    head="",
    between=(
        " <|constrain|>json<|message|>",
        "<|channel|>commentary <|constrain|>json<|message|>",
        "<|channel|>commentary json<|message|>",
        " <|message|>",
        "<|channel|>commentary<|message|>",
    ),
    tail=("",),
)

FAMILIES: tuple[tuple[Callable[[str], bool], Syntax], ...] = (
    (lambda template: "<|channel|>" in template and "functions." in template, HARMONY),
    (lambda template: "[TOOL_CALLS]" in template and "[ARGS]" in template, MISTRAL_ARGS),
    (lambda template: "[TOOL_CALLS]" in template, MISTRAL_LIST),
    (lambda template: "<｜tool▁call▁begin｜>" in template and "```json" in template, DEEPSEEK_R1),
    (lambda template: "<｜tool▁call▁begin｜>" in template, DEEPSEEK_V3_1),
    (lambda template: "<|tool_call|>" in template, TAGGED_LIST),
    (lambda template: "<tool_call>" in template and not any(tag in template for tag in ("<arg_key>", "<function=")), HERMES),
    (lambda template: "<|start_header_id|>" in template and '"parameters": ' in template, LLAMA_3),
)

#: Texts that parsers must see although they may be control tokens.
VISIBLE = frozenset(
    text
    for syntax in (DEFAULT, *(syntax for _, syntax in FAMILIES))
    for text in (syntax.marker, syntax.section, *syntax.ignored, "[ARGS]", "[CALL_ID]", "<｜tool▁sep｜>")
    if text
)


def written(syntax: Syntax, calls: Sequence[tuple[str, str]]) -> str:
    """Return calls as the model would write them; each is a name and the JSON text of its arguments."""
    head, between, tail = (_spelled(pattern) for pattern in (syntax.head, syntax.between[0], syntax.tail[0]))
    bodies = [f"{head}{name}{between}{arguments}{tail}" for name, arguments in calls]
    if syntax.listed:
        return f"{syntax.marker}[{', '.join(bodies)}]"
    end = syntax.ignored[-1] if syntax.ignored and not syntax.bare else ""
    return "\n".join(f"{syntax.marker}{body}{end}" for body in bodies)


def _spelled(pattern: str) -> str:
    """Return a pattern as text, with the white space that people put into JSON."""
    return pattern.replace(" , ", ", ").replace(" : ", ": ").replace("{ ", "{").replace(" }", "}").removeprefix(" ")


def native_syntax(template: str) -> Syntax | None:
    """Return how the model of this chat template writes calls; None if it has no way that we know."""
    return next((syntax for fits, syntax in FAMILIES if fits(template)), None)
