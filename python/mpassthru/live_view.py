"""The live view of a port: a table on a terminal, one line per interval elsewhere, JSON lines on demand.

Rates are differences between two reports divided by the time between them. Nothing here starts a thread: the table is
redrawn by the caller's interval, not by rich.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mpassthru.broker.status import AttachReport, to_json
from mpassthru.report import DirectionReport


@dataclass(frozen=True)
class Rates:
    """One direction's speed over an interval."""

    frames_per_s: float
    bits_per_s: float

    @classmethod
    def between(cls, before: DirectionReport, after: DirectionReport, elapsed_s: float) -> Rates:
        """The speed from one report to the next; zero if no time has passed."""
        if elapsed_s <= 0:
            return cls(0.0, 0.0)
        return cls((after.frames - before.frames) / elapsed_s, 8 * (after.bytes - before.bytes) / elapsed_s)


class View(Protocol):
    """Shows a port."""

    def say(self, line: str) -> None:
        """Show one line that is not a figure."""

    def show(self, report: AttachReport) -> None:
        """Show the figures of now."""

    def close(self) -> None:
        """Show no more."""


class TerminalView:
    """A table that is redrawn in place, below the lines that were said."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._meter = _Meter()
        self._live = Live(console=console, auto_refresh=False, transient=False)
        self._live.start()

    def say(self, line: str) -> None:
        """Print a line above the table."""
        self._live.console.print(Text(line))

    def show(self, report: AttachReport) -> None:
        """Redraw the table."""
        self._live.update(Group(_table(report, *self._meter.rates(report)), _footer(report)), refresh=True)

    def close(self) -> None:
        """Leave the table as it is."""
        self._live.stop()


class LineView:
    """One line per interval, for logs and pipes."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._meter = _Meter()

    def say(self, line: str) -> None:
        """Print a line."""
        print(line, file=self._out, flush=True)

    def show(self, report: AttachReport) -> None:
        """Print the figures in one line."""
        rx, tx = self._meter.rates(report)
        self.say(
            f"{report.interface} {report.guest} {report.mode}"
            f" rx {_direction_line(report.rx, rx)} tx {_direction_line(report.tx, tx)}"
        )

    def close(self) -> None:
        """Nothing to do."""


class JsonView:
    """JSON lines on `out`; what is said goes to `messages`."""

    def __init__(self, out: TextIO, messages: TextIO, *, each_interval: bool) -> None:
        self._out = out
        self._messages = messages
        self._each_interval = each_interval

    def say(self, line: str) -> None:
        """Print a line to the messages."""
        print(line, file=self._messages, flush=True)

    def show(self, report: AttachReport) -> None:
        """Print the report, if it was asked for at each interval."""
        if self._each_interval:
            print(to_json(report), file=self._out, flush=True)

    def close(self) -> None:
        """Nothing to do."""


class _Meter:
    """Turns a sequence of reports into rates."""

    def __init__(self) -> None:
        self._last: tuple[float, AttachReport] | None = None

    def rates(self, report: AttachReport) -> tuple[Rates, Rates]:
        now_s = time.monotonic()
        then_s, before = self._last or (now_s, report)
        self._last = (now_s, report)
        elapsed_s = now_s - then_s
        return Rates.between(before.rx, report.rx, elapsed_s), Rates.between(before.tx, report.tx, elapsed_s)


def share(part: int, whole: int) -> str:
    """A share in percent, never rounded up to all; a dash of nothing."""
    return f"{1000 * part // whole / 10:.1f} %" if whole else "-"


def by_reason(counts: dict[str, int]) -> str:
    """Counts by reason, zeros left out."""
    return ", ".join(f"{reason} {count:,}" for reason, count in counts.items() if count) or "-"


def _table(report: AttachReport, rx: Rates, tx: Rates) -> Table:
    title = Text(f"{report.interface}  guest {report.guest}, mode {report.mode}, XDP {report.xdp_mode}")
    table = Table(title=title, title_justify="left")
    for heading in ("", "frames/s", "Gbit/s", "frames", "direct", "bounced", "dropped"):
        table.add_column(heading, justify="left" if heading in ("", "bounced", "dropped") else "right")
    for name, total, rate in (("rx, to the guest", report.rx, rx), ("tx, from the guest", report.tx, tx)):
        table.add_row(
            name,
            f"{rate.frames_per_s:,.0f}",
            f"{rate.bits_per_s / 1e9:.3f}",
            f"{total.frames:,}",
            share(total.direct, total.frames),
            by_reason(total.bounced),
            by_reason(total.dropped),
        )
    return table


def _footer(report: AttachReport) -> Text:
    steering = "; ".join(f"queue {queue}: {by_reason(counts)}" for queue, counts in report.steering.items())
    return Text(f"XDP program: {steering or '-'}\nCtrl-C ends")


def _direction_line(total: DirectionReport, rate: Rates) -> str:
    bounced, dropped = sum(total.bounced.values()), sum(total.dropped.values())
    return (
        f"{rate.frames_per_s:.0f} frames/s {rate.bits_per_s / 1e9:.3f} Gbit/s"
        f" direct {share(total.direct, total.frames)} bounced {bounced} dropped {dropped}"
    )
