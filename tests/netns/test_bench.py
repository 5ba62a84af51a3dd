"""The benches' own books: whatever was sent was delivered or is in a counter. Speed is nobody's business here."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from bench.cargo import build
from bench.idle import measure as measure_idle
from bench.load import Load, quick_plan
from bench.run import run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]  # the limit's program is built first

LOADS = (
    Load(direction="rx", frame_bytes=64),
    Load(direction="tx", frame_bytes=1514),
    Load(direction="both", frame_bytes=256, rate_frames_per_s=10_000),
)


async def test_every_frame_of_a_run_is_accounted_for() -> None:
    plan = msgspec.structs.replace(quick_plan(), name="test", rounds=1, seconds=0.5, warm_up_s=0.02, loads=LOADS)
    results = await run(
        plan,
        limit_program=build("mpassthru-limit"),
        command="pytest",
        say=lambda _: None,
        only=("limit", "mpassthru copy", "mpassthru packet"),
    )
    assert results.ok
    assert [peer.missing for peer in results.peers] == [None, None, None]
    assert len(results.rows) == len(LOADS) * 3
    for sample in results.samples:
        assert sample.frames > 0
        assert sample.offered - sample.delivered == sum(sample.lost.values()), sample


async def test_a_peer_that_does_not_start_is_named_with_the_reason() -> None:
    plan = msgspec.structs.replace(quick_plan(), name="test", rounds=2, seconds=0.05, warm_up_s=0.02, loads=LOADS[:1])
    results = await run(
        plan, limit_program=Path("/nonexistent/limit"), command="pytest", say=lambda _: None, only=("limit",)
    )
    assert not results.ok
    assert results.rows == ()
    (peer,) = results.peers
    assert peer.missing is not None
    assert "round 1" in peer.missing


async def test_every_frame_to_an_idle_guest_comes_back() -> None:
    idle = await measure_idle(1, 2.5, 50)
    assert [it.lost for it in idle.round_trips] == [0, 0, 0]
    assert all(0 < it.p50_us <= it.p99_us <= it.p999_us for it in idle.round_trips)
    assert idle.share_of_a_core > 0
