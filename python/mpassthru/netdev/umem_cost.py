"""What a guest's memory costs the host when it becomes a UMEM: known before a page is pinned.

A port has one UMEM, which its queues share, and each queue has a pool of its own. The figures are computed from the
kernel's source (`xdp_umem_reg`, `xp_create_and_assign_umem`), for chunks of 4096 bytes in unaligned mode.
"""

from __future__ import annotations

from typing import Final

import msgspec

from mpassthru.errors import RefusedError
from mpassthru.netdev.af_xdp import CHUNK_SIZE_BYTES
from mpassthru.umem import PAGE_BYTES, slab_bytes

POOL_BYTES_PER_CHUNK: Final = 128 + 8
"""`struct xdp_buff_xsk`, and its entry in the list of free ones."""
TABLE_BYTES_PER_PAGE: Final = 8 + 8
"""The page's pointer in `pgs`, and its page table entry in the kernel's mapping: once per UMEM."""
DMA_BYTES_PER_PAGE: Final = 8
"""Zero-copy only: the page's DMA address, kept once for the device and once more in each pool."""
CHUNKS_MAX: Final = (2**31 - 1) // 128
"""The kernel allocates no more than INT_MAX bytes in one piece: 16,777,215 chunks."""
UMEM_MAX_BYTES: Final = CHUNKS_MAX * CHUNK_SIZE_BYTES
"""4096 bytes less than 64 GiB."""


class UmemCost(msgspec.Struct, frozen=True, kw_only=True):
    """Cost of one guest on all of its queues, in bytes."""

    guest_bytes: int
    queues: int
    pinned_bytes: int
    """What becomes resident at once, cannot be swapped, and is charged to the memlock limit."""
    kernel_bytes_per_queue: int
    kernel_bytes: int
    """Of all queues, and of what they share."""


def umem_cost(guest_bytes: int, *, queues: int = 1, zero_copy: bool = False) -> UmemCost:
    """Compute the cost of a guest.

    Args:
        guest_bytes: Size of the guest's memory.
        queues: Queue pairs of the port.
        zero_copy: Count the DMA addresses too.

    Raises:
        RefusedError: no kernel takes a UMEM of that size; the message names the largest guest.
    """
    umem_bytes = guest_bytes + slab_bytes(queues)
    if umem_bytes > UMEM_MAX_BYTES:
        raise RefusedError(
            f"cannot make {format_bytes(guest_bytes)} of guest memory a UMEM: the kernel's limit is "
            f"{CHUNKS_MAX} chunks of {CHUNK_SIZE_BYTES} bytes; give the guest at most "
            f"{(UMEM_MAX_BYTES - slab_bytes(queues)) >> 20} MiB"
        )
    chunks = umem_bytes // CHUNK_SIZE_BYTES
    pages = umem_bytes // PAGE_BYTES
    dma_bytes = DMA_BYTES_PER_PAGE * pages if zero_copy else 0
    per_queue = POOL_BYTES_PER_CHUNK * chunks + dma_bytes
    return UmemCost(
        guest_bytes=guest_bytes,
        queues=queues,
        pinned_bytes=umem_bytes,
        kernel_bytes_per_queue=per_queue,
        kernel_bytes=per_queue * queues + TABLE_BYTES_PER_PAGE * pages + dma_bytes,
    )


def format_bytes(count: int) -> str:
    """Bytes as a person writes them: ``4 GiB``, ``152.6 MiB``."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.1f}".removesuffix(".0") + f" {unit}"
        value /= 1024
    raise AssertionError("the loop returns at GiB")
