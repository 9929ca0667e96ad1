"""Which models may guess ahead for which: by their vocabularies, with the reason if not, and for those who may see them."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from bench.make_gguf import PRESETS, Vocabulary, write_model
from lmweb.access import Principal
from lmweb.errors import InvalidRequest, ModelNotFound
from models_app.drafts import check_draft, compatible_drafts, draft_file
from models_app.generations import start_generation
from models_app.loading import request_load
from models_app.models import Generation, InstalledModel
from models_app.services import import_file
from tests.micro_models import make_micro, starter_vocabulary
from workers.models import WorkerNode
from workers.schemas import ChatMessage, GenerationRequest, LoadConfig

pytestmark = pytest.mark.django_db(transaction=True)


def install(path: Path) -> InstalledModel:
    return import_file(principal=None, source=path, user_repo=f"test/{path.stem}")


@pytest.fixture
def model(tmp_path: Path) -> InstalledModel:
    return install(make_micro(tmp_path / "large.gguf", layers=3))


@pytest.fixture
def draft(tmp_path: Path) -> InstalledModel:
    return install(make_micro(tmp_path / "small.gguf", layers=1, seed=2))


@pytest.fixture
def foreign(tmp_path: Path) -> InstalledModel:
    """Return a small model of which one token differs."""
    words = starter_vocabulary()
    other = Vocabulary([*words.tokens[:100], "changed", *words.tokens[101:]], words.types, words.merges, words.fields)
    return install(write_model(tmp_path / "foreign.gguf", PRESETS["micro"], other, name="foreign", context=512, seed=0))


def test_smaller_models_with_the_same_vocabulary_are_listed(
    member: Principal, model: InstalledModel, draft: InstalledModel, foreign: InstalledModel
) -> None:
    assert [found.key for found in compatible_drafts(member, model)] == ["test/small"]
    assert compatible_drafts(member, draft) == []


def test_unused_tokens_at_the_end_do_not_matter(member: Principal, model: InstalledModel, tmp_path: Path) -> None:
    words = starter_vocabulary()
    padded = Vocabulary([*words.tokens, "[PAD1]", "[PAD2]"], [*words.types, 5, 5], words.merges, words.fields)
    install(write_model(tmp_path / "padded.gguf", PRESETS["micro"], padded, name="padded", context=512, seed=0))
    assert [found.key for found in compatible_drafts(member, model)] == ["test/padded"]


def test_what_does_not_match_is_refused_with_the_reason(member: Principal, model: InstalledModel, foreign: InstalledModel) -> None:
    with pytest.raises(InvalidRequest, match="its tokens are others than the model's"):
        check_draft(member, model, "test/foreign")
    with pytest.raises(InvalidRequest, match="it is the model itself"):
        check_draft(member, model, "test/large")
    with pytest.raises(ModelNotFound):
        check_draft(member, model, "test/nothing")
    with pytest.raises(ModelNotFound):
        check_draft(member, model, "nul\x00")
    foreign.file.unlink()
    with pytest.raises(InvalidRequest, match="cannot be read"):
        check_draft(member, model, "test/foreign")


def test_requests_and_loads_are_checked(member: Principal, model: InstalledModel, draft: InstalledModel, foreign: InstalledModel) -> None:
    request = GenerationRequest(model=model.key, messages=[ChatMessage(role="user", content="x")], draft_model="Test/Small")
    generation = start_generation(principal=member, request=request, source="test")
    assert Generation.objects.get(pk=generation.pk).request["draft_model"] == "test/small"
    with pytest.raises(InvalidRequest) as refused:
        start_generation(principal=member, request=msgspec.structs.replace(request, draft_model="test/foreign"), source="test")
    assert refused.value.param == "draft_model"
    WorkerNode.objects.create(name="node", incarnation=generation.pk)
    with pytest.raises(InvalidRequest):
        request_load(principal=None, model=model, config=LoadConfig(draft_model="test/foreign"))
    assert request_load(principal=None, model=model, config=LoadConfig(draft_model="test/small")).config["draft_model"] == "test/small"


def test_a_draft_that_is_gone_is_done_without(draft: InstalledModel) -> None:
    found = draft_file("test/small")
    assert found is not None
    assert found.needed_bytes > draft.size_bytes
    draft.file.unlink()
    assert draft_file("test/small") is None
    assert draft_file("test/unknown") is None
    assert draft_file(None) is None
