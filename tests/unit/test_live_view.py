"""The views: rates, lines, JSON lines, and a table that shows what a port says without interpreting it."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace

import msgspec
import pytest
from rich.console import Console

from mpassthru import live_view
from mpassthru.broker.binding_state import BindingState
from mpassthru.broker.status import AttachReport, PortStatus
from mpassthru.live_view import JsonView, LineView, Rates, TerminalView, by_reason, share
from mpassthru.report import DirectionReport

BOUND = PortStatus(interface="eth9", queue_ids=(0,), xdp_mode="native", binding=BindingState.BOUND)
FIRST = replace(BOUND, guest="running", worker="ready").report()
SECOND = msgspec.structs.replace(
    FIRST,
    mode="copy",
    rx=DirectionReport(frames=1000, bytes=1_000_000, direct=990, bounced={"short_buffer": 10}, dropped={"runt": 0}),
)


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seconds pass from one look to the next."""
    times = iter(range(0, 1000, 2))
    monkeypatch.setattr(live_view.time, "monotonic", lambda: float(next(times)))  # type: ignore[attr-defined]


def test_rates_are_differences_over_time() -> None:
    assert Rates.between(FIRST.rx, SECOND.rx, 2.0) == Rates(500.0, 4_000_000.0)


def test_rates_of_no_time_are_zero() -> None:
    assert Rates.between(FIRST.rx, SECOND.rx, 0.0) == Rates(0.0, 0.0)


def test_share_and_reasons_of_nothing_are_a_dash() -> None:
    assert share(0, 0) == "-"
    assert by_reason({"runt": 0}) == "-"


def test_share_is_not_rounded_up_to_all() -> None:
    assert share(99_999, 100_000) == "99.9 %"
    assert share(1, 1) == "100.0 %"


def test_lines_have_one_line_per_look() -> None:
    out = io.StringIO()
    view = LineView(out)
    view.show(FIRST)
    view.show(SECOND)

    first, second = out.getvalue().splitlines()
    assert first.startswith("eth9 running/detached: rx 0 frames/s 0.000 Gbit/s, total 0 frames direct -")
    assert "running/copy: rx 500 frames/s 0.004 Gbit/s, total 1000 frames direct 99.0 % bounced 10 dropped 0;" in second


def test_lines_end_with_totals_and_reasons() -> None:
    out = io.StringIO()
    LineView(out).finish(SECOND)

    totals, reasons, steering = out.getvalue().splitlines()
    assert totals.startswith("eth9 ended: rx total 1000 frames direct 99.0 % bounced 10 dropped 0; tx total 0 frames")
    assert reasons == "rx bounced: short_buffer 10"
    assert steering == "XDP program: -"


def test_what_was_done_to_frames_is_listed() -> None:
    out = io.StringIO()
    offloaded = DirectionReport(frames=90, direct=90, header_split=90, offloaded={"tso4": 2, "checksum": 0})
    LineView(out).finish(msgspec.structs.replace(SECOND, tx=offloaded))

    assert "tx offloaded: tso4 2\n" in out.getvalue()


@pytest.mark.parametrize("each_interval", [True, False])
def test_json_lines_come_only_where_they_were_asked_for(each_interval: bool) -> None:
    out, messages = io.StringIO(), io.StringIO()
    view = JsonView(out, messages, each_interval=each_interval)
    view.say("hello")
    view.show(SECOND)

    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [line["mode"] for line in lines] == (["copy"] if each_interval else [])
    assert messages.getvalue() == "hello\n"


def test_last_json_line_says_so() -> None:
    out = io.StringIO()
    JsonView(out, io.StringIO(), each_interval=False).finish(msgspec.structs.replace(SECOND, final=True))

    assert [json.loads(line)["final"] for line in out.getvalue().splitlines()] == [True]


def test_table_shows_text_as_it_is() -> None:
    """What comes from a worker is not markup, and cannot draw on the terminal."""
    out = io.StringIO()
    view = TerminalView(Console(file=out, force_terminal=True, width=160))
    view.say("[red]guest[/red] said this")
    view.show(SECOND)
    view.close()

    assert "[red]guest[/red] said this" in out.getvalue()
    assert "short_buffer 10" in out.getvalue()


def shown(*reports: AttachReport, width: int = 80, finish: bool = False) -> list[str]:
    """The last frame, as lines without control sequences."""
    out = io.StringIO()
    view = TerminalView(Console(file=out, force_terminal=True, width=width, height=24))
    for report in reports:
        view.show(report)
    if finish:
        view.finish(reports[-1])
    frame = out.getvalue().split("\x1b[2K")[-1]
    view.close()
    return [line.rstrip() for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", frame).replace("\r", "").splitlines()]


LARGE = DirectionReport(
    frames=10**13,
    bytes=10**16,
    direct=10**13 - 1,
    bounced={"short_buffer": 10**12, "split_buffer": 10**12},
    dropped={"no_buffer": 10**12},
    copied_bytes=10**16,
)


def columns(lines: list[str]) -> list[list[int]]:
    """Where the cells of the table's three rows end."""
    head = next(number for number, line in enumerate(lines) if "dropped" in line)
    return [
        [match.end() for match in re.finditer(r"\S+( [%MGT]| frames| bytes)?", line)] for line in lines[head : head + 3]
    ]


@pytest.mark.parametrize("finish", [False, True])
@pytest.mark.parametrize("total", [FIRST.rx, SECOND.rx, LARGE], ids=["nothing", "some", "large"])
def test_columns_stay_where_they_are(total: DirectionReport, finish: bool) -> None:
    report = msgspec.structs.replace(SECOND, rx=total, tx=total)
    lines = shown(report, report, finish=finish)

    head, rx, tx = columns(lines)
    assert rx[1:] == tx[1:] == head
    assert head == (columns(shown(FIRST, finish=finish))[0])
    assert max(map(len, lines[:4])) < 80


def test_reasons_have_lines_of_their_own() -> None:
    lines = shown(msgspec.structs.replace(SECOND, tx=LARGE))

    assert "rx bounced: short_buffer 10" in lines
    assert "tx dropped: no_buffer 1,000,000,000,000" in lines
    assert not any(line.startswith("rx dropped") for line in lines)


@pytest.mark.parametrize("width", [40, 79])
def test_narrow_terminal_has_a_compact_form(width: int) -> None:
    lines = shown(FIRST, SECOND, width=width)

    assert max(map(len, lines)) <= width
    assert "rx         500 frames/s    0.004 Gbit/s" in lines


def test_last_frame_has_the_totals_and_nothing_of_the_live_view() -> None:
    lines = shown(FIRST, SECOND, finish=True)

    assert lines[0].startswith("eth9: ended, copy mode, native XDP")
    assert "Ctrl-C ends" not in lines
    assert any("1,000,000" in line for line in lines)


def test_text_to_paste_is_not_broken_into_other_lines() -> None:
    out = io.StringIO()
    view = TerminalView(Console(file=out, force_terminal=True, width=40))
    view.say("qemu \\\n  " + "x" * 50)

    assert out.getvalue() == "qemu \\\n  " + "x" * 50 + "\n"


def test_mode_of_an_ended_port_is_that_of_its_last_socket() -> None:
    status = replace(PortStatus())
    status.socket_steered(0, "copy")
    status.worker_ended()

    def report(*, ended: bool) -> AttachReport:
        return status.report(ended=ended)

    assert report(ended=False).mode == "detached"
    assert report(ended=True).mode == "copy"
