"""What a guest's memory takes of the memlock limit, to the byte."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest

from mpassthru.errors import RefusedError
from mpassthru.vhost_user import MemoryRegion
from mpassthru.worker import memlock
from mpassthru.worker.memlock import check_memlock, pinned_bytes

MIB = 1 << 20
PAIR_BYTES = 2 * 512 * 4096 + 1024 * 512
"""rx and tx frames, and headers."""
SLAB_BYTES = PAIR_BYTES + 3 * 4096


@pytest.fixture
def region() -> Iterator[MemoryRegion]:
    fd = os.memfd_create("guest")
    yield MemoryRegion(guest_phys_address=0, size_bytes=64 * MIB, user_address=0, mmap_offset=0, fd=fd)
    os.close(fd)


def test_frames_of_our_own_are_pinned_too(region: MemoryRegion) -> None:
    assert pinned_bytes([region], queue_pairs=1) == 64 * MIB + SLAB_BYTES
    assert pinned_bytes([region, region], queue_pairs=2) == 128 * MIB + SLAB_BYTES + PAIR_BYTES


def test_region_is_pinned_by_whole_pages_of_its_file(region: MemoryRegion) -> None:
    across_two_pages = replace(region, mmap_offset=4095, size_bytes=2)

    assert pinned_bytes([across_two_pages], queue_pairs=1) == 2 * 4096 + SLAB_BYTES


def test_huge_pages_are_pinned_whole(region: MemoryRegion, monkeypatch: pytest.MonkeyPatch) -> None:
    normal = os.fstatvfs(region.fd)
    monkeypatch.setattr(os, "fstatvfs", lambda fd: os.statvfs_result((2 * MIB, *normal[1:])))

    assert pinned_bytes([replace(region, size_bytes=4096)], queue_pairs=1) == 2 * MIB + SLAB_BYTES


def test_memory_beyond_the_limit_is_refused_before_anything_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memlock, "memlock_limit_bytes", lambda: 8 * MIB)
    monkeypatch.setattr(memlock, "effective_capabilities", set[int])

    check_memlock(8 * MIB)
    with pytest.raises(RefusedError, match=r"cannot pin 9 MiB .* the memlock limit is 8 MiB"):
        check_memlock(8 * MIB + 1)


def test_memory_beyond_the_limit_is_fine_with_ipc_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memlock, "memlock_limit_bytes", lambda: 8 * MIB)
    monkeypatch.setattr(memlock, "effective_capabilities", lambda: {14})

    check_memlock(1 << 40)
