"""The llama.cpp engine: GGUF models with continuous batching over one unified KV cache."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from msgspec.structs import replace

from lmweb.errors import InvalidRequest
from workers.constraints import ConstraintFactory
from workers.engines.base import Engine, EngineInfo, Logprob, Sequence, StepResult, TokenTaker
from workers.engines.batching import BatchingEngine
from workers.engines.kv_park import MIN_TOKENS, KvPark, Parked, park_bytes
from workers.engines.llama_context import Context, ContextSize, KvCache, Model
from workers.engines.llama_draft import DraftModel, load_draft
from workers.engines.llama_embedding import LlamaEmbedder, LlamaEmbeddingEngine, declared_pooling
from workers.engines.pace import Pace
from workers.engines.sampling import Row, TokenSampler, likeliest, log_probabilities, make_dry
from workers.engines.speculation import Guesses, Speculation
from workers.memory import kv_layout, logits_rows
from workers.parsing.visible import VISIBLE_SPECIALS
from workers.scheduler import CPU_TILE, Admission, Chunk, Scheduler, Slot
from workers.schemas import LoadConfig

import llama_cpp.llama_cpp as C  # isort: skip


@dataclass
class LlamaEngine(BatchingEngine):
    """One loaded GGUF. See ``workers.engines.base.Engine`` for the contract."""

    model: Model
    context: Context
    info: EngineInfo
    scheduler: Scheduler
    park: KvPark
    outputs: int
    speculation: Speculation
    make_embedder: Callable[[], LlamaEmbedder]
    make_draft: Callable[[str, str], DraftModel]
    _samplers: dict[str, TokenSampler] = field(default_factory=dict)
    _pieces: dict[int, bytes] = field(default_factory=dict)
    _constraints: ConstraintFactory | None = None
    _pace: Pace = field(default_factory=Pace)
    _embedder: LlamaEmbedder | None = None
    _crowded: bool = False

    def embedder(self) -> LlamaEmbedder:
        """Return what computes embeddings; made at the first use, because few language models are asked for any."""
        if self._embedder is None:
            self._embedder = self.make_embedder()
        return self._embedder

    def tokenize(self, text: str, *, add_bos: bool) -> list[int]:
        """Return the tokens of a text."""
        return self.model.tokenize(text, add_bos=add_bos and bool(C.llama_vocab_get_add_bos(self.model.vocab)))

    def piece(self, token: int) -> bytes:
        """Return a token's bytes; control tokens are empty except the markers that parsers look for."""
        found = self._pieces.get(token)
        if found is None:
            special = self.model.token_text(token) in VISIBLE_SPECIALS
            found = self._pieces[token] = self.model.piece(token, special=special)
        return found

    def is_end(self, token: int) -> bool:
        """Return whether the token ends a generation."""
        return bool(C.llama_vocab_is_eog(self.model.vocab, token))

    def constraints(self) -> ConstraintFactory:
        """Return what makes constraints over the vocabulary."""
        if self._constraints is None:  # takes up to a second for a large vocabulary, so not before somebody asks
            self._constraints = ConstraintFactory(self.model.grammar_tokenizer())
        return self._constraints

    def use_draft(self, key: str, path: str) -> bool:
        """Load a draft model in place of the one that is there, unless that is in use."""
        present = self.speculation.draft
        if present is None or present.key != key:
            if not self.model.can_cut:
                raise InvalidRequest("This model's kind of memory cannot take back a wrong guess: no draft model.", param="draft_model")
            if present is not None and any(sequence.draft == present.key for sequence in self.scheduler.sequences):
                return False
            self.speculation.draft = None
            if present is not None:
                present.close()
            self.speculation.draft = self.make_draft(key, path)
        return True

    def remove(self, sequence_id: str) -> None:
        """Take a sequence out; what it computed is parked for its next turn."""
        super().remove(sequence_id)
        self.speculation.forget(sequence_id)

    def step(self, take: TokenTaker) -> StepResult:
        """Admit what fits, compute one batch and sample."""
        if not self._crowded or not self.scheduler.running:  # else whoever just had to go would come back before anybody got further
            self._admit_waiting()
        self._close_gaps()
        decoding, chunks = self.scheduler.plan(self._pace.budget())
        started = time.perf_counter()
        guesses = self._guess(decoding, chunks)
        n, outputs = self._fill(decoding, chunks, guesses)
        if not n:
            return StepResult()
        computing = time.perf_counter()
        if self.context.decode(n) == 1:
            return self._make_room(guessed=bool(guesses))
        self._crowded = False
        now = time.perf_counter()
        if not chunks:
            self.speculation.note_step(n, now - computing)
        result = self._progress(decoding, chunks, sum(len(each.tokens) for each in guesses.values()), now - started)
        for slot, index in outputs:
            guess = guesses.get(slot.id)
            goes_on = self._sample(slot, index, take) if guess is None else self._check(slot, index, guess, take)
            if goes_on and slot.sequence and slot.sequence.window and len(slot.tokens) > slot.sequence.window:
                self._slide(slot, slot.sequence)
                result.slid.append(slot.sequence)
        return result

    def _progress(self, decoding: list[Slot], chunks: list[Chunk], guessed: int, seconds: float) -> StepResult:
        """Note what a step has computed, and what it cost whom."""
        prefill_tokens = sum(chunk.end - chunk.start for chunk in chunks)
        if not guessed:
            self._pace.note(seconds, prefill_tokens, len(decoding))
        for slot in decoding:
            slot.n_kv += 1
        result = StepResult(decode_sequences=len(decoding), prefill_tokens=prefill_tokens, guessed_tokens=guessed, seconds=seconds)
        for chunk in chunks:
            assert chunk.slot.sequence is not None
            chunk.slot.n_kv = chunk.end
            result.prefilled.append((chunk.slot.sequence, min(chunk.end, len(chunk.slot.sequence.prompt))))
        prompts = [(chunk.slot.sequence.owner, chunk.end - chunk.start) for chunk in chunks if chunk.slot.sequence]
        self._pace.charge(self.scheduler.fair, [slot.sequence.owner for slot in decoding if slot.sequence], prompts, seconds)
        return result

    def close(self) -> None:
        """Free everything."""
        super().close()
        if self._embedder:
            self._embedder.close()
        if self.speculation.draft:
            self.speculation.draft.close()
        self.context.close()
        self.model.close()

    def _admit(self, admission: Admission) -> None:
        """Give a sequence its slot with the longest prefix at hand: a running neighbour's cells, or a parked state."""
        slot, sequence, n_kv, lender = admission.slot, admission.sequence, 0, None
        parked = self._find_parked(sequence, admission)
        if parked and parked[1] > (admission.n_shared if self.context.is_unified else 0):
            n_kv = self._restore(slot, parked[0], self._worth_keeping(sequence, parked[1]))
        if not n_kv and admission.source is not None and admission.n_shared and self.context.is_unified:
            n_kv, lender = self._worth_keeping(sequence, admission.n_shared), admission.source
            self.context.copy(lender.id, slot.id, n_kv)
        if sequence.id not in self._samplers:  # not one that was preempted: its prompt was counted before
            sequence.cached = min(n_kv, len(sequence.prompt))
        self.scheduler.occupy(slot, sequence, n_kv, lender=lender)
        if sequence.id not in self._samplers:
            history = sequence.prompt + sequence.output
            dry = make_dry(sequence.sampling, self.model.vocab, history)
            self._samplers[sequence.id] = TokenSampler(
                sequence.sampling, self.model.vocab_size, history, drawn=len(sequence.output), dry=dry
            )

    def _find_parked(self, sequence: Sequence, admission: Admission) -> tuple[Parked, int] | None:
        """Return the parked state with the longest usable prefix, and its length.

        With caches of their own, a running neighbour that has a longer one parks a copy of all it has: that takes microseconds per
        token, and to compute one takes milliseconds, so hardly any prefix is too short for it.
        """
        parked = self.park.find(sequence, whole=not self.model.can_cut)
        if admission.source is None or self.context.is_unified:
            return parked
        worth = max(MIN_TOKENS, parked[1] + 1 if parked else 0)
        return (self._park(admission.source), admission.n_shared) if admission.n_shared >= worth else parked

    def _worth_keeping(self, sequence: Sequence, n: int) -> int:
        """Return how many of ``n`` cached tokens to use: on a CPU a whole tile of a long prompt takes less time than half of one."""
        total = len(sequence.tokens)
        if self.scheduler.on_cpu and self.model.can_cut and n >= 4 * CPU_TILE and 3 * CPU_TILE // 8 <= total - n < CPU_TILE:
            return total - CPU_TILE
        return n

    def _restore(self, slot: Slot, parked: Parked, n: int) -> int:
        """Load a parked state cut to ``n`` tokens; returns how many tokens are there then."""
        if not self.context.restore(slot.id, parked.data):
            return 0
        if n < len(parked.tokens) and not self.context.cut(slot.id, n):
            self.context.clear(slot.id)
            return 0
        return n

    def _vacate(self, slot: Slot) -> None:
        """Park what a slot has computed, and free it."""
        if slot.n_kv >= MIN_TOKENS:
            self._park(slot)
        self.context.clear(slot.id)
        self.scheduler.release(slot)

    def _park(self, slot: Slot) -> Parked:
        sequence = slot.sequence
        assert sequence is not None
        parked = Parked(slot.tokens[: slot.n_kv], sequence.owner, sequence.shared_prefix, self.context.save(slot.id))
        self.park.add(parked)
        return parked

    def _close_gaps(self) -> None:
        """Move sequences to lower slots until no free one lies between them: llama.cpp computes neighbours only in one go.

        In a unified cache it computes all in one go, wherever they are.
        """
        while not self.context.is_unified and (move := self.scheduler.gap()) is not None:
            self._move(*move)

    def _move(self, source: Slot, target: Slot) -> None:
        sequence, n_kv, data = source.sequence, source.n_kv, self.context.save(source.id)
        assert sequence is not None
        self.context.clear(source.id)
        self.scheduler.release(source)
        self.scheduler.occupy(target, sequence, n_kv if self.context.restore(target.id, data) else 0)

    def _guess(self, decoding: list[Slot], chunks: list[Chunk]) -> dict[int, Guesses]:
        """Return guesses at what the decoding slots will say, if they are likely to pay."""
        if chunks or not decoding or not self.speculation.is_on:
            return {}
        return self.speculation.plan(decoding, min(self.outputs, self.scheduler.batch_tokens) - len(decoding))

    def _fill(self, decoding: list[Slot], chunks: list[Chunk], guesses: dict[int, Guesses]) -> tuple[int, list[tuple[Slot, int]]]:
        """Write the batch arrays; returns the number of entries and where each slot's first logits will be."""
        context, n, outputs = self.context, 0, []
        context.outputs[:] = 0
        for slot in decoding:
            context.tokens[n], context.positions[n], context.sequence_ids[n] = slot.tokens[-1], slot.n_kv, slot.id
            context.outputs[n] = 1
            outputs.append((slot, n))
            n += 1
            if slot.id in guesses:
                tokens = guesses[slot.id].tokens
                size = len(tokens)
                context.tokens[n : n + size] = tokens
                context.positions[n : n + size] = range(slot.n_kv + 1, slot.n_kv + 1 + size)
                context.sequence_ids[n : n + size] = slot.id
                context.outputs[n : n + size] = 1
                n += size
        for chunk in chunks:
            size = chunk.end - chunk.start
            context.tokens[n : n + size] = chunk.slot.tokens[chunk.start : chunk.end]
            context.positions[n : n + size] = range(chunk.start, chunk.end)
            context.sequence_ids[n : n + size] = chunk.slot.id
            n += size
            if chunk.end == len(chunk.slot.tokens):
                context.outputs[n - 1] = 1
                outputs.append((chunk.slot, n - 1))
        return n, outputs

    def _sample(self, slot: Slot, index: int, take: TokenTaker) -> bool:
        """Choose the slot's next token; returns whether the sequence goes on."""
        sequence = slot.sequence
        assert sequence is not None
        logits = self.context.logits(index)
        before = log_probabilities(logits) if sequence.top_logprobs is not None else None
        token = self._samplers[sequence.id].sample(logits, sequence.constraint, row=Row(self.context.handle, index))
        sequence.output.append(token)
        slot.tokens.append(token)
        report = None if before is None else Logprob(token, float(before[token]), likeliest(before, sequence.top_logprobs or 0))
        return take(sequence, token, report)

    def _check(self, slot: Slot, index: int, guesses: Guesses, take: TokenTaker) -> bool:
        """Choose the slot's next tokens for as long as they are those that were guessed, and one more; returns whether it goes on."""
        sequence, accepted, mismatch = slot.sequence, 0, False
        assert sequence is not None
        for guess in guesses.tokens:
            goes_on = self._sample(slot, index + accepted, take)
            mismatch = slot.tokens[-1] != guess
            if mismatch:
                break
            accepted += 1
            if not goes_on:
                break
            slot.n_kv += 1
        else:
            goes_on = self._sample(slot, index + accepted, take)
        self.context.cut(slot.id, slot.n_kv)
        self.speculation.note(sequence, guesses, accepted, mismatch=mismatch)
        return goes_on

    def _slide(self, slot: Slot, sequence: Sequence) -> None:
        """Move a full window on. What stays in sight is computed again, in chunks like a prompt.

        Moving its cells instead (llama.cpp's context shift) would be faster, but stops everybody while all cells are turned, moves
        cells that a neighbour shares, and leaves values that remember what is out of sight: no cache, park or resumed run would
        ever give the same answer again.
        """
        n_kv = sequence.keep if self.model.can_cut and self.context.cut(slot.id, sequence.keep) else 0
        if not n_kv:
            self.context.clear(slot.id)
        self.scheduler.slide(slot, n_kv)
        self.speculation.forget(sequence.id)

    def _make_room(self, *, guessed: bool) -> StepResult:
        """Handle a full KV cache: without guesses there may be room; else the youngest sequence is parked and waits; a lone one fails."""
        result = StepResult()
        if guessed:
            self.speculation.skip_next()
            return result
        victim = self.scheduler.preempt()
        if victim is not None:
            self._preempt(victim)
            self._crowded = True
            return result
        for slot in self.scheduler.running:
            if slot.sequence:
                result.failed.append((slot.sequence, "The KV cache has no room for this sequence."))
        return result


def load(path: str, config: LoadConfig, on_progress: Callable[[float], None]) -> Engine:
    """Load a GGUF file. ``config.context_length`` and ``config.cpu_threads`` are set. Raises ``ModelLoadFailed``."""
    model = Model(path, gpu_layers=config.gpu_layers, on_progress=on_progress, experts=config.num_experts)
    context_length = min(config.context_length or model.trained_context, model.trained_context)
    threads = config.cpu_threads or os.cpu_count() or 1
    on_gpu = bool(config.gpu_layers) and bool(C.llama_supports_gpu_offload())

    def make_embedder() -> LlamaEmbedder:
        return LlamaEmbedder(model, limit=context_length, threads=threads, flash_attention=config.flash_attention, on_gpu=on_gpu)

    def make_draft(key: str, file: str) -> DraftModel:
        return load_draft(
            key,
            file,
            model,
            cells=context_length,
            threads=threads,
            gpu_layers=config.gpu_layers,
            flash_attention=config.flash_attention,
        )

    if declared_pooling(model) is not None:
        return _embedding_engine(model, make_embedder(), config)
    if not model.can_cut:  # what is not made of cells is kept by sequence anyway
        config = replace(config, unified_kv_cache=True)
    layout = kv_layout(config, context_length, model.kv_bytes_per_token(), on_gpu=on_gpu)
    batch_tokens = max(config.eval_batch_size, config.parallel)
    context = Context(
        model,
        size=ContextSize(layout.cells, config.parallel, batch_tokens, logits_rows(config), layout.is_unified),
        threads=threads,
        flash_attention=config.flash_attention,
        kv=KvCache(config.k_cache_type, config.v_cache_type, config.offload_kv_cache_to_gpu),
    )
    if not context.has_memory:  # an encoder that does not say how its vectors are pooled
        context.close()
        return _embedding_engine(model, make_embedder(), config)
    info = EngineInfo(
        context_length=context_length,
        cells=layout.cells,
        parallel=config.parallel,
        vocab_size=model.vocab_size,
        weights_bytes=model.size_bytes,
        eval_batch_size=batch_tokens,
        chat_template=model.metadata("tokenizer.chat_template"),
        bos_text=model.token_text(C.llama_vocab_bos(model.vocab)),
        eos_text=model.token_text(C.llama_vocab_eos(model.vocab)),
    )
    scheduler = Scheduler(
        slots=config.parallel,
        cells=layout.cells,
        batch_tokens=batch_tokens,
        can_share=model.can_cut,
        on_cpu=not on_gpu,
        is_unified=layout.is_unified,
    )
    speculation = Speculation(lookup=config.prompt_lookup and model.can_cut)
    return LlamaEngine(model, context, info, scheduler, KvPark(park_bytes()), logits_rows(config), speculation, make_embedder, make_draft)


def _embedding_engine(model: Model, embedder: LlamaEmbedder, config: LoadConfig) -> LlamaEmbeddingEngine:
    info = EngineInfo(
        context_length=embedder.limit,
        cells=0,
        parallel=config.parallel,
        vocab_size=model.vocab_size,
        weights_bytes=model.size_bytes,
        eval_batch_size=embedder.batch_tokens,
        chat_template="",
        bos_text="",
        eos_text="",
        can_generate=False,
    )
    return LlamaEmbeddingEngine(model, embedder, info)
