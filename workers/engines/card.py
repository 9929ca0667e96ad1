"""What an engine says about itself without being loaded: for the registry, and for whoever chooses between engines.

The web server and the workers read cards, so a card's module imports nothing of its engine's libraries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from types import MappingProxyType

from lmweb.errors import InvalidRequest
from workers.schemas import LoadConfig


class Feature(StrEnum):
    """What engines differ in. The value names it in JSON."""

    STRUCTURED_OUTPUT = "structured_output"
    TOOLS = "tools"
    LOGPROBS = "logprobs"
    EMBEDDINGS = "embeddings"
    PREFIX_CACHE = "prefix_cache"
    ROLLING_WINDOW = "rolling_window"
    DRAFT_MODEL = "draft_model"
    PROMPT_LOOKUP = "prompt_lookup"
    KV_CACHE_TYPES = "kv_cache_types"
    OWN_KV_CACHES = "own_kv_caches"
    NUM_EXPERTS = "num_experts"
    GPU_LAYERS = "gpu_layers"
    FLASH_ATTENTION = "flash_attention"
    CPU_THREADS = "cpu_threads"
    FURTHER_SAMPLERS = "further_samplers"
    DRY = "dry"


#: The same in words for people.
LABELS: Mapping[Feature, str] = MappingProxyType(
    {
        Feature.STRUCTURED_OUTPUT: "Structured output (JSON schema, regular expressions, grammars)",
        Feature.TOOLS: "Tool calls that always parse",
        Feature.LOGPROBS: "Log-probabilities",
        Feature.EMBEDDINGS: "Embeddings",
        Feature.PREFIX_CACHE: "Prompts computed once (prefix cache)",
        Feature.ROLLING_WINDOW: "Answers that outgrow the context",
        Feature.DRAFT_MODEL: "Draft models (speculative decoding)",
        Feature.PROMPT_LOOKUP: "Guesses from the text so far",
        Feature.KV_CACHE_TYPES: "Precision of keys and values",
        Feature.OWN_KV_CACHES: "A KV cache for each answer, or one for all",
        Feature.NUM_EXPERTS: "Number of experts",
        Feature.GPU_LAYERS: "Part of the layers on the GPU",
        Feature.FLASH_ATTENTION: "Flash attention on or off",
        Feature.CPU_THREADS: "Number of CPU threads",
        Feature.FURTHER_SAMPLERS: "Typical sampling, XTC, Mirostat",
        Feature.DRY: "DRY sampling",
    }
)

#: Which of them a load asks for, and the option that does.
_ASKED: tuple[tuple[Feature, str, Callable[[LoadConfig], bool]], ...] = (
    (Feature.DRAFT_MODEL, "draft_model", lambda config: bool(config.draft_model)),
    (Feature.PROMPT_LOOKUP, "prompt_lookup", lambda config: config.prompt_lookup),
    (Feature.KV_CACHE_TYPES, "k_cache_type", lambda config: config.k_cache_type != "f16"),
    (Feature.KV_CACHE_TYPES, "v_cache_type", lambda config: config.v_cache_type != "f16"),
    (Feature.OWN_KV_CACHES, "unified_kv_cache", lambda config: config.unified_kv_cache is False),
    (Feature.NUM_EXPERTS, "num_experts", lambda config: config.num_experts is not None),
    (Feature.GPU_LAYERS, "gpu_layers", lambda config: config.gpu_layers > 0),
    (Feature.GPU_LAYERS, "offload_kv_cache_to_gpu", lambda config: not config.offload_kv_cache_to_gpu),
    (Feature.FLASH_ATTENTION, "flash_attention", lambda config: config.flash_attention is False),
)


@dataclass(frozen=True, slots=True)
class EngineCard:
    """An engine as its author declares it.

    Attributes:
        name: what it is called everywhere.
        module: where its ``load`` (``workers.engines.base.Factory``) is.
        packages: the distributions that it needs; the first one's version is the engine's.
        formats: what it reads, as ``InstalledModel.format`` names it.
        devices: returns the kinds of devices that this installation of it can use.
        lacks: what it cannot do, with the reason as a sentence for people.
        install: what to do where a package is missing.
    """

    name: str
    module: str
    packages: tuple[str, ...]
    formats: tuple[str, ...]
    devices: Callable[[], list[str]]
    lacks: Mapping[Feature, str]
    install: str

    @property
    def is_installed(self) -> bool:
        """Whether all its packages are there."""
        return all(map(version_of, self.packages))

    def lacking_options(self) -> dict[str, str]:
        """Return the options of a load that this engine has not, or not in full, each with the reason."""
        options = {option: self.lacks[feature] for feature, option, _ in _ASKED if feature in self.lacks}
        return options | ({"cpu_threads": self.lacks[Feature.CPU_THREADS]} if Feature.CPU_THREADS in self.lacks else {})

    def check(self, config: LoadConfig) -> None:
        """Raise ``InvalidRequest`` with the reason if a load asks for what this engine cannot do."""
        for feature, option, is_asked in _ASKED:
            if feature in self.lacks and is_asked(config):
                raise InvalidRequest(f"{self.lacks[feature]} Leave '{option}' out.", param=option)


@dataclass(frozen=True, slots=True)
class Description:
    """An engine as it is on this machine, JSON-ready. ``version`` and ``devices`` are empty if it is not installed.

    ``supports`` maps every ``Feature`` to an empty text, or to the reason why not.
    """

    name: str
    version: str
    formats: list[str]
    devices: list[str]
    supports: dict[str, str]
    is_installed: bool
    install: str


def describe(card: EngineCard) -> Description:
    """Return what a card says of this machine."""
    installed = card.is_installed
    return Description(
        name=card.name,
        version=version_of(card.packages[0]) if installed else "",
        formats=list(card.formats),
        devices=card.devices() if installed else [],
        supports={feature.value: card.lacks.get(feature, "") for feature in Feature},
        is_installed=installed,
        install=card.install,
    )


def version_of(package: str) -> str:
    """Return the version of an installed distribution; empty if it is not there. Imports nothing of it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
