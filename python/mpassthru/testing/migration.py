"""Live migration of a test guest from one QEMU to another on this machine, and what the two ends have of its memory."""

from __future__ import annotations

import asyncio
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from mpassthru.testing.child import ChildError
from mpassthru.testing.qemu import QemuGuest

PAGE_BYTES = 4096
_COMPARED_BYTES = 1 << 20
_FULL_BYTES_PER_S = 1 << 30
_HELD_BYTES_PER_S = 1024
_MEMORY_FILE = "/memfd:memory-backend-memfd (deleted)"


class MigrationResult(msgspec.Struct, frozen=True, kw_only=True):
    """What QEMU says of a migration.

    Attributes:
        total_ms: From the command to the end.
        downtime_ms: While the guest ran at neither end.
        transferred_bytes: Sent by the source.
        rounds: Times that the source looked for written pages.
    """

    total_ms: int
    downtime_ms: int
    transferred_bytes: int
    rounds: int


class Migration:
    """A migration under way: `begin` it, `hold` it for a while if wanted, and `finish` it.

    The source keeps its memory, and its connections to back-ends, until its own block ends.
    """

    def __init__(self, source: QemuGuest, destination: QemuGuest, *, paused: bool = False) -> None:
        """From a running guest to a QEMU that waits for it (`GuestConfig.incoming`).

        Args:
            source: Where the guest runs.
            destination: Where it will.
            paused: Leave it stopped there; QMP's `cont` goes on.
        """
        self.source = source
        self.destination = destination
        self._paused = paused

    async def begin(self, socket_path: Path, *, bandwidth_bytes_per_s: int = _FULL_BYTES_PER_S) -> None:
        """Start sending the guest's memory.

        Args:
            socket_path: For the connection between the two; QEMU removes it afterwards.
            bandwidth_bytes_per_s: How fast the source may send until `hold` or `finish`.

        Raises:
            QmpError: one of the two refuses, or ended.
        """
        for end in (self.source, self.destination):
            await end.qmp.execute("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
        if self._paused:
            await self.destination.qmp.execute("stop")
        await self._limit(bandwidth_bytes_per_s)
        uri = f"unix:{socket_path}"
        await self.destination.qmp.execute("migrate-incoming", uri=uri)
        await self.source.qmp.execute("migrate", uri=uri)

    async def hold(self, share: float, *, timeout_s: float = 60.0) -> None:
        """Wait until this share of memory was copied, from the lowest address on; from then on send next to nothing.

        Raises:
            ChildError: the migration is over before.
            QmpError: QEMU ended.
            TimeoutError: it did not happen in time.
        """
        async with asyncio.timeout(timeout_s):
            while (answer := await self.source.qmp.execute("query-migrate"))["status"] in ("setup", "active"):
                ram = answer.get("ram")
                if ram and ram["remaining"] <= (1 - share) * ram["total"]:
                    await self._limit(_HELD_BYTES_PER_S)
                    return
                await asyncio.sleep(0.005)  # QEMU tells nobody
        raise ChildError(f"the migration is over before it could be held: {answer}")

    async def finish(self, *, timeout_s: float = 60.0) -> MigrationResult:
        """Send at full speed, and wait until the guest runs at the destination.

        Args:
            timeout_s: How long it may take.

        Raises:
            ChildError: the migration failed.
            QmpError: one of the two ended.
            TimeoutError: it did not end in time.
        """
        await self._limit(_FULL_BYTES_PER_S)
        try:
            async with asyncio.timeout(timeout_s):
                await self._completed()
        except TimeoutError:
            status = await self.source.qmp.execute("query-migrate")
            raise TimeoutError(f"the migration has not ended after {timeout_s:g} s: {status}") from None
        answer = await self.source.qmp.execute("query-migrate")
        return MigrationResult(
            total_ms=answer["total-time"],
            downtime_ms=answer["downtime"],
            transferred_bytes=answer["ram"]["transferred"],
            rounds=answer["ram"]["dirty-sync-count"],
        )

    async def _limit(self, bandwidth_bytes_per_s: int) -> None:
        await self.source.qmp.execute("migrate-set-parameters", max_bandwidth=bandwidth_bytes_per_s)

    async def _completed(self) -> None:
        while (status := (await self.source.qmp.wait_event("MIGRATION")).data["status"]) != "completed":
            if status in ("failed", "cancelled"):
                answer = await self.source.qmp.execute("query-migrate")
                raise ChildError(f"the migration {status}: {answer.get('error-desc', 'QEMU gives no reason')}")
        while (await self.destination.qmp.wait_event("MIGRATION")).data["status"] != "completed":
            pass
        if not self._paused:
            await self.destination.qmp.wait_event("RESUME")


def differing_pages(one: QemuGuest, other: QemuGuest) -> list[int]:
    """Compare the memory of two stopped guests; returns the numbers of the pages that differ.

    Pages are counted from the start of the memory's file. QEMU's devices change nothing while a guest is stopped, and
    what its CPUs wrote is all there: see `GuestConfig.odd_memory`.

    Raises:
        ChildError: one has no memory of its own, or not as much as the other.
    """
    with _memory_of(one) as here, _memory_of(other) as there:
        if len(here) != len(there):
            raise ChildError(f"one guest has {len(here)} bytes of memory, the other {len(there)}")
        pages: list[int] = []
        for start in range(0, len(here), _COMPARED_BYTES):
            if here[start : start + _COMPARED_BYTES] == there[start : start + _COMPARED_BYTES]:
                continue
            for at in range(start, min(start + _COMPARED_BYTES, len(here)), PAGE_BYTES):
                if here[at : at + PAGE_BYTES] != there[at : at + PAGE_BYTES]:
                    pages.append(at // PAGE_BYTES)
        return pages


@contextmanager
def _memory_of(guest: QemuGuest) -> Iterator[mmap.mmap]:
    for link in Path(f"/proc/{guest.pid}/fd").iterdir():
        if os.readlink(link) == _MEMORY_FILE:
            with link.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
                yield memory
            return
    raise ChildError(f"QEMU ({guest.pid}) has no memory that is a memfd of its own")
