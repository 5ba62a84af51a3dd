"""What one driver's zero-copy mode does to a guest's memory, as broker, worker and engine pass it on.

Made by `mpassthru.netdev.zero_copy` from the driver table and an interface; obeyed by `crates/datapath`
(`xsk/rules.rs`), buffer by buffer.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

LINUX_BUFFER_ROOM_BYTES: Final = 1524
"""What a Linux guest's receive buffer has for a frame by default (drivers/net/virtio_net.c, get_mergeable_buf_len)."""

Contiguity = Literal["backing-page", "base-page"]
"""Which memory is one range of addresses for the device too: a page of the backing file, huge ones included; or, behind
an IOMMU that translates, 4 KiB."""


class ZeroCopyRules(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of one interface in zero-copy mode. Bytes of a frame are without FCS."""

    frame_room_bytes: int
    """Room for a frame in each of the UMEM's frames: what the NIC is told that there is."""
    direct: bool
    """Guest memory may be given to the NIC at all; if not, every frame is copied once (``--bounce-only``)."""
    rx_write_max_bytes: int
    """The most that the NIC can write from a frame's start on."""
    rx_write_align_bytes: int
    """It may pad what it writes up to an address that is a multiple of this."""
    rx_write_before_bytes: int
    """Bytes directly in front of the frame that the driver has written too."""
    tx_frame_max_bytes: int
    """Longer frames are dropped."""
    tx_frame_min_bytes: int
    """Shorter ones are padded."""
    tx_pieces_max: int
    """Descriptors of one frame."""
    contiguity: Contiguity
    rx_buffers_min: int = 0
    """The driver goes wrong with fewer receive buffers than this, in its own ring and in the fill ring."""


def wants_longer_buffers(rules: ZeroCopyRules | None) -> bool:
    """Whether to offer VIRTIO_NET_F_HASH_REPORT, for its side effect: longer receive buffers in Linux guests.

    A Linux guest makes room for 1518 bytes and a header, in multiples of 64: 1536 bytes with the ordinary header of 12,
    which leaves 1524 for a frame; 1600 with the header of 20 that this feature brings. No hash is ever reported
    (VIRTIO_NET_HASH_REPORT_NONE), as the device may choose (VIRTIO 1.3 section 5.1.6.4.1).
    """
    return rules is not None and rules.direct and rules.rx_write_max_bytes > LINUX_BUFFER_ROOM_BYTES
