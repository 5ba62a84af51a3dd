"""The area in which a back-end writes down what is in flight, for the one that comes after a crash.

The front-end asks for it (GET_INFLIGHT_FD), keeps it, and hands it to each back-end (SET_INFLIGHT_FD). It is one record
for each virtqueue, one behind the other. vhost-user.rst, "Inflight I/O tracking".
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

from mpassthru.errors import ProtocolError
from mpassthru.sealed_memory import make_sealed_memory
from mpassthru.vhost_user.message import Inflight

RECORD_HEADER_BYTES = 32
"""QueueRegionPacked; QueueRegionSplit has 16."""
_SPLIT = (16, 16)
_PACKED = (32, 32)
"""QueueRegionSplit and DescStateSplit, QueueRegionPacked and DescStatePacked."""
ALIGNMENT_BYTES = 64
"""Of each record, so that no two virtqueues share a cache line."""


def record_bytes(queue_size: int, *, packed: bool) -> int:
    """What the record of a virtqueue takes, up to the next one."""
    header_bytes, state_bytes = _PACKED if packed else _SPLIT
    size_bytes = header_bytes + state_bytes * queue_size
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


@dataclass(frozen=True, slots=True)
class InflightArea:
    """An area that a front-end keeps. `fd` is owned by whoever holds the area."""

    description: Inflight
    fd: int

    @classmethod
    def make(cls, queues: int, queue_size: int) -> InflightArea:
        """Make an empty area, for virtqueues of either layout: which they have may not be known yet.

        Raises:
            HostError: there is no memory or descriptor for it.
        """
        size_bytes = queues * record_bytes(queue_size, packed=True)
        fd = make_sealed_memory("mpassthru-inflight-area", size_bytes)
        return cls(Inflight(size_bytes, 0, queues, queue_size), fd)

    @classmethod
    def of_frontend(cls, description: Inflight, fd: int) -> InflightArea:
        """Check what a front-end hands over.

        Raises:
            ProtocolError: the area cannot hold its records, or is not all in its file; `fd` stays the caller's.
        """
        needed_bytes = description.queues * record_bytes(description.queue_size, packed=False)
        if description.size_bytes < needed_bytes:
            raise ProtocolError(f"an area of {description.size_bytes} bytes; its records take {needed_bytes}")
        if description.mmap_offset % 8:
            raise ProtocolError(f"the area starts at {description.mmap_offset:#x}, which is not a multiple of 8")
        status = os.fstat(fd)
        end = description.mmap_offset + description.size_bytes
        # Memory beyond the end of its file would fault at the first access.
        if not stat.S_ISREG(status.st_mode) or end > status.st_size:
            raise ProtocolError(f"the area ends at {end:#x}, beyond its file of {status.st_size:#x} bytes")
        return cls(description, fd)

    def record_offset(self, index: int, ring_size: int, *, packed: bool) -> int | None:
        """Where in the file the record of a vring is; None if the area has none for it.

        Raises:
            ProtocolError: the vring is larger than the area was made for.
        """
        if index >= self.description.queues:
            return None
        if ring_size > self.description.queue_size:
            raise ProtocolError(
                f"vring {index} of {ring_size} entries; the area for what is in flight was made for "
                f"{self.description.queue_size}"
            )
        each_bytes = record_bytes(self.description.queue_size, packed=packed)
        if (index + 1) * each_bytes > self.description.size_bytes:
            raise ProtocolError(
                f"vring {index}: the area for what is in flight, of {self.description.size_bytes} bytes, was made for "
                "split virtqueues"
            )
        return self.description.mmap_offset + index * each_bytes

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.fd)
