"""Text on its way out: UTF-8 across tokens, stop strings across tokens, reasoning apart from the answer."""

from __future__ import annotations

from hypothesis import given, strategies as st

from workers.events import MessageDelta, MessageEnd, MessageStart, ReasoningDelta, ReasoningEnd, ReasoningStart
from workers.parsing.output import OutputParser, replay
from workers.parsing.stops import StopScanner


def parse(pieces: list[bytes], stops: list[str] | None = None, *, inside: bool = False) -> tuple[str, str, OutputParser]:
    parser = OutputParser(stops or [], starts_reasoning=inside)
    events = [event for piece in pieces for event in parser.feed(piece)] + parser.finish()
    reasoning = "".join(event.content for event in events if isinstance(event, ReasoningDelta))
    answer = "".join(event.content for event in events if isinstance(event, MessageDelta))
    return reasoning, answer, parser


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0<"), max_size=60), st.integers(1, 5))
def test_utf8_may_be_cut_anywhere(text: str, size: int) -> None:
    raw = text.encode()
    pieces = [raw[i : i + size] for i in range(0, len(raw), size)]
    assert parse(pieces)[1] == text


def test_no_half_character_is_sent() -> None:
    parser = OutputParser([], starts_reasoning=False)
    raw = "é".encode()
    assert parser.feed(b"a" + raw[:1])[-1] == MessageDelta(content="a")
    assert parser.feed(raw[1:]) == [MessageDelta(content="é")]


def test_broken_utf8_and_nul_become_replacement_characters() -> None:
    assert parse([b"a\xff", b"\x00b", b"\xe2\x82"])[1] == "a\ufffd\ufffdb\ufffd"


@given(
    st.text(alphabet="abc", max_size=40),
    st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(1, 4),
)
def test_stop_strings_cut_where_the_whole_text_would_be_cut(text: str, stops: list[str], size: int) -> None:
    scanner = StopScanner(stops)
    passed = ""
    for i in range(0, len(text), size):
        passed += scanner.feed(text[i : i + size])
        if scanner.found:
            break
    passed += scanner.release()
    seen = text[: i + size] if text else ""
    positions = [seen.find(stop) for stop in stops if stop in seen]
    assert passed == (seen[: min(positions)] if positions else text)
    assert scanner.found == bool(positions)


def test_a_stop_string_never_leaks_in_part() -> None:
    parser = OutputParser(["</end>"], starts_reasoning=False)
    sent = "".join(
        event.content for piece in (b"hello <", b"/en", b"d> more") for event in parser.feed(piece) if isinstance(event, MessageDelta)
    )
    assert sent == "hello "
    assert parser.stopped


def test_reasoning_is_split_off_at_the_start_only() -> None:
    assert parse([b"<thi", b"nk>\nwell", b" yes</th", b"ink>\n\nSeven."])[:2] == ("well yes", "Seven.")
    assert parse([b"Use <think> tags"])[:2] == ("", "Use <think> tags")
    assert parse([b"mine</think>yours"], inside=True)[:2] == ("mine", "yours")
    assert parse([b"never closed"], inside=True)[:2] == ("never closed", "")


def test_events_come_in_order() -> None:
    parser = OutputParser([], starts_reasoning=False)
    events = [event for piece in (b"<think>a", b"</think>b") for event in parser.feed(piece)] + parser.finish()
    assert [type(event) for event in events] == [ReasoningStart, ReasoningDelta, ReasoningEnd, MessageStart, MessageDelta, MessageEnd]


def test_replay_restores_the_state_of_a_parser() -> None:
    pieces = [b"<think>x", b"y</think>", b"ab\xc3", b"\xa9 ST", b"OP rest"]
    for cut in range(len(pieces)):
        whole, resumed = OutputParser(["STOP"], starts_reasoning=False), OutputParser(["STOP"], starts_reasoning=False)
        for piece in pieces[:cut]:
            whole.feed(piece)
        replay(resumed, list(range(cut)), pieces.__getitem__)
        assert [whole.feed(piece) for piece in pieces[cut:]] == [resumed.feed(piece) for piece in pieces[cut:]]
