"""Drivers that are known to have zero-copy AF_XDP, and what each one does that a guest's memory would feel.

Every row is a statement about kernel source: `source_file` is where to look when one is doubted. A driver that is not
listed may still have zero-copy (the kernel says so: `XdpFeatures.zero_copy`); only nobody has read it yet.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

RxBufferRule = Literal["frame-size", "frame-size-kib", "chunk", "driver-specific"]
"""How large a receive buffer the driver gives to the NIC: the frame size that is bound with, that in whole KiB (rounded
down: frames are split below 2048 bytes), the whole chunk, or by a rule of its own."""


class DriverFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one driver's zero-copy mode (Linux 6.18)."""

    source_file: str
    """In the kernel tree."""
    since: str
    """The kernel that first had it; recalled, not checked."""
    rx_buffer: RxBufferRule
    max_segments: int | None
    """Descriptors per frame (`xdp_zc_max_segs`); None for more than one, by device."""
    frame_max_bytes: int | None = None
    """The longest frame that the hardware writes at MTU 1500; None where it is the buffer, or not known."""
    note: str = ""


_INTEL: Final = "drivers/net/ethernet/intel"
_TIMESTAMPS: Final = "hardware timestamps move the frame by 16 bytes"

ZERO_COPY: Final[dict[str, DriverFacts]] = {
    "ice": DriverFacts(
        source_file=f"{_INTEL}/ice/ice_xsk.c",
        since="5.5",
        rx_buffer="frame-size",
        max_segments=8,
        frame_max_bytes=1534,
        note="above MTU 1500 frames are chained through the guest's memory; frames below 17 bytes reset the queue",
    ),
    "i40e": DriverFacts(
        source_file=f"{_INTEL}/i40e/i40e_xsk.c",
        since="4.20",
        rx_buffer="frame-size",
        max_segments=8,
        frame_max_bytes=1534,
        note="above MTU 1500 frames are chained through the guest's memory; frames below 17 bytes reset the queue",
    ),
    "ixgbe": DriverFacts(
        source_file=f"{_INTEL}/ixgbe/ixgbe_xsk.c",
        since="4.20",
        rx_buffer="frame-size",
        max_segments=1,
        frame_max_bytes=1518,
        note="4 bytes more per VLAN tag; the 82599 bounds frames in whole KiB",
    ),
    "igb": DriverFacts(
        source_file=f"{_INTEL}/igb/igb_xsk.c",
        since="6.14",
        rx_buffer="frame-size-kib",
        max_segments=1,
        frame_max_bytes=1534,
        note=f"the link goes down and up at each attach; {_TIMESTAMPS}",
    ),
    "igc": DriverFacts(
        source_file=f"{_INTEL}/igc/igc_main.c",
        since="5.14",
        rx_buffer="frame-size-kib",
        max_segments=1,
        note=_TIMESTAMPS,
    ),
    "mlx5_core": DriverFacts(
        source_file="drivers/net/ethernet/mellanox/mlx5/core/en/params.c",
        since="5.3",
        rx_buffer="chunk",
        max_segments=1,
        frame_max_bytes=1522,
        note="pads the end of a frame to 64 bytes",
    ),
    "virtio_net": DriverFacts(
        source_file="drivers/net/virtio_net.c",
        since="6.11",
        rx_buffer="frame-size",
        max_segments=1,
        note="writes its own header of 12 to 24 bytes in front of the frame",
    ),
    "st_gmac": DriverFacts(
        source_file="drivers/net/ethernet/stmicro/stmmac/stmmac_main.c",
        since="5.13",
        rx_buffer="driver-specific",
        max_segments=1,
    ),
    "idpf": DriverFacts(
        source_file=f"{_INTEL}/idpf/xsk.c", since="6.18", rx_buffer="driver-specific", max_segments=None
    ),
    "gve": DriverFacts(
        source_file="drivers/net/ethernet/google/gve/gve_main.c",
        since="6.4",
        rx_buffer="driver-specific",
        max_segments=1,
    ),
    "tsnep": DriverFacts(
        source_file="drivers/net/ethernet/engleder/tsnep_main.c",
        since="6.4",
        rx_buffer="driver-specific",
        max_segments=1,
    ),
}
"""By the name that `ethtool -i` shows."""

NO_ZERO_COPY: Final = frozenset(
    {
        "veth", "netkit", "netdevsim", "tun", "tap", "bonding", "fec", "bnxt_en", "hns3", "mana", "ena", "e1000",
        "e1000e", "vmxnet3",
    }
)  # fmt: skip
"""Drivers that have none, so that `doctor` can say that no setting will help."""
