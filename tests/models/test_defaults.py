"""Per-model defaults: for loads, and for answers through every door."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lmweb.access import Principal
from lmweb.errors import InvalidRequest, PermissionDenied
from models_app import defaults, services
from models_app.defaults import InferenceDefaults, load_config
from models_app.generations import start_generation
from models_app.models import InstalledModel
from models_app.placement import Mode
from tests.models.hostile import VALID, uint32
from workers.schemas import ChatMessage, GenerationRequest, LoadConfig, SamplingParams

pytestmark = pytest.mark.django_db


@pytest.fixture
def model(micro: Path, db: None) -> InstalledModel:
    return services.import_file(principal=None, source=micro, user_repo="a/micro", mode=Mode.COPY)


def stored(principal: Principal, request: GenerationRequest) -> GenerationRequest:
    """Return the request as the worker gets it."""
    import msgspec

    return msgspec.convert(start_generation(principal=principal, request=request, source="test").request, GenerationRequest)


def asking(**fields: Any) -> GenerationRequest:
    return GenerationRequest(model="a/micro", messages=fields.pop("messages", [ChatMessage(role="user", content="hi")]), **fields)


def test_answers_take_the_defaults_where_nothing_was_said(boss: Principal, member: Principal, model: InstalledModel) -> None:
    wanted = InferenceDefaults(
        sampling={"temperature": 0.1, "top_k": 7, "stop": ["END"]}, system_prompt="Be brief.", template_kwargs={"enable_thinking": False}
    )
    defaults.set_inference_defaults(principal=boss, model=model, defaults=wanted)
    plain = stored(member, asking())
    assert (plain.sampling.temperature, plain.sampling.top_k, plain.sampling.stop) == (0.1, 7, ["END"])
    assert plain.sampling.top_p == SamplingParams().top_p
    assert [message.role for message in plain.messages] == ["system", "user"]
    assert plain.template_kwargs == {"enable_thinking": False}
    said = asking(
        sampling=SamplingParams(temperature=0.8),  # the usual default, but said
        given=frozenset({"temperature"}),
        messages=[ChatMessage(role="system", content="Sing."), ChatMessage(role="user", content="hi")],
        template_kwargs={"enable_thinking": True},
    )
    own = stored(member, said)
    assert (own.sampling.temperature, own.sampling.top_k) == (0.8, 7)
    assert [message.content for message in own.messages] == ["Sing.", "hi"]
    assert own.template_kwargs == {"enable_thinking": True}
    assert not own.given
    defaults.set_inference_defaults(principal=boss, model=model, defaults=None)
    assert stored(member, asking()) == asking()


def test_openai_and_chat_say_what_was_given() -> None:
    from api.openai.translate import parse_request, to_generation_request

    body = b'{"model": "m", "messages": [{"role": "user", "content": "hi"}], "temperature": 0.8, "max_tokens": 5, "ttl": 300}'
    request = to_generation_request(parse_request(body))
    assert request.given == {"temperature", "max_tokens"}
    assert request.ttl_seconds == 300


def test_loads_take_the_defaults(boss: Principal, model: InstalledModel) -> None:
    defaults.set_load_defaults(principal=boss, model=model, config=LoadConfig(context_length=512, parallel=3))
    model.refresh_from_db()
    assert load_config(model) == LoadConfig(context_length=512, parallel=3)
    assert load_config(model, {"parallel": 4, "context_length": None}) == LoadConfig(context_length=512, parallel=4)
    defaults.set_load_defaults(principal=boss, model=model, config=None)
    model.refresh_from_db()
    assert load_config(model) == LoadConfig()


@pytest.mark.parametrize(
    ("overrides", "param"),
    [
        ({"context_length": 10**6}, "context_length"),
        ({"context_length": 3}, "context_length"),
        ({"parallel": 1000}, "parallel"),
        ({"k_cache_type": "f8"}, "k_cache_type"),
        ({"v_cache_type": "q8_0", "flash_attention": False}, "v_cache_type"),
        ({"eval_batch_size": "many"}, "eval_batch_size"),
    ],
)
def test_bad_options_are_named(model: InstalledModel, overrides: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        load_config(model, overrides)
    assert caught.value.param == param


@pytest.mark.parametrize("sampling", [{"temperature": 9}, {"colour": 1}, {"top_k": "x"}, {"stop": [""]}, {"x" * 300: 1}])
def test_bad_sampling_is_refused(boss: Principal, model: InstalledModel, sampling: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        defaults.set_inference_defaults(principal=boss, model=model, defaults=InferenceDefaults(sampling=sampling))
    model.refresh_from_db()
    assert model.inference_defaults == {}


def test_only_admins_change_defaults(member: Principal, model: InstalledModel) -> None:
    with pytest.raises(PermissionDenied):
        defaults.set_load_defaults(principal=member, model=model, config=None)
    with pytest.raises(PermissionDenied):
        defaults.set_inference_defaults(principal=member, model=model, defaults=None)


def test_a_mixture_has_so_many_experts_and_no_more(boss: Principal, model: InstalledModel) -> None:
    def store(experts: int) -> None:
        defaults.set_load_defaults(principal=boss, model=model, config=LoadConfig(num_experts=experts))

    with pytest.raises(InvalidRequest, match=r"no mixture of experts"):
        store(1)
    model.file.write_bytes(VALID.with_values(llama__expert_count=uint32(4)).encode())
    store(4)
    with pytest.raises(InvalidRequest, match=r"has 4 experts, not 5") as refused:
        store(5)
    assert refused.value.param == "num_experts"


def test_defaults_that_the_file_cannot_have_any_more_are_shown(model: InstalledModel) -> None:
    """The page is where an admin mends them."""
    model.load_defaults = {"num_experts": 2}
    assert load_config(model).num_experts == 2
