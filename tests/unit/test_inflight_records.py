"""The records that outlive a worker: whose they are, and that nobody else's are taken for them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import replace

import pytest

from mpassthru.inflight_records import InflightRecords, make_records
from mpassthru.vhost_user import MemoryRegion, VirtioFeature, Vring

VRING = Vring(
    size=256,
    base=0,
    desc_user_address=0x10000,
    used_user_address=0x12000,
    avail_user_address=0x11000,
    flags=0,
    log_guest_address=0,
    features=1 << 32,
    enabled=True,
    kick_fd=-1,
)
MEMORY_BYTES = 1 << 20


@pytest.fixture
def records() -> Iterator[InflightRecords]:
    made = InflightRecords(make_records(2))
    yield made
    made.close()


def memory(user_address: int = 0x10000, mmap_offset: int = 0) -> MemoryRegion:
    fd = os.memfd_create("guest")
    os.ftruncate(fd, 2 * MEMORY_BYTES)
    return MemoryRegion(0, MEMORY_BYTES, user_address, mmap_offset, fd)


@pytest.fixture
def region() -> Iterator[MemoryRegion]:
    made = memory()
    yield made
    os.close(made.fd)


def begin(records: InflightRecords, index: int, region: MemoryRegion) -> int:
    """A record with something in it."""
    offset = records.offset_for(index, VRING, [region])
    assert offset is not None
    os.pwrite(records.fd, b"something", offset)
    return offset


def is_kept(records: InflightRecords, index: int, vring: Vring, region: MemoryRegion) -> bool:
    offset = records.offset_for(index, vring, [region])
    assert offset is not None
    return os.pread(records.fd, 9, offset) == b"something"


def test_record_of_the_same_ring_is_kept(records: InflightRecords, region: MemoryRegion) -> None:
    begin(records, 3, region)

    assert is_kept(records, 3, replace(VRING, base=7, kick_fd=9, enabled=False), region)


def test_record_is_found_where_the_front_end_sees_its_memory_elsewhere(
    records: InflightRecords, region: MemoryRegion
) -> None:
    begin(records, 0, region)
    moved = MemoryRegion(0, MEMORY_BYTES, 0x90000, 0, region.fd)
    vring = replace(VRING, desc_user_address=0x90000, avail_user_address=0x91000, used_user_address=0x92000)

    assert is_kept(records, 0, vring, moved)


@pytest.mark.parametrize(
    "change",
    [
        {"size": 128},
        {"features": 1 << 32 | 1 << 15},
        {"desc_user_address": 0x20000},
        {"avail_user_address": 0x21000},
        {"used_user_address": 0x22000},
    ],
)
def test_record_of_another_ring_is_emptied(
    records: InflightRecords, region: MemoryRegion, change: dict[str, int]
) -> None:
    begin(records, 0, region)

    assert not is_kept(records, 0, replace(VRING, **change), region)  # type: ignore[arg-type]


def test_record_is_the_same_while_writes_are_logged(records: InflightRecords, region: MemoryRegion) -> None:
    begin(records, 0, region)

    logging = replace(VRING, features=VRING.features | VirtioFeature.VHOST_F_LOG_ALL)
    assert is_kept(records, 0, logging, region)


def test_record_of_another_guest_is_emptied(records: InflightRecords, region: MemoryRegion) -> None:
    begin(records, 0, region)
    other = memory()

    assert not is_kept(records, 0, VRING, other)
    os.close(other.fd)


def test_each_vring_has_a_record_of_its_own_as_large_as_the_largest_ring(
    records: InflightRecords, region: MemoryRegion
) -> None:
    offsets = [records.offset_for(index, VRING, [region]) for index in range(4)]

    assert all(offset is not None and offset % 4096 == 0 for offset in offsets)
    ordered = sorted(offset or 0 for offset in offsets)
    assert all(later - earlier >= 16 + 16 * 32768 for earlier, later in itertools.pairwise(ordered))
    assert os.fstat(records.fd).st_size >= ordered[-1] + 16 + 16 * 32768


def test_vring_that_no_record_can_be_kept_of_has_none(records: InflightRecords, region: MemoryRegion) -> None:
    assert records.offset_for(4, VRING, [region]) is None
    assert records.offset_for(0, replace(VRING, used_user_address=1 << 40), [region]) is None


def test_empty_records_take_no_memory(records: InflightRecords) -> None:
    assert os.fstat(records.fd).st_blocks == 0
