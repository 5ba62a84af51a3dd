"""The figures of a port, with the same keys wherever they appear (`attach`, `demo`, the API).

rx is towards the guest, tx is from the guest. Frames are Ethernet frames without FCS; bytes are frame bytes,
without the virtio-net header. `direct` + sum(`bounced`) == `frames`; frames that were dropped are in neither.
"""

from __future__ import annotations

import msgspec


class DirectionReport(msgspec.Struct, frozen=True, kw_only=True):
    """One direction of a port, since the port was attached."""

    frames: int = 0
    bytes: int = 0
    direct: int = 0
    """Frames whose payload the kernel or the NIC placed in, or took from, the guest's own buffers."""
    header_split: int = 0
    """tx: those of them whose headers were made by us, for a checksum or as segments of a larger frame."""
    bounced: dict[str, int] = {}
    """Frames copied once in user space, by reason; in mode `packet` those of tx by the kernel."""
    dropped: dict[str, int] = {}
    """Frames lost, by reason; kernel drops of the AF_XDP socket are included."""
    offloaded: dict[str, int] = {}
    """Frames of the guest by what was done to them; each may be many of `frames`."""
    copied_bytes: int = 0
    """Bytes copied in user space; counted where the copy is made."""
    header_bytes: int = 0
    """Those of them that are headers of `header_split` frames. No payload was copied but in frames that bounced."""


class PortReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a port did, and in which mode."""

    mode: str
    """`zero-copy`, `copy`, `packet`, or `detached` while no guest is there."""
    rx: DirectionReport = DirectionReport()
    tx: DirectionReport = DirectionReport()
