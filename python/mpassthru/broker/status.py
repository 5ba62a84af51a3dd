"""What a port is doing, as the live view and the report show it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from mpassthru.broker.binding_state import BindingState, Lack, Need
from mpassthru.control import GuestState, SocketMode
from mpassthru.report import DirectionReport, PortReport

TROUBLES_KEPT = 32

WorkerState = Literal["starting", "ready", "paused", "ended"]
"""`paused`: workers ended soon after their start, and the next one waits."""


class AttachReport(PortReport, frozen=True, kw_only=True):
    """A `PortReport` and where it comes from."""

    interface: str
    """The one that the port is bound to, waits for, or had last."""
    queue_ids: tuple[int, ...]
    xdp_mode: str
    binding: BindingState
    waiting_for: Need | None
    waiting_because: str | None
    """Why, in a line; None if the port does not wait."""
    link: bool
    """The guest could have a link: the port is bound, and the interface has a carrier."""
    guest: GuestState
    sessions: int
    """Front-ends that have connected."""
    faults: int
    """Virtqueues that were stopped because the guest broke them."""
    worker: WorkerState
    worker_pid: int | None
    worker_restarts: int
    buffers_resumed: int
    """Buffers that workers had when they died, and that their successors took over."""
    steering: dict[str, dict[str, int]]
    """Counters of the XDP program, by hardware queue."""
    filter: str | None
    """What the guest gets of what it asks for (`--qmp`), in words; None if nobody says what that is."""
    troubles: tuple[str, ...]
    """The last errors, one line each."""
    final: bool = False
    """The port has ended; these are its last figures."""


@dataclass
class PortStatus:
    """The state of a port; counters go on counting when a worker is replaced."""

    interface: str = ""
    queue_ids: tuple[int, ...] = ()
    xdp_mode: str = ""
    binding: BindingState = BindingState.UNBOUND
    lack: Lack | None = None
    link: bool = False
    filter: str | None = None
    guest: GuestState = "waiting"
    modes: dict[int, SocketMode] = field(default_factory=dict)
    worker: WorkerState = "starting"
    worker_pid: int | None = None
    worker_restarts: int = 0
    buffers_resumed: int = 0
    sessions: int = 0
    faults: int = 0
    troubles: deque[str] = field(default_factory=lambda: deque(maxlen=TROUBLES_KEPT))
    steering: dict[str, dict[str, int]] = field(default_factory=dict)
    last_mode: SocketMode | None = None
    _before: tuple[DirectionReport, DirectionReport] = (DirectionReport(), DirectionReport())
    _now: tuple[DirectionReport, DirectionReport] = (DirectionReport(), DirectionReport())

    @property
    def mode(self) -> str:
        """The mode of the port: that of its sockets, `detached` without any."""
        return next(iter(self.modes.values()), "detached")

    @property
    def rx(self) -> DirectionReport:
        """Towards the guest, over all workers so far."""
        return total(self._before[0], self._now[0])

    @property
    def tx(self) -> DirectionReport:
        """From the guest, over all workers so far."""
        return total(self._before[1], self._now[1])

    def worker_reported(self, rx: DirectionReport, tx: DirectionReport) -> None:
        """Take the counters of the present worker."""
        self._now = (rx, tx)

    def socket_steered(self, queue_pair: int, mode: SocketMode) -> None:
        """A queue pair has a socket in `mode`."""
        self.modes[queue_pair] = self.last_mode = mode

    def worker_ended(self) -> None:
        """Keep the last counters of a worker that is gone, and forget its state."""
        self._before, self._now = (self.rx, self.tx), (DirectionReport(), DirectionReport())
        self.modes.clear()
        self.guest = "waiting"
        self.worker = "ended"
        self.worker_pid = None

    def report(self, *, ended: bool = False) -> AttachReport:
        """The figures in their published form; the mode of a port that has ended is that of its last socket."""
        return AttachReport(
            mode=(self.last_mode or "detached") if ended else self.mode,
            rx=self.rx,
            tx=self.tx,
            interface=self.interface,
            queue_ids=self.queue_ids,
            xdp_mode=self.xdp_mode,
            binding=self.binding,
            waiting_for=self.lack.need if self.lack else None,
            waiting_because=self.lack.reason if self.lack else None,
            link=self.link,
            filter=self.filter,
            guest=self.guest,
            sessions=self.sessions,
            faults=self.faults,
            worker=self.worker,
            worker_pid=self.worker_pid,
            worker_restarts=self.worker_restarts,
            buffers_resumed=self.buffers_resumed,
            steering=self.steering,
            troubles=tuple(self.troubles),
            final=ended,
        )


def total(first: DirectionReport, second: DirectionReport) -> DirectionReport:
    """The sum of two reports of one direction."""
    return DirectionReport(
        frames=first.frames + second.frames,
        bytes=first.bytes + second.bytes,
        direct=first.direct + second.direct,
        header_split=first.header_split + second.header_split,
        bounced=_sum_by_reason(first.bounced, second.bounced),
        dropped=_sum_by_reason(first.dropped, second.dropped),
        offloaded=_sum_by_reason(first.offloaded, second.offloaded),
        copied_bytes=first.copied_bytes + second.copied_bytes,
        header_bytes=first.header_bytes + second.header_bytes,
    )


def to_json(report: msgspec.Struct) -> str:
    """A report as one line of JSON."""
    return msgspec.json.encode(report).decode()


def _sum_by_reason(first: dict[str, int], second: dict[str, int]) -> dict[str, int]:
    return {reason: first.get(reason, 0) + second.get(reason, 0) for reason in {**first, **second}}
