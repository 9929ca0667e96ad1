"""The end of a node's log: the last lines, without secrets."""

from __future__ import annotations

import logging

import pytest

from workers.recent_log import KEPT_LINES, RecentLog, without_secrets


def test_only_news_is_sent_on() -> None:
    log = RecentLog()
    assert log.fresh() is None
    for number in range(KEPT_LINES + 5):
        log.handle(logging.makeLogRecord({"msg": f"line {number}", "levelno": logging.INFO, "levelname": "INFO"}))
    lines = log.fresh()
    assert lines is not None
    assert len(lines) == KEPT_LINES
    assert lines[-1].endswith(f"line {KEPT_LINES + 4}")
    assert log.fresh() is None


@pytest.mark.parametrize(
    "text",
    [
        "connecting to postgresql://lmweb:canary-secret@db.example.org/lmweb",
        "redis://:canary-secret@redis.example.org/0 is away",
        "Authorization: Bearer canary-secret",
        "the token sk-lm-canary-secret",
        "hf_canary-secret was refused",
        "joined with lmweb-node-canary-secret",
        "password=canary-secret",
    ],
)
def test_secrets_are_left_out(text: str) -> None:
    assert "canary" not in without_secrets(text)


def test_ordinary_lines_stay() -> None:
    line = "loading acme/token-model-7b took 3.2 s (http://127.0.0.1:1234/v1)"
    assert without_secrets(line) == line
