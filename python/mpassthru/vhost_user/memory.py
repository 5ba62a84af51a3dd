"""Guest memory as the front-end described it: regions, their descriptors, and what makes a table legal.

A `MemoryTable` is a value: adding or removing a region gives a new one, so that a change which the device refuses
leaves the old table as it was. Whoever replaces a table closes the descriptors of the regions that come to be mapped no
more, of either of the two. vhost-user.rst, "Memory access".
"""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mpassthru.errors import ProtocolError
from mpassthru.vhost_user.message import RegionDescription

ADDRESS_SPACE_BYTES = 1 << 64


@dataclass(frozen=True, slots=True, eq=False)
class MemoryRegion:
    """One region of guest memory, and the descriptor that it is mapped from. Addresses and sizes in bytes.

    Compared by identity: the same memory sent twice is two regions with a descriptor each.
    """

    guest_phys_address: int
    size_bytes: int
    user_address: int
    mmap_offset: int
    fd: int

    @classmethod
    def from_description(cls, region: RegionDescription, fd: int) -> MemoryRegion:
        """Join what was in the payload with what was in the ancillary data."""
        return cls(region.guest_phys_address, region.size_bytes, region.user_address, region.mmap_offset, fd)

    @property
    def description(self) -> RegionDescription:
        """The region as it goes over the wire."""
        return RegionDescription(self.guest_phys_address, self.size_bytes, self.user_address, self.mmap_offset)

    def matches(self, region: RegionDescription) -> bool:
        """Same guest address, user address and size: what identifies a region to REM_MEM_REG."""
        return (self.guest_phys_address, self.user_address, self.size_bytes) == (
            region.guest_phys_address,
            region.user_address,
            region.size_bytes,
        )

    def is_same_memory(self, other: MemoryRegion) -> bool:
        """The same description of the same file: a front-end that repeats itself."""
        mine, others = os.fstat(self.fd), os.fstat(other.fd)
        return self.description == other.description and (mine.st_dev, mine.st_ino) == (others.st_dev, others.st_ino)

    def __str__(self) -> str:
        return f"region {self.guest_phys_address:#x}+{self.size_bytes:#x}"


class MemoryTable:
    """A checked set of regions: none empty, none beyond its address space or its file, no guest address twice.

    User addresses may overlap: two guest addresses for the same memory are legal, and translate to the same bytes.
    """

    def __init__(self, regions: Iterable[MemoryRegion] = ()) -> None:
        """Check the regions; the table owns their descriptors from now on.

        Raises:
            ProtocolError: the regions are not a legal table; their descriptors stay the caller's.
        """
        self.regions = tuple(regions)
        for region in self.regions:
            _check_region(region)
        ordered = sorted(self.regions, key=lambda region: region.guest_phys_address)
        for lower, upper in itertools.pairwise(ordered):
            if lower.guest_phys_address + lower.size_bytes > upper.guest_phys_address:
                raise ProtocolError(f"{lower} and {upper} overlap in guest addresses")

    def __len__(self) -> int:
        return len(self.regions)

    def __iter__(self) -> Iterator[MemoryRegion]:
        return iter(self.regions)

    def find(self, region: RegionDescription) -> MemoryRegion | None:
        """The region that REM_MEM_REG would mean by `region`."""
        return next((known for known in self.regions if known.matches(region)), None)

    def is_same_memory(self, other: MemoryTable) -> bool:
        """Whether `other` lists the same regions of the same files, in the same order."""
        return len(self) == len(other) and all(
            mine.is_same_memory(others) for mine, others in zip(self, other, strict=True)
        )

    def with_region(self, region: MemoryRegion) -> MemoryTable:
        """This table and one region more.

        Raises:
            ProtocolError: the region does not fit in.
        """
        return MemoryTable((*self.regions, region))

    def without_region(self, region: MemoryRegion) -> MemoryTable:
        """This table without one of its regions."""
        return MemoryTable(known for known in self.regions if known is not region)

    def replaced_by(self, table: MemoryTable) -> MemoryTable:
        """`table`, with this one's regions where it lists the same memory: those keep their descriptors."""
        known = {region.description: region for region in self.regions}
        return MemoryTable(_same_or_new(known.get(region.description), region) for region in table)

    def added_to(self, old: MemoryTable) -> tuple[MemoryRegion, ...] | None:
        """What this table has beyond `old`; None if it lacks any of that."""
        if any(region not in self.regions for region in old):
            return None
        return tuple(region for region in self.regions if region not in old.regions)

    def covers(self, user_address: int, size_bytes: int) -> bool:
        """Whether every byte of a range of user addresses lies in a region; neighbours may share the range."""
        position, end = user_address, user_address + size_bytes
        while position < end:
            region = next(
                (r for r in self.regions if r.user_address <= position < r.user_address + r.size_bytes),
                None,
            )
            if region is None:
                return False
            position = region.user_address + region.size_bytes
        return True

    def close_except(self, kept: MemoryTable) -> None:
        """Close the descriptors of the regions that `kept` does not hold."""
        for region in self.regions:
            if region not in kept.regions:
                os.close(region.fd)


def _same_or_new(known: MemoryRegion | None, region: MemoryRegion) -> MemoryRegion:
    return known if known is not None and known.is_same_memory(region) else region


def _check_region(region: MemoryRegion) -> None:
    if region.size_bytes == 0:
        raise ProtocolError(f"{region} has no size")
    for what, start in (
        ("guest", region.guest_phys_address),
        ("user", region.user_address),
        ("mmap", region.mmap_offset),
    ):
        if start + region.size_bytes > ADDRESS_SPACE_BYTES:
            raise ProtocolError(f"{region} overflows its {what} addresses, from {start:#x}")
    status = os.fstat(region.fd)
    # Memory beyond the end of its file would fault at the first access, in whoever maps it.
    if stat.S_ISREG(status.st_mode) and region.mmap_offset + region.size_bytes > status.st_size:
        raise ProtocolError(
            f"{region} from offset {region.mmap_offset:#x} ends beyond its file of {status.st_size:#x} bytes"
        )
