"""The worker's life: configured, unprivileged, then one front-end after another until the broker says stop or is gone.

Privileges are given up between the broker's configuration and `Ready`; the broker hands over a front-end only after
`Ready`, so that no privileged code ever meets a byte that a front-end or a guest wrote.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

import msgspec

from mpassthru import control, event_loop
from mpassthru.control import BrokerMessage, Configure, ControlChannel, ControlError, WorkerMessage, close_fds
from mpassthru.errors import HostError, MpassthruError
from mpassthru.inflight_records import InflightRecords
from mpassthru.report import DirectionReport
from mpassthru.vhost_user import Backend, StillInUseError
from mpassthru.worker import privileges
from mpassthru.worker.async_engine import AsyncEngine, end_process
from mpassthru.worker.device import PortDevice
from mpassthru.worker.socket_client import SocketClient

if TYPE_CHECKING:
    from mpassthru._core import Engine, Event

UNSHARED_AFTER_S = 2.0
"""How long rings may stay zero after a kick."""

MakeEngine = Callable[[Configure], "Engine"]


class _Counters(msgspec.Struct, frozen=True):
    rx: DirectionReport
    tx: DirectionReport


class Worker:
    """Serves a port for the broker at the other end of `channel`."""

    def __init__(
        self,
        channel: ControlChannel[WorkerMessage, BrokerMessage],
        configuration: Configure,
        engine: Engine,
        records: InflightRecords | None = None,
    ) -> None:
        self._channel = channel
        self._engine = AsyncEngine(engine, self._on_trouble)
        self._sockets = SocketClient(channel)
        self._device = PortDevice(
            self._engine,
            self._sockets,
            configuration,
            on_running=lambda running: self._tell_state("running" if running else "connected"),
            on_resumed=lambda vring, buffers: self._tell(control.Resumed(vring=vring, buffers=buffers)),
            notice=self._notice,
            trouble=lambda text: self._notice(text, trouble=True),
            records=records,
        )
        self._backend = Backend(self._device)
        self._serving: asyncio.Task[None] | None = None
        self._rebinding: asyncio.Task[None] | None = None
        self._suspicion: asyncio.TimerHandle | None = None

    async def run(self) -> None:
        """Answer the broker until it says stop or closes its end; then give everything back.

        Raises:
            ControlError: the broker is gone, or sent nonsense.
            OSError: the kernel refused something that no session can do without.
        """
        try:
            with event_loop.ungrouped():
                async with asyncio.TaskGroup() as self._tasks:
                    self._channel.send(control.Ready())
                    await self._answer()
                    await self._end_what_goes_on()
        finally:
            with suppress(ControlError):  # a broker that was killed wants no last report
                self._report()
            self._engine.close()

    async def _end_what_goes_on(self) -> None:
        """End it while the broker is still answered: in zero-copy mode it waits for the broker to see a queue free."""
        answering = self._tasks.create_task(self._answer())
        for task in (self._rebinding, self._serving):
            if task is not None:
                task.cancel()
                await asyncio.wait({task})
        answering.cancel()

    async def _answer(self) -> None:
        while (received := await self._channel.receive()) is not None:
            message, fds = received
            match message:
                case control.FrontendConnected():
                    self._serving = self._tasks.create_task(self._serve(socket.socket(fileno=fds[0])))
                case (
                    control.SocketGranted()
                    | control.SocketSteered()
                    | control.SocketFreed()
                    | control.SocketRefused()
                    | control.MemoryGranted()
                    | control.MemoryRefused()
                ):
                    self._sockets.answered(message, fds)
                case control.Rebind(binding=binding):
                    self._rebinding = self._tasks.create_task(self._rebind(binding))
                case control.ReportWanted():
                    self._report()
                case control.Stop():
                    return
                case _:
                    close_fds(fds)
                    raise ControlError(f"unexpected control message {type(message).__name__}")

    async def _serve(self, sock: socket.socket) -> None:
        """One front-end, from its first message to its last."""
        self._tell_state("connected")
        error: str | None = None
        try:
            await self._backend.serve_connection(sock)
        except ControlError:
            raise
        except StillInUseError as held:
            # The kernel takes it back from a process that ends; the next one waits until no NIC can write to it.
            end_process(f"{held}; ending this worker, for no other front-end can be served")
        except MpassthruError as ended_by:
            error = str(ended_by)
        self._tell_state("waiting", error)

    async def _rebind(self, binding: control.Binding | None) -> None:
        """The broker asks for one at a time."""
        answer = control.Rebound()
        try:
            await self._device.rebind(binding)
        except ControlError:
            raise
        except MpassthruError as error:
            number = error.errno or 0 if isinstance(error, HostError) else 0
            answer = control.Rebound(errno=number, error=str(error))
        self._channel.send(answer)

    def _tell_state(self, state: control.GuestState, error: str | None = None) -> None:
        self._channel.send(control.SessionChanged(state=state, error=error))

    def _notice(self, text: str, *, trouble: bool = False) -> None:
        self._tell(control.Notice(text=text, trouble=trouble))

    def _tell(self, message: WorkerMessage) -> None:
        """Send what no caller waits for. If that fails, the channel is over, and `_answer` ends the worker."""
        with suppress(ControlError):
            self._channel.send(message)

    def _report(self) -> None:
        counters = msgspec.convert(self._engine.engine.counters(), _Counters)
        self._channel.send(control.WorkerReport(rx=counters.rx, tx=counters.tx))

    def _on_trouble(self, event: Event) -> None:
        match event.kind:
            case "fault":
                self._tell(control.Fault(vring=event.vring, error=str(event.error)))
            case "host-error":
                # The engine tries again by itself: a link that went down comes back.
                self._notice(str(event.error), trouble=True)
            case "distrusted":
                zero_copy = bool(event.value)
                self._tasks.create_task(self._device.distrust(event.vring // 2, str(event.error), zero_copy=zero_copy))
            case "kicked-empty":
                # Harmless if the driver has only not begun; a front-end that keeps its memory private never begins.
                if self._suspicion is None:
                    self._suspicion = asyncio.get_running_loop().call_later(UNSHARED_AFTER_S, self._judge_suspicion)
            case "completed":
                raise AssertionError("completions are waited for")

    def _judge_suspicion(self) -> None:
        self._suspicion = None
        if self._device.looks_unshared():
            self._notice(
                "the guest kicks its virtqueues, but they hold nothing but zeros: its memory is not shared with us; "
                "add share=on to its memory backend (libvirt: <access mode='shared'/>)",
                trouble=True,
            )


class _ForwardedLog(logging.Handler):
    """Carries warnings of the vhost-user session to the broker, and so to the user."""

    def __init__(self, channel: ControlChannel[WorkerMessage, BrokerMessage]) -> None:
        super().__init__(logging.WARNING)
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(ControlError):  # a broker that is gone is noticed where its messages are read
            self._channel.send(control.Notice(text=record.getMessage(), trouble=True))


async def serve_port(control_fd: int, parent_pid: int, make_engine: MakeEngine) -> None:
    """Take the configuration from the broker, give up all privileges, and serve.

    Args:
        control_fd: This process's end of the control channel.
        parent_pid: Of the broker.
        make_engine: Makes the data plane; called after the privileges are gone.

    Raises:
        ControlError: the broker is gone before it said anything, or sent nonsense.
        HostError: a privilege cannot be given up.
    """
    channel = control.worker_channel(socket.socket(fileno=control_fd))
    received = await channel.receive()
    if received is None:
        return
    configuration, fds = received
    if not isinstance(configuration, Configure) or len(fds) != 1:
        close_fds(fds)
        raise ControlError(
            f"the first control message is {type(configuration).__name__} with {len(fds)} fds, not Configure with one"
        )
    privileges.drop(
        parent_pid=parent_pid,
        uid=configuration.uid,
        gid=configuration.gid,
        keep_ipc_lock=configuration.keep_ipc_lock,
    )
    logging.getLogger("mpassthru").addHandler(_ForwardedLog(channel))
    worker = Worker(channel, configuration, make_engine(configuration), InflightRecords(fds[0]))
    running = asyncio.ensure_future(worker.run())
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)
    with suppress(asyncio.CancelledError):
        await running
    channel.close()


def start(control_fd: int, parent_pid: int, make_engine: MakeEngine) -> None:
    """Entry of the worker process; see `serve_port`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    privileges.die_with_parent(parent_pid)
    os.set_inheritable(control_fd, False)
    event_loop.run(serve_port(control_fd, parent_pid, make_engine))
