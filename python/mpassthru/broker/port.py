"""A port as the broker sees it: one worker, its sockets and its front-ends, from start to an orderly end.

Three things go on at once while a worker lives: its messages are answered, front-ends are handed to it one at a time,
and the user's wish to stop is waited for. When the worker dies, the kernel takes its sockets out of the XSKMAP (frames
of its queues are dropped, the host sees none of them), and the one in reserve takes over: at once, or after a pause if
the last one lived only briefly. What was in flight is in a memory file that outlives them all
(`mpassthru.inflight_records`).

Which interface the port has, if any, is `mpassthru.broker.keeper`'s to decide, and may change at any time (`rebind`).
The broker never maps guest memory and never reads from a vhost-user socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import time
from collections.abc import Callable, Mapping

import msgspec

from mpassthru import control
from mpassthru.broker.endpoint import Endpoint
from mpassthru.broker.socket_grants import SocketGrants, Steering, WaitQueueFree
from mpassthru.broker.status import PortStatus
from mpassthru.broker.worker_process import STOP_TIMEOUT_S, WorkerProcess
from mpassthru.broker.worker_supply import WorkerSupply
from mpassthru.broker.xsk import create_socket
from mpassthru.control import ControlError, close_fds
from mpassthru.errors import HostError, MpassthruError, RefusedError
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
REBIND_TIMEOUT_S = 400.0
"""A worker that moves its sockets may register all of guest memory twice, for up to 180 s each (`ATTACH_TIMEOUT_S` in
`mpassthru.worker.async_engine`), and wait for hardware queues to come free."""
STDERR_LINES_MAX = 200
"""Of a worker, in the time of a `LineLimiter`: a traceback is kept whole."""
REASONS_MAX = 64
"""Of bouncing or dropping, in a worker's report: more than there are."""
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")

Say = Callable[[str], None]


class Port:
    """Runs a port until told to stop.

    Args:
        configuration: What each worker is told; `keep_ipc_lock`, `binding` and `unproven` are those of the moment.
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
        self._configuration = configuration
        self._endpoint = endpoint
        self._memory = memory
        self._once = once or endpoint.single
        self._say = LineLimiter(say)
        # Of its own, so that what a guest does, as often as it likes, hides nothing that went wrong on the host.
        self._say_of_guest = LineLimiter(say)
        self._say_stderr = LineLimiter(say, lines_max=STDERR_LINES_MAX)
        self._supply = WorkerSupply(start_worker, self._say, self._say_of_worker)
        self._grants = SocketGrants(configuration.queue_pairs, new_socket, wait_free)
        self._steering: Steering | None = None
        self._steering_before: dict[str, dict[str, int]] = {}
        self._rebinding: asyncio.Future[control.Rebound] | None = None
        self._freeing: dict[int, asyncio.Task[None]] = {}
        self._stopping = stopping or asyncio.Event()
        self._idle = asyncio.Event()
        self._reported = asyncio.Event()
        self._worker: WorkerProcess | None = None

    @property
    def failed(self) -> bool:
        """Whether the port's only front-end met trouble."""
        return self._once and bool(self.status.troubles)

    def stop(self) -> None:
        """Ask for an orderly end; `run` returns when everything has been given back."""
        self._stopping.set()

    def say(self, line: str) -> None:
        """Tell the user something."""
        self._say(line)

    def trouble(self, line: str) -> None:
        """Tell the user of something that went wrong, and keep it for the report."""
        self.status.troubles.append(line)
        self._say(line)

    def _trouble_of_guest(self, line: str) -> None:
        self.status.troubles.append(line)
        self._say_of_guest(line)

    async def rebind(self, binding: control.Binding | None, steering: Steering | None = None) -> None:
        """Have the port's sockets on another interface, or in another way, or on none. One at a time.

        That goes for the worker that lives, and for all that come.

        Args:
            binding: What to bind to.
            steering: The XDP program that is attached, with this port's queues claimed; in mode `packet` a stand-in.

        A worker that does not answer is killed, and the next one does as it is told from the start.

        Raises:
            MpassthruError: the worker could not; what sockets there are now is for the next `rebind` to settle.
        """
        self._configuration = msgspec.structs.replace(self._configuration, binding=binding)
        if steering is not self._steering:
            self._steering_before, self._steering = self.read_steering(), steering
        if binding is not None and steering is not None:
            self._grants.offer(binding, steering)
        if self._worker is not None:
            await self._rebind_worker(self._worker, binding)
        # Not before: until it has switched, a worker goes on with what it had.
        self._grants.withdraw_all_but(self._configuration.binding)

    async def _rebind_worker(self, worker: WorkerProcess, binding: control.Binding | None) -> None:
        self._rebinding = asyncio.get_running_loop().create_future()
        try:
            with contextlib.suppress(ControlError):  # a worker that is already dead is found elsewhere
                worker.channel.send(control.Rebind(binding=binding))
                await asyncio.wait({self._rebinding}, timeout=REBIND_TIMEOUT_S)
                if not self._rebinding.done():
                    self._give_up(worker)
                    return
                answer = self._rebinding.result()
                if answer.error is not None and answer.errno:
                    raise HostError(answer.errno, printable(answer.error))
                if answer.error is not None:
                    raise RefusedError(printable(answer.error))
        finally:
            self._rebinding = None

    def _give_up(self, worker: WorkerProcess) -> None:
        """Kill a worker; from now on the next one is waited for, however long the kernel takes to end this one."""
        self.trouble(f"worker {worker.pid} has not moved its sockets within {REBIND_TIMEOUT_S:g} s; killing it")
        worker.kill()
        self._worker = None

    async def run(self) -> None:
        """Keep a worker running until `stop`, or until the one front-end of `once` has left.

        Raises:
            HostError: the front-end's socket cannot be connected to, or no worker can be started.
        """
        records_fd = make_records(self._configuration.queue_pairs)
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
        """The counters of all XDP programs that the port has had, by hardware queue."""
        counters = {queue: dict(names) for queue, names in self._steering_before.items()}
        for queue, names in (self._steering.counters() if self._steering else {}).items():
            before = counters.setdefault(str(queue), {})
            for name, count in names.items():
                before[name] = before.get(name, 0) + count
        return counters

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
                worker.channel.send(self._configuration_now(keep_ipc_lock), (records_fd,))
            self._worker = worker
            await asyncio.wait({reading, feeding, stopping}, return_when=asyncio.FIRST_COMPLETED)
            await self._let_worker_end(worker, reading, feeding)
        except BaseException:
            worker.kill()
            await worker.end()
            raise
        finally:
            self._worker = None
            if self._rebinding is not None and not self._rebinding.done():
                self._rebinding.set_result(control.Rebound())  # the next one does as it is told from the start
            helpers = (reading, feeding, stopping, *self._freeing.values())
            for task in helpers:
                task.cancel()
            await asyncio.gather(*helpers, return_exceptions=True)
            self._freeing.clear()
            self._idle.clear()
            self._grants.release_all()
            self._unlock_memory()
            self.status.worker_ended()

    def _configuration_now(self, keep_ipc_lock: bool) -> control.Configure:
        return msgspec.structs.replace(self._configuration, keep_ipc_lock=keep_ipc_lock, unproven=self._grants.unproven)

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
            self.trouble(f"worker {worker.pid} {worker.exit_text}{cause}")
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
            case control.MemoryWanted() | control.SocketWanted() | control.SocketBound() | control.SocketReleased():
                self._act_on_sockets(worker, message)
            case control.Rebound():
                if self._rebinding is None or self._rebinding.done():
                    raise ControlError("the worker says that it is bound anew, unasked")
                self._rebinding.set_result(message)
            case control.SessionChanged(state=state, error=error):
                self._session_changed(state, error)
            case control.Fault(vring=vring, error=error):
                self.status.faults += 1
                self._trouble_of_guest(f"virtqueue {vring} was stopped, for the guest broke it: {printable(error)}")
            case control.Resumed(vring=vring, buffers=buffers):
                self.status.buffers_resumed += buffers
                self._say(f"virtqueue {vring} goes on where a worker ended that had {buffers} of its buffers")
            case control.Notice(text=text, trouble=trouble):
                (self.trouble if trouble else self._say)(printable(text))
            case control.WorkerReport(rx=rx, tx=tx):
                self.status.worker_reported(_checked(rx), _checked(tx))
                self._reported.set()

    def _act_on_sockets(self, worker: WorkerProcess, message: control.SocketMessage) -> None:
        match message:
            case control.MemoryWanted(locked_bytes=locked_bytes):
                self._lock_memory(worker, locked_bytes)
            case control.SocketWanted(queue_pair=queue_pair, binding=serial):
                self._grant_socket(worker, queue_pair, serial)
            case control.SocketBound(queue_pair=queue_pair, mode=mode):
                self._steer_socket(worker, queue_pair, mode)
            case control.SocketReleased(queue_pair=queue_pair, await_free=await_free):
                self._grants.release(queue_pair, keep_granted=await_free)
                self.status.modes.pop(queue_pair, None)
                if await_free:
                    if (earlier := self._freeing.pop(queue_pair, None)) is not None:
                        earlier.cancel()
                    self._freeing[queue_pair] = asyncio.create_task(self._tell_when_free(worker, queue_pair))

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
            self.trouble(str(error))

    def _grant_socket(self, worker: WorkerProcess, queue_pair: int, serial: int) -> None:
        try:
            sock = self._grants.grant(queue_pair, serial)
        except (HostError, RefusedError) as error:
            worker.channel.send(_refusal(queue_pair, error))
        else:
            worker.channel.send(control.SocketGranted(queue_pair=queue_pair), (sock.fileno(),))

    def _steer_socket(self, worker: WorkerProcess, queue_pair: int, mode: control.SocketMode) -> None:
        try:
            self._grants.steer(queue_pair, pins_memory=self._memory.locked_bytes > 0)
        except HostError as error:
            worker.channel.send(_refusal(queue_pair, error))
        else:
            self.status.socket_steered(queue_pair, mode)
            worker.channel.send(control.SocketSteered(queue_pair=queue_pair))

    async def _tell_when_free(self, worker: WorkerProcess, queue_pair: int) -> None:
        """Tell the worker that no NIC can write to the buffers of its last sockets any more."""
        answer: control.SocketFreed | control.SocketRefused = control.SocketFreed(queue_pair=queue_pair)
        try:
            await self._grants.until_free(queue_pair)
        except HostError as error:
            answer = _refusal(queue_pair, error)
        with contextlib.suppress(ControlError):  # a worker that has died needs no answer
            worker.channel.send(answer)

    def _session_changed(self, state: control.GuestState, error: str | None) -> None:
        if state != self.status.guest:
            self._say_of_guest(f"guest: {state}")
        self.status.guest = state
        if error is not None:
            self._trouble_of_guest(f"session ended: {printable(error)}")
        if state == "running" and not self._once:
            self._supply.keep_reserve()
        if state == "waiting":
            self._grants.forget_granted()
            self._idle.set()

    def _say_of_worker(self, line: str) -> None:
        self._say_stderr(f"worker: {printable(line)}")


def _refusal(queue_pair: int, error: HostError | RefusedError) -> control.SocketRefused:
    number = error.errno or 0 if isinstance(error, HostError) else 0
    return control.SocketRefused(queue_pair=queue_pair, errno=number, error=str(error))


def _checked(report: DirectionReport) -> DirectionReport:
    """Refuse reasons that are not plain names, or are too many: they are summed up, and shown as they are."""
    reasons: tuple[Mapping[str, int], ...] = (report.bounced, report.dropped, report.offloaded)
    if any(len(reason) > REASONS_MAX for reason in reasons):
        raise ControlError(f"the worker reported more than {REASONS_MAX} reasons")
    for name in (name for reason in reasons for name in reason):
        if not _NAME.fullmatch(name):
            raise ControlError("the worker reported a reason that is not a name")
    return report
