"""The limiter of lines."""

from __future__ import annotations

import pytest

from mpassthru import log
from mpassthru.log import LineLimiter


def test_lines_beyond_the_limit_are_counted_and_said_later(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr(log.time, "monotonic", lambda: now_s)  # type: ignore[attr-defined]
    said: list[str] = []
    say = LineLimiter(said.append, lines_max=2, period_s=10.0)
    for line in "abcd":
        say(line)

    now_s = 10.0
    say("e")

    assert said == ["a", "b", "(2 more lines like these were left out)", "e"]
