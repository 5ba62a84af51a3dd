"""Figures made of samples, and the table made of figures."""

from __future__ import annotations

import os

import msgspec
import pytest

from bench.cpu import cpu_time
from bench.load import Load, full_plan, quick_plan
from bench.publish import short_table
from bench.results import Peer, Results, Sample, Spread, rows_of, spread
from bench.table import markdown

LOAD = Load(direction="rx", frame_bytes=1000)


def sample(peer: str, round_: int = 1, *, frames: int = 1_000_000, backend_s: float = 0.5, lost: int = 0) -> Sample:
    return Sample(
        peer=peer,
        round=round_,
        load=LOAD,
        seconds=2.0,
        frames=frames,
        backend_user_s=0.1,
        backend_system_s=0.3,
        backend_s=backend_s,
        machine_s=2.0,
        offered=frames + lost,
        delivered=frames,
        lost={"rx: no_buffer": lost} if lost else {},
    )


def results(samples: tuple[Sample, ...]) -> Results:
    return Results(
        target="bench-quick",
        ok=True,
        seconds=1.0,
        command="python -m bench",
        machine={"kernel": "6.18"},
        plan=quick_plan(),
        peers=(Peer(name="dpdk", what="testpmd", missing="not installed"),),
        rows=rows_of(samples),
        samples=samples,
    )


def test_figures_are_for_each_delivered_frame() -> None:
    assert sample("limit").figure("mframes_per_s") == pytest.approx(0.5)
    assert sample("limit").figure("gbit_per_s") == pytest.approx(4.0)
    assert sample("limit").figure("backend_ns") == pytest.approx(500)
    assert sample("limit").figure("machine_ns") == pytest.approx(2000)


def test_ticks_only_divide_the_schedulers_sum() -> None:
    assert sample("limit").figure("backend_user_ns") == pytest.approx(125)
    assert sample("limit").figure("backend_system_ns") == pytest.approx(375)


def test_a_sample_without_frames_has_no_figure_for_each_frame() -> None:
    assert sample("limit", frames=0).figure("backend_ns") is None
    assert sample("limit", frames=0).figure("lost_share") is None


def test_ratios_are_those_of_each_round() -> None:
    rows = rows_of(
        (
            sample("limit", 1, frames=1_000_000),
            sample("port", 1, frames=500_000),
            sample("limit", 2, frames=100_000),
            sample("port", 2, frames=90_000),
        )
    )
    ratio = rows[1].of_limit["mframes_per_s"]
    assert ratio is not None
    assert (ratio.min, ratio.max) == (pytest.approx(0.5), pytest.approx(0.9))
    assert rows[0].of_limit["mframes_per_s"] == Spread(1.0, 1.0, 1.0)


def test_a_peer_whose_limit_was_not_measured_has_no_ratio() -> None:
    assert rows_of((sample("port"),))[0].of_limit["mframes_per_s"] is None


def test_spread_leaves_out_what_there_is_not() -> None:
    assert spread([3.0, None, 1.0, 2.0]) == Spread(1.0, 2.0, 3.0)
    assert spread([None]) is None


def test_the_table_names_losses_by_reason_and_a_missing_peer_with_its_reason() -> None:
    text = markdown(results((sample("limit"), sample("port", lost=1_000_000))))
    assert "| dpdk | testpmd |  |  | not installed |" in text
    assert "50.0 % (rx: no_buffer 1,000,000)" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith(("| bytes", "| 1000"))}
    assert len(widths) == 1


def test_results_survive_their_own_json() -> None:
    before = results((sample("limit"), sample("port")))
    assert msgspec.json.decode(msgspec.json.encode(before), type=Results) == before


def test_the_full_plan_has_all_that_the_quick_one_has() -> None:
    assert set(quick_plan().loads) <= set(full_plan().loads)


def test_cpu_time_of_this_process_goes_up() -> None:
    before = cpu_time(os.getpid())
    while (now := cpu_time(os.getpid())).user_s + now.system_s == before.user_s + before.system_s:
        sum(range(10_000))
    assert now.total_s > before.total_s
    assert now.machine_s >= before.machine_s


def test_the_short_table_names_what_was_not_measured() -> None:
    load = Load(direction="tx", frame_bytes=64)
    rows = rows_of((msgspec.structs.replace(sample("limit"), load=load),))
    table = short_table(msgspec.structs.replace(results(()), rows=rows))
    assert table.splitlines()[0] == "| | limit |"
    assert "| tx, 64 bytes | 0.50 M/s, 500 ns |" in table
    assert "| tx, 1514 bytes | missing |" in table
