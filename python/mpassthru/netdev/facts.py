"""What is known about a host interface, as plain data; `reader` fills it, `checks` and `doctor` judge it."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

IommuKind = Literal["none", "identity", "translating", "unknown"]
XdpProgramMode = Literal["native", "generic", "offloaded", "mixed"]

XDP_ACT_BASIC: Final = 1 << 0
XDP_ACT_REDIRECT: Final = 1 << 1
XDP_ACT_XSK_ZEROCOPY: Final = 1 << 3
"""Bits of `enum netdev_xdp_act` (Documentation/netlink/specs/netdev.yaml)."""


class QueueCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Hardware queues in use, and the most that the driver can have (equal where it does not say)."""

    rx: int
    tx: int
    rx_max: int
    tx_max: int


class XdpProgram(msgspec.Struct, frozen=True, kw_only=True):
    """An XDP program that is attached to the interface."""

    id: int
    mode: XdpProgramMode


class XdpFeatures(msgspec.Struct, frozen=True, kw_only=True):
    """What the driver says of itself through the NETDEV netlink family (Linux 6.3 and later)."""

    native: bool
    """It runs XDP programs and redirects frames before an skb is made."""
    zero_copy: bool
    zero_copy_max_segments: int
    """Descriptors that one frame may take in zero-copy mode."""


class Offloads(msgspec.Struct, frozen=True, kw_only=True):
    """Offloads that change a frame before AF_XDP sees it."""

    rx_vlan_strip: bool
    lro: bool
    gro_hw: bool
    rx_fcs: bool = False
    """Frames come with their FCS, four bytes longer."""
    rx_all: bool = False
    """Bad frames come too."""


class VethPeer(msgspec.Struct, frozen=True, kw_only=True):
    """The other end of a veth, whose sender decides whether frames arrive whole."""

    ifindex: int
    ifname: str | None
    """None if it is in another network namespace; its offloads cannot be read then."""
    unfinished_offloads: tuple[str, ...] = ()
    """Its offloads that hand on frames without a checksum, or larger than the MTU."""


class Interface(msgspec.Struct, frozen=True, kw_only=True):
    """One host interface, at the moment it was read."""

    name: str
    ifindex: int
    mac: str
    mtu_bytes: int
    up: bool
    """Administratively up; `operstate` tells of the carrier."""
    operstate: str
    driver: str | None
    bus_address: str | None
    """PCI address, as in ``0000:3b:00.0``."""
    queues: QueueCounts
    offloads: Offloads
    xdp_program: XdpProgram | None = None
    xdp_features: XdpFeatures | None = None
    """None if the kernel does not say (before 6.3)."""
    xsk_queues: tuple[int, ...] | None = None
    """Receive queues that have an AF_XDP socket; None if the kernel does not say (before 6.14)."""
    iommu: IommuKind = "none"
    numa_node: int | None = None
    veth_peer: VethPeer | None = None
    virtio_header_bytes: int | None = None
    """The virtio-net header of virtio_net's own device; None for other drivers."""
    virtio_dma_api: bool | None = None
    """Whether virtio_net's device is driven by the kernel's DMA API, as zero-copy needs; None for other drivers."""
