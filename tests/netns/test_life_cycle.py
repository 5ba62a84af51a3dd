"""Random life-cycle steps leave nothing behind: counted before, at each idle moment, and after."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from life_cycle import LifeCycle
from traces import InterfaceTraces, ProcessTraces

from mpassthru.testing.netns import Namespace

SHORT_STEPS, LONG_STEPS = 50, 1000
RecordFigure = Callable[[str, object], None]


async def live(namespace: Namespace, folder: Path, seed: int, steps: int, record_figure: RecordFigure) -> None:
    us, interface = ProcessTraces.of(os.getpid()), InterfaceTraces.of(namespace)
    assert interface == InterfaceTraces()
    life = LifeCycle(namespace, folder, seed)
    try:
        await life.run(steps)
    except BaseException:
        print(f"after {len(life.steps)} steps: {' '.join(life.steps[-12:])}")
        raise

    assert ProcessTraces.of(os.getpid()) == us
    assert os.listdir(folder) == []
    record_figure("steps", dict(Counter(life.steps)))
    record_figure("times_counted", life.counts)
    record_figure("left", asdict(InterfaceTraces.of(namespace)))


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_some_steps_leave_nothing_behind(
    veth: Namespace, tmp_path: Path, seed: int, record_figure: RecordFigure
) -> None:
    await live(veth, tmp_path, seed, SHORT_STEPS, record_figure)


@pytest.mark.soak
@pytest.mark.timeout(3600)
async def test_a_thousand_steps_leave_nothing_behind(
    veth: Namespace, tmp_path: Path, seed: int, record_figure: RecordFigure
) -> None:
    await live(veth, tmp_path, seed, LONG_STEPS, record_figure)
