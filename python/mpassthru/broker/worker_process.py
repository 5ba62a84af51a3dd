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

from mpassthru.control import BrokerMessage, ControlChannel, WorkerMessage, broker_channel

STOP_TIMEOUT_S = 5.0
"""How long an orderly end may take (closing an AF_XDP socket takes tens of ms) before SIGKILL."""


class WorkerProcess:
    """A running worker and the broker's end of its control channel.

    Raises:
        OSError: the process cannot be started.
    """

    def __init__(self, *, module: str = "mpassthru.worker") -> None:
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
                    start_new_session=True,
                )
            except BaseException:
                ours.close()
                raise
        self.channel: ControlChannel[BrokerMessage, WorkerMessage] = broker_channel(ours)
        self._pidfd = os.pidfd_open(self._process.pid)

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def exit_text(self) -> str:
        """How the process ended, in words."""
        status = self._process.returncode
        if status is None:
            return "is running"
        if status < 0:
            return f"was killed by {signal.Signals(-status).name}"
        return f"ended with status {status}"

    def raise_memlock_limit(self) -> bool:
        """Lift the worker's limit of locked memory, for a UMEM pins all of a guest. False if that is not allowed."""
        infinity = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        try:
            resource.prlimit(self.pid, resource.RLIMIT_MEMLOCK, infinity)
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

    def kill(self) -> None:
        """Send SIGKILL, if the process is still there."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
