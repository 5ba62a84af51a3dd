"""`mpassthru demo` as `make` runs it: its verdict, its report, and that an interrupted one leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path

import pytest

from mpassthru.testing.child import running_child

TIMEOUT_S = 30.0
COMMAND = (sys.executable, "-m", "mpassthru", "demo", "--seconds", "0.5")


async def test_demo_passes_and_reports(tmp_path: Path) -> None:
    path = tmp_path / "demo.json"
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
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

    assert status == 128 + number
    assert b"everything was given back" in output
    assert os.listdir(tmp_path) == []


async def test_interrupt_that_is_repeated_cannot_stop_the_cleaning(tmp_path: Path) -> None:
    command = ("env", f"TMPDIR={tmp_path}", *COMMAND, "--seconds", "60")
    async with running_child(*command) as process, asyncio.timeout(TIMEOUT_S):
        assert process.stdout is not None
        while b"guest: running" not in await process.stdout.readline():
            assert process.returncode is None
        insisting = asyncio.create_task(interrupt_again_and_again(process))
        while b"interrupted already" not in (line := await process.stdout.readline()):
            assert line
        insisting.cancel()
        output = await process.stdout.read()
        status = await process.wait()

    assert status == 130
    assert output.endswith(b"interrupted by SIGINT; everything was given back\n")
    assert os.listdir(tmp_path) == []


async def interrupt_again_and_again(process: Process) -> None:
    while True:
        process.send_signal(signal.SIGINT)
        await asyncio.sleep(0.01)


async def test_report_without_a_directory_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "demo.json"
    async with running_child(*COMMAND, "--report", str(path)) as process:
        async with asyncio.timeout(TIMEOUT_S):
            output, _ = await process.communicate()

    assert process.returncode == 1
    assert output.decode() == (
        f"mpassthru: cannot write the report to {path}: there is no {path.parent}; make it first\n"
    )
