"""The one native generation request and the load configuration. Every API dialect and the chat page translate into these."""

from __future__ import annotations

from enum import IntEnum
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from lmweb.decoding import decode_json

Role = Literal["system", "developer", "user", "assistant", "tool"]
Reasoning = Literal["off", "low", "medium", "high", "on"]
OverflowPolicy = Literal["stopAtLimit", "truncateMiddle", "rollingWindow"]
KvCacheType = Literal["f32", "f16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]
Fraction = Annotated[float, Meta(ge=0.0, le=1.0)]
#: Whole numbers have bounds everywhere: JSON knows none, and what goes to a runner (MessagePack, C) has 64 bits at most.
Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
TokenId = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]

#: What a chat template is given by us; no request and no model's settings may replace it.
RESERVED_TEMPLATE_NAMES = frozenset({"messages", "tools", "add_generation_prompt", "bos_token", "eos_token"})

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_LOGIT_BIAS = 1024


MAX_FORMAT_CHARACTERS = 256 * 1024
MAX_TOP_LOGPROBS = 20
MAX_TOOLS = 512
MAX_TOOL_CALLS = 128
MAX_EMBEDDING_INPUTS = 2048


class Lane(IntEnum):
    """Whose work comes first when a model is busy."""

    INTERACTIVE = 0
    API = 1
    BATCH = 2


#: How long a model may stay in memory without use; ten years are for ever.
TtlSeconds = Annotated[int, Meta(ge=1, le=315_360_000)]

#: Names of tools need no quoting in any family's way of writing calls.
ToolName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.:/-]{0,127}$")]


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A call that a model made. ``arguments`` is a JSON object as text, cut short if the answer was."""

    id: Annotated[str, Meta(max_length=256)]
    name: Annotated[str, Meta(max_length=256)]
    arguments: str = "{}"


class ChatMessage(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One turn of the conversation, in plain text; an assistant's may have made ``tool_calls``.

    A turn of the role ``tool`` is the result of the call ``tool_call_id``.
    """

    role: Role
    content: str
    tool_calls: Annotated[tuple[ToolCall, ...], Meta(max_length=MAX_TOOL_CALLS)] = ()
    tool_call_id: Annotated[str, Meta(max_length=256)] = ""


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """How the next token is chosen. Names as in OpenAI's API and LM Studio; defaults are LM Studio's.

    ``temperature`` 0 is greedy. ``top_k`` 0 turns top-k off, ``top_p`` 1 and ``min_p`` 0 likewise; ``repeat_penalty`` 1 and
    ``presence_penalty``/``frequency_penalty`` 0 turn the penalties off. ``seed`` None draws one. ``logit_bias`` maps token ids to
    an additive bias. ``max_tokens`` None means up to the end of the context. ``ignore_eos`` keeps generating past
    end-of-sequence (for measuring). The rest are llama.cpp's further samplers, off by default: locally typical sampling, XTC
    ("exclude top choices"), DRY (against repeated passages) and Mirostat, which takes the place of top-k, top-p and their like.
    """

    temperature: Annotated[float, Meta(ge=0.0, le=5.0)] = 0.8
    top_k: Annotated[int, Meta(ge=0, le=1_000_000)] = 40
    top_p: Fraction = 0.95
    min_p: Fraction = 0.05
    repeat_penalty: Annotated[float, Meta(gt=0.0, le=10.0)] = 1.1
    presence_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] = 0.0
    seed: Int64 | None = None
    logit_bias: Annotated[dict[TokenId, Annotated[float, Meta(ge=-100.0, le=100.0)]], Meta(max_length=MAX_LOGIT_BIAS)] = {}
    max_tokens: Annotated[int, Meta(ge=1, le=10_000_000)] | None = None
    stop: Annotated[list[Annotated[str, Meta(min_length=1, max_length=MAX_STOP_LENGTH)]], Meta(max_length=MAX_STOP_STRINGS)] = []
    ignore_eos: bool = False
    typical_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    xtc_probability: Fraction = 0.0
    xtc_threshold: Annotated[float, Meta(ge=0.0, le=0.5)] = 0.1
    dry_multiplier: Annotated[float, Meta(ge=0.0, le=100.0)] = 0.0
    dry_base: Annotated[float, Meta(ge=1.0, le=10.0)] = 1.75
    dry_allowed_length: Annotated[int, Meta(ge=1, le=1024)] = 2
    mirostat: Literal[0, 1, 2] = 0
    mirostat_tau: Annotated[float, Meta(gt=0.0, le=100.0)] = 5.0
    mirostat_eta: Annotated[float, Meta(gt=0.0, le=1.0)] = 0.1


class OutputFormat(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What the answer must look like. ``value`` is the JSON schema as JSON text, the regular expression, or the grammar (GBNF or Lark)."""

    kind: Literal["json_object", "json_schema", "regex", "grammar"]
    value: Annotated[str, Meta(max_length=MAX_FORMAT_CHARACTERS)] = ""


class Tool(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """A function that the model may call. ``parameters`` is the JSON schema of its arguments as JSON text.

    Keywords of a schema that cannot be enforced are ignored unless it is ``strict``.
    """

    name: ToolName
    description: Annotated[str, Meta(max_length=MAX_FORMAT_CHARACTERS)] = ""
    parameters: Annotated[str, Meta(max_length=MAX_FORMAT_CHARACTERS)] = '{"type": "object"}'
    strict: bool = False


class NamedTool(msgspec.Struct, frozen=True):
    """The choice of one tool."""

    name: ToolName


class GenerationRequest(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What is asked of a model.

    ``model`` is a key or an instance identifier. ``context_overflow`` says what becomes of messages that do not fit. ``top_logprobs`` asks for the log-probability of each token and of that many
    alternatives (None: of none). ``tool_choice`` "none" hides the tools, "required" or a named one makes the answer a call;
    without ``parallel_tool_calls`` the answer ends after one. ``lane`` is the request's place when the model is busy. ``reasoning``
    says how much the model is to think, in LM Studio's words, ``template_kwargs`` sets variables of the chat template by name.
    ``ttl_seconds`` is how long the model stays without use if this request loads it. ``given`` names the sampling parameters that
    the caller set: the others take the model's defaults where generations start.
    ``draft_model`` is the key of a model that guesses ahead: None takes that of the load, empty means none.
    """

    model: Annotated[str, Meta(min_length=1, max_length=512)]
    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=10_000)]
    sampling: SamplingParams = SamplingParams()
    template_kwargs: dict[str, Any] = {}
    reasoning: Reasoning | None = None
    context_overflow: OverflowPolicy = "stopAtLimit"
    output_format: OutputFormat | None = None
    tools: Annotated[tuple[Tool, ...], Meta(max_length=MAX_TOOLS)] = ()
    tool_choice: Literal["auto", "none", "required"] | NamedTool = "auto"
    parallel_tool_calls: bool = True
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    lane: Lane = Lane.API
    ttl_seconds: TtlSeconds | None = None
    draft_model: Annotated[str, Meta(max_length=512)] | None = None
    given: frozenset[str] = frozenset()


class EmbeddingRequest(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What is to be turned into vectors: texts, or token ids of the model's own vocabulary.

    ``dimensions`` shortens the vectors of models that were trained for it. ``truncate`` cuts inputs that are longer than the
    context; without it they are an error. ``ttl_seconds`` as in ``GenerationRequest``.
    """

    model: Annotated[str, Meta(min_length=1, max_length=512)]
    inputs: Annotated[list[str | list[TokenId]], Meta(min_length=1, max_length=MAX_EMBEDDING_INPUTS)]
    dimensions: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    truncate: bool = False
    lane: Lane = Lane.API
    ttl_seconds: TtlSeconds | None = None


AnyRequest = GenerationRequest | EmbeddingRequest


class LoadConfig(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """How a model is loaded. Names as in LM Studio's REST v1 ``models/load``.

    ``context_length`` is in tokens, for each of the ``parallel`` sequences at most; None takes the model's own, up to the
    installation's default. With a ``unified_kv_cache`` they share about one such context; without, each has its own, which takes
    ``parallel`` times the memory, and nobody's attention passes over the others' tokens; None: own ones where they are small
    (``workers.memory.kv_layout``). ``eval_batch_size`` is the number of prompt tokens per step at most. ``gpu_layers`` -1 means all.
    ``cpu_threads`` 0 means the installation's default. ``num_experts`` is how many experts of a mixture work on a token; None is
    the model's own number. ``k_cache_type`` and ``v_cache_type`` are the precisions of keys and values; values below 16 bits need
    ``flash_attention``. ``offload_kv_cache_to_gpu`` has no effect without a GPU.
    ``draft_model`` is the key of a smaller model with the same vocabulary that
    guesses ahead; ``prompt_lookup`` takes guesses from the text so far. Guesses change how fast an answer comes, never what it says.
    """

    context_length: Annotated[int, Meta(ge=16, le=16_777_216)] | None = None
    eval_batch_size: Annotated[int, Meta(ge=32, le=16_384)] = 512
    parallel: Annotated[int, Meta(ge=1, le=256)] = 16
    flash_attention: bool | None = None
    gpu_layers: Annotated[int, Meta(ge=-1, le=100_000)] = -1
    cpu_threads: Annotated[int, Meta(ge=0, le=1024)] = 0
    num_experts: Annotated[int, Meta(ge=1, le=4096)] | None = None
    offload_kv_cache_to_gpu: bool = True
    unified_kv_cache: bool | None = None
    k_cache_type: KvCacheType = "f16"
    v_cache_type: KvCacheType = "f16"
    draft_model: Annotated[str, Meta(max_length=512)] = ""
    prompt_lookup: bool = False


def request_to_builtins(request: AnyRequest) -> dict[str, Any]:
    """Return the request as JSON-serialisable data, for the ``Generation`` row."""
    data: dict[str, Any] = msgspec.to_builtins(request, str_keys=True)
    return data


class _Kind(msgspec.Struct):
    inputs: msgspec.Raw = msgspec.Raw()


def request_from_json(text: str) -> AnyRequest:
    """Rebuild a stored request of either kind. Raises ``msgspec.ValidationError`` for a text that is none."""
    if decode_json(text, _Kind).inputs:
        return decode_json(text, EmbeddingRequest)
    return decode_json(text, GenerationRequest, strict=False)
