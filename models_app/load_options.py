"""The options of ``load`` and ``estimate``: how a model is loaded, as arguments of a command."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, get_args

from django.core.management.base import CommandParser

from lmweb.errors import InvalidRequest
from models_app.memory import read_shape
from models_app.models import InstalledModel
from workers.schemas import KvCacheType


def add_config_arguments(parser: CommandParser) -> None:
    """Add them; whatever is not given takes the model's default."""
    parser.add_argument("--context-length", "-c", type=whole_number(16, 16_777_216), metavar="N", help="tokens of context")
    parser.add_argument("--gpu", metavar="off|max|auto|0-1", help="how much of the model to put on the GPU")
    parser.add_argument("--parallel", type=whole_number(1, 256), metavar="N", help="answers at the same time")
    parser.add_argument("--eval-batch-size", type=whole_number(32, 16_384), metavar="N", help="tokens of a prompt per step")
    parser.add_argument("--flash-attention", choices=["on", "off"], help="without, the engine decides")
    parser.add_argument("--k-cache-type", choices=get_args(KvCacheType), help="precision of keys in the cache")
    parser.add_argument("--v-cache-type", choices=get_args(KvCacheType), help="precision of values in the cache")
    parser.add_argument("--kv-cache-on-gpu", choices=["on", "off"], help="whether the GPU's memory holds the cache")
    parser.add_argument("--unified-kv-cache", choices=["on", "off"], help="one cache for all answers, or one for each, which is faster")
    parser.add_argument("--num-experts", type=whole_number(1, 4096), metavar="N", help="experts that work on a token, of a mixture")
    parser.add_argument("--cpu-threads", type=whole_number(1, 1024), metavar="N", help="threads of the processor")
    parser.add_argument("--draft-model", metavar="KEY", help="a smaller model with the same vocabulary that guesses ahead; none: no")
    parser.add_argument("--prompt-lookup", choices=["on", "off"], help="guess ahead from the text itself")


def overrides(options: dict[str, Any], model: InstalledModel) -> dict[str, Any]:
    """Return what was given, as overrides of ``LoadConfig``. Raises ``InvalidRequest``."""
    names = ("context_length", "parallel", "eval_batch_size", "k_cache_type", "v_cache_type", "num_experts", "cpu_threads")
    given = {name: options[name] for name in names}
    given["draft_model"] = "" if options["draft_model"] == "none" else options["draft_model"]
    given["prompt_lookup"] = _switch(options["prompt_lookup"])
    given["flash_attention"] = _switch(options["flash_attention"])
    given["offload_kv_cache_to_gpu"] = _switch(options["kv_cache_on_gpu"])
    given["unified_kv_cache"] = _switch(options["unified_kv_cache"])
    given["gpu_layers"] = None if options["gpu"] is None else gpu_layers(options["gpu"], model)
    return given


def gpu_layers(text: str, model: InstalledModel) -> int:
    """Return the number of layers for lms' way of saying it: off, max, auto or a fraction. Raises ``InvalidRequest``."""
    named = {"off": 0, "max": -1, "auto": -1}
    if text in named:
        return named[text]
    try:
        fraction = float(text)
    except ValueError:
        fraction = -1.0
    if not 0.0 <= fraction <= 1.0:
        raise InvalidRequest(f"--gpu is off, max, auto or a number from 0 to 1, not '{text}'.", param="gpu")
    return -1 if fraction == 1.0 else round(fraction * read_shape(model.file).layers)


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """Return the reader of an argument that is a whole number within limits."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 12 and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"'{text}' is no whole number from {low} to {high}")
        return int(text)

    return parse


def _switch(text: str | None) -> bool | None:
    return None if text is None else text == "on"
