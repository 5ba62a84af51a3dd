"""`mpassthru demo` as `make` runs it: its verdict, its report, and that an interrupted one leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE
from pathlib import Path

import pytest

from mpassthru.testing.child import running_child

TIMEOUT_S = 30.0
COMMAND = (sys.executable, "-m", "mpassthru", "demo", "--seconds", "0.5")


async def test_demo_passes_and_reports(tmp_path: Path) -> None:
    path = tmp_path / "reports" / "demo.json"
    async with running_child(*COMMAND, "--json", "--report", str(path), stderr=PIPE) as process:
        async with asyncio.timeout(TIMEOUT_S):
            output, _ = await process.communicate()

    report = json.loads(output)
    assert process.returncode == 0, report
    assert report["ok"] is True
    assert report["mode"] == "copy"
    for direction in (report["rx"], report["tx"]):
        assert direction["direct"] == direction["frames"] > 0
        assert direction["copied_bytes"] == 0
        assert isinstance(direction["bounced"], dict)
        assert isinstance(direction["dropped"], dict)
    assert json.loads(path.read_text()) == report


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_interrupted_demo_leaves_nothing_behind(tmp_path: Path, number: signal.Signals) -> None:
    command = ("env", f"TMPDIR={tmp_path}", *COMMAND, "--seconds", "60")
    async with running_child(*command) as process:
        assert process.stdout is not None
        async with asyncio.timeout(TIMEOUT_S):
            while b"guest: running" not in await process.stdout.readline():
                assert process.returncode is None
            process.send_signal(number)
            output = await process.stdout.read()
            status = await process.wait()

    assert status == 130
    assert b"everything was given back" in output
    assert os.listdir(tmp_path) == []
