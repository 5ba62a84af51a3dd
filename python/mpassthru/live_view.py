"""The live view of a port: a table on a terminal, one line per interval elsewhere, JSON lines on demand.

Rates are differences between two reports divided by the time between them. Nothing here starts a thread: the table is
redrawn by the caller's interval, not by rich. Columns have fixed widths, so that figures change in place; what has no
fixed length, the reasons, has lines of its own below.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from mpassthru.broker.binding_state import BindingState
from mpassthru.broker.status import AttachReport, to_json
from mpassthru.report import DirectionReport, PortReport

TABLE_WIDTH: Final = 80
"""Columns of the terminal below which the compact form is shown."""
_LIVE_WIDTHS: Final = (3, 13, 10, 17, 10, 13, 13)
_TOTAL_WIDTHS: Final = (3, 14, 18, 9, 11, 11, 13)
_UNITS: Final = ((1, ""), (10**6, " M"), (10**9, " G"), (10**12, " T"))


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

    def finish(self, report: AttachReport) -> None:
        """Show the last figures, which stay, and no more."""

    def close(self) -> None:
        """Show no more."""


class TerminalView:
    """A table that is redrawn in place, below the lines that were said."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._meter = _Meter()
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def say(self, line: str) -> None:
        """Print a line above the table."""
        # A text of several lines is to be pasted: no line of it may be broken.
        self._console.print(Text(line), soft_wrap="\n" in line)

    def show(self, report: AttachReport) -> None:
        """Redraw the table."""
        rates = self._meter.rates(report)
        body = _live_table(report, *rates) if self._console.width >= TABLE_WIDTH else _live_compact(report, *rates)
        lines = (*body, *reason_lines(report), f"XDP program: {_steering(report)}", "Ctrl-C ends")
        self._live.start()  # not earlier, for it hides the cursor
        self._live.update(Group(*map(Text, lines)), refresh=True)

    def finish(self, report: AttachReport) -> None:
        """Replace the table by the totals."""
        self.close()
        title = f"{report.interface}: ended, {report.mode} mode, {report.xdp_mode} XDP; rx is towards the guest"
        for line in (title, *total_lines(report, self._console.width), f"XDP program: {_steering(report)}"):
            self._console.print(Text(line))

    def close(self) -> None:
        """Take the table away."""
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
        state = f"{report.guest}/{report.mode}" if report.guest == "running" else report.guest
        if report.binding is not BindingState.BOUND:
            state = f"{state}, {_standing(report)}"
        if report.worker != "ready":
            state = f"worker {report.worker}"
        self.say(
            f"{report.interface} {state}: rx {_rate(rx)}, {_totals(report.rx)}; tx {_rate(tx)}, {_totals(report.tx)}"
        )

    def finish(self, report: AttachReport) -> None:
        """Print the totals, and what the live line has no room for."""
        self.say(f"{report.interface} ended: rx {_totals(report.rx)}; tx {_totals(report.tx)}")
        for line in (*reason_lines(report), f"XDP program: {_steering(report)}"):
            self.say(line)

    def close(self) -> None:
        """Nothing to do."""


class JsonView:
    """JSON lines on `out`, the last one always; what is said goes to `messages`."""

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

    def finish(self, report: AttachReport) -> None:
        """Print the report."""
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


def total_lines(report: PortReport, width: int) -> Iterator[str]:
    """What a port did in all: a table, or without its columns where `width` is too small; then the reasons."""
    if width >= TABLE_WIDTH:
        yield _row(_TOTAL_WIDTHS, "", "frames", "bytes", "direct", "bounced", "dropped", "copied bytes")
        for name, total in (("rx", report.rx), ("tx", report.tx)):
            yield _row(
                _TOTAL_WIDTHS,
                name,
                total.frames,
                total.bytes,
                share(total.direct, total.frames),
                _sum(total.bounced),
                _sum(total.dropped),
                total.copied_bytes,
            )
    else:
        for name, total in (("rx", report.rx), ("tx", report.tx)):
            yield f"{name} {total.frames:,} frames, {total.bytes:,} bytes"
            yield f"   {_fate(total)}, copied bytes {total.copied_bytes:,}"
    yield from reason_lines(report)


def reason_lines(report: PortReport) -> Iterator[str]:
    """What was done to frames, and why they bounced or were dropped; a line each, none where there were none."""
    for name, total in (("rx", report.rx), ("tx", report.tx)):
        fates = (("offloaded", total.offloaded), ("bounced", total.bounced), ("dropped", total.dropped))
        for fate, counts in fates:
            if any(counts.values()):
                yield f"{name} {fate}: {by_reason(counts)}"


def _live_table(report: AttachReport, rx: Rates, tx: Rates) -> Iterator[str]:
    yield f"{_title(report)}; rx is towards the guest"
    yield _row(_LIVE_WIDTHS, "", "frames/s", "Gbit/s", "total frames", "direct", "bounced", "dropped")
    for name, total, rate in (("rx", report.rx, rx), ("tx", report.tx, tx)):
        yield _row(
            _LIVE_WIDTHS,
            name,
            f"{rate.frames_per_s:,.0f}",
            f"{rate.bits_per_s / 1e9:.3f}",
            total.frames,
            share(total.direct, total.frames),
            _sum(total.bounced),
            _sum(total.dropped),
        )


def _live_compact(report: AttachReport, rx: Rates, tx: Rates) -> Iterator[str]:
    yield _title(report)
    for name, total, rate in (("rx", report.rx, rx), ("tx", report.tx, tx)):
        yield f"{name} {rate.frames_per_s:>11,.0f} frames/s {rate.bits_per_s / 1e9:>8.3f} Gbit/s"
        yield f"   {_fate(total)}"


def _standing(report: AttachReport) -> str:
    """Where the port stands with its interface; empty if it is bound."""
    match report.binding:
        case BindingState.WAITING:
            return f"waiting for {report.interface}: {report.waiting_because}"
        case BindingState.UNBOUND:
            return "unbound"
    return ""


def _title(report: AttachReport) -> str:
    if report.binding is not BindingState.BOUND:
        return f"{_standing(report)}; guest {report.guest}"
    if report.worker != "ready":
        return f"{report.interface}: worker {report.worker}, restarts {report.worker_restarts}, {report.xdp_mode} XDP"
    if report.guest != "running":
        return f"{report.interface}: guest {report.guest}, {report.xdp_mode} XDP"
    return f"{report.interface}: guest running, {report.mode} mode, {report.xdp_mode} XDP"


def _steering(report: AttachReport) -> str:
    return "; ".join(f"queue {queue}: {by_reason(counts)}" for queue, counts in report.steering.items()) or "-"


def _row(widths: tuple[int, ...], name: str, *cells: int | str) -> str:
    columns = zip(cells, widths[1:], strict=True)
    return name.ljust(widths[0]) + "".join(_cell(cell, width - 1).rjust(width) for cell, width in columns)


def _cell(value: int | str, width: int) -> str:
    """What a column shows: a count that is too long for it in millions, and so on."""
    if isinstance(value, str):
        return value
    texts = (f"{value // unit:,}{suffix}" for unit, suffix in _UNITS)
    return next((text for text in texts if len(text) <= width), "many")


def _sum(counts: dict[str, int]) -> int:
    return sum(counts.values())


def _fate(total: DirectionReport) -> str:
    return (
        f"direct {share(total.direct, total.frames)}, bounced {_sum(total.bounced):,}, dropped {_sum(total.dropped):,}"
    )


def _rate(rate: Rates) -> str:
    return f"{rate.frames_per_s:.0f} frames/s {rate.bits_per_s / 1e9:.3f} Gbit/s"


def _totals(total: DirectionReport) -> str:
    return (
        f"total {total.frames} frames direct {share(total.direct, total.frames)}"
        f" bounced {_sum(total.bounced)} dropped {_sum(total.dropped)}"
    )
