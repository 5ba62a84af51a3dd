"""Child processes of the test harness: started in a network namespace, ended by pid, never left behind.

A child dies with us however we end: by `end_child` in an orderly end, on an exception and on cancellation, and by
its parent death signal if we are killed.
"""

from __future__ import annotations

import asyncio
import os
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

from mpassthru.errors import MpassthruError
from mpassthru.testing.netns import Namespace

GRACE_S = 5.0
"""Seconds that a child has to end by itself."""


class ChildError(MpassthruError):
    """A program that the harness runs did not do what it was started for."""


def _command(arguments: Sequence[str], namespace: Namespace | None) -> list[str]:
    """Return a command line that enters the namespace and dies with its parent; each step keeps the pid.

    A child cannot be started inside `Namespace.entered`: starting one waits, and other tasks would run there too.
    """
    enter = ["nsenter", f"--net=/proc/{os.getpid()}/fd/{namespace.fd}", "--"] if namespace else []
    return [*enter, "setpriv", "--pdeathsig", "KILL", "--", *arguments]


async def end_child(process: Process) -> int:
    """End a child and reap it: end of file and SIGTERM, then SIGKILL after `GRACE_S` seconds.

    Returns:
        Its exit status; negative if a signal ended it.
    """
    if process.stdin is not None:
        process.stdin.close()
    if process.returncode is None:
        process.terminate()
    try:
        async with asyncio.timeout(GRACE_S):
            await process.wait()
    except TimeoutError:
        pass
    finally:
        if process.returncode is None:
            process.kill()
    return await process.wait()


async def until_gone(pid: int, *, timeout_s: float = 10.0) -> None:
    """Wait until a process has ended that need not be our child.

    Raises:
        TimeoutError: it lives on.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(pidfd, ended.set)
    try:
        async with asyncio.timeout(timeout_s):
            await ended.wait()
    finally:
        asyncio.get_running_loop().remove_reader(pidfd)
        os.close(pidfd)


@asynccontextmanager
async def running_child(
    *arguments: str,
    namespace: Namespace | None = None,
    pass_fds: Sequence[int] = (),
    stdin: int = asyncio.subprocess.DEVNULL,
    stderr: int = asyncio.subprocess.STDOUT,
) -> AsyncIterator[Process]:
    """Run a child for the length of the block, with its output in a pipe."""
    process = await asyncio.create_subprocess_exec(
        *_command(arguments, namespace),
        stdin=stdin,
        stdout=asyncio.subprocess.PIPE,
        stderr=stderr,
        pass_fds=pass_fds,
    )
    try:
        yield process
    finally:
        await end_child(process)


async def run_child(*arguments: str, namespace: Namespace | None = None, timeout_s: float = 60.0) -> str:
    """Run a child to its end; returns what it printed.

    Raises:
        ChildError: It failed; the message holds the end of its output.
        TimeoutError: It ran for more than `timeout_s` seconds.
    """
    async with asyncio.timeout(timeout_s), running_child(*arguments, namespace=namespace) as process:
        output, _ = await process.communicate()
    text = output.decode(errors="replace")
    if process.returncode:
        raise ChildError(f"{' '.join(arguments)} failed with status {process.returncode}: {last_lines(text)}")
    return text


@contextmanager
def memory_file(name: str, content: bytes) -> Iterator[int]:
    """Hold a file that exists only as a descriptor, for a child to open as `/proc/self/fd/FD`."""
    fd = os.memfd_create(name)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(content)
        yield fd
    finally:
        os.close(fd)


def last_lines(text: str, count: int = 3) -> str:
    """Return the last lines of an output in one line, for an error message."""
    return " | ".join(line.strip() for line in text.splitlines()[-count:] if line.strip()) or "(no output)"
