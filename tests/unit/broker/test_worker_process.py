"""A child process as the broker holds it: what it says, how it ends, and what is left of it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mpassthru.broker.worker_process import LINE_MAX_BYTES, WorkerProcess
from mpassthru.errors import HostError

MODULE = "played_worker_program"


@pytest.fixture
def write_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], object]]:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    before = len(os.listdir("/proc/self/fd"))
    yield (tmp_path / f"{MODULE}.py").write_text
    assert len(os.listdir("/proc/self/fd")) <= before, "a descriptor is left"


async def test_lines_of_stderr_are_said_and_stdout_is_lost(
    write_program: Callable[[str], object], capfd: pytest.CaptureFixture[str]
) -> None:
    write_program("import sys; print('lost'); sys.stderr.write('first\\nlast words'); sys.exit(3)")
    lines: list[str] = []
    worker = WorkerProcess(lines.append, module=MODULE)

    await worker.end()

    assert lines == ["first", "last words"]
    assert worker.exit_text == "ended with status 3"
    assert capfd.readouterr() == ("", "")


async def test_process_that_cannot_be_watched_is_ended_again(
    write_program: Callable[[str], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []

    def refuse(pid: int) -> int:
        started.append(pid)
        raise OSError(errno.EMFILE, "Too many open files")

    write_program("import time; time.sleep(3600)")
    monkeypatch.setattr(os, "pidfd_open", refuse)
    with pytest.raises(HostError, match=r"cannot start a worker \(EMFILE\)"):
        WorkerProcess([].append, module=MODULE)

    with pytest.raises(ProcessLookupError):
        os.kill(started[0], 0)


async def test_line_without_end_comes_in_pieces(write_program: Callable[[str], object]) -> None:
    write_program(f"import sys; sys.stderr.write('x' * {10 * LINE_MAX_BYTES})")
    lines: list[str] = []
    worker = WorkerProcess(lines.append, module=MODULE)

    await worker.end()

    assert max(map(len, lines)) <= 2 * LINE_MAX_BYTES
    assert "".join(lines) == "x" * 10 * LINE_MAX_BYTES


async def test_pipe_that_another_process_keeps_open_does_not_keep_the_worker(
    write_program: Callable[[str], object],
) -> None:
    write_program("import os, sys, time\nif os.fork() == 0:\n time.sleep(1)\n os._exit(0)\nsys.stderr.write('bye')")
    lines: list[str] = []
    worker = WorkerProcess(lines.append, module=MODULE)

    await worker.end()

    assert lines == ["bye"]


async def test_worker_that_does_not_end_is_killed(write_program: Callable[[str], object]) -> None:
    write_program("import time; time.sleep(3600)")
    worker = WorkerProcess(print, module=MODULE)

    await worker.end(timeout_s=0)
    await worker.end()

    assert worker.exit_text == "was killed by SIGKILL"
