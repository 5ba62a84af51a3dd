"""What the user asked for, as `mpassthru attach` and everything behind it know it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from mpassthru.broker.endpoint import SocketAccess
from mpassthru.broker.guest_filter import Steer
from mpassthru.broker.mode import ZeroCopyOptions
from mpassthru.broker.rx_offloads import RxOffloads
from mpassthru.broker.status import AttachReport
from mpassthru.broker.tx_offloads import TxOffloads
from mpassthru.control import Mode, PollMode


@dataclass(frozen=True, kw_only=True)
class QmpOptions:
    """QEMU's monitor."""

    path: Path
    nic: str | None = None
    """The device, or its network back-end; None for that whose back-end is on the port's socket."""


XdpChoice = Literal["auto", "native", "generic"]


@dataclass(frozen=True, kw_only=True)
class AttachOptions:
    """What the user asked for. Exactly one of `socket_path`, `connect_path` and `fd` is set."""

    interface: str
    socket_path: Path | None = None
    socket_access: SocketAccess = field(default_factory=SocketAccess)
    connect_path: Path | None = None
    fd: int | None = None
    queue: int = 0
    queues: int = 1
    mode: Mode = "auto"
    zero_copy: ZeroCopyOptions = field(default_factory=ZeroCopyOptions)
    xdp: XdpChoice = "auto"
    steer: Steer = field(default_factory=Steer)
    qmp: QmpOptions | None = None
    """Where to hear what the guest asks its network device for; None to leave it at `steer`."""
    lock_macs: tuple[bytes, ...] | None = None
    """Source addresses that frames from the guest may have; None for any."""
    poll: PollMode = "adaptive"
    tx_offloads: TxOffloads = "auto"
    rx_offloads: RxOffloads = "auto"
    user: str | None = None
    """Whose process the worker is; None for `nobody`."""
    once: bool = False
    interval_s: float = 1.0
    guest_bytes: int = 4 << 30
    """Of the guest that is expected; refused if no kernel could take it."""
    locked_memory_bytes: int | None = None
    """Most memory that this port may lock; None for as much as all may."""
    locked_memory_all_bytes: int | None = None
    """Most memory that all ports of the host may lock together; None for most of what the host has."""
    runtime_dir: Path | None = None
    """Where ports keep the accounts of locked memory, and may be talked to; None for `RUNTIME_DIR`."""

    @property
    def queue_ids(self) -> tuple[int, ...]:
        """Hardware queue of each queue pair."""
        return tuple(range(self.queue, self.queue + self.queues))


class View(Protocol):
    """Shows what goes on; see `mpassthru.live_view`."""

    def say(self, line: str) -> None:
        """Show one line."""

    def show(self, report: AttachReport) -> None:
        """Show the figures of now."""
