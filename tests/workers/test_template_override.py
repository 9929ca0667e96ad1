"""A template in place of the file's, and its variables, through a real runner: each counts from the next request on."""

from __future__ import annotations

from pathlib import Path

from models_app.models import InstalledModel
from tests.micro_models import make_micro
from tests.workers.support import GREEDY, Bench
from workers.schemas import SamplingParams

SHORT = SamplingParams(max_tokens=1)
COUNTS = "{% for m in messages %}{{ m.content }}{% endfor %}{% if enable_thinking is defined and not enable_thinking %} a b c{% endif %}"


def prompt_tokens(bench: Bench, model: InstalledModel, **fields: object) -> int:
    generation = bench.create(model, "x", sampling=SHORT, **fields)
    bench.host.generate(str(generation.pk))
    stats = bench.finished(generation).stats
    return int(stats["input_tokens"])


def test_an_edit_counts_from_the_next_request_on(bench: Bench, starter: InstalledModel) -> None:
    own = bench.run(starter, "Which port does the server use?", sampling=GREEDY)
    runner = next(iter(bench.host.runners.by_id.values())).process.pid
    InstalledModel.objects.update(chat_template_override="{{ messages[0].content }}")
    bare = bench.run(starter, "Which port does the server use?", sampling=SHORT)
    InstalledModel.objects.update(chat_template_override="{{ broken")
    refused = bench.run(starter, "Which port does the server use?", sampling=SHORT)
    InstalledModel.objects.update(chat_template_override="")
    again = bench.run(starter, "Which port does the server use?", sampling=GREEDY)
    assert bare.stats["input_tokens"] < own.stats["input_tokens"] == again.stats["input_tokens"]
    assert (refused.error_code, refused.status) == ("template_error", "failed")
    assert again.content == own.content
    assert next(iter(bench.host.runners.by_id.values())).process.pid == runner


def test_a_model_whose_own_template_is_broken_can_be_mended(bench: Bench, tmp_path: Path) -> None:
    model = bench.install(make_micro(tmp_path / "m.gguf", chat_template="{% nonsense %}"), architecture="qwen2")
    assert bench.run(model, "x", sampling=SHORT).error_code == "template_error"
    InstalledModel.objects.update(chat_template_override="{{ messages[0].content }}")
    assert bench.run(model, "x", sampling=SHORT).status == "completed"


def test_variables_and_reasoning_reach_the_template(bench: Bench, tmp_path: Path) -> None:
    model = bench.install(make_micro(tmp_path / "m.gguf", chat_template=COUNTS), architecture="qwen2")
    plain = prompt_tokens(bench, model)
    assert prompt_tokens(bench, model, template_kwargs={"enable_thinking": True}) == plain
    silent = prompt_tokens(bench, model, template_kwargs={"enable_thinking": False})
    assert silent > plain
    assert prompt_tokens(bench, model, reasoning="off") == silent
    assert prompt_tokens(bench, model, reasoning="high") == plain
    InstalledModel.objects.update(chat_template_override="{{ messages[0].content }}")
    generation = bench.create(model, "x", sampling=SHORT, reasoning="off")
    bench.host.generate(str(generation.pk))
    assert bench.finished(generation).error_message == "The reasoning of this model cannot be set to 'off'."
