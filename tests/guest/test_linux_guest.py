"""An unmodified Linux guest in QEMU: the demo's traffic, every check of it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from mpassthru.demo.report import DemoReport

DEADLINE_S = 240


@pytest.mark.slow
@pytest.mark.timeout(DEADLINE_S + 20)
async def test_linux_guest_moves_ping_iperf3_and_files_both_ways_in_place(
    tmp_path: Path, record_figure: Callable[[str, object], None]
) -> None:
    report_path = tmp_path / "demo.json"
    demo = (
        sys.executable,
        "-m",
        "mpassthru",
        "demo",
        "--guest",
        "qemu",
        "--seconds",
        "3",
        "--report",
        str(report_path),
    )
    process = await asyncio.create_subprocess_exec(
        *demo, stderr=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL
    )
    async with asyncio.timeout(DEADLINE_S):
        _, said = await process.communicate()
    assert process.returncode == 0, said.decode(errors="replace")[-2000:]

    report = msgspec.json.decode(report_path.read_bytes(), type=DemoReport)
    assert report.ok
    assert [check.name for check in report.checks if not check.ok] == []
    for direction in (report.rx, report.tx):
        assert direction.direct >= 0.99 * direction.frames > 0
        assert direction.copied_bytes == direction.header_bytes
    assert report.rx.header_bytes == 0
    assert report.tx.offloaded["tso4"] > 0
    record_figure("demo", msgspec.to_builtins(report))
