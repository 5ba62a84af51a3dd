"""Whether an interface can carry a guest's frames: asked before anything is attached."""

from __future__ import annotations

import os
from typing import Final

from mpassthru.errors import RefusedError
from mpassthru.netdev.af_xdp import CHUNK_SIZE_BYTES, XDP_PACKET_HEADROOM_BYTES
from mpassthru.netdev.facts import Interface
from mpassthru.netdev.netdev_family import kernel_version
from mpassthru.rules import LINUX_BUFFER_ROOM_BYTES

MULTI_BUFFER_SINCE: Final = (6, 6)
"""The kernel that first took frames of several pieces from AF_XDP and gave them to it (XDP_USE_SG)."""

ETHERNET_OVERHEAD_BYTES: Final = 14 + 4
"""Ethernet header and one VLAN tag; the FCS is not part of a frame here."""
FRAME_MAX_BYTES: Final = CHUNK_SIZE_BYTES - XDP_PACKET_HEADROOM_BYTES
"""The longest frame that one chunk can take."""
CHUNK_MTU_MAX_BYTES: Final = FRAME_MAX_BYTES - ETHERNET_OVERHEAD_BYTES
MTU_MAX_BYTES: Final = 9216
"""Of frames in several chunks: the largest MTU that is common (crates/datapath, `xsk::LONG_FRAME_BYTES_MAX`)."""


def has_multi_buffer(release: str | None = None) -> bool:
    """Whether a kernel, the running one if left out, lets frames on AF_XDP sockets take several pieces."""
    return kernel_version(release or os.uname().release) >= MULTI_BUFFER_SINCE


def frame_max_bytes(interface: Interface, *, release: str | None = None) -> int:
    """The longest frame of the interface, without FCS.

    Args:
        interface: With its MTU.
        release: Of the kernel, if not of the running one.

    Raises:
        RefusedError: it is longer than a port carries; the message names the MTU that fits.
    """
    limit_bytes = MTU_MAX_BYTES if has_multi_buffer(release) else CHUNK_MTU_MAX_BYTES
    if interface.mtu_bytes > limit_bytes:
        younger = "" if has_multi_buffer(release) else ", or Linux 6.6 or later"
        raise RefusedError(
            f"cannot use {interface.name} with MTU {interface.mtu_bytes}: its frames are longer than a port carries; "
            f"'ip link set dev {interface.name} mtu {limit_bytes}' or less{younger}"
        )
    return interface.mtu_bytes + ETHERNET_OVERHEAD_BYTES


def room_bytes(frame_bytes: int, *, release: str | None = None) -> int:
    """Room for a frame in each of the UMEM's chunks, in copy mode.

    Longer frames arrive in several pieces, so that shorter ones still go straight to a Linux guest's buffers.

    Args:
        frame_bytes: The longest frame.
        release: Of the kernel, if not of the running one.
    """
    return min(frame_bytes, LINUX_BUFFER_ROOM_BYTES) if has_multi_buffer(release) else frame_bytes


def check_queue(interface: Interface, queue_id: int) -> None:
    """Refuse a queue that the interface does not have.

    Raises:
        RefusedError: the message says which queues there are.
    """
    if not 0 <= queue_id < interface.queues.rx:
        most = interface.queues.rx_max
        more = f"; 'ethtool -L {interface.name}' makes up to {most}" if interface.queues.rx < most else ""
        raise RefusedError(
            f"cannot use queue {queue_id} of {interface.name}: it has {interface.queues.rx} receive queue(s), "
            f"numbered from 0{more}"
        )
    if queue_id >= interface.queues.tx:
        # The kernel would take the guest's frames and send none, without an error (net/xdp/xsk.c: __xsk_generic_xmit).
        raise RefusedError(
            f"cannot use queue {queue_id} of {interface.name}: it has only {interface.queues.tx} transmit queue(s), "
            f"and a socket sends on the queue it receives from; see 'ethtool -L {interface.name}'"
        )


def other_queues_warning(interface: Interface, queue_ids: tuple[int, ...]) -> str | None:
    """What to do where a NIC spreads frames over more queues than the guest has; None where it does not.

    A NIC chooses the queue by a hash of each frame's addresses and ports: what falls on a queue that is not the guest's
    goes to the host.
    """
    others = interface.queues.rx - len(queue_ids)
    if others <= 0:
        return None
    first, name = queue_ids[0], interface.name
    start = f" start {first}" if first else ""
    return (
        f"{name} has {others} more queue(s), and its NIC spreads frames over all of them: to give the guest every "
        f"frame, 'ethtool -X {name}{start} equal {len(queue_ids)}'; to give it some, 'ethtool -N {name}'"
    )


def warnings_for(interface: Interface) -> list[str]:
    """What will not stop a guest from being attached, but from getting its frames whole. One line each."""
    name = interface.name
    warnings: list[str] = []
    if not interface.up:
        warnings.append(f"{name} is down: 'ip link set dev {name} up'")
    elif interface.operstate not in ("up", "unknown"):
        warnings.append(f"{name} has no carrier (operstate {interface.operstate})")
    if interface.offloads.rx_vlan_strip:
        warnings.append(f"{name} strips VLAN tags, which the guest will not see: 'ethtool -K {name} rxvlan off'")
    if interface.offloads.lro:
        warnings.append(f"{name} merges received frames: 'ethtool -K {name} lro off'")
    peer = interface.veth_peer
    if peer and peer.unfinished_offloads:
        warnings.append(
            f"the veth peer {peer.ifname} sends frames without checksum: "
            f"'ethtool -K {peer.ifname} tx off tso off gso off'"
        )
    if peer and peer.ifname is None:
        warnings.append(
            f"the veth peer of {name} is in another namespace, where its offloads cannot be seen: "
            "there, 'ethtool -K PEER tx off tso off gso off', or the guest drops what it sends"
        )
    return warnings
