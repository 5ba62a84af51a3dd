"""One worker process: started, fed and reaped by the broker. A pidfd tells its end, so that no thread waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable

from mpassthru.control import BrokerMessage, ControlChannel, WorkerMessage, broker_channel
from mpassthru.errors import attempting

STOP_TIMEOUT_S = 5.0
"""How long an orderly end may take (closing an AF_XDP socket takes tens of ms) before SIGKILL."""
LINE_MAX_BYTES = 4096
"""Longer lines of a worker come in pieces."""
PIPE_BYTES = 65536
"""What may be left in a pipe (pipe(7)) whose writer is gone."""


class WorkerProcess:
    """A running worker and the broker's end of its control channel.

    Its stdout is lost and its stderr a pipe: a terminal would obey what a worker writes to it.

    Args:
        say: Called with each line that the process writes to stderr (a panic, a traceback, its last words), as it is.
        module: What to run.

    Raises:
        HostError: the process cannot be started.
    """

    def __init__(self, say: Callable[[str], None], *, module: str = "mpassthru.worker") -> None:
        self._say = say
        self._line = b""
        with attempting("start a worker"):
            self._start(module)

    def _start(self, module: str) -> None:
        """Make the process and what it is watched by, or nothing."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                # -P: no module from the current directory gets into a process that starts privileged.
                # A session of its own: Ctrl-C is the broker's to handle.
                self._process: subprocess.Popen[bytes] = subprocess.Popen(
                    [
                        *(sys.executable, "-P", "-m", module),
                        *("--control-fd", str(theirs.fileno())),
                        *("--broker-pid", str(os.getpid())),
                    ],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    start_new_session=True,
                )
            except BaseException:
                ours.close()
                raise
        self.channel: ControlChannel[BrokerMessage, WorkerMessage] = broker_channel(ours)
        assert self._process.stderr is not None, "it is a pipe"
        self._stderr = self._process.stderr
        os.set_blocking(self._stderr.fileno(), False)
        self._pidfd = -1
        try:
            self._pidfd = os.pidfd_open(self._process.pid)
            asyncio.get_running_loop().add_reader(self._stderr.fileno(), self._read_stderr)
        except BaseException:
            self.channel.close()
            self._stderr.close()
            if self._pidfd >= 0:
                os.close(self._pidfd)
            self._process.kill()
            self._process.wait()
            raise

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        """Whether the process is no more; it is reaped then."""
        return self._process.poll() is not None

    @property
    def exit_text(self) -> str:
        """How the process ended, in words."""
        status = self._process.returncode
        if status is None:
            return "is running"
        if status < 0:
            return f"was killed by {signal.Signals(-status).name}"
        return f"ended with status {status}"

    def limit_locked_memory(self, max_bytes: int) -> bool:
        """Let the worker lock so much memory, for a UMEM pins all of a guest. False if that is not allowed.

        The kernel holds this limit against what all processes of the worker's user have locked
        (`xdp_umem_account_pages`).
        """
        try:
            resource.prlimit(self.pid, resource.RLIMIT_MEMLOCK, (max_bytes, max_bytes))
        except PermissionError:
            return False
        return True

    async def wait(self) -> None:
        """Wait until the process has ended, and reap it."""
        if self._process.returncode is not None:
            return
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        loop.add_reader(self._pidfd, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(self._pidfd)
        self._process.wait()

    async def end(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Wait `timeout_s` for the process to end by itself, then kill it. The channel is closed. May be repeated."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.wait(), timeout_s)
        self.kill()
        await self.wait()
        self.channel.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        for _ in range(0, PIPE_BYTES, LINE_MAX_BYTES):
            self._read_stderr()
        self._close_stderr()

    def kill(self) -> None:
        """Send SIGKILL, if the process is still there."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    def _read_stderr(self) -> None:
        """Pass on the lines that are there."""
        if self._stderr.closed:
            return
        try:
            data = os.read(self._stderr.fileno(), LINE_MAX_BYTES)
        except BlockingIOError:
            return
        if not data:
            self._close_stderr()
        *lines, self._line = (self._line + data).split(b"\n")
        if len(self._line) > LINE_MAX_BYTES:
            lines, self._line = [*lines, self._line], b""
        for line in lines:
            self._say(line.decode(errors="replace"))

    def _close_stderr(self) -> None:
        if self._stderr.closed:
            return
        asyncio.get_running_loop().remove_reader(self._stderr.fileno())
        self._stderr.close()
        if self._line:
            self._say(self._line.decode(errors="replace"))
            self._line = b""
