"""The runner without its process, on every engine: what only it can refuse, how answers end, what it says of one that was complete."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import pytest

from tests.live import REPOSITORY
from tests.workers.engines import micro_for, open_engine
from workers.engines import registry
from workers.events import ContextOverflow, MessageDelta, Stats, ToolCallArguments
from workers.protocol import Channel, Output, RunnerMessage, Step, Submit
from workers.reports import Outbox, StepLog
from workers.runner import Runner
from workers.schemas import ChatMessage, GenerationRequest, OutputFormat, SamplingParams, Tool

DEFAULTS = SamplingParams()


@pytest.fixture(scope="module", params=list(registry.CARDS))
def runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    """Return a runner of each engine."""
    path = micro_for(request.param, tmp_path_factory.mktemp("runner"))
    engine = open_engine(request.param, path, context_length=512, parallel=4)
    yield Runner(engine, StepLog(""))
    engine.close()


def submit(runner: Runner, *, sampling: SamplingParams = DEFAULTS, output_tokens: list[int] | None = None, **fields: object) -> Submit:
    request = GenerationRequest(model="m", messages=[ChatMessage(role="user", content="time")], sampling=sampling, **fields)  # type: ignore[arg-type]
    return Submit(generation_id="g", owner="a", request=request, output_tokens=output_tokens or [])


def finish(runner: Runner, message: Submit) -> list[Output]:
    first = runner.submit(message)
    outputs = [first] if first else []
    while runner.has_work:
        outputs += runner.step().outputs
    return outputs


@pytest.mark.parametrize("token", [-1, 2912])
def test_a_bias_on_a_token_that_the_model_lacks_is_refused(runner: Runner, token: int) -> None:
    refused = runner.submit(submit(runner, sampling=SamplingParams(logit_bias={5: 1.0, token: 1.0})))
    assert refused is not None
    assert refused.error is not None
    assert (refused.error.code, refused.error.param) == ("invalid_request", "logit_bias")
    assert str(token) in refused.error.message
    assert "2911" in refused.error.message


def test_an_answer_of_another_model_is_not_continued(runner: Runner) -> None:
    refused = runner.submit(submit(runner, output_tokens=[7, 2912]))
    assert refused is not None
    assert refused.error is not None
    assert refused.error.code == "generation_interrupted"


def test_an_answer_that_was_complete_before_the_crash_gets_no_further_token(runner: Runner) -> None:
    message = submit(runner, sampling=SamplingParams(temperature=0.0), output_format=OutputFormat(kind="regex", value="[ab]{3}"))
    outputs = finish(runner, message)
    tokens = [token for output in outputs for token in output.tokens]
    assert tokens
    resumed = finish(runner, Submit(generation_id="r", owner="a", request=message.request, output_tokens=tokens))
    assert [token for output in resumed for token in output.tokens] == []
    assert resumed[-1].stats is not None
    assert resumed[-1].stats.stop_reason == "eosFound"


def test_an_answer_may_grow_past_the_context_and_says_what_went_out_of_sight(runner: Runner) -> None:
    messages = [ChatMessage(role="system", content="time year"), ChatMessage(role="user", content="people way")]
    sampling = SamplingParams(temperature=0.0, repeat_penalty=1.0, max_tokens=700)
    kept = {}
    for policy in ("rollingWindow", "truncateMiddle", "stopAtLimit"):
        request = GenerationRequest(model="m", messages=messages, sampling=sampling, context_overflow=policy)  # type: ignore[arg-type]
        outputs = finish(runner, Submit(generation_id=policy, owner="a", request=request))
        stats = outputs[-1].stats
        assert stats is not None
        told = [event for output in outputs for event in output.events if isinstance(event, ContextOverflow)]
        if policy == "stopAtLimit":
            assert not told
            assert (stats.stop_reason, stats.input_tokens + stats.total_output_tokens) == ("contextLengthReached", 512)
            continue
        assert (stats.stop_reason, stats.total_output_tokens) == ("maxPredictedTokensReached", 700)
        assert [event.dropped_tokens for event in told] == [told[0].dropped_tokens * (i + 1) for i in range(len(told))]
        assert stats.dropped_tokens == told[-1].dropped_tokens
        kept[policy] = 513 - 2 * told[0].dropped_tokens
    system, first = (runner.engine.tokenize(text, add_bos=False) for text in ("time year", "people way"))
    assert len(system) < kept["rollingWindow"] < kept["truncateMiddle"] - len(first)


def test_an_answer_without_a_limit_ends_when_it_is_as_long_as_the_context(runner: Runner) -> None:
    outputs = finish(runner, submit(runner, sampling=SamplingParams(temperature=0.0), context_overflow="rollingWindow"))
    assert outputs[-1].stats is not None
    assert (outputs[-1].stats.stop_reason, outputs[-1].stats.total_output_tokens) == ("contextLengthReached", 512)


def test_a_stop_string_ends_an_answer_and_the_counts_are_right(runner: Runner) -> None:
    sampling = SamplingParams(temperature=0.0, repeat_penalty=1.0, max_tokens=24)
    whole = finish(runner, submit(runner, sampling=sampling))
    text = "".join(event.content for output in whole for event in output.events if isinstance(event, MessageDelta))
    stats = whole[-1].stats
    assert stats is not None
    assert (stats.stop_reason, stats.total_output_tokens) == ("maxPredictedTokensReached", 24)
    assert stats.input_tokens == len(runner.engine.tokenize("<|im_start|>user\ntime<|im_end|>\n<|im_start|>assistant\n", add_bos=True))
    stop = text[20:26]
    cut = finish(runner, submit(runner, sampling=SamplingParams(temperature=0.0, repeat_penalty=1.0, stop=[stop])))
    assert "".join(event.content for output in cut for event in output.events if isinstance(event, MessageDelta)) == text[:20]
    assert cut[-1].stats is not None
    assert cut[-1].stats.stop_reason == "stopStringFound"
    assert cut[-1].stats.total_output_tokens == sum(len(output.tokens) for output in cut) < 24


def test_a_tool_that_must_be_called_is_called_with_arguments_that_fit(runner: Runner) -> None:
    parameters = '{"properties": {"n": {"enum": [1, 2, 3]}}, "required": ["n"], "additionalProperties": false}'
    sampling = SamplingParams(temperature=1.0, seed=4, max_tokens=200)
    tools = (Tool(name="pick", parameters=parameters),)
    message = submit(runner, sampling=sampling, tools=tools, tool_choice="required", parallel_tool_calls=False)
    template = (REPOSITORY / "models_app" / "starter" / "chat_template.jinja").read_text()
    outputs = finish(runner, Submit(generation_id="t", owner="a", request=message.request, chat_template=template))
    events = [event for output in outputs for event in output.events]
    arguments = "".join(event.content for event in events if isinstance(event, ToolCallArguments))
    assert json.loads(arguments)["n"] in {1, 2, 3}
    assert outputs[-1].stats is not None
    assert outputs[-1].stats.stop_reason == "toolCalls"


def test_what_the_engine_lacks_is_refused_before_it_runs(runner: Runner) -> None:
    message = submit(runner, draft_model="a/b")
    refused = runner.submit(Submit(generation_id="d", owner="a", request=message.request, draft_path="/nowhere"))
    assert refused is not None
    assert refused.error is not None
    assert not runner.jobs
    assert not runner.has_work


def test_fast_steps_leave_together_but_first_words_and_ends_at_once() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        outbox, host = Outbox(Channel(ours, RunnerMessage)), Channel(theirs, RunnerMessage)

        def brought(name: str, token: int, stats: Stats | None = None) -> list[Output]:
            return [Output(generation_id=name, events=[MessageDelta(content=f"{token} ")], tokens=[token], stats=stats)]

        def received() -> list[tuple[str, str, list[int], bool]]:
            (message,) = host.receive()
            assert isinstance(message, Step)
            return [
                (
                    each.generation_id,
                    "".join(event.content for event in each.events if isinstance(event, MessageDelta)),
                    each.tokens,
                    each.stats is not None,
                )
                for each in message.outputs
            ]

        outbox.add(brought("a", 1))
        assert received() == [("a", "1 ", [1], False)]
        outbox.add(brought("a", 2))
        outbox.add(brought("a", 3))
        outbox.add(brought("b", 9))
        assert received() == [("a", "2 3 ", [2, 3], False), ("b", "9 ", [9], False)]
        outbox.add(brought("a", 4))
        outbox.add(brought("a", 5, Stats(stop_reason="eosFound")))
        assert received() == [("a", "4 5 ", [4, 5], True)]
