"""Guest memory that comes and goes under a session."""

from __future__ import annotations

import asyncio
import os
import struct

import pytest
from session_steps import encodable, ends_with, negotiated, start
from vhost_user_fakes import (
    MEMORY_BYTES,
    USER_BASE,
    FakeDevice,
    memory_fd,
    open_fds,
    region,
)

from mpassthru.errors import HostError, MpassthruError, ProtocolError, RefusedError
from mpassthru.vhost_user import (
    Request,
)


async def test_hot_added_region_stops_no_vring(fd: int, event: int) -> None:
    async with negotiated() as (frontend, device, session, _):
        await frontend.add_mem_reg(region(fd))
        await start(frontend, 0, event)
        device.calls.clear()
        await frontend.add_mem_reg(region(fd, slot=1))
        assert device.calls == ["add_memory"]
        assert [r.guest_phys_address for r in session.memory] == [0, MEMORY_BYTES]


async def test_table_that_only_has_more_stops_no_vring_and_keeps_the_first_descriptors(fd: int, event: int) -> None:
    async with negotiated() as (frontend, device, session, _):
        await frontend.set_mem_table([region(fd)])
        await start(frontend, 0, event)
        (kept,) = session.memory
        device.calls.clear()
        held = open_fds()
        await frontend.set_mem_table([region(fd, slot=1), region(fd)])
        assert device.calls == ["add_memory"]
        assert [r.guest_phys_address for r in session.memory] == [MEMORY_BYTES, 0]
        assert kept in session.memory
        assert open_fds() == held + 1


async def test_same_table_in_another_order_is_no_change(fd: int, event: int) -> None:
    async with negotiated() as (frontend, device, _, _):
        await frontend.set_mem_table([region(fd), region(fd, slot=1)])
        await start(frontend, 0, event)
        device.calls.clear()
        held = open_fds()
        await frontend.set_mem_table([region(fd, slot=1), region(fd)])
        assert device.calls == []
        assert open_fds() == held


@pytest.mark.parametrize("error", [RefusedError("over budget"), HostError(12, "cannot map")])
async def test_region_that_cannot_be_added_leaves_everything_as_it_was(
    fd: int, event: int, error: MpassthruError
) -> None:
    async with negotiated() as (frontend, device, session, _):
        await frontend.set_mem_table([region(fd)])
        await start(frontend, 0, event)
        held = open_fds()
        device.failures["add_memory"] = error
        with pytest.raises(RefusedError, match="ADD_MEM_REG"):
            await frontend.add_mem_reg(region(fd, slot=1))
        assert open_fds() == held
        assert len(session.memory) == len(device.regions) == 1
        assert 0 in device.running


async def test_vring_that_waits_for_a_region_starts_when_that_is_added_beside_running_ones(fd: int, event: int) -> None:
    async with negotiated() as (frontend, device, _, _):
        await frontend.add_mem_reg(region(fd))
        await frontend.add_mem_reg(region(fd, slot=1))
        await start(frontend, 0, event)
        await start(frontend, 1, event, shift=MEMORY_BYTES)
        await frontend.rem_mem_reg(region(fd, slot=1))
        assert device.running.keys() == {0}
        device.calls.clear()
        await frontend.add_mem_reg(region(fd, slot=1))
        assert device.calls == ["add_memory", "start_vring 1"]


async def test_device_that_cannot_add_while_vrings_run_restarts_them_with_their_bases(fd: int, event: int) -> None:
    async with negotiated(FakeDevice(next_base=5, can_add=False)) as (frontend, device, session, _):
        await frontend.add_mem_reg(region(fd))
        for index in (0, 1):
            await start(frontend, index, event)
        device.calls.clear()
        await frontend.add_mem_reg(region(fd, slot=1))
        stops, starts = ["stop_vring 0", "stop_vring 1"], ["start_vring 0", "start_vring 1"]
        assert device.calls == ["add_memory", *stops, "map_memory", *starts]
        assert [vring.base for vring in device.running.values()] == [15, 15]
        assert [r.guest_phys_address for r in session.memory] == [0, MEMORY_BYTES]


async def test_region_added_twice_and_removed_twice_is_no_change(fd: int) -> None:
    async with negotiated() as (frontend, device, _, _):
        await frontend.add_mem_reg(region(fd))
        held = open_fds()
        await frontend.add_mem_reg(region(fd))
        assert open_fds() == held
        await frontend.rem_mem_reg(region(fd))
        await frontend.rem_mem_reg(region(fd))
        assert device.calls == ["set_features", "map_memory", "map_memory"]
        assert open_fds() == held - 1


async def test_region_of_another_file_at_the_same_place_is_an_overlap(fd: int) -> None:
    other = memory_fd()
    async with negotiated() as (frontend, _, _, task):
        await frontend.add_mem_reg(region(fd))
        with pytest.raises(ProtocolError):
            await frontend.add_mem_reg(region(other))
        await ends_with(task, "ADD_MEM_REG: region .* overlap in guest addresses")
    os.close(other)


async def test_region_is_replaced_under_running_vrings(fd: int, event: int) -> None:
    """QEMU removes and adds: in between a vring lies in no memory, and waits."""
    async with negotiated() as (frontend, device, _, task):
        await frontend.add_mem_reg(region(fd))
        await frontend.add_mem_reg(region(fd, slot=1))
        await start(frontend, 0, event)
        await frontend.rem_mem_reg(region(fd))
        assert not device.running
        assert not task.done()
        await frontend.add_mem_reg(region(fd))
        assert device.running[0].base == 15


async def test_descriptor_that_comes_with_a_removal_is_closed(fd: int) -> None:
    async with negotiated() as (frontend, _, session, _):
        await frontend.add_mem_reg(region(fd))
        held = open_fds()
        await frontend._tell(
            Request.VHOST_USER_REM_MEM_REG, encodable(struct.pack("=QQQQQ", 0, 0, MEMORY_BYTES, USER_BASE, 0)), [fd]
        )
        assert len(session.memory) == 0
        assert open_fds() == held - 1


async def test_no_more_regions_than_slots(fd: int) -> None:
    async with negotiated() as (frontend, _, session, _):
        for slot in range(await frontend.get_max_mem_slots()):
            await frontend.add_mem_reg(region(fd, slot=slot))
        with pytest.raises(RefusedError, match="ADD_MEM_REG"):
            await frontend.add_mem_reg(region(fd, slot=99))
        assert len(session.memory) == 32


async def test_empty_table_unmaps_and_vrings_wait(fd: int, event: int) -> None:
    async with negotiated() as (frontend, device, _, _):
        await frontend.set_mem_table([region(fd)])
        await start(frontend, 0, event)
        await frontend.set_mem_table([])
        assert not device.running
        assert not device.regions
        await frontend.set_mem_table([region(fd)])
        assert device.running[0].base == 15


async def test_table_with_fewer_descriptors_than_regions_ends_the_connection(fd: int) -> None:
    async with negotiated() as (frontend, _, _, task):
        table = struct.pack("=II", 2, 0) + bytes(64)
        with pytest.raises(ProtocolError):
            await frontend._tell(Request.VHOST_USER_SET_MEM_TABLE, encodable(table), [fd])
        await ends_with(task, "SET_MEM_TABLE: 1 descriptors came along with 2 regions")


async def test_map_that_fails_puts_the_old_memory_back(fd: int, event: int) -> None:
    async with negotiated() as (frontend, device, session, _):
        await frontend.set_mem_table([region(fd)])
        device.can_add = False
        await start(frontend, 0, event)
        held = open_fds()
        device.failures["map_memory"] = RefusedError("too large for a UMEM")
        with pytest.raises(RefusedError, match="ADD_MEM_REG"):
            await frontend.add_mem_reg(region(fd, slot=1))
        assert open_fds() == held
        assert len(session.memory) == len(device.regions) == 1
        assert device.running[0].base == 15


async def test_map_that_fails_in_both_directions_leaves_no_memory(fd: int, event: int) -> None:
    class Unmappable(FakeDevice):
        broken = False

        async def map_memory(self, regions: object) -> None:
            if self.broken and regions:
                raise HostError(12, "cannot map")
            await super().map_memory(regions)  # type: ignore[arg-type]

    device = Unmappable()
    async with negotiated(device) as (frontend, _, session, task):
        await frontend.set_mem_table([region(fd)])
        device.can_add = False
        await start(frontend, 0, event)
        held = open_fds()
        device.broken = True
        with pytest.raises(RefusedError):
            await frontend.add_mem_reg(region(fd, slot=1))
        assert len(session.memory) == 0
        assert open_fds() == held - 1
        assert not device.running
        assert not task.done()


async def test_vring_that_does_not_stop_for_new_memory_leaves_no_descriptor_of_that_open(fd: int, event: int) -> None:
    async with negotiated(FakeDevice(next_base=5, can_add=False)) as (frontend, device, session, _):
        await frontend.set_mem_table([region(fd)])
        await start(frontend, 0, event)
        await start(frontend, 1, event)
        (kept,) = session.memory
        held = open_fds()
        for _attempt in range(2):
            device.failures["stop_vring"] = HostError(16, "still held")
            with pytest.raises(RefusedError, match="ADD_MEM_REG"):
                await frontend.add_mem_reg(region(fd, slot=1))
            device.failures["stop_vring"] = HostError(16, "still held")
            with pytest.raises(RefusedError, match="SET_MEM_TABLE"):
                await frontend.set_mem_table([region(fd, slot=1), region(fd)])
        assert open_fds() == held
        assert tuple(session.memory) == (kept,)
        assert device.running.keys() == {0, 1}
        await frontend.add_mem_reg(region(fd, slot=1))
        assert open_fds() == held + 1


async def test_cancellation_while_vrings_stop_for_new_memory_closes_both_tables(fd: int, event: int) -> None:
    async with negotiated(FakeDevice(next_base=5, can_add=False)) as (frontend, device, _, task):
        await frontend.set_mem_table([region(fd)])
        await start(frontend, 0, event)
        device.block_at = len(device.calls) + 1
        telling = asyncio.create_task(frontend.add_mem_reg(region(fd, slot=1)))
        await device.blocked.wait()
        assert device.calls[-1] == "stop_vring 0"
        task.cancel()
        with pytest.raises(ProtocolError):
            await telling


async def test_cancellation_while_memory_is_replaced_closes_both_tables(fd: int) -> None:
    other = memory_fd()
    async with negotiated() as (frontend, device, _, task):
        await frontend.set_mem_table([region(fd), region(fd, slot=1)])
        device.block_at = len(device.calls)
        telling = asyncio.create_task(frontend.set_mem_table([region(other)]))
        await device.blocked.wait()
        task.cancel()
        with pytest.raises(ProtocolError):
            await telling
    os.close(other)


async def test_table_that_is_repeated_keeps_vrings_running(fd: int, event: int) -> None:
    async with negotiated() as (frontend, device, _, _):
        await frontend.set_mem_table([region(fd)])
        await start(frontend, 0, event)
        device.calls.clear()
        await frontend.set_mem_table([region(fd)])
        assert device.calls == []
