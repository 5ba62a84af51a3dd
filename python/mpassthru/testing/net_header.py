"""The virtio-net header: what a driver asks of a frame, in front of it (VIRTIO 1.3 section 5.1.6).

The kernel takes the same one, as `struct virtio_net_hdr`, from taps and packet sockets (PACKET_VNET_HDR).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

NEEDS_CSUM: Final = 1
GSO_TCPV4: Final = 1
GSO_TCPV6: Final = 4
GSO_UDP_L4: Final = 5
GSO_ECN: Final = 0x80

_FIELDS: Final = struct.Struct("<BBHHHH")


@dataclass(frozen=True, slots=True, kw_only=True)
class NetHeader:
    """The fields, but for those of rx alone.

    Attributes:
        flags: `NEEDS_CSUM`, or nothing.
        gso_type: One of the `GSO_*`, with `GSO_ECN` or without.
        header_bytes: A hint: length of the frame's headers.
        gso_size: Payload of each segment in bytes.
        csum_start: Where in the frame the checksum begins.
        csum_offset: Where from there it belongs.
    """

    flags: int = 0
    gso_type: int = 0
    header_bytes: int = 0
    gso_size: int = 0
    csum_start: int = 0
    csum_offset: int = 0

    def pack(self, size_bytes: int = 12) -> bytes:
        """The header as a driver writes it; what `size_bytes` leaves over is zero."""
        fields = (self.flags, self.gso_type, self.header_bytes, self.gso_size, self.csum_start, self.csum_offset)
        return _FIELDS.pack(*fields).ljust(size_bytes, b"\0")

    @classmethod
    def unpack(cls, header: bytes) -> NetHeader:
        """The header as it lies in memory."""
        flags, gso_type, header_bytes, gso_size, csum_start, csum_offset = _FIELDS.unpack_from(header)
        return cls(
            flags=flags,
            gso_type=gso_type,
            header_bytes=header_bytes,
            gso_size=gso_size,
            csum_start=csum_start,
            csum_offset=csum_offset,
        )
