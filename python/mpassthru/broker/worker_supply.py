"""Where a port's workers come from: while a guest runs, one is in reserve, started and waiting for its configuration.

The start of a Python process is most of what a guest would wait for when its worker dies, and more so on a machine
whose CPUs the guest itself keeps busy. A worker in reserve has no configuration, no socket and no guest; it costs only
memory.
"""

from __future__ import annotations

from collections.abc import Callable

from mpassthru.broker.worker_process import WorkerProcess
from mpassthru.errors import HostError

Say = Callable[[str], None]


class WorkerSupply:
    """Gives out workers that have not been configured.

    Args:
        start: Starts a worker process, which says its lines of stderr.
        say: Called with one line for the user.
        say_stderr: Called with each line that a worker writes to stderr.
    """

    def __init__(self, start: Callable[[Say], WorkerProcess], say: Say, say_stderr: Say) -> None:
        self._start = start
        self._say = say
        self._say_stderr = say_stderr
        self._reserve: WorkerProcess | None = None

    async def take(self) -> WorkerProcess:
        """The worker in reserve if it lives, or else a new one. It is the caller's to end.

        Raises:
            HostError: no process can be started.
        """
        worker, self._reserve = self._reserve, None
        if worker is not None and worker.has_ended:
            await worker.end()
            self._say(f"worker {worker.pid}, in reserve, {worker.exit_text}")
            worker = None
        return worker or self._start(self._say_stderr)

    def keep_reserve(self) -> None:
        """Have a worker in reserve until `drop_reserve`; a guest can do without if there is none to be had."""
        if self._reserve is not None:
            return
        try:
            self._reserve = self._start(self._say_stderr)
        except HostError as error:
            self._say(f"no worker is in reserve, and a new one will take longer: {error}")

    async def drop_reserve(self) -> None:
        """End the worker in reserve, if there is one."""
        worker, self._reserve = self._reserve, None
        if worker is not None:
            worker.kill()
            await worker.end()
