"""Keeping what others cause, and say, from filling or confusing the user's log."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

LINES_MAX = 20
PERIOD_S = 10.0


class LineLimiter:
    """Passes lines on, but no more than `lines_max` in `period_s` seconds; says how many it kept to itself.

    A guest can have its virtqueues stopped as often as it resets them; a front-end can connect as often as it likes.
    """

    def __init__(self, say: Callable[[str], None], *, lines_max: int = LINES_MAX, period_s: float = PERIOD_S) -> None:
        self._say = say
        self._period_s = period_s
        self._said_s: deque[float] = deque(maxlen=lines_max)
        self._kept = 0

    def __call__(self, line: str) -> None:
        """Say a line, or count it."""
        now_s = time.monotonic()
        if len(self._said_s) == self._said_s.maxlen and now_s - self._said_s[0] < self._period_s:
            self._kept += 1
            return
        if self._kept:
            self._say(f"({self._kept} more lines like these were left out)")
            self._kept = 0
        self._said_s.append(now_s)
        self._say(line)


def printable(text: str) -> str:
    """Others' words made fit for a terminal: one line, no control characters, not endless."""
    return "".join(character if character.isprintable() else " " for character in text[:500])
