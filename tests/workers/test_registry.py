"""What engines say about themselves, without being loaded."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from lmweb.errors import ModelLoadFailed
from tests.live import REPOSITORY
from workers.engines import card, registry


def test_every_engine_says_what_it_can_and_why_not() -> None:
    described = {engine.name: engine for engine in registry.describe()}
    llama = described["llama.cpp"]
    assert llama.is_installed
    assert llama.version
    assert llama.formats == ["gguf"]
    assert llama.devices[-1] == "cpu"
    for engine in described.values():
        assert set(engine.supports) == {feature.value for feature in card.Feature} == {feature.value for feature in card.LABELS}
        assert all(reason == "" or reason.endswith(".") for reason in engine.supports.values())


def test_describing_imports_no_engine() -> None:
    code = "import sys; from workers.engines import registry; registry.describe(); print(sorted({'numpy', 'llama_cpp', 'mlx'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_format_has_one_engine() -> None:
    formats = [name for each in registry.CARDS.values() for name in each.formats]
    assert len(formats) == len(set(formats))


def test_an_engine_that_is_not_there_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = card.EngineCard("ghost", "no.such.module", ("no-such-package",), (), list, {}, "Install it.")
    monkeypatch.setitem(registry.CARDS, "ghost", absent)
    with pytest.raises(ModelLoadFailed, match="'ghost' is not installed here"):
        registry.factory("ghost")
    with pytest.raises(ModelLoadFailed, match="no engine 'nothing'"):
        registry.factory("nothing")
    assert card.describe(absent).version == ""


FOLDERS = ("lmweb", "workers", "models_app", "chat", "api", "templates", "static", "bench")
ENGINE_LIBRARIES = re.compile(r"\bmlx[-_]lm\b|\bmlx\.core\b|engines[./]mlx_|\bMlxEngine\b")


def test_nothing_outside_its_modules_and_the_registry_names_the_mlx_engine() -> None:
    """The format ``mlx`` is named where models on disk are; the engine is not."""
    known = re.compile(r"workers/engines/(mlx_\w+|registry)\.py|models_app/starter/.*|static/vendor/.*")
    found = [file for folder in FOLDERS for file in (REPOSITORY / folder).rglob("*") if file.suffix in {".py", ".html", ".js", ".css"}]
    code = {str(file.relative_to(REPOSITORY)): file for file in found}
    assert len(code) > 200
    assert [name for name, file in code.items() if not known.fullmatch(name) and ENGINE_LIBRARIES.search(file.read_text())] == []


def test_the_documented_differences_are_the_declared_ones() -> None:
    page = (REPOSITORY / "docs" / "engines.md").read_text()
    assert all(f"`{name}`" in page for name in registry.CARDS)
    words = {
        "embeddings": "Embeddings", "draft_model": "`draft_model`", "prompt_lookup": "`prompt_lookup`", "num_experts": "`num_experts`",
        "kv_cache_types": "Precision of keys and values", "gpu_layers": "`gpu_layers`", "flash_attention": "`flash_attention`",
        "cpu_threads": "`cpu_threads`", "own_kv_caches": "`unified_kv_cache`", "dry": "DRY",
    }  # fmt: skip
    for each in registry.CARDS.values():
        assert each.lacks.keys() <= words.keys()
        assert all(words[feature] in page for feature in each.lacks)
