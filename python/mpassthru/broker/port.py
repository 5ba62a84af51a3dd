"""A port as the broker sees it: one worker, its sockets and its front-ends, from start to an orderly end.

Three things go on at once while a worker lives: its messages are answered, front-ends are handed to it one at a time,
and the user's wish to stop is waited for. When the worker dies, the kernel takes its sockets out of the XSKMAP (frames
of its queues are dropped, the host sees none of them), and the one in reserve takes over: at once, or after a pause if
the last one lived only briefly. What was in flight is in a memory file that outlives them all
(`mpassthru.inflight_records`).

The broker never maps guest memory and never reads from a vhost-user socket. It keeps an AF_XDP socket's fd only from
its creation until it is in the XSKMAP: an open copy would keep the socket, and with it the queue, alive.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import time
from collections.abc import Callable, Mapping
from typing import Protocol

import msgspec

from mpassthru import control
from mpassthru.broker.endpoint import Endpoint
from mpassthru.broker.status import PortStatus
from mpassthru.broker.worker_process import STOP_TIMEOUT_S, WorkerProcess
from mpassthru.broker.worker_supply import WorkerSupply
from mpassthru.broker.xsk import create_socket
from mpassthru.control import ControlError, close_fds
from mpassthru.errors import HostError, MpassthruError
from mpassthru.inflight_records import make_records
from mpassthru.locked_memory import LockedMemory
from mpassthru.log import LineLimiter, printable
from mpassthru.netdev.af_xdp import wait_queue_free
from mpassthru.report import DirectionReport

RESTART_PAUSE_MIN_S = 0.1
RESTART_PAUSE_MAX_S = 5.0
RESTART_AT_ONCE_S = 1.0
"""A worker that lived this long is followed by another at once; after a shorter life comes a pause, each twice as long.
Whoever can make workers end, such as a guest, costs the host one start a second at most."""
REPORT_TIMEOUT_S = 2.0
FREE_TIMEOUT_S = 15.0
"""How long a queue may be held after its socket was closed; a NIC whose link has to come back takes seconds."""
STDERR_LINES_MAX = 200
"""Of a worker, in the time of a `LineLimiter`: a traceback is kept whole."""
REASONS_MAX = 64
"""Of bouncing or dropping, in a worker's report: more than there are."""
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")

Say = Callable[[str], None]


class WaitQueueFree(Protocol):
    """`mpassthru.netdev.af_xdp.wait_queue_free`."""

    async def __call__(self, ifname: str, ifindex: int, queue_id: int, *, timeout_s: float) -> None:
        """Return when no NIC can write to the last socket's buffers; HostError if that does not come to pass."""


class Steering(Protocol):
    """What a port needs of `_core.SteeringProgram`."""

    def set_socket(self, queue_id: int, socket_fd: int) -> None:
        """Send a queue's frames to a socket."""

    def clear_socket(self, queue_id: int) -> None:
        """Drop a queue's frames."""

    def counters(self) -> dict[int, dict[str, int]]:
        """Frames of each queue, by name."""


class Port:
    """Runs a port until told to stop.

    Args:
        configuration: What each worker is told; `keep_ipc_lock` is decided per worker.
        steering: The attached XDP program, with this port's queues claimed; in mode `packet` there is none.
        endpoint: Where front-ends come from.
        memory: This port's place in the accounts of locked memory.
        once: End after one front-end, or when the worker dies.
        stopping: Set to end the port; `stop` sets it.
        say: Called with one line for each thing the user should know.
        start_worker: Makes a worker process, which says its lines of stderr; tests pass their own.
        new_socket: Makes a socket for an interface: AF_XDP, or in mode `packet` a bound packet socket.
        wait_free: Waits until the kernel has let go of a queue; tests pass their own.
    """

    def __init__(
        self,
        configuration: control.Configure,
        steering: Steering,
        endpoint: Endpoint,
        memory: LockedMemory,
        *,
        say: Say,
        once: bool = False,
        stopping: asyncio.Event | None = None,
        start_worker: Callable[[Say], WorkerProcess] = WorkerProcess,
        new_socket: Callable[[int], socket.socket] = create_socket,
        wait_free: WaitQueueFree = wait_queue_free,
    ) -> None:
        self.status = PortStatus()
        self._failed = False
        self._configuration = configuration
        self._steering = steering
        self._endpoint = endpoint
        self._memory = memory
        self._once = once or endpoint.single
        self._say = LineLimiter(say)
        self._say_stderr = LineLimiter(say, lines_max=STDERR_LINES_MAX)
        self._supply = WorkerSupply(start_worker, self._say, self._say_of_worker)
        self._new_socket = new_socket
        self._wait_free = wait_free
        self._freeing: dict[int, asyncio.Task[None]] = {}
        self._stopping = stopping or asyncio.Event()
        self._idle = asyncio.Event()
        self._reported = asyncio.Event()
        self._worker: WorkerProcess | None = None
        self._sockets: dict[int, socket.socket] = {}

    @property
    def failed(self) -> bool:
        """Whether the port ended for want of something, or its only front-end met trouble."""
        return self._failed or (self._once and bool(self.status.troubles))

    def stop(self) -> None:
        """Ask for an orderly end; `run` returns when everything has been given back."""
        self._stopping.set()

    def fail(self, line: str) -> None:
        """Like `stop`, for a reason that the user should know."""
        self._trouble(line)
        self._failed = True
        self.stop()

    async def run(self) -> None:
        """Keep a worker running until `stop`, or until the one front-end of `once` has left.

        Raises:
            HostError: the front-end's socket cannot be connected to, or no worker can be started.
        """
        records_fd = make_records(len(self._configuration.queue_ids))
        try:
            await self._run_workers(records_fd)
        finally:
            await self._supply.drop_reserve()
            os.close(records_fd)

    async def _run_workers(self, records_fd: int) -> None:
        """One worker after the other."""
        pause_s = 0.0
        while not self._stopping.is_set():
            started = time.monotonic()
            await self._run_worker(records_fd)
            if self._stopping.is_set() or self._once:
                return
            if time.monotonic() - started >= RESTART_AT_ONCE_S:
                pause_s = 0.0
            else:
                pause_s = min(max(2 * pause_s, RESTART_PAUSE_MIN_S), RESTART_PAUSE_MAX_S)
            self.status.worker_restarts += 1
            when = f"in {pause_s:g} s" if pause_s else "at once"
            self._say(f"starting a new worker {when}; the front-end has to connect again")
            self.status.worker = "paused"
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause_s)

    async def refresh(self) -> PortStatus:
        """The port's status with the worker's counters of now; with those of before if no worker answers in time."""
        if self._worker is not None:
            self._reported.clear()
            with contextlib.suppress(ControlError, TimeoutError):
                self._worker.channel.send(control.ReportWanted())
                await asyncio.wait_for(self._reported.wait(), REPORT_TIMEOUT_S)
        self.status.steering = self.read_steering()
        return self.status

    def read_steering(self) -> dict[str, dict[str, int]]:
        """The XDP program's counters, by hardware queue."""
        return {str(queue): dict(names) for queue, names in self._steering.counters().items()}

    async def _run_worker(self, records_fd: int) -> None:
        """One worker, from start to reaped."""
        self.status.worker = "starting"
        worker = await self._supply.take()
        self.status.worker_pid = worker.pid
        reading = asyncio.create_task(self._answer(worker))
        feeding = asyncio.create_task(self._feed(worker))
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            keep_ipc_lock = not worker.limit_locked_memory(self._memory.budget.host_max_bytes)
            with contextlib.suppress(ControlError):  # a worker that is already dead is found below
                worker.channel.send(_with_ipc_lock(self._configuration, keep_ipc_lock), (records_fd,))
            self._worker = worker
            await asyncio.wait({reading, feeding, stopping}, return_when=asyncio.FIRST_COMPLETED)
            await self._let_worker_end(worker, reading, feeding)
        except BaseException:
            worker.kill()
            await worker.end()
            raise
        finally:
            self._worker = None
            helpers = (reading, feeding, stopping, *self._freeing.values())
            for task in helpers:
                task.cancel()
            await asyncio.gather(*helpers, return_exceptions=True)
            self._freeing.clear()
            self._idle.clear()
            self._drop_sockets()
            self._unlock_memory()
            self.status.worker_ended()

    async def _let_worker_end(
        self, worker: WorkerProcess, reading: asyncio.Task[None], feeding: asyncio.Task[None]
    ) -> None:
        """End the worker in good order if it still lives; say how it ended if it did so unasked."""
        asked = not reading.done()
        if asked:
            with contextlib.suppress(ControlError):
                worker.channel.send(control.Stop())
            await asyncio.wait({reading}, timeout=STOP_TIMEOUT_S)
        broken = reading.exception() if reading.done() else ControlError("it does not stop")
        if broken is not None:
            worker.kill()
        await worker.end()
        if broken is not None or not asked:
            cause = f": {broken}" if broken is not None else ""
            self._trouble(f"worker {worker.pid} of {self._configuration.interface} {worker.exit_text}{cause}")
        if broken is not None and not isinstance(broken, MpassthruError):
            raise broken
        if feeding.done():
            feeding.result()

    async def _feed(self, worker: WorkerProcess) -> None:
        """Hand front-ends to the worker, one at a time; returns after the last one has left."""
        while True:
            await self._idle.wait()
            await self._supply.drop_reserve()
            connection = await self._endpoint.next_connection()
            if connection is None:
                return
            self._idle.clear()
            self.status.sessions += 1
            with connection, contextlib.suppress(ControlError):  # a worker that has died: the front-end sees it too
                worker.channel.send(control.FrontendConnected(), (connection.fileno(),))
            if self._once:
                await self._idle.wait()
                return

    async def _answer(self, worker: WorkerProcess) -> None:
        """Act on the worker's messages until it closes its end."""
        while (received := await worker.channel.receive()) is not None:
            message, fds = received
            if fds:
                close_fds(fds)
                raise ControlError(f"the worker sent file descriptors with {type(message).__name__}")
            self._act_on(worker, message)

    def _act_on(self, worker: WorkerProcess, message: control.WorkerMessage) -> None:
        match message:
            case control.Ready():
                self._say(f"worker {worker.pid} is ready for a front-end")
                self.status.worker = "ready"
                self._idle.set()
            case control.MemoryWanted(locked_bytes=locked_bytes):
                self._lock_memory(worker, locked_bytes)
            case control.SocketWanted(queue_pair=queue_pair):
                self._grant_socket(worker, queue_pair)
            case control.SocketBound(queue_pair=queue_pair, mode=mode):
                self._steer_socket(worker, queue_pair, mode)
            case control.SocketReleased(queue_pair=queue_pair, await_free=await_free):
                self._release_socket(queue_pair)
                if await_free:
                    if (earlier := self._freeing.pop(queue_pair, None)) is not None:
                        earlier.cancel()
                    self._freeing[queue_pair] = asyncio.create_task(self._tell_when_free(worker, queue_pair))
            case control.SessionChanged(state=state, error=error):
                self._session_changed(state, error)
            case control.Fault(vring=vring, error=error):
                self.status.faults += 1
                self._trouble(f"virtqueue {vring} was stopped, for the guest broke it: {printable(error)}")
            case control.Resumed(vring=vring, buffers=buffers):
                self.status.buffers_resumed += buffers
                self._say(f"virtqueue {vring} goes on where a worker ended that had {buffers} of its buffers")
            case control.Notice(text=text, trouble=trouble):
                (self._trouble if trouble else self._say)(printable(text))
            case control.WorkerReport(rx=rx, tx=tx):
                self.status.worker_reported(_checked(rx), _checked(tx))
                self._reported.set()

    def _lock_memory(self, worker: WorkerProcess, locked_bytes: int) -> None:
        if locked_bytes < 0:
            raise ControlError(f"the worker wants {locked_bytes} bytes of memory")
        answer: control.MemoryGranted | control.MemoryRefused = control.MemoryGranted()
        try:
            self._memory.lock(locked_bytes)
        except MpassthruError as error:
            number = error.errno or 0 if isinstance(error, HostError) else 0
            answer = control.MemoryRefused(errno=number, error=str(error))
        worker.channel.send(answer)

    def _unlock_memory(self) -> None:
        """No worker is left: nothing is locked any more."""
        try:
            self._memory.lock(0)
        except MpassthruError as error:
            self._trouble(str(error))

    def _grant_socket(self, worker: WorkerProcess, queue_pair: int) -> None:
        self._queue_id(queue_pair)
        self._forget_socket(queue_pair)
        try:
            sock = self._new_socket(self._configuration.ifindex)
        except HostError as error:
            worker.channel.send(control.SocketRefused(queue_pair=queue_pair, errno=error.errno or 0, error=str(error)))
            return
        self._sockets[queue_pair] = sock
        worker.channel.send(control.SocketGranted(queue_pair=queue_pair), (sock.fileno(),))

    def _steer_socket(self, worker: WorkerProcess, queue_pair: int, mode: control.SocketMode) -> None:
        sock = self._sockets.get(queue_pair)
        if sock is None:
            raise ControlError(f"the worker bound a socket of queue pair {queue_pair} that it was not given")
        if self._memory.locked_bytes == 0 and self._configuration.socket_mode != "packet":
            raise ControlError(f"the worker bound a socket of queue pair {queue_pair} without leave to lock memory")
        try:
            self._steering.set_socket(self._queue_id(queue_pair), sock.fileno())
        except HostError as error:
            worker.channel.send(control.SocketRefused(queue_pair=queue_pair, errno=error.errno or 0, error=str(error)))
            return
        finally:
            self._forget_socket(queue_pair)
        self.status.socket_steered(queue_pair, mode)
        worker.channel.send(control.SocketSteered(queue_pair=queue_pair))

    def _release_socket(self, queue_pair: int) -> None:
        self._steering.clear_socket(self._queue_id(queue_pair))
        self._forget_socket(queue_pair)
        self.status.modes.pop(queue_pair, None)

    async def _tell_when_free(self, worker: WorkerProcess, queue_pair: int) -> None:
        """Tell the worker that no NIC can write to the buffers of its last socket any more."""
        configuration, queue_id = self._configuration, self._queue_id(queue_pair)
        answer: control.SocketFreed | control.SocketRefused = control.SocketFreed(queue_pair=queue_pair)
        try:
            await self._wait_free(configuration.interface, configuration.ifindex, queue_id, timeout_s=FREE_TIMEOUT_S)
        except HostError as error:
            answer = control.SocketRefused(queue_pair=queue_pair, errno=error.errno or 0, error=str(error))
        with contextlib.suppress(ControlError):  # a worker that has died needs no answer
            worker.channel.send(answer)

    def _session_changed(self, state: control.GuestState, error: str | None) -> None:
        if state != self.status.guest:
            self._say(f"guest: {state}")
        self.status.guest = state
        if error is not None:
            self._trouble(f"session ended: {printable(error)}")
        if state == "running" and not self._once:
            self._supply.keep_reserve()
        if state == "waiting":
            # One that was never bound would keep the memory that is registered on it pinned.
            self._drop_sockets()
            self._idle.set()

    def _queue_id(self, queue_pair: int) -> int:
        if not 0 <= queue_pair < len(self._configuration.queue_ids):
            raise ControlError(f"the worker named queue pair {queue_pair}, which it does not have")
        return self._configuration.queue_ids[queue_pair]

    def _forget_socket(self, queue_pair: int) -> None:
        sock = self._sockets.pop(queue_pair, None)
        if sock is not None:
            sock.close()

    def _drop_sockets(self) -> None:
        for queue_pair in list(self._sockets):
            self._forget_socket(queue_pair)

    def _say_of_worker(self, line: str) -> None:
        self._say_stderr(f"worker: {printable(line)}")

    def _trouble(self, line: str) -> None:
        self.status.troubles.append(line)
        self._say(line)


def _with_ipc_lock(configuration: control.Configure, keep: bool) -> control.Configure:
    return msgspec.structs.replace(configuration, keep_ipc_lock=keep)


def _checked(report: DirectionReport) -> DirectionReport:
    """Refuse reasons that are not plain names, or are too many: they are summed up, and shown as they are."""
    reasons: tuple[Mapping[str, int], ...] = (report.bounced, report.dropped, report.offloaded)
    if any(len(reason) > REASONS_MAX for reason in reasons):
        raise ControlError(f"the worker reported more than {REASONS_MAX} reasons")
    for name in (name for reason in reasons for name in reason):
        if not _NAME.fullmatch(name):
            raise ControlError("the worker reported a reason that is not a name")
    return report
