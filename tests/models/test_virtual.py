"""Virtual models: a model.yaml gives a model another name, settings and switches, down to the prompt."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from lmweb.errors import Conflict, InvalidRequest, PermissionDenied
from models_app import loading, services, virtual
from models_app.defaults import InferenceDefaults, set_inference_defaults
from models_app.generations import start_generation
from models_app.models import InstalledModel
from models_app.placement import Mode
from tests.workers.conftest import bench  # noqa: F401  (a fixture)
from workers.schemas import ChatMessage, GenerationRequest

if TYPE_CHECKING:
    from pathlib import Path

    from lmweb.access import Principal
    from tests.workers.support import Bench
    from workers.models import WorkerNode

pytestmark = pytest.mark.django_db(transaction=True)

YAML = textwrap.dedent("""\
    model: team/quick-thinker
    base:
      - key: nobody/has-this
        sources: [{type: huggingface, user: nobody, repo: Has-This-GGUF}]
      - key: other/name
        sources: [{type: huggingface, user: a, repo: Micro-GGUF}]
    metadataOverrides: {domain: llm, vision: false, reasoning: true, trainedForToolUse: true}
    config:
      operation:
        fields:
          - {key: llm.prediction.topKSampling, value: 20}
          - {key: llm.prediction.minPSampling, value: {checked: false, value: 0.5}}
          - {key: llm.prediction.temperature, value: 0.7}
          - {key: llm.prediction.systemPrompt, value: Be quick.}
          - {key: llm.prediction.unheardOf, value: 1}
      load:
        fields:
          - {key: llm.load.contextLength, value: 512}
          - {key: llm.load.llama.kCacheQuantizationType, value: {checked: true, value: f32}}
    customFields:
      - key: enableThinking
        displayName: Enable Thinking
        description: Whether it thinks first
        type: boolean
        defaultValue: true
        effects: [{type: setJinjaVariable, variable: enable_thinking}]
    """)


@pytest.fixture
def base(micro: Path, db: None) -> InstalledModel:
    return services.import_file(principal=None, source=micro, user_repo="a/Micro-GGUF", mode=Mode.COPY)


def stored(principal: Principal, **fields: Any) -> GenerationRequest:
    request = GenerationRequest(model="team/quick-thinker", messages=[ChatMessage(role="user", content="hi")], **fields)
    return msgspec.convert(start_generation(principal=principal, request=request, source="test").request, GenerationRequest)


def test_settings_and_switches_reach_the_request(base: InstalledModel, boss: Principal, member: Principal) -> None:
    model = virtual.install(principal=boss, text=YAML)
    assert (model.key, model.base, model.file) == ("team/quick-thinker", base, base.file)
    assert model.load_defaults == {"context_length": 512, "k_cache_type": "f32"}
    assert model.capabilities["reasoning"]
    request = stored(member)
    assert (request.sampling.top_k, request.sampling.temperature, request.sampling.min_p) == (20, 0.7, 0.0)
    assert request.messages[0] == ChatMessage(role="system", content="Be quick.")
    assert request.template_kwargs == {"enable_thinking": True}
    assert stored(member, template_kwargs={"enable_thinking": False}).template_kwargs["enable_thinking"] is False
    chosen = msgspec.structs.replace(msgspec.convert(model.inference_defaults, InferenceDefaults), custom_fields={"enableThinking": False})
    set_inference_defaults(principal=boss, model=model, defaults=chosen)
    assert stored(member).template_kwargs == {"enable_thinking": False}


def test_it_runs_on_the_weights_of_its_base(base: InstalledModel, boss: Principal, bench: Bench) -> None:  # noqa: F811
    from models_app.models import ModelInstance

    model = virtual.install(principal=boss, text=YAML)
    generation = bench.create(model, "to be")
    bench.host.generate(str(generation.pk))
    assert bench.finished(generation).status == "completed", generation.error_message
    instance = ModelInstance.objects.get()
    assert (instance.model, instance.config["context_length"]) == (base, 512)
    bench.run(base, "to be")
    assert ModelInstance.objects.count() == 1


def test_one_on_another_has_the_settings_and_switches_of_both(base: InstalledModel, boss: Principal) -> None:
    virtual.install(principal=boss, text=YAML)
    more = textwrap.dedent("""\
        model: team/hot-thinker
        base: team/quick-thinker
        config: {operation: {fields: [{key: llm.prediction.temperature, value: 1.2}]}}
        customFields: [{key: tone, type: string, defaultValue: dry, effects: [{type: setJinjaVariable, variable: tone}]}]
        """)
    model = virtual.install(principal=boss, text=more)
    assert (model.base, model.load_defaults["context_length"]) == (base, 512)
    assert (model.inference_defaults["sampling"]["temperature"], model.inference_defaults["sampling"]["top_k"]) == (1.2, 20)
    assert [field["key"] for field in model.custom_fields] == ["enableThinking", "tone"]


def test_a_load_by_hand_has_its_name(base: InstalledModel, boss: Principal, node: WorkerNode) -> None:
    model = virtual.install(principal=boss, text=YAML)
    instance = loading.request_load(principal=boss, model=model)
    assert (instance.identifier, instance.model, instance.config["context_length"]) == ("team/quick-thinker", base, 512)


def test_it_is_deleted_before_its_base(base: InstalledModel, boss: Principal, models_dir: Path) -> None:
    model = virtual.install(principal=boss, text=YAML)
    assert (models_dir / "team/quick-thinker/model.yaml").read_text() == YAML
    with pytest.raises(Conflict, match="already"):
        virtual.install(principal=boss, text=YAML)
    with pytest.raises(Conflict, match="team/quick-thinker"):
        services.delete_model(principal=boss, model=base)
    services.delete_model(principal=boss, model=model)
    assert not (models_dir / "team").exists()
    services.delete_model(principal=boss, model=base)
    assert not InstalledModel.objects.exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "just text",
        "- a list",
        "model: [",
        "a: &x 1\nb: *x",
        "x" * 300_000,
        YAML.replace("team/quick-thinker", "../../etc"),
        YAML.replace("team/quick-thinker", "team/..\\x"),
        YAML.replace("user: a,", "user: b,"),
        YAML.replace("value: 512", "value: 999999"),
        YAML.replace("value: 0.7", "value: hot"),
        YAML.replace("type: boolean", "type: __import__"),
        YAML.replace("variable: enable_thinking", "variable: messages"),
        YAML.replace("key: enableThinking", "key: '{{ x }}'"),
        YAML.replace("model: team/quick-thinker", "model: !!python/object/apply:os.system [id]"),
    ],
)
def test_what_is_wrong_adds_nothing(base: InstalledModel, boss: Principal, models_dir: Path, text: str) -> None:
    with pytest.raises((InvalidRequest, Conflict)):
        virtual.install(principal=boss, text=text)
    assert InstalledModel.objects.count() == 1
    assert not list(models_dir.rglob("model.yaml"))


def test_only_admins_add_them(base: InstalledModel, member: Principal) -> None:
    with pytest.raises(PermissionDenied):
        virtual.install(principal=member, text=YAML)
