"""The memlock limit: how much memory a process may pin (getrlimit(2), RLIMIT_MEMLOCK), and how much a UMEM pins."""

from __future__ import annotations

import os
import resource
from collections.abc import Sequence

from mpassthru.errors import HostError, RefusedError, errno_name
from mpassthru.umem import PAGE_BYTES, slab_bytes
from mpassthru.vhost_user import MemoryRegion
from mpassthru.worker.privileges import CAP_IPC_LOCK, effective_capabilities


def pinned_bytes(regions: Sequence[MemoryRegion], queue_pairs: int) -> int:
    """How much the UMEM of a guest with these regions pins: whole pages of their files, and the host's own frames.

    Raises:
        HostError: a region's file does not tell its page size.
    """
    return sum(map(_extent_bytes, regions)) + slab_bytes(queue_pairs)


def check_memlock(needed_bytes: int) -> None:
    """Refuse memory that may not be locked, before anything is pinned.

    Raises:
        RefusedError: the limit is too small and CAP_IPC_LOCK is missing.
    """
    limit_bytes = memlock_limit_bytes()
    if limit_bytes == resource.RLIM_INFINITY or needed_bytes <= limit_bytes:
        return
    if CAP_IPC_LOCK not in effective_capabilities():
        raise RefusedError(
            f"cannot pin {-(-needed_bytes >> 20)} MiB (guest memory and frames of ours): "
            f"the memlock limit is {limit_bytes >> 20} MiB; raise it (ulimit -l unlimited, LimitMEMLOCK=infinity) "
            "or give the broker CAP_SYS_RESOURCE or CAP_IPC_LOCK"
        )


def memlock_limit_bytes() -> int:
    """How much this process may lock; RLIM_INFINITY without a limit."""
    return resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]


def _extent_bytes(region: MemoryRegion) -> int:
    """The region rounded out to whole pages of its file, huge ones included."""
    try:
        page_bytes = os.fstatvfs(region.fd).f_bsize or PAGE_BYTES
    except OSError as error:
        raise HostError(
            error.errno or 0,
            f"cannot map guest memory region at {region.guest_phys_address:#x} ({errno_name(error.errno)}): "
            "the front-end sent a file descriptor that is no file",
        ) from error
    start = region.mmap_offset // page_bytes
    end = -(-(region.mmap_offset + region.size_bytes) // page_bytes)
    return (end - start) * page_bytes
