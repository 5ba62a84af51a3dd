"""`mpassthru attach` as a child process: the real broker and the real worker, watched through `--json`."""

from __future__ import annotations

import asyncio
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from mpassthru.broker.status import AttachReport
from mpassthru.testing.child import ChildError, running_child
from mpassthru.testing.netns import Namespace

INTERVAL_S = 0.1
TIMEOUT_S = 10.0


class AttachedPort:
    """A running `mpassthru attach`.

    Attributes:
        socket_path: Where its front-end connects.
        report: The figures that it printed last; None before the first.
        lines: What else it said.
    """

    def __init__(self, process: Process, socket_path: Path) -> None:
        self.socket_path = socket_path
        self.report: AttachReport | None = None
        self.lines: list[str] = []
        self._process = process
        self._news = asyncio.Condition()
        self._ended = False

    @property
    def pid(self) -> int:
        """Process id of the broker."""
        return self._process.pid

    async def until(self, condition: Callable[[AttachReport], bool], *, timeout_s: float = TIMEOUT_S) -> AttachReport:
        """Wait for figures that fulfil a condition, and return them.

        Raises:
            ChildError: the program ended before.
            TimeoutError: it did not happen in time.
        """
        await self._until(lambda: self.report is not None and condition(self.report), timeout_s)
        assert self.report is not None
        return self.report

    async def until_idle(self, *, after_sessions: int) -> None:
        """Wait until so many front-ends have come, and the last one has gone.

        Raises:
            ChildError: the program ended before.
            TimeoutError: it did not happen in time.
        """
        await self.until(lambda report: report.sessions == after_sessions and report.guest == "waiting")

    async def news(self) -> None:
        """Wait until it prints something, or ends.

        Raises:
            ChildError: it has ended.
        """
        async with self._news:
            if self._ended:
                raise ChildError(f"mpassthru attach has ended: {' | '.join(self.lines[-3:])}")
            await self._news.wait()

    async def until_said(self, text: str, *, timeout_s: float = TIMEOUT_S) -> str:
        """Wait until it says a line with `text` in it, and return the line.

        Raises:
            ChildError: the program ended before.
            TimeoutError: it did not happen in time.
        """
        await self._until(lambda: any(text in line for line in self.lines), timeout_s)
        return next(line for line in self.lines if text in line)

    async def wait(self, *, timeout_s: float = TIMEOUT_S) -> int:
        """Wait until it ends by itself; returns its exit status."""
        async with asyncio.timeout(timeout_s):
            async with self._news:
                await self._news.wait_for(lambda: self._ended)
            return await self._process.wait()

    async def stop(self, *, timeout_s: float = TIMEOUT_S) -> AttachReport:
        """End it in good order (SIGTERM) and return its last figures.

        Raises:
            ChildError: it failed to end well.
        """
        self._process.send_signal(signal.SIGTERM)
        status = await self.wait(timeout_s=timeout_s)
        if status != 0 or self.report is None:
            raise ChildError(f"mpassthru attach ended with status {status}: {' | '.join(self.lines[-3:])}")
        return self.report

    def kill(self) -> None:
        """SIGKILL the broker."""
        self._process.kill()

    async def _until(self, condition: Callable[[], bool], timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s), self._news:
                await self._news.wait_for(lambda: self._ended or condition())
        except TimeoutError:
            raise TimeoutError(
                f"waited {timeout_s:g} s in vain; {self.report}; {' | '.join(self.lines[-5:])}"
            ) from None
        if not condition():
            status = await self._process.wait()
            raise ChildError(f"mpassthru attach ended with status {status}: {' | '.join(self.lines[-3:])}")

    async def follow(self) -> None:
        """Read what it prints until it ends."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow_figures())
            tasks.create_task(self._follow_lines())
        async with self._news:
            self._ended = True
            self._news.notify_all()

    async def _follow_figures(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            async with self._news:
                self.report = msgspec.json.decode(line, type=AttachReport)
                self._news.notify_all()

    async def _follow_lines(self) -> None:
        assert self._process.stderr is not None
        async for line in self._process.stderr:
            async with self._news:
                self.lines.append(line.decode(errors="replace").rstrip())
                self._news.notify_all()


@asynccontextmanager
async def attached_port(
    namespace: Namespace,
    socket_path: Path,
    *options: str,
    interval_s: float = INTERVAL_S,
    connect: bool = False,
    prefix: Sequence[str] = (),
    python: str = sys.executable,
) -> AsyncIterator[AttachedPort]:
    """Run `mpassthru attach` on the namespace's interface for the length of the block.

    Args:
        namespace: Where the interface is.
        socket_path: Where the front-end will connect, or listens.
        options: More options of `mpassthru attach`.
        interval_s: Seconds between figures.
        connect: The front-end listens.
        prefix: Command to run it with, such as `setpriv` and its options.
        python: Interpreter to run it with.
    """
    command = (python, "-m", "mpassthru", "attach", namespace.ifname, "--json", "--interval", str(interval_s))
    async with running_child(
        *prefix,
        *command,
        "--connect" if connect else "--socket-path",
        str(socket_path),
        *options,
        namespace=namespace,
        stderr=PIPE,
    ) as process:
        port = AttachedPort(process, socket_path)
        following = asyncio.create_task(port.follow())
        try:
            yield port
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
