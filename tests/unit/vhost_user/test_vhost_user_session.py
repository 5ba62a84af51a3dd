"""Each message in legal and illegal state, seen from the front-end and from the device."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

import pytest
from vhost_user_fakes import (
    FEATURES,
    MEMORY_BYTES,
    USER_BASE,
    FakeDevice,
    connected,
    memory_fd,
    open_fds,
    region,
    ring_address,
)

from mpassthru.errors import HostError, MpassthruError, ProtocolError, RefusedError
from mpassthru.vhost_user import (
    SUPPORTED_PROTOCOL_FEATURES,
    Frontend,
    ProtocolFeature,
    Request,
    Session,
    VirtioFeature,
    VringAddress,
)
from mpassthru.vhost_user.connection import Connection
from mpassthru.vhost_user.handlers import HANDLERS, NOT_OFFERED, NOT_OFFERED_WITH_REPLY
from mpassthru.vhost_user.message import U64, Empty, Payload, VringFile, VringState, encode_message, request_name

PROTOCOL_FEATURES = int(VirtioFeature.VHOST_USER_F_PROTOCOL_FEATURES)
NO_ACK = int(SUPPORTED_PROTOCOL_FEATURES & ~ProtocolFeature.VHOST_USER_PROTOCOL_F_REPLY_ACK)


@pytest.fixture
def fd() -> Iterator[int]:
    fd = memory_fd()
    yield fd
    os.close(fd)


@pytest.fixture
def event() -> Iterator[int]:
    fd = os.eventfd(0)
    yield fd
    os.close(fd)


@asynccontextmanager
async def negotiated(
    device: FakeDevice | None = None, *, features: int = FEATURES, protocol_features: int = -1
) -> AsyncIterator[tuple[Frontend, FakeDevice, Session, asyncio.Task[None]]]:
    device = device or FakeDevice(next_base=5)
    async with connected(device) as (frontend, session, task):
        await frontend.negotiate(features, protocol_features)
        yield frontend, device, session, task


async def start(frontend: Frontend, index: int, event: int, *, enable: bool = True, shift: int = 0) -> None:
    await frontend.set_vring_num(index, 256)
    await frontend.set_vring_base(index, 10)
    await frontend.set_vring_addr(ring_address(index, shift=shift))
    await frontend.set_vring_call(index, event)
    await frontend.set_vring_kick(index, event)
    if enable:
        await frontend.set_vring_enable(index, True)


async def ends_with(task: asyncio.Task[None], reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        await asyncio.wait_for(asyncio.shield(task), 5)


async def hangs_up(frontend: Frontend, task: asyncio.Task[None], reason: str, error: type[Exception]) -> None:
    """The session has ended with `error`, and the front-end sees the end of the connection."""
    with pytest.raises(error, match=reason):
        await asyncio.wait_for(asyncio.shield(task), 5)
    with pytest.raises(ProtocolError, match="closed the connection"):
        await frontend.get_features()


# ---- negotiation -------------------------------------------------------------------------------------------


async def test_negotiation_reaches_the_device() -> None:
    async with negotiated() as (frontend, device, session, _):
        assert device.acked == FEATURES == frontend.features == session.features
        assert session.protocol_features == SUPPORTED_PROTOCOL_FEATURES
        assert await frontend.get_queue_num() == 2
        assert await frontend.get_max_mem_slots() == 32
        assert session.counters.messages == 7


async def test_feature_that_was_not_offered_ends_the_connection() -> None:
    async with connected(FakeDevice()) as (frontend, _, task):
        await frontend.set_features(1 << 34)
        await ends_with(task, "SET_FEATURES: not offered: VIRTIO_F_RING_PACKED")


async def test_logging_is_refused_by_a_device_without_it() -> None:
    async with connected(FakeDevice(features=FEATURES)) as (frontend, _, task):
        await frontend.set_features(FEATURES | VirtioFeature.VHOST_F_LOG_ALL)
        await ends_with(task, "SET_FEATURES: not offered: VHOST_F_LOG_ALL")


async def test_protocol_feature_that_was_not_offered_ends_the_connection() -> None:
    async with connected(FakeDevice()) as (frontend, _, task):
        await frontend.set_protocol_features(1 << 7)
        await ends_with(task, "SET_PROTOCOL_FEATURES: not offered: VHOST_USER_PROTOCOL_F_CRYPTO_SESSION")


async def test_protocol_features_are_refused_by_a_device_without_them() -> None:
    async with connected(FakeDevice(features=1 << 32)) as (frontend, _, task):
        with pytest.raises(ProtocolError):
            await frontend.get_protocol_features()
        await ends_with(task, "GET_PROTOCOL_FEATURES: VHOST_USER_F_PROTOCOL_FEATURES was not offered")


async def test_repeated_owner_and_features_are_accepted() -> None:
    async with negotiated() as (frontend, device, _, _):
        await frontend.set_owner()
        await frontend.set_features(FEATURES)
        assert device.calls == ["set_features", "set_features"]


async def test_messages_without_end_leave_other_tasks_their_turn() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours:
        ours.sendall(encode_message(Request.VHOST_USER_SET_OWNER, Empty()) * 50)
        ours.shutdown(socket.SHUT_WR)
        session = asyncio.create_task(Session(Connection(theirs), FakeDevice()).run())
        turns = 0
        while not session.done():
            await asyncio.sleep(0)
            turns += 1

    assert turns >= 50


async def test_same_features_leave_running_vrings_alone(fd: int, event: int) -> None:
    async with negotiated() as (frontend, device, _, _):
        await frontend.set_mem_table([region(fd)])
        await start(frontend, 0, event)
        device.calls.clear()
        await frontend.set_features(FEATURES)
        assert device.calls == []


async def test_other_features_restart_running_vrings_where_they_are(fd: int, event: int) -> None:
    async with negotiated() as (frontend, device, _, _):
        await frontend.set_mem_table([region(fd)])
        await start(frontend, 0, event)
        device.calls.clear()
        await frontend.set_features(PROTOCOL_FEATURES)
        assert device.calls == ["stop_vring 0", "set_features", "start_vring 0"]
        assert (device.running[0].features, device.running[0].base) == (PROTOCOL_FEATURES, 15)


# ---- start, stop, enable -----------------------------------------------------------------------------------


async def test_vring_starts_as_it_was_configured(fd: int, event: int) -> None:
    async with negotiated() as (frontend, device, _, _):
        await frontend.set_mem_table([region(fd)])
        await frontend.set_vring_err(1, event)
        await start(frontend, 1, event, enable=False)
        vring = device.running[1]
        assert (vring.size, vring.base, vring.features, vring.enabled) == (256, 10, FEATURES, False)
        assert vring.desc_user_address == USER_BASE + 0x4000
        assert vring.avail_user_address == USER_BASE + 0x5000
        assert vring.used_user_address == USER_BASE + 0x6000
        assert min(vring.kick_fd, vring.call_fd, vring.err_fd) >= 0


@pytest.mark.parametrize("last", ["memory", "size", "base", "address", "kick"])
async def test_vring_starts_with_whatever_comes_last(fd: int, event: int, last: str) -> None:
    async with negotiated() as (frontend, device, _, _):
        steps: dict[str, Callable[[], Awaitable[None]]] = {
            "memory": lambda: frontend.set_mem_table([region(fd)]),
            "size": lambda: frontend.set_vring_num(0, 256),
            "base": lambda: frontend.set_vring_base(0, 0),
            "address": lambda: frontend.set_vring_addr(ring_address(0)),
            "kick": lambda: frontend.set_vring_kick(0, event),
        }
        final = steps.pop(last)
        for step in steps.values():
            await step()
            assert not device.running
        await final()
        assert device.running.keys() == {0}


async def test_enable_before_features_and_start_is_remembered(fd: int, event: int) -> None:
    async with connected(device := FakeDevice()) as (frontend, _, _):
        await frontend.set_vring_enable(0, True)
        await frontend.negotiate(FEATURES, -1)
        await frontend.set_mem_table([region(fd)])
        await start(frontend, 0, event, enable=False)
        assert device.running[0].enabled


async def test_vring_starts_enabled_without_protocol_features(fd: int, event: int) -> None:
    async with connected(device := FakeDevice()) as (frontend, _, _):
        await frontend.set_features(1 << 32)
        await frontend.set_mem_table([region(fd)])
        await start(frontend, 0, event, enable=False)
        await frontend.get_features()
        assert device.running[0].enabled


async def test_enable_is_switched_at_run_time_and_repetition_is_silent(fd: int, event: int) -> None:
    async with negotiated() as (frontend, device, _, _):
        await frontend.set_mem_table([region(fd)])
        await start(frontend, 0, event)
        device.calls.clear()
        for enabled in (True, False, False, True):
            await frontend.set_vring_enable(0, enabled)
        assert device.calls == ["set_vring_enabled 0 False", "set_vring_enabled 0 True"]


async def test_get_vring_base_stops_and_answers_the_devices_base(fd: int, event: int) -> None:
    async with negotiated() as (frontend, device, _, _):
        await frontend.set_mem_table([region(fd)])
        await start(frontend, 0, event)
        assert await frontend.get_vring_base(0) == 15
        assert not device.running
        assert await frontend.get_vring_base(0) == 15


async def test_get_vring_base_of_a_vring_that_never_ran() -> None:
    async with negotiated() as (frontend, device, _, _):
        assert await frontend.get_vring_base(3) == 0
        await frontend.set_vring_base(3, 77)
        assert await frontend.get_vring_base(3) == 77
        assert "stop_vring 3" not in device.calls


async def test_stopped_vring_starts_again_only_by_a_kick(fd: int, event: int) -> None:
    async with negotiated() as (frontend, device, _, _):
        await frontend.set_mem_table([region(fd)])
        await start(frontend, 0, event)
        base = await frontend.get_vring_base(0)
        await frontend.set_vring_base(0, base)
        await frontend.set_vring_addr(ring_address(0))
        assert not device.running
        await frontend.set_vring_kick(0, event)
        assert device.running[0].base == 15
        assert device.running[0].call_fd >= 0


async def test_new_kick_restarts_a_running_vring_where_it_is(fd: int, event: int) -> None:
    async with negotiated() as (frontend, device, _, _):
        await frontend.set_mem_table([region(fd)])
        await start(frontend, 0, event)
        device.calls.clear()
        await frontend.set_vring_kick(0, event)
        assert device.calls == ["stop_vring 0", "start_vring 0"]
        assert device.running[0].base == 15


async def test_address_again_is_no_change_and_another_moves_the_vring(fd: int, event: int) -> None:
    async with negotiated() as (frontend, device, _, _):
        await frontend.set_mem_table([region(fd)])
        await start(frontend, 0, event)
        device.calls.clear()
        await frontend.set_vring_addr(ring_address(0))
        assert device.calls == []
        await frontend.set_vring_addr(ring_address(0, shift=16))
        assert device.calls == ["stop_vring 0", "start_vring 0"]
        assert device.running[0].desc_user_address == USER_BASE + 16
        assert device.running[0].base == 15


async def test_call_and_err_are_replaced_at_run_time_and_taken_away(fd: int, event: int) -> None:
    async with negotiated() as (frontend, device, _, _):
        await frontend.set_mem_table([region(fd)])
        await start(frontend, 0, event)
        held = open_fds()
        await frontend.set_vring_call(0, event)
        assert open_fds() == held
        await frontend.set_vring_err(0, event)
        assert device.running[0].err_fd >= 0
        await frontend.set_vring_call(0, None)
        await frontend.set_vring_err(0, None)
        assert (device.running[0].call_fd, device.running[0].err_fd) == (-1, -1)
        assert open_fds() == held - 1


async def test_call_the_device_refuses_leaves_the_old_one(fd: int, event: int) -> None:
    async with negotiated() as (frontend, device, session, _):
        await frontend.set_mem_table([region(fd)])
        await start(frontend, 0, event)
        held, call_fd = open_fds(), session.rings[0].call_fd
        device.failures["set_vring_call"] = HostError(9, "no")
        with pytest.raises(RefusedError, match="SET_VRING_CALL"):
            await frontend.set_vring_call(0, event)
        assert session.rings[0].call_fd == call_fd
        assert open_fds() == held


async def test_kick_without_a_descriptor_is_refused() -> None:
    async with negotiated() as (frontend, _, session, task):
        with pytest.raises(RefusedError, match="SET_VRING_KICK"):
            await frontend.set_vring_kick(0, None)
        assert session.counters.refusals == 1
        assert not task.done()
    async with negotiated(protocol_features=NO_ACK) as (frontend, _, _, task):
        await frontend.set_vring_kick(0, None)
        await hangs_up(frontend, task, "SET_VRING_KICK: vring 0 would have to be polled", ProtocolError)


@pytest.mark.parametrize("size", [0, 32769])
async def test_impossible_size_ends_the_connection(size: int) -> None:
    async with negotiated(protocol_features=NO_ACK) as (frontend, _, _, task):
        await frontend.set_vring_num(0, size)
        await ends_with(task, f"SET_VRING_NUM: vring 0 of {size} entries")


async def test_split_virtqueue_has_a_power_of_two_and_a_packed_one_need_not(fd: int, event: int) -> None:
    packed = int(VirtioFeature.VIRTIO_F_RING_PACKED)
    for features, starts in ((FEATURES, False), (FEATURES | packed, True)):
        device = FakeDevice(features=FEATURES | packed)
        async with negotiated(device, features=features, protocol_features=NO_ACK) as (frontend, _, _, task):
            await frontend.set_mem_table([region(fd)])
            await frontend.set_vring_num(0, 100)
            await frontend.set_vring_base(0, 0x8000_0000 if starts else 0)
            await frontend.set_vring_addr(ring_address(0))
            await frontend.set_vring_kick(0, event)
            if starts:
                await frontend.get_features()
                assert device.running[0].size == 100
            else:
                await ends_with(task, "SET_VRING_KICK: vring 0 of 100 entries; a split virtqueue has a power of two")


async def test_base_beyond_sixteen_bits_ends_the_connection(fd: int, event: int) -> None:
    async with negotiated(protocol_features=NO_ACK) as (frontend, _, _, task):
        await frontend.set_mem_table([region(fd)])
        await frontend.set_vring_num(0, 256)
        await frontend.set_vring_base(0, 0x10000)
        await frontend.set_vring_addr(ring_address(0))
        await frontend.set_vring_kick(0, event)
        await ends_with(task, "vring 0 starts at 65536")


@pytest.mark.parametrize(
    ("request_", "payload"),
    [
        (Request.VHOST_USER_SET_VRING_NUM, VringState(0, 128)),
        (Request.VHOST_USER_SET_VRING_BASE, VringState(0, 10)),
    ],
)
async def test_size_and_base_of_a_running_vring_are_fixed(
    fd: int, event: int, request_: Request, payload: Payload
) -> None:
    async with negotiated() as (frontend, _, _, task):
        await frontend.set_mem_table([region(fd)])
        await start(frontend, 0, event)
        with pytest.raises(ProtocolError):
            await frontend._tell(request_, payload)
        await ends_with(task, f"{request_name(request_)}: vring 0 is running")


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        (VringAddress(0, 0, 8, 0, 0), "descriptor table at 0x8 is not aligned to 16"),
        (VringAddress(0, 0, 0, 2, 0), "used ring at 0x2 is not aligned to 4"),
        (VringAddress(0, 0, 0, 0, 1), "avail ring at 0x1 is not aligned to 2"),
        (VringAddress(4, 0, 0, 0, 0), "vring 4 of a device with 4"),
    ],
)
async def test_bad_address_ends_the_connection(address: VringAddress, reason: str) -> None:
    async with negotiated(protocol_features=NO_ACK) as (frontend, _, _, task):
        await frontend.set_vring_addr(address)
        await ends_with(task, f"SET_VRING_ADDR: {reason}")


@pytest.mark.parametrize(("offered", "flags"), [(False, 1), (True, 2)])
async def test_flags_that_were_not_offered_are_refused(offered: bool, flags: int) -> None:
    features = FEATURES | (VirtioFeature.VHOST_F_LOG_ALL if offered else 0)
    async with negotiated(FakeDevice(features=features)) as (frontend, _, _, _):
        with pytest.raises(RefusedError):
            await frontend.set_vring_addr(ring_address(0, flags=flags))


@pytest.mark.parametrize(
    ("address", "part"),
    [
        (ring_address(0, shift=MEMORY_BYTES), "descriptor table"),
        (VringAddress(0, 0, USER_BASE + MEMORY_BYTES - 16 * 255, USER_BASE, USER_BASE), "descriptor table"),
        (VringAddress(0, 0, USER_BASE, USER_BASE + MEMORY_BYTES - 8 * 256 - 4, USER_BASE), "used ring"),
        (VringAddress(0, 0, USER_BASE, USER_BASE, USER_BASE + MEMORY_BYTES - 2 * 256 - 4), "avail ring"),
        (VringAddress(0, 0, 2**64 - 16, USER_BASE, USER_BASE), "descriptor table"),
    ],
)
async def test_ring_outside_memory_ends_the_connection(fd: int, event: int, address: VringAddress, part: str) -> None:
    address = VringAddress(
        0,
        0,
        address.desc_user_address & ~15,
        address.used_user_address,
        address.avail_user_address,
    )
    async with negotiated(protocol_features=NO_ACK) as (frontend, device, _, task):
        await frontend.set_mem_table([region(fd)])
        await frontend.set_vring_num(0, 256)
        await frontend.set_vring_base(0, 0)
        await frontend.set_vring_addr(address)
        await frontend.set_vring_kick(0, event)
        await ends_with(task, f"SET_VRING_KICK: vring 0: {part} at .* is outside the memory that was sent")
        assert "start_vring 0" not in device.calls


async def test_ring_that_fills_memory_to_its_last_byte_starts(fd: int, event: int) -> None:
    async with negotiated() as (frontend, device, _, _):
        await frontend.set_mem_table([region(fd)])
        await frontend.set_vring_num(0, 1)
        await frontend.set_vring_base(0, 0)
        end = USER_BASE + MEMORY_BYTES
        await frontend.set_vring_addr(VringAddress(0, 0, end - 16, end - 16, end - 8))
        await frontend.set_vring_kick(0, event)
        assert 0 in device.running


@pytest.mark.parametrize("number", [2, 0xFFFF_FFFF])
async def test_enable_is_one_bit(number: int) -> None:
    async with negotiated() as (frontend, _, _, task):
        with pytest.raises(ProtocolError):
            await frontend._tell(Request.VHOST_USER_SET_VRING_ENABLE, VringState(0, number))
        await ends_with(task, "SET_VRING_ENABLE: vring 0: .* is neither 0 nor 1")


async def test_start_that_fails_is_answered_and_may_be_tried_again(fd: int, event: int) -> None:
    async with negotiated() as (frontend, device, _, _):
        await frontend.set_mem_table([region(fd)])
        device.failures["start_vring"] = HostError(12, "no memory for it")
        with pytest.raises(RefusedError, match="SET_VRING_KICK"):
            await start(frontend, 0, event)
        await frontend.set_vring_addr(ring_address(0, shift=16))
        assert not device.running
        await frontend.set_vring_kick(0, event)
        assert 0 in device.running


async def test_move_that_fails_is_tried_again_with_the_address(fd: int, event: int) -> None:
    async with negotiated() as (frontend, device, _, _):
        await frontend.set_mem_table([region(fd)])
        await start(frontend, 0, event)
        device.failures["start_vring"] = HostError(12, "no memory for it")
        with pytest.raises(RefusedError, match="SET_VRING_ADDR"):
            await frontend.set_vring_addr(ring_address(0, shift=16))
        assert not device.running
        await frontend.set_vring_addr(ring_address(0, shift=16))
        assert device.running[0].base == 15


async def test_start_that_fails_unasked_ends_the_connection(fd: int, event: int) -> None:
    device = FakeDevice(failures={"start_vring": HostError(12, "no memory for it")})
    async with negotiated(device, protocol_features=NO_ACK) as (frontend, _, _, task):
        await frontend.set_mem_table([region(fd)])
        await start(frontend, 0, event, enable=False)
        await hangs_up(frontend, task, "SET_VRING_KICK: no memory for it", HostError)
        error = task.exception()
        assert isinstance(error, HostError)
        assert error.errno == 12


async def test_stop_that_fails_ends_the_connection_for_a_base_is_no_acknowledgement(fd: int, event: int) -> None:
    async with negotiated() as (frontend, device, _, task):
        await frontend.set_mem_table([region(fd)])
        await start(frontend, 0, event)
        device.failures["stop_vring"] = HostError(5, "stuck")
        with pytest.raises(ProtocolError, match="closed the connection"):
            await frontend.get_vring_base(0)
        await hangs_up(frontend, task, "GET_VRING_BASE: stuck", HostError)


# ---- memory ------------------------------------------------------------------------------------------------


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


# ---- device ------------------------------------------------------------------------------------------------


async def test_status_is_kept_and_zero_stops_every_vring(fd: int, event: int) -> None:
    async with negotiated() as (frontend, device, _, _):
        await frontend.set_mem_table([region(fd)])
        await start(frontend, 0, event)
        await frontend.set_status(15)
        assert await frontend.get_status() == 15
        await frontend.set_status(0)
        assert not device.running
        assert await frontend.get_vring_base(0) == 15


async def test_status_has_eight_bits() -> None:
    async with negotiated(protocol_features=NO_ACK) as (frontend, _, _, task):
        await frontend.set_status(0x100)
        await ends_with(task, "SET_STATUS: a device status of 0x100")


async def test_reset_device_forgets_vrings_and_keeps_memory(fd: int, event: int) -> None:
    async with negotiated() as (frontend, device, session, _):
        await frontend.set_mem_table([region(fd)])
        await start(frontend, 0, event)
        await frontend.set_status(15)
        await frontend.reset_device()
        assert device.calls[-2:] == ["stop_vring 0", "reset"]
        assert len(session.memory) == 1
        assert await frontend.get_status() == 0
        assert await frontend.get_vring_base(0) == 0
        await frontend.set_features(FEATURES)
        await frontend.set_vring_kick(0, event)
        assert not device.running
        await frontend.reset_device()
        await start(frontend, 0, event)
        assert not device.running
        await frontend.get_vring_base(0)
        await frontend.set_features(FEATURES)
        await start(frontend, 0, event)
        assert device.running[0].base == 10


async def test_reset_owner_disables_where_the_front_end_can_enable_again(fd: int, event: int) -> None:
    async with negotiated() as (frontend, device, _, _):
        await frontend.set_mem_table([region(fd)])
        await start(frontend, 0, event)
        await frontend.reset_owner()
        assert not device.running[0].enabled
    async with connected(device := FakeDevice()) as (frontend, _, _):
        await frontend.set_features(0)
        await frontend.set_mem_table([region(fd)])
        await start(frontend, 0, event, enable=False)
        await frontend.reset_owner()
        await frontend.get_features()
        assert device.running[0].enabled


async def test_mtu_and_rarp_reach_the_device() -> None:
    async with negotiated() as (frontend, device, _, _):
        await frontend.set_mtu(1500)
        await frontend.send_rarp(b"\x52\x54\x00\x12\x34\x56")
        assert device.mtu_bytes == 1500
        assert device.rarp == b"\x52\x54\x00\x12\x34\x56"


@pytest.mark.parametrize("mtu_bytes", [0, 67, 65536, 2**64 - 1])
async def test_impossible_mtu_is_refused(mtu_bytes: int) -> None:
    async with negotiated() as (frontend, _, _, _):
        with pytest.raises(RefusedError, match="NET_SET_MTU"):
            await frontend.set_mtu(mtu_bytes)


async def test_backend_request_socket_is_kept_and_replaced() -> None:
    async with negotiated() as (frontend, _, _, _):
        ours, theirs = socket.socketpair()
        await frontend.set_backend_req_fd(theirs.fileno())
        held = open_fds()
        await frontend.set_backend_req_fd(theirs.fileno())
        assert open_fds() == held
        theirs.close()
        ours.setblocking(False)
        with pytest.raises(BlockingIOError):
            ours.recv(1)
        ours.close()


# ---- what is not offered, and what is malformed --------------------------------------------------------------


def encodable(data: bytes) -> Payload:
    """Any bytes as a payload."""

    class Raw(Empty):
        def encode(self) -> bytes:
            return data

    return Raw()


@pytest.mark.parametrize("request_", [*NOT_OFFERED, 0, 44, 0xFFFF_FFFF], ids=request_name)
async def test_message_that_is_not_offered_is_refused_with_its_reason(request_: int, event: int) -> None:
    async with negotiated() as (frontend, _, session, task):
        connection = frontend._connection
        await connection.send(request_, U64(0), need_reply=True, fds=[event])
        if request_ in NOT_OFFERED_WITH_REPLY:
            await hangs_up(frontend, task, f"{request_name(request_)}: .* was not offered", ProtocolError)
        else:
            message = await connection.receive()
            assert message is not None
            assert (message.request, message.payload) == (request_, U64(1).encode())
            assert session.counters.refusals == 1
    async with negotiated(protocol_features=NO_ACK) as (frontend, _, _, task):
        await frontend._connection.send(request_, U64(0), need_reply=True)
        await hangs_up(frontend, task, f"{request_name(request_)}: .*(was not offered|is known)", ProtocolError)


@pytest.mark.parametrize("request_", [request for request, rule in HANDLERS.items() if rule.needs], ids=request_name)
async def test_message_of_a_feature_the_device_lacks_is_refused(request_: int) -> None:
    rule = HANDLERS[request_]
    device = FakeDevice(protocol_features=int(SUPPORTED_PROTOCOL_FEATURES & ~rule.needs))
    async with negotiated(device) as (frontend, _, _, task):
        await frontend._connection.send(request_, U64(0), need_reply=False)
        await hangs_up(frontend, task, f"{request_name(request_)}: {rule.needs.name} was not offered", ProtocolError)


def test_every_message_is_handled_or_known_to_be_not_offered() -> None:
    assert {*HANDLERS, *NOT_OFFERED} == set(Request)
    assert not {*HANDLERS} & {*NOT_OFFERED}


@pytest.mark.parametrize("request_", HANDLERS, ids=request_name)
async def test_wrong_payload_size_ends_the_connection(request_: int, event: int) -> None:
    rule = HANDLERS[request_]
    async with negotiated() as (frontend, _, _, task):
        fds = [event] * rule.fds[0]
        await frontend._connection.send(request_, encodable(bytes(300)), fds=fds)
        await hangs_up(frontend, task, f"{request_name(request_)}: .*bytes", ProtocolError)


@pytest.mark.parametrize("request_", HANDLERS, ids=request_name)
async def test_wrong_number_of_descriptors_ends_the_connection(request_: int, event: int) -> None:
    rule = HANDLERS[request_]
    payloads = {"VringFile": VringFile(0, has_fd=True), "RegionTable": encodable(bytes(8))}
    payload = payloads.get(rule.payload.__name__, encodable(bytes(getattr(rule.payload, "LAYOUT", EMPTY).size)))
    counts = [0] if rule.fds[0] == 1 or rule.payload is VringFile else []
    if rule.fds[-1] < 8:
        counts.append(rule.fds[-1] + 1)
    for count in [*counts, 8]:
        async with negotiated() as (frontend, _, _, task):
            await frontend._connection.send(request_, payload, fds=[event] * count)
            await hangs_up(frontend, task, f"{request_name(request_)}: .*{count} descriptors", ProtocolError)


EMPTY = struct.Struct("")


async def test_descriptor_against_the_payloads_word_ends_the_connection(event: int) -> None:
    async with negotiated() as (frontend, _, _, task):
        await frontend._connection.send(Request.VHOST_USER_SET_VRING_CALL, VringFile(0, has_fd=False), fds=[event])
        await hangs_up(frontend, task, "SET_VRING_CALL: vring 0: 1 descriptors came along", ProtocolError)


async def test_reply_from_the_front_end_ends_the_connection() -> None:
    async with negotiated() as (frontend, _, session, task):
        await frontend._connection.send(Request.VHOST_USER_GET_FEATURES, Empty(), reply=True)
        await hangs_up(frontend, task, "GET_FEATURES: a reply, to nothing that was asked", ProtocolError)
        assert session.counters.protocol_errors == 1


async def test_acknowledgement_is_not_given_before_it_was_negotiated() -> None:
    async with connected(FakeDevice()) as (frontend, _, _):
        connection = frontend._connection
        await connection.send(Request.VHOST_USER_SET_OWNER, Empty(), need_reply=True)
        await connection.send(Request.VHOST_USER_GET_FEATURES, Empty(), need_reply=True)
        message = await connection.receive()
        assert message is not None
        assert message.request == Request.VHOST_USER_GET_FEATURES


async def test_front_end_that_hangs_up_before_its_reply_is_an_ordinary_end() -> None:
    before = open_fds()
    ours, theirs = socket.socketpair()
    ours.send(encode_message(Request.VHOST_USER_GET_FEATURES, Empty()) * 3)
    ours.close()
    await Session(Connection(theirs), FakeDevice()).run()
    assert open_fds() == before


async def test_stop_that_fails_at_the_end_does_not_keep_the_rest_from_being_done(
    fd: int, event: int, caplog: pytest.LogCaptureFixture
) -> None:
    device = FakeDevice()
    async with negotiated(device) as (frontend, _, _, task):
        await frontend.set_mem_table([region(fd)])
        await start(frontend, 0, event)
        await start(frontend, 1, event)
        device.failures["stop_vring"] = HostError(5, "stuck")
        device.calls.clear()
        frontend.close()
        with pytest.raises(AssertionError):  # the fake's: memory must not go while vring 0 runs
            await asyncio.wait_for(asyncio.shield(task), 5)
        assert device.calls == ["stop_vring 0", "stop_vring 1"]
        assert "vring 0 at the end of the connection: stuck" in caplog.text
        device.running.clear()
        device.regions.clear()


async def test_memory_that_is_overlapping_ends_the_connection(fd: int) -> None:
    async with negotiated(protocol_features=NO_ACK) as (frontend, device, _, task):
        await frontend.set_mem_table([region(fd), region(fd)])
        await ends_with(task, "SET_MEM_TABLE: region .* overlap")
        assert not device.regions
