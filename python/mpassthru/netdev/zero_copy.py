"""Whether an interface may take a guest's memory in zero-copy mode, and under which rules.

In copy mode the kernel stands between a NIC and the guest's memory. In zero-copy mode the NIC itself writes there, and
what it writes is bounded only by what its driver told it. So every rule here is about one question: can anything be
written to a place that the guest did not offer? What cannot be answered is refused, with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from mpassthru.netdev import pci
from mpassthru.netdev.checks import ETHERNET_OVERHEAD_BYTES, FRAME_MAX_BYTES
from mpassthru.netdev.drivers import NO_ZERO_COPY, ZERO_COPY, DriverFacts
from mpassthru.netdev.facts import Interface
from mpassthru.rules import Contiguity, ZeroCopyRules

ROOM_STEP_BYTES: Final = 128
"""The kernel rounds a NIC's room down to this (include/net/xdp_sock_drv.h)."""
MTU_OVERHEAD_BYTES: Final = 26
"""A zero-copy bind wants room for the MTU and so much more: header, FCS and two tags (net/xdp/xsk_buff_pool.c)."""
BOUNCE_ONLY: Final = "--bounce-only"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why zero-copy mode is not taken, and what would change that."""

    reason: str
    advice: str = ""

    def __str__(self) -> str:
        """One line."""
        return f"{self.reason}; {self.advice}" if self.advice else self.reason


def zero_copy_rules(
    interface: Interface,
    *,
    frame_max_bytes: int | None = None,
    bounce_only: bool = False,
    dma_is_bounced: bool | None = None,
) -> ZeroCopyRules | Refusal:
    """The rules for guests on this interface, or why it has to be copy mode.

    Args:
        interface: As read now. The rules hold as long as its MTU and offloads stay as they are.
        frame_max_bytes: The operator's promise that nothing longer arrives from the wire, tags included and FCS not,
            and that no hardware timestamps are taken. If it is broken, the NIC writes past a guest's buffers.
        bounce_only: Give no guest memory to the NIC: any driver will do, for one copy of each frame.
        dma_is_bounced: For tests; None to find out.
    """
    facts = ZERO_COPY.get(interface.driver or "")
    refusal = _without_zero_copy(interface) or (_unproven(interface, facts) if not bounce_only else None)
    if refusal is not None:
        return refusal
    facts = facts or DriverFacts(source_file="", since="", proven=False)
    room_bytes = _room_bytes(interface, facts)
    write_max_bytes = _write_max_bytes(interface, facts, room_bytes)
    refusal = _too_large(interface, facts, room_bytes) or _offloads(interface)
    if refusal is None and not bounce_only and (pci.dma_is_bounced() if dma_is_bounced is None else dma_is_bounced):
        refusal = Refusal(
            "the kernel copies all DMA of this machine through its own buffers (swiotlb)", _bounce_advice()
        )
    if refusal is not None:
        return refusal
    features = interface.xdp_features
    return ZeroCopyRules(
        frame_room_bytes=room_bytes,
        direct=not bounce_only,
        rx_write_max_bytes=min(write_max_bytes, frame_max_bytes or write_max_bytes),
        rx_write_align_bytes=facts.write_align_bytes,
        rx_write_before_bytes=interface.virtio_header_bytes or 0,
        rx_buffers_min=facts.buffers_min,
        tx_frame_max_bytes=interface.mtu_bytes + ETHERNET_OVERHEAD_BYTES,
        tx_frame_min_bytes=facts.frame_min_bytes,
        tx_pieces_max=features.zero_copy_max_segments if features else facts.max_segments,
        contiguity=contiguity(interface),
    )


def contiguity(interface: Interface) -> Contiguity:
    """Which memory is one range for the interface's device; the careful answer where the kernel gives none."""
    return "backing-page" if interface.iommu in ("none", "identity") else "base-page"


def _without_zero_copy(interface: Interface) -> Refusal | None:
    features = interface.xdp_features
    name = interface.driver or "this driver"
    # virtio_net says that it has zero-copy whether or not its device can; a bind would fail.
    has_none = (features and not features.zero_copy) or interface.virtio_dma_api is False
    if has_none or interface.driver in NO_ZERO_COPY:
        advice = ""
        if interface.driver == "virtio_net":
            advice = (
                "it has with iommu_platform=on and disable-legacy=on, and with its offloads guest_csum, guest_tso4, "
                "guest_tso6, guest_ufo and guest_ecn off"
            )
        return Refusal(f"{name} has no zero-copy here", advice)
    return None


def _unproven(interface: Interface, facts: DriverFacts | None) -> Refusal | None:
    if facts is not None and facts.proven:
        if facts.writes_virtio_header and interface.virtio_header_bytes is None:
            return Refusal("the features of this virtio device cannot be read", _bounce_advice())
        return None
    name = interface.driver or "this driver"
    return Refusal(f"nobody has yet read how far {name} lets a NIC write into a guest's memory", _bounce_advice())


def _bounce_advice() -> str:
    return f"'--mode zero-copy {BOUNCE_ONLY}' gives it none, for one copy of each frame"


def _too_large(interface: Interface, facts: DriverFacts, room_bytes: int) -> Refusal | None:
    mtu_bytes, name = interface.mtu_bytes, interface.name
    if facts.mtu_max_bytes is not None and mtu_bytes > facts.mtu_max_bytes:
        return Refusal(
            f"above MTU {facts.mtu_max_bytes} {interface.driver} does not bound what a NIC writes into one buffer",
            f"'ip link set dev {name} mtu {facts.mtu_max_bytes}' or less",
        )
    if room_bytes > FRAME_MAX_BYTES:
        mtu_max_bytes = FRAME_MAX_BYTES - MTU_OVERHEAD_BYTES
        return Refusal(
            f"with MTU {mtu_bytes} a NIC needs {room_bytes} bytes for a frame, and a chunk has {FRAME_MAX_BYTES}",
            f"'ip link set dev {name} mtu {mtu_max_bytes}' or less",
        )
    return None


def _offloads(interface: Interface) -> Refusal | None:
    on = [
        name
        for name, active in (("rx-fcs", interface.offloads.rx_fcs), ("rx-all", interface.offloads.rx_all))
        if active
    ]
    if not on:
        return None
    settings = " ".join(f"{name} off" for name in on)
    return Refusal(
        f"with {' and '.join(on)} frames are longer than they may be", f"'ethtool -K {interface.name} {settings}'"
    )


def _room_bytes(interface: Interface, facts: DriverFacts) -> int:
    needed_bytes = max(
        interface.mtu_bytes + MTU_OVERHEAD_BYTES,
        facts.room_min_bytes,
        (facts.hardware_max_bytes or 0) + facts.timestamp_bytes,
    )
    return -(-needed_bytes // ROOM_STEP_BYTES) * ROOM_STEP_BYTES


def _write_max_bytes(interface: Interface, facts: DriverFacts, room_bytes: int) -> int:
    limit_bytes = room_bytes
    if facts.hardware_max_bytes is not None:
        limit_bytes = facts.hardware_max_bytes + facts.timestamp_bytes
    elif facts.hardware_max_over_mtu_bytes is not None:
        limit_bytes = interface.mtu_bytes + facts.hardware_max_over_mtu_bytes
    return min(limit_bytes, room_bytes)
