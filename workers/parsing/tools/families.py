"""How families of models write calls of tools, told apart by what their chat templates contain. Each family is data.

Arguments are JSON in most of them; others write parameter by parameter between tags (``Parameters``) or in a notation of their own
(``Notation``). All are passed on as JSON (``arguments.py``), and a call that was begun is held to its tool's schema (``grammar.py``).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Form:
    """A way of writing a parameter's value: ``middle`` (a pattern) after its name, ``close`` (literal) after the value.

    ``kind`` is ``text`` for values as they are, ``json`` for JSON, and ``schema`` where text stands for itself if the schema allows
    a string, and is JSON otherwise.
    """

    middle: str
    close: str
    kind: Literal["text", "json", "schema"] = "schema"


@dataclass(frozen=True, slots=True)
class Parameters:
    """Arguments that are written one by one: ``opening`` (a pattern), the name, and a ``Form``; longer middles come first."""

    opening: str
    forms: tuple[Form, ...]


@dataclass(frozen=True, slots=True)
class Notation:
    """Arguments in a notation that resembles JSON.

    Attributes:
        end: closes the arguments, which the pattern before them opens.
        equals: stands between a name and its value at the top level.
        quotes: what may enclose strings.
        escapes: whether backslashes escape inside of strings.
        bare_names: whether the names inside of values are not quoted.
        words: JSON's true, false and null.
    """

    end: str
    equals: str
    quotes: tuple[str, ...]
    escapes: bool
    bare_names: bool
    words: tuple[str, str, str]


#: Lists of calls: what opens one, what comes between two calls, what closes it (patterns).
JSON_LIST = (" [", " ,", " ]")


@dataclass(frozen=True, slots=True)
class Syntax:
    """A way of writing calls. ``head``, ``between``, ``tail`` and those in ``listed`` are patterns (``patterns.py``).

    Attributes:
        marker: begins a unit, that is a call or a list of calls; empty where calls begin the answer without one.
        head: what comes before the name.
        between: what may come between the name and the arguments; the first is what a forced call is written with.
        tail: what may come after the arguments.
        arguments: how arguments are written; None for JSON.
        section: comes before the first marker.
        listed: what is around the calls of a unit that is a list of them.
        bare: whether a call may begin without the marker.
        ignored: markers that mean nothing once calls are found.
        aliases: other markers that begin a unit.
        numbered: whether ids must be ``functions.NAME:NUMBER``.
    """

    marker: str
    head: str
    between: tuple[str, ...]
    tail: tuple[str, ...]
    arguments: Parameters | Notation | None = None
    section: str = ""
    listed: tuple[str, str, str] | None = None
    bare: bool = False
    ignored: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    numbered: bool = False

    @property
    def can_be_written(self) -> bool:
        """Whether ``written`` knows this way."""
        return self.arguments is None or (isinstance(self.arguments, Notation) and self.arguments.escapes)

    @property
    def markers(self) -> tuple[str, ...]:
        """All texts that begin a unit."""
        return (self.marker, *self.aliases)


_OBJECT = {"head": ' { "name" : "', "between": ('" , "arguments" : ',), "tail": (" }",)}
_WITH_ID = {**_OBJECT, "tail": (" }", ' , "id" : "~" }')}

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
MISTRAL_LIST = Syntax(marker="[TOOL_CALLS]", listed=JSON_LIST, **_WITH_ID)  # type: ignore[arg-type]
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
#: Granite 3.x.
TAGGED_LIST = Syntax(marker="<|tool_call|>", listed=JSON_LIST, ignored=("<|/tool_call|>",), **_OBJECT)  # type: ignore[arg-type]
#: Phi-4-mini and FireFunction.
FUNCTOOLS = Syntax(
    marker="functools[",
    listed=(" ", " ,", " ]"),
    aliases=("<|tool_call|>functools[", "<|tool_call|>["),
    ignored=("<|/tool_call|>",),
    **_OBJECT,  # type: ignore[arg-type]
)
APRIEL = Syntax(marker="<tool_calls>", listed=JSON_LIST, ignored=("</tool_calls>",), **_WITH_ID)  # type: ignore[arg-type]
NEMOTRON = Syntax(marker="<TOOLCALL>", listed=JSON_LIST, ignored=("</TOOLCALL>",), **_OBJECT)  # type: ignore[arg-type]
MINIMAX_M1 = Syntax(marker="<tool_calls>", listed=(" ", " ", " </tool_calls>"), **_OBJECT)  # type: ignore[arg-type]
GIGACHAT_3 = Syntax(section="<|message_sep|>\n\n", marker="function call<|role_sep|>", ignored=("<|message_sep|>",), **_OBJECT)  # type: ignore[arg-type]
GIGACHAT_3_1 = Syntax(marker="<|function_call|>", ignored=("<|message_sep|>",), **_OBJECT)  # type: ignore[arg-type]
KIMI_K2 = Syntax(
    section="<|tool_calls_section_begin|>",
    marker="<|tool_call_begin|>",
    head=" functions.",
    between=(":~ <|tool_call_argument_begin|>",),
    tail=("",),
    ignored=("<|tool_calls_section_begin|>", "<|tool_call_end|>", "<|tool_calls_section_end|>"),
    numbered=True,
)
COHERE = Syntax(
    marker="<|START_ACTION|>",
    head=' { "tool_call_id" : "~" , "tool_name" : "',
    between=('" , "parameters" : ',),
    tail=(" }",),
    listed=JSON_LIST,
    ignored=("<|END_ACTION|>",),
)
COMMAND_R = Syntax(
    marker="Action:\n```json\n[",
    head=' { "tool_name" : "',
    between=('" , "parameters" : ',),
    tail=(" }",),
    listed=(" ", " ,", " ] ```"),
)
APERTUS = Syntax(marker="<|tools_prefix|>", head=' { "', between=('" : ',), tail=(" }",), listed=JSON_LIST, ignored=("<|tools_suffix|>",))
SOLAR = Syntax(
    section="<|tool_calls|>",
    marker="<|tool_call:begin|>",
    head="~<|tool_call:name|>",
    between=("<|tool_call:args|>",),
    tail=("",),
    ignored=("<|tool_calls|>", "<|tool_call:end|>", "<|calls|>"),
)
#: Functionary 3.1.
FUNCTION_TAG = Syntax(marker="<function=", head="", between=(">",), tail=(" </function>",))

_XML = Parameters(" <parameter=", (Form(">\n", "\n</parameter>"),))
#: Qwen3-Coder and 3.5, Nemotron 3, Step.
QWEN_XML = Syntax(
    marker="<tool_call>", head=" <function=", between=(">",), tail=(" </function>",), arguments=_XML, ignored=("</tool_call>",)
)
SEED = Syntax(
    marker="<seed:tool_call>",
    head=" <function=",
    between=(">",),
    tail=(" </function>",),
    arguments=Parameters(" <parameter=", (Form(">", "</parameter>"),)),
    ignored=("</seed:tool_call>",),
)
#: GLM 4.5 and later, Ling, Laguna, Spark.
GLM = Syntax(
    marker="<tool_call>",
    head=" ",
    between=(" ",),
    tail=(" </tool_call>",),
    arguments=Parameters(" <arg_key>", (Form("</arg_key> <arg_value>", "</arg_value>"),)),
)
HUNYUAN = Syntax(
    section="<tool_calls:opensource>",
    marker="<tool_call:opensource>",
    head=" ",
    between=(" <tool_sep:opensource>",),
    tail=(" </tool_call:opensource>",),
    arguments=Parameters(" <arg_key:opensource>", (Form("</arg_key:opensource> <arg_value:opensource>", "</arg_value:opensource>"),)),
    ignored=("<tool_calls:opensource>", "</tool_calls:opensource>"),
)
_INVOKE = {"head": ' <invoke name="', "between": ('">',), "tail": (" </invoke>",)}
MINIMAX_M2 = Syntax(
    marker="<minimax:tool_call>",
    arguments=Parameters(' <parameter name="', (Form('">', "</parameter>"),)),
    listed=(" ", " ", " </minimax:tool_call>"),
    **_INVOKE,  # type: ignore[arg-type]
)
_DSML = {
    "head": ' <｜DSML｜invoke name="',
    "between": ('">',),
    "tail": (" </｜DSML｜invoke>",),
    "arguments": Parameters(
        ' <｜DSML｜parameter name="',
        (Form('" string="true">', "</｜DSML｜parameter>", "text"), Form('" string="false">', "</｜DSML｜parameter>", "json")),
    ),
}
DEEPSEEK_V3_2 = Syntax(
    marker="<｜DSML｜function_calls>",
    listed=(" ", " ", " </｜DSML｜function_calls>"),
    **_DSML,  # type: ignore[arg-type]
)
DEEPSEEK_V4 = Syntax(
    marker="<｜DSML｜tool_calls>",
    listed=(" ", " ", " </｜DSML｜tool_calls>"),
    **_DSML,  # type: ignore[arg-type]
)
MINICPM = Syntax(
    marker='<function name="',
    head="",
    between=('">',),
    tail=(" </function>",),
    arguments=Parameters(' <param name="', (Form('"><![CDATA[', "]]></param>", "text"), Form('">', "</param>"))),
)

GEMMA_4 = Syntax(
    marker="<|tool_call>",
    head="call:",
    between=("{",),
    tail=("",),
    arguments=Notation(end="}", equals=":", quotes=('<|"|>',), escapes=False, bare_names=True, words=("true", "false", "null")),
    ignored=("<tool_call|>",),
)
#: LFM 2: calls as Python writes them.
PYTHON_CALLS = Syntax(
    marker="<|tool_call_start|>",
    head=" ",
    between=("(",),
    tail=("",),
    listed=JSON_LIST,
    arguments=Notation(end=")", equals="=", quotes=("'", '"'), escapes=True, bare_names=False, words=("True", "False", "None")),
    ignored=("<|tool_call_end|>",),
)

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

#: What the templates of a family contain; the first that fits counts.
FAMILIES: tuple[tuple[tuple[str, ...], Syntax | None], ...] = (
    (("]<]minimax[>[",), None),  # MiniMax-M3 nests tags without end: LM Studio's format serves it
    (("<|channel|>", "functions."), HARMONY),
    (("[TOOL_CALLS]", "[ARGS]"), MISTRAL_ARGS),
    (("[TOOL_CALLS]",), MISTRAL_LIST),
    (("<｜tool▁call▁begin｜>", "```json"), DEEPSEEK_R1),
    (("<｜tool▁call▁begin｜>",), DEEPSEEK_V3_1),
    (("｜DSML｜", "function_calls>"), DEEPSEEK_V3_2),
    (("｜DSML｜", "tool_calls>"), DEEPSEEK_V4),
    (("｜DSML｜", "'tool_calls'"), DEEPSEEK_V4),
    (("<|tool_call_argument_begin|>",), KIMI_K2),
    (("functools[",), FUNCTOOLS),
    (("<|tool|>", "<|/tool|>"), FUNCTOOLS),
    (("<|tool_call>call:",), GEMMA_4),
    (("<|tool_call_start|>",), PYTHON_CALLS),
    (("<|tool_list_start|>",), PYTHON_CALLS),
    (("List of tools: [", "<|im_start|>"), PYTHON_CALLS),
    (("<|tool_call:begin|>",), SOLAR),
    (("<|tools_prefix|>",), APERTUS),
    (("<|START_ACTION|>",), COHERE),
    (("Action:", '"tool_name"'), COMMAND_R),
    (("<TOOLCALL>",), NEMOTRON),
    (("<seed:tool_call>",), SEED),
    (("<minimax:tool_call>",), MINIMAX_M2),
    (("<tool_calls>[",), APRIEL),
    (("<tool_calls>",), MINIMAX_M1),
    (('<function name="',), MINICPM),
    (("<tool_sep",), HUNYUAN),
    (("<|function_call|>",), GIGACHAT_3_1),
    (("function call", "<|role_sep|>"), GIGACHAT_3),
    (("<|tool_call|>",), TAGGED_LIST),
    (("<arg_key>",), GLM),
    (("<tool_call>", "<function="), QWEN_XML),
    (("<function=",), FUNCTION_TAG),
    (("<tool_call>",), HERMES),
    (("<|start_header_id|>", '"parameters": '), LLAMA_3),
)

_SYNTAXES = (DEFAULT, *(syntax for _, syntax in FAMILIES if syntax))
_PIECES = (
    "[ARGS]", "[CALL_ID]", "<｜tool▁sep｜>", "<|tool_call_argument_begin|>", "<|tool_call:name|>", "<|tool_call:args|>", "<|role_sep|>",
    '<|"|>', "｜DSML｜", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "</tool_call>", "</tool_calls>", "<function=",
    "</function>", "<parameter=", "</parameter>", "<tool_sep:opensource>", "</tool_call:opensource>", "<arg_key:opensource>",
    "</arg_key:opensource>", "<arg_value:opensource>", "</arg_value:opensource>", "</minimax:tool_call>", "<param", "</param>", "<function",
)  # fmt: skip

#: Texts that parsers must see although they may be control tokens.
VISIBLE = frozenset(text for syntax in _SYNTAXES for text in (*syntax.markers, syntax.section, *syntax.ignored, *_PIECES) if text)


def written(syntax: Syntax, calls: Sequence[tuple[str, str]]) -> str:
    """Return calls as the model would write them; each is a name and the JSON text of its arguments.

    Only for families whose ``can_be_written`` is true: the templates of the others write calls themselves.
    """
    head, between, tail = (_spelled(pattern) for pattern in (syntax.head, syntax.between[0], syntax.tail[0]))
    spell = _as_python if syntax.arguments else str
    bodies = [f"{head}{name}{between}{spell(arguments)}{tail}" for name, arguments in calls]
    end = syntax.ignored[-1] if syntax.ignored and not syntax.bare else ""
    if syntax.listed:
        opening, separator, closing = (_spelled(pattern) for pattern in syntax.listed)
        return f"{syntax.marker}{opening}{f'{separator} '.join(bodies)}{closing}{end}"
    return "\n".join(f"{syntax.marker}{body}{end}" for body in bodies)


def _as_python(arguments: str) -> str:
    """Return a JSON object as the arguments of a call in Python."""
    return ", ".join(f"{name}={value!r}" for name, value in json.loads(arguments).items()) + ")"


def _spelled(pattern: str) -> str:
    """Return a pattern as text, with the white space that people put into JSON."""
    return pattern.replace(" , ", ", ").replace(" : ", ": ").replace("{ ", "{").replace(" }", "}").replace("~", "0").removeprefix(" ")


def native_syntax(template: str) -> Syntax | None:
    """Return how the model of this chat template writes calls; None if it has no way that we know."""
    return next((syntax for parts, syntax in FAMILIES if all(part in template for part in parts)), None)
