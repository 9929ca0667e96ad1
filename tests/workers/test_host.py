"""Generations through a real host: what the stream says, what the row says, and what is left when something dies."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from django.db import transaction
from django.db.utils import OperationalError

from models_app.models import Generation, InstalledModel, ModelInstance
from tests.workers.support import ENDLESS, GREEDY, Bench, make_host, wait_for
from workers.events import ChatEnd, ChatStart, Error, MessageDelta, MessageEnd, MessageStart, ModelLoadEnd, ModelLoadStart
from workers.models import WorkerNode
from workers.runner_process import RunnerProcess
from workers.schemas import ChatMessage, OutputFormat, SamplingParams


def test_stream_and_row_tell_the_same_story(bench: Bench, starter: InstalledModel) -> None:
    generation = bench.run(starter, "Which port does the server use?")
    assert generation.status == "completed"
    assert generation.content == "The server listens on port 1234 by default." == bench.text(generation)
    kinds = [type(event) for event in bench.events(generation)]
    assert kinds[:2] == [ChatStart, ModelLoadStart]
    assert ModelLoadEnd in kinds
    assert kinds[-2:] == [MessageEnd, ChatEnd]
    assert kinds.count(MessageStart) == 1
    assert [entry.seq for entry in bench.entries(generation)] == list(range(1, len(bench.entries(generation)) + 1))
    assert generation.stats["stop_reason"] == "eosFound"
    assert generation.stats["total_output_tokens"] == len(generation.output_tokens) == 17
    assert generation.stats["input_tokens"] > 5
    assert ModelInstance.objects.get().status == "ready"


def test_stop_keeps_the_text_and_frees_the_slot(bench: Bench, starter: InstalledModel) -> None:
    generation = bench.create(starter, "What is GGUF?", **ENDLESS)
    bench.host.generate(str(generation.pk))
    wait_for(lambda: len(bench.text(generation)) > 50)
    bench.host.cancel(str(generation.pk))
    bench.finished(generation)
    assert generation.status == "cancelled"
    assert generation.content == bench.text(generation) != ""
    assert generation.stats["stop_reason"] == "userStopped"


def test_the_cancel_flag_alone_is_enough(bench: Bench, starter: InstalledModel) -> None:
    generation = bench.create(starter, "What is GGUF?", **ENDLESS)
    Generation.objects.filter(pk=generation.pk).update(cancel_requested=True)
    bench.host.generate(str(generation.pk))
    assert bench.finished(generation).status == "cancelled"


def test_a_killed_runner_loses_nothing(bench: Bench, starter: InstalledModel) -> None:
    generations = [bench.create(starter, "What is GGUF?", **ENDLESS) for _ in range(3)]
    for generation in generations:
        bench.host.generate(str(generation.pk))
    wait_for(lambda: all(bench.text(generation) for generation in generations))
    before = [bench.text(generation) for generation in generations]
    os.kill(next(iter(bench.host.runners.by_id.values())).process.pid, signal.SIGKILL)
    wait_for(lambda: all(len(bench.text(g)) > len(text) + 200 for g, text in zip(generations, before, strict=True)))
    for generation, text in zip(generations, before, strict=True):
        bench.host.cancel(str(generation.pk))
        bench.finished(generation)
        assert (generation.status, generation.resumes) == ("cancelled", 1)
        assert generation.content == bench.text(generation)
        assert generation.content.startswith(text)
        assert [entry.seq for entry in bench.entries(generation)] == list(range(1, len(bench.entries(generation)) + 1))
        assert generation.stats["total_output_tokens"] == len(generation.output_tokens)


def test_a_request_that_ends_every_runner_says_how(bench: Bench, starter: InstalledModel) -> None:
    generation = bench.create(starter, "What is GGUF?", **ENDLESS)
    bench.host.generate(str(generation.pk))
    for _ in range(3):
        length = len(bench.text(generation))
        wait_for(lambda length=length: len(bench.text(generation)) > length)
        os.kill(next(iter(bench.host.runners.by_id.values())).process.pid, signal.SIGILL)
    failed = bench.finished(generation)
    assert (failed.status, failed.error_code) == ("failed", "generation_interrupted")
    assert failed.content == bench.text(failed) != ""
    assert "crashed repeatedly" in failed.error_message
    assert "compiled for another processor" in failed.error_message


def test_a_request_that_nobody_foresaw_fails_alone(bench: Bench, starter: InstalledModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that takes up what arrives is one for all: it goes on."""
    assert bench.run(starter, "What is GGUF?").status == "completed"
    send = RunnerProcess.submit

    def submit(runner: RunnerProcess, message: Any) -> None:
        if "42" in str(message.request):
            raise OverflowError("Integer value out of range")
        send(runner, message)

    monkeypatch.setattr(RunnerProcess, "submit", submit)
    bad = bench.finished(bench.create(starter, "42"))
    assert (bad.status, bad.error_code) == ("failed", "internal_error")
    runner = next(iter(bench.host.runners.by_id.values()))
    assert not runner.running
    bench.host.unload(runner.instance.id)
    wait_for(lambda: not bench.host.runners.by_id)
    bad = bench.finished(bench.create(starter, "42"))  # handed in by another thread, that of the runner which has loaded
    assert (bad.status, bad.error_code) == ("failed", "internal_error")
    assert bench.finished(bench.create(starter, "What is GGUF?")).status == "completed"


def test_an_error_that_quotes_a_nul_is_stored(bench: Bench, starter: InstalledModel) -> None:
    """Nothing else could be stored after it: the saver tried it for ever."""
    asked = bench.create(starter, "hello", output_format=OutputFormat(kind="json_schema", value='{"type": "\\u0000"}'))
    bench.host.generate(str(asked.pk))
    refused = bench.finished(asked)
    assert (refused.status, refused.error_code) == ("failed", "invalid_request")
    assert bench.run(starter, "What is GGUF?").status == "completed"


def test_a_request_that_this_release_cannot_read_ends(bench: Bench, starter: InstalledModel) -> None:
    with transaction.atomic():  # else the host, which is told of the row, may be quicker
        generation = bench.create(starter, "What is GGUF?")
        Generation.objects.filter(pk=generation.pk).update(request={"model": 1})
    bench.host.generate(str(generation.pk))
    wait_for(lambda: Generation.objects.filter(pk=generation.pk, status="failed").exists())
    generation.refresh_from_db()
    assert (generation.status, generation.error_code) == ("failed", "generation_interrupted")
    assert bench.run(starter, "What is GGUF?").status == "completed"


def test_an_engine_for_another_processor_is_called_that(bench: Bench, starter: InstalledModel, caplog: pytest.LogCaptureFixture) -> None:
    generation = bench.create(starter, "What is GGUF?", **ENDLESS)
    bench.host.generate(str(generation.pk))
    wait_for(lambda: bench.text(generation))
    os.kill(next(iter(bench.host.runners.by_id.values())).process.pid, signal.SIGILL)
    wait_for(lambda: "compiled for another processor" in caplog.text)
    bench.host.cancel(str(generation.pk))
    bench.finished(generation)


def test_sampling_with_a_seed_survives_a_crash(bench: Bench, starter: InstalledModel) -> None:
    sampling = SamplingParams(temperature=1.0, seed=7, max_tokens=600, ignore_eos=True)
    whole = bench.run(starter, "Tell me a story", sampling=sampling)
    generation = bench.create(starter, "Tell me a story", sampling=sampling)
    bench.host.generate(str(generation.pk))
    wait_for(lambda: len(bench.text(generation)) > 50)
    os.kill(next(iter(bench.host.runners.by_id.values())).process.pid, signal.SIGKILL)
    bench.finished(generation)
    same = next(
        (i for i, (a, b) in enumerate(zip(whole.output_tokens, generation.output_tokens, strict=False)) if a != b), len(whole.output_tokens)
    )
    assert same > 30, "the resumed run must draw the random numbers that come next, not start over"


def test_a_file_that_cannot_be_loaded_says_why(bench: Bench, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + b"\0" * 100)
    generation = bench.run(bench.install(broken, "test/broken"), "hello")
    assert generation.status == "failed"
    assert generation.error_code == "model_load_failed"
    assert isinstance(bench.events(generation)[-2], Error)
    assert ModelInstance.objects.get().status == "failed"


def test_a_prompt_over_the_context_is_refused(bench: Bench, starter: InstalledModel) -> None:
    generation = bench.run(starter, "word " * 4000)
    assert generation.status == "failed"
    assert generation.error_code == "context_length_exceeded"
    assert "2048" in generation.error_message


def test_a_prompt_far_over_the_context_is_not_even_split_into_tokens(bench: Bench, starter: InstalledModel) -> None:
    generation = bench.run(starter, "word " * 200_000)
    assert (generation.status, generation.error_code) == ("failed", "context_length_exceeded")
    assert "characters" in generation.error_message


def test_stop_strings_end_the_answer_and_are_not_sent(bench: Bench, starter: InstalledModel) -> None:
    stop = SamplingParams(temperature=0.0, repeat_penalty=1.0, stop=["port 12"])
    generation = bench.run(starter, "Which port does the server use?", sampling=stop)
    assert generation.content == "The server listens on " == bench.text(generation)
    assert generation.stats["stop_reason"] == "stopStringFound"


def test_unload_ends_the_runner_and_its_row(bench: Bench, starter: InstalledModel) -> None:
    bench.run(starter, "What is a token?")
    instance = ModelInstance.objects.get()
    process = bench.host.runners.by_id[instance.pk].process
    bench.host.unload(instance.pk)
    wait_for(lambda: not ModelInstance.objects.exists())
    assert process.poll() is not None


def test_shutdown_gives_unfinished_work_to_the_next_worker(bench: Bench, starter: InstalledModel, tmp_path: Path) -> None:
    generation = bench.create(starter, "What is GGUF?", **ENDLESS)
    bench.host.generate(str(generation.pk))
    wait_for(lambda: len(bench.text(generation)) > 50)
    bench.host.stop()
    assert not WorkerNode.objects.alive().exists(), "nothing may be sent to a node that has stopped"
    generation.refresh_from_db()
    assert generation.status == "queued"
    assert generation.content == bench.text(generation)
    successor = Bench(make_host(tmp_path), bench.principal.user)
    successor.host.start()
    wait_for(lambda: len(bench.text(generation)) > len(generation.content) + 200)
    successor.host.cancel(str(generation.pk))
    before = generation.content
    bench.finished(generation)
    assert generation.content == bench.text(generation)
    assert generation.content.startswith(before)
    successor.host.stop()


def test_a_generation_that_overtakes_the_load_of_its_model_takes_it_over(bench: Bench, starter: InstalledModel) -> None:
    asked = ModelInstance.objects.create(identifier=starter.key, model=starter, node_id="test-node", config={"context_length": 512})
    generation = bench.create(starter, "What is GGUF?")
    bench.host.generate(str(generation.pk))
    bench.host.load(asked.pk)
    assert bench.finished(generation).status == "completed"
    asked.refresh_from_db()
    assert (asked.status, asked.config["context_length"]) == ("ready", 512)


def test_thinking_is_kept_apart_from_the_answer(bench: Bench, starter: InstalledModel) -> None:
    generation = bench.create(starter, "", messages=[ChatMessage(role="user", content="What is 3 + 4? /think")], sampling=GREEDY)
    bench.host.generate(str(generation.pk))
    bench.finished(generation)
    assert generation.reasoning
    assert "<think>" not in generation.reasoning + generation.content
    assert 0 < generation.stats["reasoning_time_seconds"] < generation.stats["generation_time_seconds"]
    assert generation.content
    assert not any("think>" in event.content for event in bench.events(generation) if isinstance(event, MessageDelta))


def test_a_node_registers_when_the_database_is_there(bench: Bench, starter: InstalledModel, tmp_path: Path) -> None:
    """Found in a worker that was restarted while PostgreSQL recovered: it stayed, and never took any work."""
    generation = bench.create(starter, "What is GGUF?")
    bench.host.stop()
    successor = Bench(make_host(tmp_path), bench.principal.user)
    register, failures = successor.host.store.register, [OperationalError("starting up"), OperationalError("starting up")]

    def refuse_at_first() -> None:
        if failures:
            raise failures.pop()
        register()

    successor.host.store.register = refuse_at_first  # type: ignore[method-assign]
    successor.host.start()
    assert successor.finished(generation).status == "completed"
    successor.host.stop()
