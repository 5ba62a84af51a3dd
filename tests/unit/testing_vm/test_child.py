from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from mpassthru.testing.child import ChildError, last_lines, memory_file, run_child, running_child


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def test_child_ends_with_its_block() -> None:
    async with running_child("sleep", "60") as process:
        assert exists(process.pid)
    assert process.returncode == -signal.SIGTERM
    assert not exists(process.pid)


async def test_child_ends_when_its_task_is_cancelled() -> None:
    started: asyncio.Future[asyncio.subprocess.Process] = asyncio.get_running_loop().create_future()

    async def hold() -> None:
        async with running_child("sleep", "60") as process:
            started.set_result(process)
            await asyncio.Event().wait()

    task = asyncio.create_task(hold())
    process = await started
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert process.returncode == -signal.SIGTERM


async def test_child_that_ignores_sigterm_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpassthru.testing.child.GRACE_S", 0.1)
    script = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); signal.pause()"
    async with running_child(sys.executable, "-c", script) as process:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"ready\n"
    assert process.returncode == -signal.SIGKILL


async def test_child_is_killed_with_its_parent() -> None:
    """The parent is a Python that starts a child as we do, says its pid, and is killed."""
    script = (
        "import asyncio\n"
        "from mpassthru.testing.child import running_child\n"
        "async def main():\n"
        "    async with running_child('sleep', '60') as process:\n"
        "        print(process.pid, flush=True)\n"
        "        await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    async with running_child(sys.executable, "-c", script) as parent:
        assert parent.stdout is not None
        pid = int(await parent.stdout.readline())
        fd = os.pidfd_open(pid)
        gone = asyncio.Event()
        asyncio.get_running_loop().add_reader(fd, gone.set)
        try:
            parent.kill()
            async with asyncio.timeout(5):
                await gone.wait()
        finally:
            asyncio.get_running_loop().remove_reader(fd)
            os.close(fd)


async def test_output_is_returned() -> None:
    assert await run_child("printf", "a\\nb\\n") == "a\nb\n"


async def test_failure_is_told_with_the_last_lines() -> None:
    with pytest.raises(ChildError, match="failed with status 3: some reason"):
        await run_child("sh", "-c", "echo some reason; exit 3")


async def test_child_is_ended_at_its_deadline() -> None:
    with pytest.raises(TimeoutError):
        await run_child("sleep", "60", timeout_s=0.05)


async def test_child_reads_a_file_that_is_only_a_descriptor() -> None:
    with memory_file("name", b"content") as fd:
        async with running_child("cat", f"/proc/self/fd/{fd}", pass_fds=[fd]) as process:
            output, _ = await process.communicate()
    assert output == b"content"


def test_last_lines_are_one_line() -> None:
    assert last_lines("a\nb\n\n c \nd\n", 3) == "c | d"
    assert last_lines("") == "(no output)"
