"""What makes a memory table legal, and which addresses it covers."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vhost_user_fakes import memory_fd

from mpassthru.errors import ProtocolError
from mpassthru.vhost_user import MemoryRegion, MemoryTable, RegionDescription


@pytest.fixture
def fd() -> Iterator[int]:
    fd = memory_fd(0x10000)
    yield fd
    os.close(fd)


@pytest.mark.parametrize(
    ("numbers", "reason"),
    [
        ((0, 0, 0, 0), "has no size"),
        ((2**64 - 0x1000, 0x2000, 0, 0), "overflows its guest addresses"),
        ((0, 0x2000, 2**64 - 0x1000, 0), "overflows its user addresses"),
        ((0, 0x2000, 0, 2**64 - 0x1000), "overflows its mmap addresses"),
        ((0, 0x10001, 0, 0), "beyond its file of 0x10000 bytes"),
        ((0, 0x1000, 0, 0xF001), "beyond its file of 0x10000 bytes"),
    ],
)
def test_illegal_region_is_a_protocol_error(fd: int, numbers: tuple[int, int, int, int], reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        MemoryTable([MemoryRegion(*numbers, fd)])


@pytest.mark.parametrize("start", [0x0, 0x1000, 0x2FFF, 0xFFFF_F001])
def test_overlapping_guest_addresses_are_a_protocol_error(fd: int, start: int) -> None:
    table = MemoryTable([MemoryRegion(0x1000, 0x2000, 0, 0, fd), MemoryRegion(0xFFFF_F000, 0x1000, 0x9000, 0, fd)])
    with pytest.raises(ProtocolError, match="overlap in guest addresses"):
        table.with_region(MemoryRegion(start, 0x1001, 0x100000, 0, fd))


def test_regions_that_touch_and_regions_that_share_user_addresses_are_legal(fd: int) -> None:
    table = MemoryTable([MemoryRegion(0x1000, 0x1000, 0, 0, fd), MemoryRegion(0x0, 0x1000, 0, 0, fd)])
    assert len(table) == 2


def test_region_at_the_very_end_of_an_address_space_is_legal(fd: int) -> None:
    assert len(MemoryTable([MemoryRegion(2**64 - 0x1000, 0x1000, 2**64 - 0x1000, 0, fd)])) == 1


def test_range_is_covered_across_neighbours_but_not_across_holes(fd: int) -> None:
    table = MemoryTable(
        [
            MemoryRegion(0x9000, 0x1000, 0x1000, 0, fd),
            MemoryRegion(0x0000, 0x1000, 0x2000, 0, fd),
            MemoryRegion(0x5000, 0x1000, 0x4000, 0, fd),
        ]
    )
    assert table.covers(0x1800, 0x1800)
    assert table.covers(0x4000, 0x1000)
    assert not table.covers(0x1800, 0x1801)
    assert not table.covers(0x0FFF, 2)
    assert not MemoryTable().covers(0, 1)


@given(st.lists(st.tuples(st.integers(0, 15), st.integers(1, 4)), max_size=8), st.integers(0, 20), st.integers(1, 8))
def test_covers_agrees_with_a_set_of_bytes(spans: list[tuple[int, int]], start: int, size: int) -> None:
    fd = os.open("/dev/null", os.O_RDONLY)
    try:
        table = MemoryTable(MemoryRegion(i * 100, length, user, 0, fd) for i, (user, length) in enumerate(spans))
        mapped = {byte for user, length in spans for byte in range(user, user + length)}
        assert table.covers(start, size) == mapped.issuperset(range(start, start + size))
    finally:
        os.close(fd)


def test_region_is_found_by_addresses_and_size_whatever_its_offset(fd: int) -> None:
    known = MemoryRegion(0x1000, 0x1000, 0x7000, 0x2000, fd)
    table = MemoryTable([known])
    assert table.find(RegionDescription(0x1000, 0x1000, 0x7000, 0)) is known
    assert table.find(RegionDescription(0x1000, 0x1000, 0x8000, 0x2000)) is None
    assert len(table.without_region(known)) == 0


def test_same_memory_is_told_by_file_not_by_descriptor(fd: int) -> None:
    again, other = os.dup(fd), memory_fd(0x10000)
    table = MemoryTable([MemoryRegion(0, 0x1000, 0, 0, fd)])
    assert table.is_same_memory(MemoryTable([MemoryRegion(0, 0x1000, 0, 0, again)]))
    assert not table.is_same_memory(MemoryTable([MemoryRegion(0, 0x1000, 0, 0, other)]))
    assert not table.is_same_memory(MemoryTable([MemoryRegion(0, 0x1000, 0, 0x1000, fd)]))
    assert not table.is_same_memory(MemoryTable())
    os.close(again)
    os.close(other)
