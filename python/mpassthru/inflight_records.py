"""What is in flight on a port's virtqueues, in memory that outlives its workers.

Few front-ends keep such records themselves (QEMU does not for network devices). So the broker keeps a memfd for each
port and hands it to every worker. It is never mapped by the broker, and nothing that is found in it is trusted.

```text
one slot for each vring:  | identity, one page | record (vhost-user.rst, "Inflight I/O tracking") |
```

The identity says which rings of which guest the record is about: the memory file, where in it the rings are, their
size, and the features that the driver chose. A record is taken over only if it is the same; the rest of the check, that
the record and the ring tell the same story, is the engine's.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from typing import Final

from mpassthru.sealed_memory import make_sealed_memory
from mpassthru.vhost_user.device import Vring
from mpassthru.vhost_user.features import VirtioFeature
from mpassthru.vhost_user.inflight import RECORD_HEADER_BYTES, record_bytes
from mpassthru.vhost_user.memory import MemoryRegion
from mpassthru.vhost_user.vring import VRING_SIZE_MAX

PAGE_BYTES: Final = 4096
SLOT_BYTES: Final = PAGE_BYTES + -(-record_bytes(VRING_SIZE_MAX, packed=True) // PAGE_BYTES) * PAGE_BYTES
_RING_PART = struct.Struct("=QQQ")
"""Device and inode of the file that a part of a ring is in, and the offset in it."""
_RING_FACTS = struct.Struct("=QI4x")
"""Features and size."""
_IDENTITY_BYTES: Final = 3 * _RING_PART.size + _RING_FACTS.size


def make_records(queue_pairs: int) -> int:
    """Make the memory file for the records of a port, empty.

    Returns:
        The descriptor, the caller's to close.

    Raises:
        HostError: it cannot be made.
    """
    return make_sealed_memory("mpassthru-inflight", 2 * queue_pairs * SLOT_BYTES)


class InflightRecords:
    """A worker's use of the records.

    Args:
        fd: The memory file, owned from here on.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def offset_for(self, index: int, vring: Vring, regions: Sequence[MemoryRegion]) -> int | None:
        """Make the record of a vring ready for it to start: kept if it is about this very ring, otherwise emptied.

        Returns:
            Where the record is in the file, in bytes; None if this ring can have none.
        """
        slot = index * SLOT_BYTES
        if slot + SLOT_BYTES > os.fstat(self.fd).st_size:
            return None
        identity = identify(vring, regions)
        if identity is None:
            return None
        if os.pread(self.fd, _IDENTITY_BYTES, slot) != identity:
            # In this order: whenever this process ends, a record is not taken for that of another ring.
            os.pwrite(self.fd, bytes(_IDENTITY_BYTES), slot)
            os.pwrite(self.fd, bytes(RECORD_HEADER_BYTES), slot + PAGE_BYTES)
            os.pwrite(self.fd, identity, slot)
        return slot + PAGE_BYTES

    def close(self) -> None:
        """Close the memory file."""
        os.close(self.fd)


def identify(vring: Vring, regions: Sequence[MemoryRegion]) -> bytes | None:
    """What tells a ring from all others; None if a part of it is in no region."""
    parts = []
    for address in (vring.desc_user_address, vring.avail_user_address, vring.used_user_address):
        region = next((r for r in regions if 0 <= address - r.user_address < r.size_bytes), None)
        if region is None:
            return None
        status = os.fstat(region.fd)
        parts.append(_RING_PART.pack(status.st_dev, status.st_ino, region.mmap_offset + address - region.user_address))
    # Logging is switched while a ring runs: it is the same ring.
    features = vring.features & ~VirtioFeature.VHOST_F_LOG_ALL
    return b"".join(parts) + _RING_FACTS.pack(features, vring.size)
