"""The runner: one process, one loaded model, one loop. Started by the host as ``python -m workers.runner FD``.

It has no database, no Redis, no secrets and no Django; it speaks ``workers.protocol`` over the inherited socket and ends when
the host does. Nothing else may run in this process: one busy thread beside the loop costs two thirds of its speed.
"""

from __future__ import annotations

import logging
import os
import secrets
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import msgspec

from lmweb.errors import ContextLengthExceeded, GenerationInterrupted, InvalidRequest, LmwebError, ModelLoadFailed
from workers.constraints import Constraint
from workers.embeddings import EmbeddingQueue
from workers.engines import registry
from workers.engines.base import Engine, Logprob, Sequence
from workers.events import (
    AnyEvent,
    ContextOverflow,
    ErrorInfo,
    PromptProcessingEnd,
    PromptProcessingProgress,
    PromptProcessingStart,
    Stats,
    TokenLogprob,
    TopLogprob,
)
from workers.overflow import kept_messages, room_for_answer, shorten
from workers.parsing.output import OutputParser, replay
from workers.parsing.tools.grammar import argument_schema
from workers.parsing.tools.reader import CallReader
from workers.parsing.tools.requests import call_limit, callable_tools, grammars, usable_tools
from workers.prompting import Prompter
from workers.protocol import Cancel, Channel, Embed, HostMessage, Load, Loaded, LoadFailed, LoadProgress, Output, Shutdown, Step, Submit
from workers.reports import Outbox, QueueReport, StepLog
from workers.scheduler import common_prefix
from workers.schemas import ChatMessage, GenerationRequest, OverflowPolicy, Tool

logger = logging.getLogger(__name__)

#: Prompts that take several steps report their progress.
PROGRESS_MIN_TOKENS = 256
#: Tokens are shorter than this. Splitting megabytes into tokens takes seconds, in which all others stand still; what is longer than so
#: many times the context is refused without.
MAX_TOKEN_CHARACTERS = 256


@dataclass(slots=True)
class Job:
    """A generation inside the runner: its sequence in the engine, and its text."""

    sequence: Sequence
    parser: OutputParser
    resumed_tokens: int
    prompt_done: bool
    overflow: OverflowPolicy = "stopAtLimit"
    dropped_messages: int = 0
    dropped_tokens: int = 0
    call_limit: int | None = None
    complete: bool = False
    prompt_announced: bool = False
    first_token_at: float | None = None
    reasoned_until: float | None = None

    def overflow_event(self) -> ContextOverflow:
        """Return what the model does not see."""
        return ContextOverflow(policy=self.overflow, dropped_messages=self.dropped_messages, dropped_tokens=self.dropped_tokens)

    def stats(self, stop_reason: str) -> Stats:
        """Return the counts and timings so far."""
        now, sequence = time.perf_counter(), self.sequence
        first = self.first_token_at or now
        new_tokens = len(sequence.output) - self.resumed_tokens
        decode_seconds = now - first
        drafts = sequence.drafts
        total = drafts.accepted + drafts.rejected + drafts.ignored
        guessed = total > 0 or bool(sequence.draft)
        return Stats(
            input_tokens=len(sequence.prompt),
            total_output_tokens=len(sequence.output),
            reasoning_output_tokens=self.parser.reasoning_tokens,
            reasoning_time_seconds=round(self.reasoned_until - first, 6) if self.reasoned_until else 0.0,
            cached_input_tokens=sequence.cached,
            tokens_per_second=round((new_tokens - 1) / decode_seconds, 2) if new_tokens > 1 and decode_seconds > 0 else 0.0,
            time_to_first_token_seconds=round(first - sequence.submitted_at, 6),
            generation_time_seconds=round(now - sequence.submitted_at, 6),
            stop_reason=stop_reason,
            dropped_messages=self.dropped_messages,
            dropped_tokens=self.dropped_tokens,
            draft_model=sequence.draft or None,
            total_draft_tokens_count=total if guessed else None,
            accepted_draft_tokens_count=drafts.accepted if guessed else None,
            rejected_draft_tokens_count=drafts.rejected if guessed else None,
            ignored_draft_tokens_count=drafts.ignored if guessed else None,
        )


class Runner:
    """Owns the engine and the jobs. ``send`` delivers a message to the host."""

    def __init__(self, engine: Engine, step_log: StepLog, *, draft: tuple[str, str] = ("", "")) -> None:
        """Serve this engine; ``draft`` is the key and the path of the draft model for requests that name none."""
        self.engine = engine
        self._draft = draft
        self.jobs: dict[str, Job] = {}
        self._prompter = lru_cache(maxsize=8)(self._make_prompter)
        self._opening = lru_cache(maxsize=256)(self._render_opening)
        self._log = step_log
        self._queue = QueueReport(engine.info.parallel)
        self._embeddings = EmbeddingQueue(engine.embedder, engine.info.vocab_size)
        self._new: dict[str, tuple[list[AnyEvent], list[int]]] = {}  # what the present step brought: events and tokens
        self._reasons: dict[str, str] = {}  # and why which generations ended in it

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self.engine.has_work or self._embeddings.has_work

    def embed(self, message: Embed) -> Output | None:
        """Queue an embedding request; returns its only output if it is refused."""
        return self._embeddings.submit(message)

    def _make_prompter(self, chat_template: str) -> Prompter:
        """Return what makes prompts with this template, or with the model's own if it is empty. Raises ``TemplateError``."""
        info = self.engine.info
        return Prompter(chat_template or info.chat_template, bos_token=info.bos_text, eos_token=info.eos_text)

    def submit(self, message: Submit) -> Output | None:
        """Start a generation; returns what is to be said at once: that it was refused, is complete already, or was shortened."""
        try:
            job = self._prepare(message)
            reason = self._ended(job)
            if not reason:
                self.engine.add(job.sequence)
        except LmwebError as error:
            info = ErrorInfo(code=error.code, message=error.message, param=error.param, details=error.details)
            return Output(generation_id=message.generation_id, error=info, stats=Stats(stop_reason="failed"))
        except Exception:  # one request that breaks a library must not end everybody's generation
            logger.exception("generation %s could not be prepared", message.generation_id)
            info = ErrorInfo(code=LmwebError.code, message="The request could not be prepared. The runner's log says more.")
            return Output(generation_id=message.generation_id, error=info, stats=Stats(stop_reason="failed"))
        if reason:
            events = job.parser.finish()
            return Output(generation_id=message.generation_id, events=events, stats=job.stats(_stop_reason(job, reason)))
        self.jobs[message.generation_id] = job
        if not job.dropped_messages or message.output_tokens:
            return None
        return Output(generation_id=message.generation_id, events=[job.overflow_event()])

    def cancel(self, message: Cancel) -> Output | None:
        """End a generation; returns its last output, or None if it is not running here."""
        job = self.jobs.pop(message.generation_id, None)
        if job is None:
            return self._embeddings.cancel(message.generation_id)
        self.engine.remove(message.generation_id)
        return Output(generation_id=message.generation_id, events=job.parser.finish(), stats=job.stats("userStopped"))

    def step(self) -> Step:
        """Advance the engine by one step, and the embeddings by one batch; return what that brought."""
        generating = self.engine.has_work
        outputs = self._generate() if generating else []
        if self._embeddings.has_work:
            outputs += self._embeddings.step(shared=generating)
        return Step(outputs=outputs)

    def _generate(self) -> list[Output]:
        outputs = self._new = {}
        self._reasons = {}
        result = self.engine.step(self._take)
        for sequence, done in result.prefilled:
            if events := self._prompt_events(self.jobs[sequence.id], done):
                outputs.setdefault(sequence.id, ([], []))[0][:0] = events  # before what was sampled right after the prompt
        finished: dict[str, tuple[Stats, ErrorInfo | None]] = {}
        for generation_id, reason in self._reasons.items():
            finished[generation_id] = (self._end(generation_id, outputs[generation_id][0], reason), None)
        for sequence in result.slid:
            job = self.jobs[sequence.id]
            job.dropped_tokens = sequence.dropped
            outputs[sequence.id][0].append(job.overflow_event())
        for sequence, text in result.failed:
            events, _ = outputs.setdefault(sequence.id, ([], []))
            finished[sequence.id] = (self._end(sequence.id, events, "failed"), ErrorInfo(code="context_length_exceeded", message=text))
        for generation_id, event in self._queue.due(self.engine.queue):
            outputs.setdefault(generation_id, ([], []))[0].append(event)
        self._log.write(result)
        nothing = (None, None)
        return [
            Output(generation_id=key, events=events, tokens=kept, stats=finished.get(key, nothing)[0], error=finished.get(key, nothing)[1])
            for key, (events, kept) in outputs.items()
        ]

    def _prepare(self, message: Submit) -> Job:
        request, info = message.request, self.engine.info
        if not info.can_generate:
            raise InvalidRequest("This model makes embeddings; it cannot chat.", param="model")
        self._check_tokens(message)
        prompter = self._prompter(message.chat_template)
        messages, prompt_text, prompt = self._fit(prompter, request)
        if not prompt:
            raise InvalidRequest("The prompt is empty.", param="messages")
        if len(prompt) >= info.context_length:
            raise ContextLengthExceeded(
                f"The prompt has {len(prompt)} tokens, but the model's context holds {info.context_length}. "
                "Shorten it, or load the model with a longer context.",
                param="messages",
                details={"prompt_tokens": len(prompt), "context_length": info.context_length},
            )
        sampling = request.sampling
        if sampling.seed is None:
            sampling = msgspec.structs.replace(sampling, seed=secrets.randbits(31))
        room = info.context_length - len(prompt)
        slides = request.context_overflow != "stopAtLimit" and (sampling.max_tokens or info.context_length) > room
        limit = sampling.max_tokens or info.context_length if slides else min(sampling.max_tokens or room, room)
        parser = OutputParser(
            sampling.stop,
            starts_reasoning=prompter.starts_reasoning(prompt_text),
            calls=_call_reader(prompter, message),
            tags=prompter.tags,
        )
        constraint = self._constraint(prompter, request)
        complete = replay(parser, message.output_tokens, self.engine.piece, constraint)
        sequence = Sequence(
            id=message.generation_id,
            owner=message.owner,
            prompt=prompt,
            shared_prefix=self._shared_tokens(message, prompt),
            sampling=sampling,
            limit=limit,
            lane=request.lane,
            output=list(message.output_tokens),
            constraint=constraint,
            top_logprobs=request.top_logprobs,
            draft=self._use_draft(message),
            window=info.context_length if slides else 0,
            keep=min(self._kept_tokens(message, messages, prompt), info.context_length // 2) if slides else 0,
        )
        return Job(
            sequence,
            parser,
            resumed_tokens=len(message.output_tokens),
            prompt_done=bool(message.output_tokens),
            overflow=request.context_overflow,
            dropped_messages=len(request.messages) - len(messages),
            dropped_tokens=sequence.dropped,
            call_limit=call_limit(request),
            complete=complete,
        )

    def _check_tokens(self, message: Submit) -> None:
        """Refuse token ids that the vocabulary lacks: in a batch they would fail everybody's step."""
        size = self.engine.info.vocab_size
        if wrong := [token for token in message.request.sampling.logit_bias if not 0 <= token < size]:
            raise InvalidRequest(f"'logit_bias' names token {wrong[0]}; this model's tokens are 0 to {size - 1}.", param="logit_bias")
        if any(not 0 <= token < size for token in message.output_tokens):
            raise GenerationInterrupted("The answer was begun by another model under this name and cannot be continued. Its text is kept.")

    def _use_draft(self, message: Submit) -> str:
        """Return the key of the draft model that guesses for this request, empty for none. Raises ``InvalidRequest`` for a wrong one."""
        wanted = message.request.draft_model
        key, path = self._draft if wanted is None else (wanted, message.draft_path)
        return key if path and self.engine.use_draft(key, path) else ""

    def _fit(self, prompter: Prompter, request: GenerationRequest) -> tuple[list[ChatMessage], str, list[int]]:
        """Return the messages that the model gets, with their prompt as text and tokens; too long only if nothing may be left out."""
        context_length = self.engine.info.context_length

        def rendered(messages: list[ChatMessage]) -> tuple[str, list[int]]:
            text = prompter.render(request, messages)
            if len(text) > context_length * MAX_TOKEN_CHARACTERS and request.context_overflow == "stopAtLimit":
                raise ContextLengthExceeded(
                    f"The prompt has {len(text)} characters, more than the model's context of {context_length} tokens can hold. "
                    "Shorten it, or load the model with a longer context.",
                    param="messages",
                    details={"context_length": context_length},
                )
            return text, self._tokenize(text)

        text, prompt = rendered(request.messages)
        if len(prompt) < context_length or request.context_overflow == "stopAtLimit":
            return request.messages, text, prompt
        limit = context_length - room_for_answer(context_length, request.sampling.max_tokens)
        shortened = shorten(request.messages, request.context_overflow, lambda kept: len(rendered(kept)[1]) <= limit)
        if shortened is None:
            return request.messages, text, prompt
        return shortened[0], *rendered(shortened[0])

    def _tokenize(self, prompt: str) -> list[int]:
        bos = self.engine.info.bos_text
        return self.engine.tokenize(prompt, add_bos=not (bos and prompt.startswith(bos)))

    def _constraint(self, prompter: Prompter, request: GenerationRequest) -> Constraint | None:
        if callable_tools(request):
            return self.engine.constraints().make_calls(partial(grammars, request, prompter.syntax))
        return None if request.output_format is None else self.engine.constraints().make(request.output_format)

    def _shared_tokens(self, message: Submit, prompt: list[int]) -> int:
        """Return how many tokens of the prompt come from the system prompt and the tools, which different people may share."""
        first = message.request.messages[0]
        return self._opening_tokens(message, [first], prompt) if first.role in {"system", "developer"} else 0

    def _kept_tokens(self, message: Submit, messages: list[ChatMessage], prompt: list[int]) -> int:
        """Return how many tokens of the prompt stay in sight when the answer grows past the context."""
        return self._opening_tokens(message, kept_messages(messages, message.request.context_overflow), prompt) or 1

    def _opening_tokens(self, message: Submit, opening: list[ChatMessage], prompt: list[int]) -> int:
        """Return how many tokens of the prompt come from its first messages and the tools."""
        prefix = self._opening(message.chat_template, tuple(opening), usable_tools(message.request)) if opening else ()
        return common_prefix(prompt, list(prefix))

    def _render_opening(self, chat_template: str, opening: tuple[ChatMessage, ...], tools: tuple[Tool, ...]) -> tuple[int, ...]:
        try:
            text = self._prompter(chat_template).render_opening(opening, tools)
        except LmwebError:  # some templates demand a user's turn
            return ()
        return tuple(self._tokenize(text))

    def _prompt_events(self, job: Job, done: int) -> list[AnyEvent]:
        total = len(job.sequence.prompt)
        if job.prompt_done or total - job.sequence.cached < PROGRESS_MIN_TOKENS:
            return []
        events: list[AnyEvent] = []
        if not job.prompt_announced:
            job.prompt_announced = True
            events.append(PromptProcessingStart())
        events.append(PromptProcessingProgress(progress=round(done / total, 4)))
        if done >= total:
            job.prompt_done = True
            events.append(PromptProcessingEnd())
        return events

    def _take(self, sequence: Sequence, token: int, logprob: Logprob | None) -> bool:
        """Turn a token into events; returns whether the generation goes on."""
        job = self.jobs[sequence.id]
        new = self._new.get(sequence.id)
        if new is None:
            new = self._new[sequence.id] = ([], [])
        if job.first_token_at is None:
            job.first_token_at = time.perf_counter()
        if self.engine.is_end(token) and not sequence.sampling.ignore_eos:
            sequence.output.pop()
            self._reasons[sequence.id] = "eosFound"
            return False
        new[1].append(token)
        if logprob is not None:
            job.parser.note_logprob(self._describe(logprob))
        new[0].extend(job.parser.feed(self.engine.piece(token)))
        if job.parser.is_reasoning:
            job.reasoned_until = time.perf_counter()
        if reason := self._ended(job):
            self._reasons[sequence.id] = reason
            return False
        if sequence.constraint is not None:
            sequence.constraint.follow(job.parser)
        return True

    def _ended(self, job: Job) -> str:
        """Return the stop reason if the text so far is the whole answer."""
        constraint = job.sequence.constraint
        if job.parser.stopped:
            return "stopStringFound"
        if job.complete or (constraint is not None and constraint.is_complete):
            return "eosFound"
        if job.call_limit is not None and job.parser.completed_calls >= job.call_limit:
            return "toolCalls"
        return self._limit_reason(job) if len(job.sequence.output) >= job.sequence.limit else ""

    def _describe(self, logprob: Logprob) -> TokenLogprob:
        top = [TopLogprob(**self._token_text(token), logprob=round(value, 6)) for token, value in logprob.top]
        return TokenLogprob(**self._token_text(logprob.token), logprob=round(logprob.logprob, 6), top_logprobs=top)

    def _token_text(self, token: int) -> dict[str, Any]:
        piece = self.engine.piece(token)
        return {"token": piece.decode("utf-8", "replace"), "bytes": list(piece)}

    def _limit_reason(self, job: Job) -> str:
        asked = job.sequence.sampling.max_tokens
        return "maxPredictedTokensReached" if asked is not None and asked <= job.sequence.limit else "contextLengthReached"

    def _end(self, generation_id: str, events: list[AnyEvent], reason: str) -> Stats:
        job = self.jobs.pop(generation_id)
        self.engine.remove(generation_id)
        events += job.parser.finish()
        stats = job.stats(_stop_reason(job, reason))
        self._queue.note_end(stats.generation_time_seconds)
        return stats


def _call_reader(prompter: Prompter, message: Submit) -> CallReader | None:
    tools = callable_tools(message.request)
    schemas = {tool.name: argument_schema(tool, i) for i, tool in enumerate(tools)}
    return CallReader(prompter.syntax, schemas, message.generation_id) if tools else None


def _stop_reason(job: Job, reason: str) -> str:
    """Return the reason as it is reported: an answer that ends after calls ended for their sake."""
    return "toolCalls" if reason == "eosFound" and job.parser.completed_calls else reason


def load(channel: Channel, message: Load) -> Engine:
    """Load the model, reporting progress at most every 2 %. Raises ``ModelLoadFailed``."""
    reported = 0.0

    def on_progress(fraction: float) -> None:
        nonlocal reported
        if fraction - reported >= 0.02:
            reported = fraction
            channel.send(LoadProgress(progress=round(fraction, 3)))

    started = time.perf_counter()
    engine = registry.factory(message.engine)(message.path, message.config, on_progress)
    if message.draft_path:
        engine.use_draft(message.config.draft_model, message.draft_path)
    info = engine.info
    channel.send(
        Loaded(
            context_length=info.context_length,
            parallel=info.parallel,
            vocab_size=info.vocab_size,
            load_time_seconds=round(time.perf_counter() - started, 4),
            weights_bytes=info.weights_bytes,
            eval_batch_size=info.eval_batch_size,
            flash_attention=message.config.flash_attention,
        )
    )
    return engine


def serve(channel: Channel, runner: Runner, step_log: StepLog) -> None:
    """The loop: drain the inbox, step, send. Blocks while there is nothing to do; returns on ``Shutdown``."""
    outbox = Outbox(channel)
    while True:
        while _readable(channel, wait=not runner.has_work, before_waiting=step_log.flush):
            outbox.flush()  # what comes may take long
            for message in channel.receive():
                if isinstance(message, Shutdown):
                    return
                output = _handle(runner, message)  # type: ignore[arg-type]
                if output is not None:
                    outbox.add([output])
        if runner.has_work:
            outbox.add(runner.step().outputs)


def _handle(runner: Runner, message: HostMessage) -> Output | None:
    if isinstance(message, Submit):
        return runner.submit(message)
    if isinstance(message, Embed):
        return runner.embed(message)
    if isinstance(message, Cancel):
        return runner.cancel(message)
    raise TypeError(f"unexpected message {type(message).__name__}")


def _readable(channel: Channel, *, wait: bool, before_waiting: Callable[[], None]) -> bool:
    if select.select([channel], [], [], 0)[0]:
        return True
    if not wait:
        return False
    before_waiting()
    select.select([channel], [], [])
    return True


def main() -> int:
    """Run until the host says so or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the host decides when we end
    channel = Channel(socket.socket(fileno=int(sys.argv[1])), HostMessage)
    try:
        message = next(m for m in channel.receive() if isinstance(m, Load))
        step_log = StepLog(message.step_log)
        try:
            engine = load(channel, message)
            runner = Runner(engine, step_log, draft=(message.config.draft_model, message.draft_path))
        except LmwebError as error:
            channel.send(LoadFailed(error=ErrorInfo(code=ModelLoadFailed.code, message=error.message)))
            return 1
        serve(channel, runner, step_log)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the host is gone, and with it everybody who wanted anything
    return 0


if __name__ == "__main__":
    code = main()
    os._exit(code)  # the system frees the memory faster than llama.cpp does
