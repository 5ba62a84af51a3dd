"""What to tell a user before it has to be asked: what steering takes away, and why a guest does not come to life."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from mpassthru.broker.status import PortStatus

if TYPE_CHECKING:
    from mpassthru.steering import Filter

UNSTARTED_AFTER_S: Final = 5.0
"""How long a front-end may be connected before it seems odd that no virtqueue was started."""
QUEUEING_AFTER_S: Final = 2.0
"""How long a second front-end may wait; the successor of one that is just leaving waits for less."""


class FrontendWatch:
    """Notices front-ends that get nowhere, and says so once for each session."""

    def __init__(self) -> None:
        self._session = 0
        self._since_s = 0.0
        self._queueing_since_s: float | None = None
        self._may_say_unstarted = False
        self._may_say_queueing = False

    def look(self, status: PortStatus, now_s: float, *, another_waits: bool) -> Iterator[str]:
        """What is to be said now.

        Args:
            status: Of the port.
            now_s: Monotonic time.
            another_waits: Whether a further front-end has connected and was not accepted yet.
        """
        if status.sessions != self._session:
            self._session, self._since_s = status.sessions, now_s
            self._may_say_unstarted = self._may_say_queueing = True
        if status.guest == "running":
            self._may_say_unstarted = False
        if not another_waits or status.guest == "waiting":
            self._queueing_since_s = None
        elif self._queueing_since_s is None:
            self._queueing_since_s = now_s
        if self._may_say_unstarted and status.guest == "connected" and now_s - self._since_s >= UNSTARTED_AFTER_S:
            self._may_say_unstarted = False
            yield (
                "connected, but not started: the guest has not loaded its virtio-net driver yet, "
                "or its memory is not shared (QEMU: share=on; libvirt: <access mode='shared'/>)"
            )
        queueing_since_s = self._queueing_since_s
        if self._may_say_queueing and queueing_since_s is not None and now_s - queueing_since_s >= QUEUEING_AFTER_S:
            self._may_say_queueing = False
            yield "another front-end waits: a port serves one at a time, and the next when this one has left"


def steering_notice(interface: str, allowed: Filter) -> str:
    """Who goes without which frames, for a redirected frame is moved and not copied."""
    broadcast = "the guest" if allowed.broadcast else "the host"
    multicast = "the guest" if allowed.multicast is None else "the host"
    if allowed.multicast:
        multicast = "the host but for the guest's groups, and these to the guest"
    return (
        f"--steer mac: broadcast (ARP, DHCP) goes to {broadcast} alone, multicast (IPv6 neighbour discovery) to "
        f"{multicast} alone, for XDP cannot copy a frame: neighbours on {interface} do not find the other one, unless "
        "they have a permanent entry for it ('ip neigh replace IP lladdr MAC dev DEV')"
    )
