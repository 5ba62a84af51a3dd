"""The views: rates, lines, JSON lines, and a table that shows what a port says without interpreting it."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import msgspec
import pytest
from rich.console import Console

from mpassthru import live_view
from mpassthru.broker.status import AttachReport, PortStatus
from mpassthru.live_view import JsonView, LineView, Rates, TerminalView, by_reason, share
from mpassthru.report import DirectionReport

FIRST = PortStatus(guest="running").report(interface="eth9", queue_ids=(0,), xdp_mode="native")
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
    assert first.startswith("eth9 running detached rx 0 frames/s")
    assert "rx 500 frames/s 0.004 Gbit/s direct 99.0 % bounced 10 dropped 0" in second


@pytest.mark.parametrize("each_interval", [True, False])
def test_json_lines_come_only_where_they_were_asked_for(each_interval: bool) -> None:
    out, messages = io.StringIO(), io.StringIO()
    view = JsonView(out, messages, each_interval=each_interval)
    view.say("hello")
    view.show(SECOND)

    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [line["mode"] for line in lines] == (["copy"] if each_interval else [])
    assert messages.getvalue() == "hello\n"


def test_table_shows_text_as_it_is() -> None:
    """What comes from a worker is not markup, and cannot draw on the terminal."""
    out = io.StringIO()
    view = TerminalView(Console(file=out, force_terminal=True, width=160))
    view.say("[red]guest[/red] said this")
    view.show(SECOND)
    view.close()

    assert "[red]guest[/red] said this" in out.getvalue()
    assert "short_buffer 10" in out.getvalue()


def test_mode_of_an_ended_port_is_that_of_its_last_socket() -> None:
    status = replace(PortStatus())
    status.socket_steered(0, "copy")
    status.worker_ended()

    def report(*, ended: bool) -> AttachReport:
        return status.report(interface="eth9", queue_ids=(0,), xdp_mode="native", ended=ended)

    assert report(ended=False).mode == "detached"
    assert report(ended=True).mode == "copy"
