"""Vrings: start, stop, enable, and what may change while they run, from both ends."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
from session_steps import NO_ACK, ends_with, hangs_up, negotiated, start
from vhost_user_fakes import (
    FEATURES,
    MEMORY_BYTES,
    USER_BASE,
    FakeDevice,
    connected,
    open_fds,
    region,
    ring_address,
)

from mpassthru.errors import HostError, ProtocolError, RefusedError
from mpassthru.vhost_user import (
    Request,
    VirtioFeature,
    VringAddress,
)
from mpassthru.vhost_user.message import Payload, VringState, request_name


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


async def test_base_of_a_packed_virtqueue_lies_inside_its_ring(fd: int, event: int) -> None:
    features = FEATURES | int(VirtioFeature.VIRTIO_F_RING_PACKED)
    async with negotiated(FakeDevice(features=features), features=features, protocol_features=NO_ACK) as (
        frontend,
        _,
        _,
        task,
    ):
        await frontend.set_mem_table([region(fd)])
        await frontend.set_vring_num(0, 100)
        await frontend.set_vring_base(0, 0x8000_8000 | 100)
        await frontend.set_vring_addr(ring_address(0))
        await frontend.set_vring_kick(0, event)
        await ends_with(task, "SET_VRING_KICK: vring 0 starts at 0x80008064, outside its 100 descriptors")


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
