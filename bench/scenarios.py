"""What ``bench/compare.py`` measures. Both servers get the same prompts in turns, and must write exactly as many tokens as asked."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec
import numpy as np

from bench.loadgen import Answer, BadAnswer, Endpoint, chat, percentile, post, words
from bench.servers import Server

PEOPLE = 8
WIDTHS = (1, 4, 8, 16)
#: From this width on it matters whether all slots share one KV cache: a CPU's attention looks at the cells of everybody.
OWN_CACHE_WIDTH = 8
#: Tokens per request at most, on both sides.
CONTEXT = 8192


class Row(msgspec.Struct, kw_only=True):
    """One line of the table: a figure of ours and of theirs, and whether the bar is reached (None: there is no bar)."""

    case: str
    unit: str
    ours: float
    theirs: float
    ratio: float
    bar: str = ""
    met: bool | None = None
    notes: str = ""


@dataclass
class Contest:
    """Both servers, and how often they take turns."""

    ours: Server
    theirs: Callable[..., Server]
    rounds: int
    quick: bool = False
    seed: int = field(default_factory=lambda: random.SystemRandom().getrandbits(32))

    async def turns(
        self, model: str, work: Callable[[Server, Endpoint, random.Random], Awaitable[Any]], *rivals: Server
    ) -> list[list[Any]]:
        """Let ours and each rival (by default the plain one) do the same work in turns, from the same random numbers; return what each gave."""
        servers = [self.ours, *(rivals or (self.theirs(),))]
        for server in servers:
            await _warm_up(server.endpoint(model))
        found: list[list[Any]] = [[] for _ in servers]
        for number in range(self.rounds):
            for results, server in zip(found, servers, strict=True):
                results.append(await work(server, server.endpoint(model), random.Random(f"{self.seed}-{number}")))
        return found


async def _warm_up(endpoint: Endpoint) -> None:
    await chat(endpoint, _user("Are you there?"), max_tokens=8)


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _fresh(rng: random.Random, tokens: int) -> list[dict[str, str]]:
    """Return a conversation of about so many tokens that nobody has had before: it differs from its first word on."""
    return _user(f"{rng.getrandbits(40):x} {words(tokens, rng)}")


def _same_work(answers: Sequence[Sequence[Answer]], *, tolerance: float = 0.0) -> None:
    """Raise ``BadAnswer`` unless both sides read and wrote as many tokens; conversations differ a little once answers do."""
    totals = [(sum(a.prompt_tokens for a in side), sum(a.completion_tokens for a in side)) for side in answers]
    first, *others = totals
    for other in others:
        if first[1] != other[1] or abs(first[0] - other[0]) > tolerance * first[0]:
            raise BadAnswer(f"the work was not the same: {totals} tokens read and written")


# --- throughput -------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """Streams side by side: their answers, and tokens per second and processor time per token of the whole run."""

    answers: list[Answer]
    tokens_per_second: float
    cpu_ms_per_token: float


async def _streams(server: Server, endpoint: Endpoint, rng: random.Random, *, width: int, options: Mapping[str, Any] | None = None) -> Run:
    prompts = [_fresh(rng, 190) for _ in range(width)]
    cpu, began = server.cpu_seconds(), time.perf_counter()
    answers = await asyncio.gather(
        *(chat(endpoint, prompt, max_tokens=128, user=user, options=options) for user, prompt in enumerate(prompts))
    )
    seconds, cpu = time.perf_counter() - began, server.cpu_seconds() - cpu
    tokens = 128 * width
    return Run(answers, tokens / seconds, 1000 * cpu / tokens)


def _throughput_row(case: str, ours: list[Run], theirs: list[Run], least: float) -> Row:
    for mine, other in zip(ours, theirs, strict=True):
        _same_work([mine.answers, other.answers])
    ratio = statistics.median(mine.tokens_per_second / other.tokens_per_second for mine, other in zip(ours, theirs, strict=True))
    cpu = [statistics.median(run.cpu_ms_per_token for run in side) for side in (ours, theirs)]
    return Row(
        case=case,
        unit="tokens/s",
        ours=statistics.median(run.tokens_per_second for run in ours),
        theirs=statistics.median(run.tokens_per_second for run in theirs),
        ratio=ratio,
        bar=f">= {least:g}x",
        met=ratio >= least,
        notes=f"CPU per token, all processes: {cpu[0]:.2f} ms, llama-server {cpu[1]:.2f} ms",
    )


async def throughput(contest: Contest, *, model: str, width: int, least: float) -> list[Row]:
    """Streams of 128 tokens after prompts of 200."""
    rivals = [contest.theirs("--kv-unified")]
    if width >= OWN_CACHE_WIDTH:
        rivals.append(contest.theirs())
    ours, *theirs = await contest.turns(model, partial(_streams, width=width), *rivals)
    case = f"{model}, {width} {'stream' if width == 1 else 'streams'}"
    rows = [_throughput_row(f"{case} (llama-server with one KV cache)", ours, theirs[0], least)]
    for others in theirs[1:]:
        row = _throughput_row(f"{case} (llama-server with a KV cache per slot)", ours, others, least)
        rows.append(msgspec.structs.replace(row, bar="", met=None, notes=""))
    return rows


SCHEMA = {
    "type": "array",
    "minItems": 100,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 24},
            "kind": {"enum": ["model", "token", "server", "person"]},
            "count": {"type": "integer", "minimum": 0, "maximum": 9999},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 4},
            "ready": {"type": "boolean"},
        },
        "required": ["name", "kind", "count", "tags", "ready"],
        "additionalProperties": False,
    },
}


async def structured(contest: Contest, *, model: str, least: float) -> list[Row]:
    """Four streams of 128 tokens inside a JSON schema that takes more than that."""
    response_format = {"type": "json_schema", "json_schema": {"name": "things", "strict": True, "schema": SCHEMA}}
    options = {"response_format": response_format, "chat_template_kwargs": {"enable_thinking": False}}
    rival = contest.theirs("--reasoning-format", "none")  # else the schema holds only for what follows its reasoning
    ours, theirs = await contest.turns(model, partial(_streams, width=4, options=options), rival)
    for run in (*ours, *theirs):
        for answer in run.answers:
            if not answer.text.lstrip().startswith("["):
                raise BadAnswer(f"not what the schema asks for: {answer.text[:80]!r}")
    return [_throughput_row(f"JSON schema, 4 streams, {'starter' if model == 'starter' else 'random'} model", ours, theirs, least)]


async def embeddings(contest: Contest) -> list[Row]:
    """1,000 passages of 200 tokens by one client, in requests of 100."""
    passages = 200 if contest.quick else 1000

    rival = contest.theirs("--embedding")
    endpoints = [server.endpoint("bert") for server in (contest.ours, rival)]
    for endpoint in endpoints:
        await post(endpoint, "/embeddings", {"input": "Are you there?"})
    speeds: list[list[float]] = [[], []]
    for number in range(contest.rounds):
        rng = random.Random(f"{contest.seed}-{number}")
        seconds, vectors = [0.0, 0.0], [[], []]  # type: tuple[list[float], list[list[Any]]]
        for _ in range(0, passages, 100):  # by turns, request by request: a machine is not equally fast for minutes
            texts = [words(400, rng)[: rng.randint(410, 450)] for _ in range(100)]
            for side, endpoint in enumerate(endpoints):
                began = time.perf_counter()
                answer = await post(endpoint, "/embeddings", {"input": texts})
                seconds[side] += time.perf_counter() - began
                vectors[side] += [(item["embedding"], answer["usage"]["prompt_tokens"]) for item in answer["data"]]
        for side in (0, 1):
            speeds[side].append(passages / seconds[side])
        ours, theirs = (np.array([vector for vector, _ in side]) for side in vectors)
        likeness = float((ours * theirs).sum(axis=1).min())
        tokens = [sum(used for _, used in side[::100]) for side in vectors]
        if likeness < 0.999 or tokens[0] != tokens[1]:
            raise BadAnswer(f"the vectors differ (likeness {likeness:.4f}, {tokens} tokens)")
    ratio = statistics.median(mine / other for mine, other in zip(*speeds, strict=True))
    return [
        Row(
            case=f"embeddings, {passages} passages of {tokens[0] / passages:.0f} tokens",
            unit="passages/s",
            ours=statistics.median(speeds[0]),
            theirs=statistics.median(speeds[1]),
            ratio=ratio,
            bar=">= 1x",
            met=ratio >= 1.0,
        )
    ]


# --- latency ----------------------------------------------------------------------------------------------------------


def _latency_row(case: str, ours: float, theirs: float, bar: str, *, met: bool, notes: str = "") -> Row:
    """Return a row of times, given in seconds."""
    return Row(case=case, unit="ms", ours=1000 * ours, theirs=1000 * theirs, ratio=ours / theirs, bar=bar, met=met, notes=notes)


async def first_token(contest: Contest, *, model: str) -> list[Row]:
    """Time to the first token of one user after another, prompts of 200 tokens."""
    contest.rounds *= 10

    async def work(_server: Server, endpoint: Endpoint, rng: random.Random) -> Answer:
        return await chat(endpoint, _fresh(rng, 190), max_tokens=4)

    sides = await contest.turns(model, work)
    _same_work(sides)
    ours, theirs = (statistics.median(answer.first_seconds for answer in side) for side in sides)
    notes = f"{1000 * (ours - theirs):+.1f} ms, {contest.rounds} requests each"
    return [
        _latency_row(
            f"time to first token, idle, {model}", ours, theirs, "<= llama-server + 15 ms", met=ours <= theirs + 0.015, notes=notes
        )
    ]


async def burst(contest: Contest) -> list[Row]:
    """Eight people at once with one system prompt of 2,000 tokens that nobody has used before."""

    async def work(_server: Server, endpoint: Endpoint, rng: random.Random) -> list[Answer]:
        system = {"role": "system", "content": f"{rng.getrandbits(40):x} {words(1990, rng)}"}
        chats = [[system, *_user(words(40, rng))] for _ in range(8)]
        return list(await asyncio.gather(*(chat(endpoint, messages, max_tokens=32, user=user) for user, messages in enumerate(chats))))

    sides = [[answer for answers in side for answer in answers] for side in await contest.turns("small", work)]
    _same_work(sides)
    rows = []
    for percent, most in ((50, 1 / 4), (95, 1 / 8)):
        ours, theirs = (percentile([answer.first_seconds for answer in side], percent) for side in sides)
        case = f"8 users, one new 2,000-token system prompt: time to first token, p{percent}"
        rows.append(_latency_row(case, ours, theirs, f"<= 1/{1 / most:.0f}", met=ours <= most * theirs))
    return rows


async def stall(contest: Contest) -> list[Row]:
    """The pace of four streams while a prompt of 4,000 tokens comes in."""

    async def work(_server: Server, endpoint: Endpoint, rng: random.Random) -> tuple[list[float], Answer, list[Answer]]:
        started = asyncio.Semaphore(0)
        prompts = [_fresh(rng, 190) for _ in range(4)]
        streams = [
            asyncio.create_task(chat(endpoint, prompt, max_tokens=256, user=user, on_first=started.release))
            for user, prompt in enumerate(prompts)
        ]
        for _ in streams:
            await started.acquire()
        await asyncio.sleep(1)
        long = await chat(endpoint, _fresh(rng, 3990), max_tokens=4, user=7)
        answers = await asyncio.gather(*streams)
        if any(answer.stamps[-1] < long.stamps[0] for answer in answers):
            raise BadAnswer("a stream ended before the long prompt was read")
        gaps = [gap for answer in answers for gap in answer.gaps(long.began, long.stamps[0])]
        return gaps, long, answers

    rivals = contest.theirs(), contest.theirs("-b", "256", "-ub", "256")
    sides = await contest.turns("small", work, *rivals)
    _same_work([[answer for _, long, answers in side for answer in (long, *answers)] for side in sides])
    paces = [percentile([gap for gaps, _, _ in side for gap in gaps], 95) for side in sides]
    waits = [statistics.median(long.first_seconds for _, long, _ in side) for side in sides]
    rows = []
    for index, (flags, most, bar) in enumerate((("as it comes", 0.1, "<= 1/10"), ("-b 256 -ub 256", 0.6, "<= 0.6x")), start=1):
        notes = f"first token of the long prompt: {waits[0]:.1f} s, llama-server {waits[index]:.1f} s"
        case = f"4 streams during a 4,000-token prefill: time between tokens, p95, llama-server {flags}"
        rows.append(_latency_row(case, paces[0], paces[index], bar, met=paces[0] <= most * paces[index], notes=notes))
    return rows


async def conversation(contest: Contest, *, others: int) -> list[Row]:
    """One chat of eight turns; ``others`` chats of other people use the model between any two of them."""
    turns = 4 if contest.quick else 8

    servers = (contest.ours, contest.theirs())
    endpoints = [server.endpoint("small") for server in servers]
    for endpoint in endpoints:
        await _warm_up(endpoint)
    sides: list[list[Answer]] = [[], []]
    for number in range(contest.rounds):
        rngs = [random.Random(f"{contest.seed}-{number}") for _ in servers]
        chats = [_fresh(rng, 190) for rng in rngs]
        for turn in range(turns):  # by turns, answer by answer: a machine is not equally fast for minutes
            for side, (endpoint, rng) in enumerate(zip(endpoints, rngs, strict=True)):
                answer = await chat(endpoint, chats[side], max_tokens=32)
                sides[side].append(answer)
                chats[side] = [*chats[side], {"role": "assistant", "content": answer.text}, *_user(words(50, rng))]
                for other in range(others if turn < turns - 1 else 0):
                    await chat(endpoint, _fresh(rng, 60), max_tokens=4, user=1 + other % (PEOPLE - 1))
    _same_work(sides, tolerance=0.02)
    later = [[answer for number, answer in enumerate(side) if number % turns] for side in sides]
    ours, theirs = (statistics.median(answer.first_seconds for answer in side) for side in later)
    cached = [sum(answer.cached_tokens for answer in side) / sum(answer.prompt_tokens for answer in side) for side in later]
    case = f"chat of {turns} turns{f', {others} other chats between any two' if others else ''}: time to first token from the second on"
    notes = f"from a cache: {cached[0]:.0%} of the prompts, llama-server {cached[1]:.0%}"
    return [_latency_row(case, ours, theirs, "<= llama-server", met=ours <= theirs, notes=notes)]


@dataclass
class Share:
    """What a turn of ``fairness`` gave: times to first tokens, and the time of a step.

    ``single`` is one chat by itself; ``without`` and ``beside`` are those of each person, without and beside the long streams.
    """

    single: list[float]
    without: list[list[float]]
    beside: list[list[float]]
    step: float


async def fairness(contest: Contest) -> list[Row]:
    """Short chats of five people while a sixth has eight long streams, against the same chats without those, on each server."""
    sides: list[list[Share]] = await contest.turns("small", partial(_share, chats=3 if contest.quick else 6))
    single = [statistics.median(value for share in side for value in share.single) for side in sides]
    without, beside = ([_worst([getattr(share, name) for share in side]) for side in sides] for name in ("without", "beside"))
    step = statistics.median(share.step for share in sides[0])
    allowed = 2 * without[0] + step
    notes = (
        f"without the long streams {1000 * without[0]:.0f} ms, llama-server {1000 * without[1]:.0f} ms; one chat by itself (median) "
        f"{1000 * single[0]:.0f} ms, llama-server {1000 * single[1]:.0f} ms; one step {1000 * step:.0f} ms"
    )
    case = "8 long streams of one user, short chats of 5 others: time to first token, p95 of the worst-served"
    bar = f"<= 2x alone + one step ({1000 * allowed:.0f} ms)"
    return [_latency_row(case, beside[0], beside[1], bar, met=beside[0] <= allowed, notes=notes)]


def _worst(turns: list[list[list[float]]]) -> float:
    """Return the largest of the people's 95th percentiles."""
    return max(percentile([value for people in turns for value in people[person]], 95) for person in range(len(turns[0])))


async def _share(_server: Server, endpoint: Endpoint, rng: random.Random, *, chats: int) -> Share:
    async def person(rng: random.Random, user: int) -> list[Answer]:
        answers = []
        for _ in range(chats):
            await asyncio.sleep(rng.uniform(0.5, 3.5))
            answers.append(await chat(endpoint, _fresh(rng, 90), max_tokens=16, user=user))
        return answers

    async def everybody(name: str) -> list[list[Answer]]:
        return list(await asyncio.gather(*(person(random.Random(f"{seed} {name} {user}"), user) for user in range(1, 6))))

    seed = rng.getrandbits(32)
    single = [await chat(endpoint, _fresh(rng, 90), max_tokens=16, user=1) for _ in range(chats)]
    without = await everybody("without")
    started = asyncio.Semaphore(0)
    busy = [asyncio.create_task(_endless(endpoint, _fresh(rng, 490), started)) for _ in range(8)]
    for _ in busy:
        await started.acquire()
    beside = await everybody("beside")
    for task in busy:
        task.cancel()
    outcomes = await asyncio.gather(*busy, return_exceptions=True)
    if failed := [outcome for outcome in outcomes if not isinstance(outcome, asyncio.CancelledError)]:
        raise BadAnswer(f"a long stream ended: {failed[0]}")
    await asyncio.sleep(1)  # the servers notice
    gaps = [gap for answers in beside for answer in answers for gap in answer.gaps()]
    firsts = [[[answer.first_seconds for answer in answers] for answers in found] for found in ([single], without, beside)]
    return Share(firsts[0][0], firsts[1], firsts[2], statistics.median(gaps))


async def _endless(endpoint: Endpoint, messages: list[dict[str, str]], started: asyncio.Semaphore) -> None:
    await chat(endpoint, messages, max_tokens=6000, on_first=started.release, timeout_seconds=3600)


# --- all of them ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenario:
    """A scenario, the models that it needs, and how often the servers take turns in it."""

    run: Callable[[Contest], Awaitable[list[Row]]]
    models: tuple[str, ...]
    rounds: int = 3


SCENARIOS: dict[str, Scenario] = {
    **{f"small-{n}": Scenario(partial(throughput, model="small", width=n, least=0.97), ("small",)) for n in WIDTHS},
    **{f"tiny-{n}": Scenario(partial(throughput, model="tiny", width=n, least=0.95), ("tiny",), rounds=7) for n in WIDTHS},
    "first-token-small": Scenario(partial(first_token, model="small"), ("small",)),
    "first-token-tiny": Scenario(partial(first_token, model="tiny"), ("tiny",), rounds=5),
    "burst": Scenario(burst, ("small",), rounds=2),
    "stall": Scenario(stall, ("small",), rounds=2),
    "conversation": Scenario(partial(conversation, others=0), ("small",)),
    "conversation-others": Scenario(partial(conversation, others=20), ("small",), rounds=1),
    "schema-starter": Scenario(partial(structured, model="starter", least=1.0), ("starter",), rounds=7),
    "schema-random": Scenario(partial(structured, model="tiny", least=3.0), ("tiny",)),
    "embeddings": Scenario(embeddings, ("bert",), rounds=1),
    "fairness": Scenario(fairness, ("small",), rounds=2),
}
