"""Sizes of a port's UMEM: guest memory, and frames of the host's own around it (crates/datapath, `guest_memory`)."""

from __future__ import annotations

from typing import Final

PAGE_BYTES: Final = 4096
SLAB_BYTES_PER_QUEUE: Final = (4 << 20) + (512 << 10)
"""The host's own frames next to the guest's memory (crates/datapath, `pump/slab.rs`)."""
SLAB_ENDS_BYTES: Final = 3 * PAGE_BYTES
"""What lies in front of the first and behind the last of them."""


def slab_bytes(queues: int) -> int:
    """The host's part of the UMEM of a port with so many queue pairs."""
    return SLAB_BYTES_PER_QUEUE * queues + SLAB_ENDS_BYTES
