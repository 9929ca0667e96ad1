"""The MLX engine: directories of safetensors through mlx-lm's ``BatchGenerator``, which batches continuously."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import BatchGenerator

from lmweb.errors import InvalidModelFile, InvalidRequest, ModelLoadFailed
from workers.constraints import ConstraintFactory
from workers.engines.base import Embedder, Engine, EngineInfo, Logprob, Sequence, StepResult, TokenTaker
from workers.engines.batching import BatchingEngine
from workers.engines.card import Feature
from workers.engines.kv_park import MIN_TOKENS, park_bytes
from workers.engines.mlx_card import CARD
from workers.engines.mlx_model import Loaded, open_model
from workers.engines.mlx_prefixes import Prefixes, cut
from workers.engines.pace import Pace
from workers.engines.sampling import TokenSampler, likeliest, log_probabilities
from workers.memory import kv_cells
from workers.mlx_directory import read_directory
from workers.scheduler import MIN_CHUNK, Admission, Scheduler, Slot
from workers.schemas import LoadConfig

#: Prompts that are computed side by side. They are padded to the longest piece among them.
PROMPTS_AT_ONCE = 4
#: ``BatchGenerator`` counts tokens too; the runner decides when an answer ends.
ENDLESS = 1 << 62


class PaddedScheduler(Scheduler):
    """A batch of MLX is a rectangle: every sequence takes as many cells as the longest one."""

    def _fits(self, sequence: Sequence, n_shared: int) -> bool:
        running = self._running_sequences()
        longest = max(len(item.tokens) + self._reserve(item) for item in [*running, sequence])
        return not running or (len(running) + 1) * longest <= self.cells

    @property
    def is_full(self) -> bool:
        """Whether the next token of everybody would be too many."""
        running = self.running
        return len(running) > 1 and len(running) * (max(len(slot.tokens) for slot in running) + 1) > self.cells


@dataclass(slots=True)
class Stream:
    """One sequence inside the ``BatchGenerator``, which calls ``process`` and then ``sample`` for each of its tokens.

    The token is chosen in ``process``, where the logits are not normalised yet, and reported at once: the mask of the next one
    depends on what the text looks like with this one.
    """

    slot: Slot
    sampler: TokenSampler
    choose: Callable[[Stream, Any], int]
    uid: int = -1
    start: int = 0
    has_begun: bool = False
    _token: int = 0

    def process(self, _context: Any, logits: Any) -> Any:
        """Choose the next token from its row of logits, which is returned as it is."""
        self._token = self.choose(self, logits)
        return logits

    def sample(self, _logprobs: Any) -> Any:
        """Return the token that was chosen."""
        return mx.array([self._token], dtype=mx.uint32)


@dataclass
class MlxEngine(BatchingEngine):
    """One loaded directory. See ``workers.engines.base.Engine`` for the contract."""

    loaded: Loaded
    generator: Any  # a BatchGenerator, most of which has no types
    info: EngineInfo
    scheduler: PaddedScheduler
    prefixes: Prefixes
    _streams: dict[str, Stream] = field(default_factory=dict)
    _samplers: dict[str, TokenSampler] = field(default_factory=dict)
    _constraints: ConstraintFactory | None = None
    _pace: Pace = field(default_factory=Pace)
    _take: TokenTaker | None = None
    _slid: list[Stream] = field(default_factory=list)

    def embedder(self) -> Embedder:
        """Raise ``InvalidRequest``: the library has no embeddings."""
        raise InvalidRequest(CARD.lacks[Feature.EMBEDDINGS], param="model")

    def tokenize(self, text: str, *, add_bos: bool) -> list[int]:
        """Return the tokens of a text."""
        return self.loaded.vocabulary.tokenize(text, add_bos=add_bos)

    def piece(self, token: int) -> bytes:
        """Return a token's bytes."""
        return self.loaded.vocabulary.piece(token)

    def is_end(self, token: int) -> bool:
        """Return whether the token ends a generation."""
        return token in self.loaded.vocabulary.ends

    def constraints(self) -> ConstraintFactory:
        """Return what makes constraints over the vocabulary."""
        if self._constraints is None:
            self._constraints = ConstraintFactory(self.loaded.vocabulary.table)
        return self._constraints

    def use_draft(self, key: str, path: str) -> bool:
        """Raise ``InvalidRequest``: the library guesses for a single sequence only."""
        raise InvalidRequest(CARD.lacks[Feature.DRAFT_MODEL], param="draft_model")

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises ``InvalidRequest`` for a sampler that this engine has not."""
        if sequence.sampling.dry_multiplier > 0.0:
            raise InvalidRequest(CARD.lacks[Feature.DRY], param="dry_multiplier")
        super().add(sequence)

    def step(self, take: TokenTaker) -> StepResult:
        """Admit what fits, compute one batch and sample."""
        if self.scheduler.is_full and (victim := self.scheduler.preempt()) is not None:
            self._preempt(victim)
        else:
            self._admit_waiting()
        if not self._streams:
            return StepResult()
        self._take = take
        decoding = [stream for stream in self._streams.values() if stream.has_begun]
        self._size_prompts(len(decoding))
        started = time.perf_counter()
        with self.generator.stats() as counted:
            prompts, _ = self.generator.next()
        seconds = time.perf_counter() - started
        begun = sum(response.end_of_prompt for response in prompts)  # their last token is not counted
        result = StepResult(decode_sequences=len(decoding), prefill_tokens=counted.prompt_tokens + begun, seconds=seconds)
        self._note(result, decoding, prompts)
        result.slid = [self._slide(stream) for stream in self._slid]
        self._slid = []
        return result

    def close(self) -> None:
        """Free everything."""
        super().close()
        self.generator.close()

    def _admit(self, admission: Admission) -> None:
        """Give a sequence its slot with the longest prefix at hand: a running neighbour's, or a kept one."""
        sequence = admission.sequence
        cache, n = self.prefixes.find(sequence)
        if admission.source is not None and admission.source.sequence is not None and admission.n_shared > max(n, MIN_TOKENS - 1):
            lender = self._streams[admission.source.sequence.id]
            if lender.slot.n_kv > lender.start:  # else it is not in a batch yet, and its cache would not be a copy
                other, held = self.generator.extract_cache([lender.uid])[lender.uid]
                if len(held) >= admission.n_shared and cut(other, len(held), admission.n_shared):
                    cache, n = other, admission.n_shared
        if sequence.id not in self._samplers:  # not one that was preempted: its prompt was counted before
            sequence.cached = min(n, len(sequence.prompt))
            history = sequence.prompt + sequence.output
            self._samplers[sequence.id] = TokenSampler(sequence.sampling, self.info.vocab_size, history, drawn=len(sequence.output))
        self.scheduler.occupy(admission.slot, sequence, n)
        self._insert(admission.slot, sequence, cache if n else None)

    def _insert(self, slot: Slot, sequence: Sequence, cache: list[Any] | None) -> None:
        """Hand a slot's sequence to the generator. It stops at the end of the system prompt, so that this can be kept by itself."""
        tokens, n = slot.tokens, slot.n_kv
        opening = sequence.shared_prefix if n + MIN_TOKENS <= sequence.shared_prefix < len(tokens) and not sequence.dropped else n
        stream = Stream(slot, self._samplers[sequence.id], self._choose, start=n)
        (stream.uid,) = self.generator.insert_segments(
            [[tokens[n:opening], tokens[opening:]]],
            max_tokens=[ENDLESS],
            caches=None if cache is None else [cache],
            all_tokens=[tokens[:n]],
            samplers=[stream.sample],
            logits_processors=[[stream.process]],
        )
        self._streams[sequence.id] = stream

    def _withdraw(self, slot: Slot) -> tuple[list[Any], list[int]]:
        """Take a slot's sequence from the generator; returns its cache and the tokens in it."""
        assert slot.sequence is not None
        uid = self._streams.pop(slot.sequence.id).uid
        cache, tokens = self.generator.remove([uid], return_prompt_caches=True)[uid]
        return cache, list(tokens)

    def _vacate(self, slot: Slot) -> None:
        """Keep what a slot has computed, and free it."""
        assert slot.sequence is not None
        owner = slot.sequence.owner
        cache, tokens = self._withdraw(slot)
        self.prefixes.keep(owner, tokens, cache)
        self.scheduler.release(slot)

    def _slide(self, stream: Stream) -> Sequence:
        """Move a full window on: what stays in sight is computed again, except its beginning where the cache can be cut."""
        slot = stream.slot
        assert slot.sequence is not None
        sequence = slot.sequence
        cache, tokens = self._withdraw(slot)
        kept = sequence.keep if cut(cache, len(tokens), sequence.keep) else 0
        self.scheduler.slide(slot, kept)
        self._insert(slot, sequence, cache if kept else None)
        return sequence

    def _size_prompts(self, decoding: int) -> None:
        """Set how much of each prompt the next step computes: little while somebody decodes."""
        prompts = min(PROMPTS_AT_ONCE, len(self._streams) - decoding) or 1
        most = max(MIN_CHUNK, self.info.eval_batch_size // prompts)
        self.generator.prefill_step_size = min(most, max(MIN_CHUNK, self._pace.budget() // prompts)) if decoding else most

    def _choose(self, stream: Stream, logits: Any) -> int:
        """Choose a sequence's next token and report it; called from within the generator's step."""
        slot = stream.slot
        sequence = slot.sequence
        assert sequence is not None
        assert self._take is not None
        row = np.array(logits[0].astype(mx.float32))
        before = log_probabilities(row) if sequence.top_logprobs is not None else None
        token = stream.sampler.sample(row, sequence.constraint)
        slot.n_kv = len(slot.tokens)
        sequence.output.append(token)
        slot.tokens.append(token)
        stream.has_begun = True
        report = None if before is None else Logprob(token, float(before[token]), likeliest(before, sequence.top_logprobs or 0))
        if self._take(sequence, token, report) and sequence.window and len(slot.tokens) > sequence.window:
            self._slid.append(stream)
        return token

    def _note(self, result: StepResult, decoding: list[Stream], prompts: list[Any]) -> None:
        """Note what a step has computed, and what it cost whom."""
        by_uid = {stream.uid: stream for stream in self._streams.values()}
        shares = []
        for response in prompts:
            stream = by_uid[response.uid]
            sequence = stream.slot.sequence
            assert sequence is not None
            done = stream.start + response.progress[0]
            if not stream.has_begun:
                shares.append((sequence.owner, done - stream.slot.n_kv))
                stream.slot.n_kv = done
            result.prefilled.append((sequence, min(done, len(sequence.prompt))))
            if response.end_of_segment and done == sequence.shared_prefix:
                cache, tokens = self.generator.extract_cache([response.uid])[response.uid]
                self.prefixes.keep_shared(list(tokens), cache)
        owners = [stream.slot.sequence.owner for stream in decoding if stream.slot.sequence]
        if decoding or result.prefill_tokens >= MIN_CHUNK:
            self._pace.note(result.seconds, result.prefill_tokens, len(decoding))
        self._pace.charge(self.scheduler.fair, owners, shares, result.seconds)


def load(path: str, config: LoadConfig, on_progress: Callable[[float], None]) -> Engine:
    """Load the directory of a ``config.json``. ``config.context_length`` is set. Raises ``ModelLoadFailed``."""
    try:
        CARD.check(config)
        directory = read_directory(Path(path).parent)
    except (InvalidRequest, InvalidModelFile) as error:
        raise ModelLoadFailed(error.message) from error
    if config.gpu_layers == 0:
        mx.set_default_device(mx.Device(mx.DeviceType.cpu))
    loaded = open_model(directory, on_progress)
    trained = directory.context_length
    context_length = min(config.context_length or trained, trained)
    cells = kv_cells(context_length, config.parallel, directory.kv_bytes_per_token)
    info = EngineInfo(
        context_length=context_length,
        cells=cells,
        parallel=config.parallel,
        vocab_size=loaded.vocabulary.size,
        weights_bytes=loaded.weights_bytes,
        eval_batch_size=config.eval_batch_size,
        chat_template=directory.chat_template,
        bos_text=loaded.vocabulary.bos_text,
        eos_text=loaded.vocabulary.eos_text,
    )
    generator = BatchGenerator(
        loaded.model,
        completion_batch_size=config.parallel,
        prefill_batch_size=min(PROMPTS_AT_ONCE, config.parallel),
        prefill_step_size=config.eval_batch_size,
        stream=mx.new_thread_local_stream(mx.default_device()),
    )
    scheduler = PaddedScheduler(
        slots=config.parallel, cells=cells, batch_tokens=config.eval_batch_size, can_share=loaded.can_trim, on_cpu=False
    )
    return MlxEngine(loaded, generator, info, scheduler, Prefixes(park_bytes()))
