"""The vhost-user wire format: request ids, flags, and payload codecs used in both directions.

One message is a header (request, flags, size), a payload of `size` bytes, and the file descriptors that came in its
ancillary data. Numbers are in the machine's byte order. vhost-user.rst, "Message Specification".

Decoding is strict: a payload has exactly the size of its type, and nothing here raises anything but ProtocolError.
Invariant: a `Message` owns its descriptors until `take_fds` hands them over; `close` closes what is left.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, ClassVar, Self

from mpassthru.errors import ProtocolError

VHOST_USER_VERSION = 0x1
VHOST_USER_VERSION_MASK = 0x3
VHOST_USER_REPLY_MASK = 1 << 2
VHOST_USER_NEED_REPLY_MASK = 1 << 3
VHOST_USER_VRING_IDX_MASK = 0xFF
VHOST_USER_VRING_NOFD_MASK = 1 << 8
VHOST_VRING_F_LOG = 1 << 0

VHOST_MEMORY_BASELINE_NREGIONS = 8
"""Regions that one SET_MEM_TABLE can carry, and so the most descriptors that any message carries."""

PAYLOAD_MAX_BYTES = 4096
"""No payload in the specification is larger; a header that claims more is refused before anything is read."""


class Request(IntEnum):
    """Messages from the front-end (vhost-user.rst, "Front-end message types")."""

    VHOST_USER_GET_FEATURES = 1
    VHOST_USER_SET_FEATURES = 2
    VHOST_USER_SET_OWNER = 3
    VHOST_USER_RESET_OWNER = 4
    VHOST_USER_SET_MEM_TABLE = 5
    VHOST_USER_SET_LOG_BASE = 6
    VHOST_USER_SET_LOG_FD = 7
    VHOST_USER_SET_VRING_NUM = 8
    VHOST_USER_SET_VRING_ADDR = 9
    VHOST_USER_SET_VRING_BASE = 10
    VHOST_USER_GET_VRING_BASE = 11
    VHOST_USER_SET_VRING_KICK = 12
    VHOST_USER_SET_VRING_CALL = 13
    VHOST_USER_SET_VRING_ERR = 14
    VHOST_USER_GET_PROTOCOL_FEATURES = 15
    VHOST_USER_SET_PROTOCOL_FEATURES = 16
    VHOST_USER_GET_QUEUE_NUM = 17
    VHOST_USER_SET_VRING_ENABLE = 18
    VHOST_USER_SEND_RARP = 19
    VHOST_USER_NET_SET_MTU = 20
    VHOST_USER_SET_BACKEND_REQ_FD = 21
    VHOST_USER_IOTLB_MSG = 22
    VHOST_USER_SET_VRING_ENDIAN = 23
    VHOST_USER_GET_CONFIG = 24
    VHOST_USER_SET_CONFIG = 25
    VHOST_USER_CREATE_CRYPTO_SESSION = 26
    VHOST_USER_CLOSE_CRYPTO_SESSION = 27
    VHOST_USER_POSTCOPY_ADVISE = 28
    VHOST_USER_POSTCOPY_LISTEN = 29
    VHOST_USER_POSTCOPY_END = 30
    VHOST_USER_GET_INFLIGHT_FD = 31
    VHOST_USER_SET_INFLIGHT_FD = 32
    VHOST_USER_GPU_SET_SOCKET = 33
    VHOST_USER_RESET_DEVICE = 34
    VHOST_USER_VRING_KICK = 35
    VHOST_USER_GET_MAX_MEM_SLOTS = 36
    VHOST_USER_ADD_MEM_REG = 37
    VHOST_USER_REM_MEM_REG = 38
    VHOST_USER_SET_STATUS = 39
    VHOST_USER_GET_STATUS = 40
    VHOST_USER_GET_SHARED_OBJECT = 41
    VHOST_USER_SET_DEVICE_STATE_FD = 42
    VHOST_USER_CHECK_DEVICE_STATE = 43


def request_name(request: int) -> str:
    """The message's name without its `VHOST_USER_` prefix, or its number where it has none."""
    try:
        return Request(request).name.removeprefix("VHOST_USER_")
    except ValueError:
        return f"message {request}"


@dataclass(frozen=True, slots=True)
class Header:
    """The 12 bytes in front of every payload."""

    request: int
    flags: int
    size_bytes: int

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=III")

    def encode(self) -> bytes:
        """The header as it goes over the wire."""
        return self.LAYOUT.pack(self.request, self.flags, self.size_bytes)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read and check a header.

        Raises:
            ProtocolError: not 12 bytes, another protocol version, an undefined flag, or a payload too large.
        """
        header = cls(*_unpack(cls.LAYOUT, data, "header"))
        name = request_name(header.request)
        if header.flags & VHOST_USER_VERSION_MASK != VHOST_USER_VERSION:
            raise ProtocolError(f"{name}: flags {header.flags:#x} are not of protocol version {VHOST_USER_VERSION}")
        if header.flags & ~(VHOST_USER_VERSION_MASK | VHOST_USER_REPLY_MASK | VHOST_USER_NEED_REPLY_MASK):
            raise ProtocolError(f"{name}: flags {header.flags:#x} have undefined bits set")
        if header.size_bytes > PAYLOAD_MAX_BYTES:
            raise ProtocolError(f"{name}: payload of {header.size_bytes} bytes; the largest is {PAYLOAD_MAX_BYTES}")
        return header


@dataclass(slots=True)
class Message:
    """A message as received: checked header, raw payload, and the descriptors it brought, which it owns."""

    request: int
    flags: int
    payload: bytes
    fds: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        """`SET_FEATURES`, or `message 99` for a request that no specification names."""
        return request_name(self.request)

    @property
    def is_reply(self) -> bool:
        """Set on everything that answers a request."""
        return bool(self.flags & VHOST_USER_REPLY_MASK)

    @property
    def needs_reply(self) -> bool:
        """The sender waits for an acknowledgement (REPLY_ACK)."""
        return bool(self.flags & VHOST_USER_NEED_REPLY_MASK)

    def take_fds(self) -> list[int]:
        """Hand the descriptors over to the caller, who closes them."""
        fds, self.fds = self.fds, []
        return fds

    def close(self) -> None:
        """Close the descriptors that nobody took."""
        for fd in self.take_fds():
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class Empty:
    """No payload."""

    def encode(self) -> bytes:
        """Nothing."""
        return b""

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Check that there is nothing."""
        if data:
            raise ProtocolError(f"payload of {len(data)} bytes where none belongs")
        return cls()


@dataclass(frozen=True, slots=True)
class U64:
    """A single 64-bit integer."""

    value: int

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=Q")

    def encode(self) -> bytes:
        """8 bytes."""
        return self.LAYOUT.pack(self.value)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read 8 bytes."""
        return cls(*_unpack(cls.LAYOUT, data, "u64"))


@dataclass(frozen=True, slots=True)
class MacAddress:
    """The payload of SEND_RARP: a u64 whose first six bytes in memory are the MAC address."""

    mac: bytes

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=6s2x")

    def encode(self) -> bytes:
        """8 bytes."""
        return self.LAYOUT.pack(self.mac)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read 8 bytes; the last two mean nothing."""
        return cls(*_unpack(cls.LAYOUT, data, "MAC address"))


@dataclass(frozen=True, slots=True)
class VringState:
    """A vring state description: what `num` is depends on the message."""

    index: int
    num: int

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=II")

    def encode(self) -> bytes:
        """8 bytes."""
        return self.LAYOUT.pack(self.index, self.num)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read 8 bytes."""
        return cls(*_unpack(cls.LAYOUT, data, "vring state"))


@dataclass(frozen=True, slots=True)
class VringAddress:
    """A vring address description. Ring addresses are the front-end's user addresses."""

    index: int
    flags: int
    desc_user_address: int
    used_user_address: int
    avail_user_address: int
    log_guest_address: int = 0

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=IIQQQQ")

    def encode(self) -> bytes:
        """40 bytes."""
        return self.LAYOUT.pack(
            self.index,
            self.flags,
            self.desc_user_address,
            self.used_user_address,
            self.avail_user_address,
            self.log_guest_address,
        )

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read 40 bytes."""
        return cls(*_unpack(cls.LAYOUT, data, "vring address"))


@dataclass(frozen=True, slots=True)
class VringFile:
    """The payload of SET_VRING_KICK, CALL and ERR: a vring index, and whether a descriptor comes along."""

    index: int
    has_fd: bool

    def encode(self) -> bytes:
        """8 bytes."""
        return U64(self.index | (0 if self.has_fd else VHOST_USER_VRING_NOFD_MASK)).encode()

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read 8 bytes.

        Raises:
            ProtocolError: another size, or bits above bit 8 are set.
        """
        value = U64.decode(data).value
        if value & ~(VHOST_USER_VRING_IDX_MASK | VHOST_USER_VRING_NOFD_MASK):
            raise ProtocolError(f"payload {value:#x} has undefined bits set")
        return cls(value & VHOST_USER_VRING_IDX_MASK, not value & VHOST_USER_VRING_NOFD_MASK)


@dataclass(frozen=True, slots=True)
class RegionDescription:
    """One region of guest memory. Addresses and sizes in bytes; the descriptor travels beside it."""

    guest_phys_address: int
    size_bytes: int
    user_address: int
    mmap_offset: int

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=QQQQ")

    def encode(self) -> bytes:
        """32 bytes."""
        return self.LAYOUT.pack(self.guest_phys_address, self.size_bytes, self.user_address, self.mmap_offset)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read 32 bytes."""
        return cls(*_unpack(cls.LAYOUT, data, "memory region"))


@dataclass(frozen=True, slots=True)
class SingleRegion:
    """A single memory region description (ADD_MEM_REG, REM_MEM_REG)."""

    region: RegionDescription

    PADDING: ClassVar[bytes] = bytes(8)

    def encode(self) -> bytes:
        """40 bytes."""
        return self.PADDING + self.region.encode()

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read 40 bytes; the padding means nothing."""
        if len(data) < len(cls.PADDING):
            raise ProtocolError(f"single memory region of {len(data)} bytes instead of 40")
        return cls(RegionDescription.decode(data[len(cls.PADDING) :]))


@dataclass(frozen=True, slots=True)
class RegionTable:
    """A memory regions description (SET_MEM_TABLE)."""

    regions: tuple[RegionDescription, ...]

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=I4x")

    def encode(self) -> bytes:
        """8 bytes and 32 for each region."""
        return self.LAYOUT.pack(len(self.regions)) + b"".join(region.encode() for region in self.regions)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read the table.

        Raises:
            ProtocolError: more than 8 regions, or a size that does not match their number.
        """
        (count,) = _unpack(cls.LAYOUT, data[: cls.LAYOUT.size], "memory table header")
        if count > VHOST_MEMORY_BASELINE_NREGIONS:
            raise ProtocolError(f"{count} memory regions; one table holds at most {VHOST_MEMORY_BASELINE_NREGIONS}")
        step = RegionDescription.LAYOUT.size
        expected_bytes = cls.LAYOUT.size + count * step
        if len(data) != expected_bytes:
            raise ProtocolError(f"table of {count} memory regions in {len(data)} bytes instead of {expected_bytes}")
        offsets = range(cls.LAYOUT.size, expected_bytes, step)
        return cls(tuple(RegionDescription.decode(data[offset : offset + step]) for offset in offsets))


@dataclass(frozen=True, slots=True)
class Inflight:
    """An inflight description: the area in which a back-end writes down what is in flight."""

    size_bytes: int
    mmap_offset: int
    queues: int
    queue_size: int

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=QQHH4x")

    def encode(self) -> bytes:
        """24 bytes, as C pads them."""
        return self.LAYOUT.pack(self.size_bytes, self.mmap_offset, self.queues, self.queue_size)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read 24 bytes."""
        return cls(*_unpack(cls.LAYOUT, data, "inflight description"))


@dataclass(frozen=True, slots=True)
class LogDescription:
    """A log description (SET_LOG_BASE): where the bitmap of written pages is in the file that comes along, in bytes.

    Without a file it is a plain u64, the log's address in the front-end.
    """

    size_bytes: int
    mmap_offset: int

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=QQ")

    def encode(self) -> bytes:
        """16 bytes."""
        return self.LAYOUT.pack(self.size_bytes, self.mmap_offset)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read 16 bytes, or the 8 of an address that says nothing to us."""
        if len(data) == U64.LAYOUT.size:
            return cls(0, 0)
        return cls(*_unpack(cls.LAYOUT, data, "log description"))


Payload = (
    Empty
    | U64
    | MacAddress
    | VringState
    | VringAddress
    | VringFile
    | SingleRegion
    | RegionTable
    | Inflight
    | LogDescription
)


def encode_message(request: int, payload: Payload, *, reply: bool = False, need_reply: bool = False) -> bytes:
    """A whole message as it goes over the wire; descriptors travel beside it."""
    body = payload.encode()
    flags = VHOST_USER_VERSION
    flags |= VHOST_USER_REPLY_MASK if reply else 0
    flags |= VHOST_USER_NEED_REPLY_MASK if need_reply else 0
    return Header(request, flags, len(body)).encode() + body


def _unpack(layout: struct.Struct, data: bytes, what: str) -> tuple[Any, ...]:
    if len(data) != layout.size:
        raise ProtocolError(f"{what} of {len(data)} bytes instead of {layout.size}")
    return layout.unpack(data)
