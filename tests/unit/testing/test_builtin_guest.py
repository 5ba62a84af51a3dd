"""The built-in guest's conversation and its Python face, against a device in Python. Needs no privilege."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from loopback_device import LoopbackDevice

from mpassthru.errors import HostError, RefusedError
from mpassthru.testing import BufferLayout, BuiltinGuest, GuestConfig, GuestCounters, Pattern, Region, Source
from mpassthru.testing.guest_config import DEFAULT_FEATURES
from mpassthru.vhost_user import Backend, DeviceStatus, Frontend, VirtioFeature

SMALL = Region(size_bytes=2 << 20)
CONFIG = GuestConfig(regions=(SMALL,), queue_size=32, canaries=True)


@asynccontextmanager
async def serving(device: LoopbackDevice, path: Path) -> AsyncIterator[None]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        serve = asyncio.create_task(Backend(device).serve(listener))
        try:
            yield
        finally:
            serve.cancel()
            await asyncio.gather(serve, return_exceptions=True)


@asynccontextmanager
async def connected(
    tmp_path: Path, config: GuestConfig = CONFIG, device: LoopbackDevice | None = None
) -> AsyncIterator[tuple[BuiltinGuest, LoopbackDevice]]:
    device = LoopbackDevice() if device is None else device
    async with serving(device, tmp_path / "s"), BuiltinGuest.connect(tmp_path / "s", config) as guest:
        yield guest, device


async def exchange(guest: BuiltinGuest, count: int = 50) -> GuestCounters:
    """Send `count` more checked frames and wait until they are back."""
    before = guest.counters()
    guest.start(rx="check", source=Source(pattern=Pattern(sizes=(60, 61, 1514)), count=count))
    return await guest.wait_for(
        lambda c: c.check_good >= before.check_good + count and c.tx_frames >= before.tx_frames + count
    )


async def test_frames_go_out_and_come_back_unharmed(tmp_path: Path) -> None:
    async with connected(tmp_path) as (guest, device):
        counters = await exchange(guest)
        bases = await guest.stop()
        assert counters.rx_bytes == counters.tx_bytes == 17 * 60 + 17 * 61 + 16 * 1514
        assert counters.check_corrupt == counters.check_missing == counters.check_duplicate == 0
        assert bases == [50, 50]
        assert guest.violations() == {}
        assert guest.check_canaries() == 0
        assert device.statuses[-1] & DeviceStatus.DRIVER_OK
        assert device.acknowledged & DEFAULT_FEATURES == DEFAULT_FEATURES


@pytest.mark.parametrize(
    "layout",
    [
        BufferLayout(pieces=(12, 1514)),
        BufferLayout(pieces=(5, 40, 3, 1600), stride_bytes=1777, offset_bytes=1),
        BufferLayout(pieces=(12, 1514), indirect=True),
    ],
    ids=["header-apart", "odd", "indirect"],
)
@pytest.mark.parametrize("polling", [False, True])
async def test_every_layout_works_in_both_directions(tmp_path: Path, layout: BufferLayout, polling: bool) -> None:
    config = dataclasses.replace(CONFIG, rx=layout, tx=layout, polling=polling)
    async with connected(tmp_path, config) as (guest, _):
        await exchange(guest)
        assert (guest.violations(), guest.check_canaries()) == ({}, 0)


async def test_several_regions_and_file_offsets_are_described_to_the_back_end(tmp_path: Path) -> None:
    regions = (
        Region(guest_phys_address=0, size_bytes=1 << 20),
        Region(guest_phys_address=1 << 32, size_bytes=2 << 20, mmap_offset_bytes=8192),
    )
    config = dataclasses.replace(CONFIG, regions=regions, rx=BufferLayout(region=1))
    async with connected(tmp_path, config) as (guest, _):
        await exchange(guest)
        assert guest.ring(0).descriptor(0)[0] >= 1 << 32
        assert guest.ring(1).descriptor(0)[0] < 1 << 20


async def test_stop_and_start_again_goes_on_where_it_was(tmp_path: Path) -> None:
    async with connected(tmp_path) as (guest, _):
        await exchange(guest)
        assert await guest.stop() == [50, 50]
        await guest.start_device()
        await exchange(guest)
        assert await guest.stop() == [100, 100]
        assert guest.violations() == {}
        assert guest.counters().check_good == 100


async def test_reset_starts_over_at_index_zero(tmp_path: Path) -> None:
    async with connected(tmp_path) as (guest, device):
        await exchange(guest)
        await guest.reset()
        assert device.resets == 1
        guest.start(rx="sink", source=Source(frames=(bytes(60),), count=7))
        await guest.wait_for(lambda c: c.rx_frames >= 57)
        assert await guest.stop() == [7, 7]
        assert guest.violations() == {}


async def test_head_that_never_returns_is_a_violation(tmp_path: Path) -> None:
    async with connected(tmp_path) as (guest, device):
        device.lose_heads = True
        guest.start(source=Source(frames=(bytes(60),), count=3))
        await guest.wait_for(lambda c: c.tx_posted == 3)
        # The kicks are handled before the next message is.
        await guest.stop()
        assert guest.violations() == {"never_returned": 3}


async def test_reconnect_goes_on_from_the_used_index(tmp_path: Path) -> None:
    async with connected(tmp_path) as (guest, _):
        await exchange(guest)
        guest.pause()
        async with serving(LoopbackDevice(), tmp_path / "second"):
            await guest.reconnect(await Frontend.connect(tmp_path / "second"))
            assert guest.bases == [50, 50]
            await exchange(guest)
            await guest.stop()
            assert guest.violations() == {}


async def test_reconnect_refuses_other_features(tmp_path: Path) -> None:
    async with connected(tmp_path) as (guest, _):
        poorer = LoopbackDevice(features=DEFAULT_FEATURES & ~VirtioFeature.VIRTIO_F_EVENT_IDX)
        async with serving(poorer, tmp_path / "second"):
            with pytest.raises(RefusedError, match="other features"):
                await guest.reconnect(await Frontend.connect(tmp_path / "second"))


async def test_listening_guest_serves_a_connecting_back_end(tmp_path: Path) -> None:
    path = tmp_path / "guest"

    async def back_end() -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        while not path.exists():  # noqa: ASYNC110
            await asyncio.sleep(0)
        await asyncio.get_running_loop().sock_connect(sock, str(path))
        await Backend(LoopbackDevice()).serve_connection(sock)

    task = asyncio.create_task(back_end())
    async with BuiltinGuest.listen(path, CONFIG) as guest:
        assert not path.exists()
        await exchange(guest)
    await task


async def test_queue_pairs_have_streams_of_their_own(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, queue_pairs=2)
    async with connected(tmp_path, config, LoopbackDevice(queue_pairs=2)) as (guest, _):
        guest.start(rx="check", source=Source(pattern=Pattern(), count=20))
        counters = await guest.wait_for(lambda c: c.check_good == 40)
        assert counters.check_duplicate == 0
        assert guest.counters(1).rx_frames == 20
        await guest.stop()


async def test_too_few_queue_pairs_are_refused(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, queue_pairs=2)
    with pytest.raises(RefusedError, match="has 1 queue pairs, the guest wants 2"):
        async with connected(tmp_path, config):
            pass


async def test_first_frames_are_captured(tmp_path: Path) -> None:
    async with connected(tmp_path, dataclasses.replace(CONFIG, capture_frames=2)) as (guest, _):
        frames = (b"\x01" * 60, b"\x02" * 61, b"\x03" * 62)
        guest.start(source=Source(frames=frames, count=3))
        await guest.wait_for(lambda c: c.rx_frames == 3)
        assert guest.take_captured() == list(frames[:2])
        assert guest.take_captured() == []


async def test_private_memory_shows_the_back_end_nothing(tmp_path: Path) -> None:
    region = dataclasses.replace(SMALL, backing="private-memfd")
    async with connected(tmp_path, dataclasses.replace(CONFIG, regions=(region,))) as (guest, _):
        guest.start(source=Source(frames=(bytes(60),), count=1))
        await guest.wait_for(lambda c: c.tx_posted == 1)
        assert await guest.stop() == [0, 0]
        assert guest.counters().tx_frames == 0


async def test_ring_can_be_abused_by_hand(tmp_path: Path) -> None:
    async with connected(tmp_path) as (guest, _):
        ring = guest.ring(1)
        buffer = guest.ring(0).descriptor(0)[0] + 4096 * 32
        guest.driver.write(buffer, bytes(12) + b"by hand" * 10)
        ring.set_descriptor(3, address=buffer, length=82)
        ring.set_avail_entry(0, 3)
        ring.set_avail_idx(1)
        ring.kick()
        guest.start(rx="sink")
        await guest.wait_for(lambda c: c.rx_frames == 1)
        assert (ring.used_idx, ring.used_entry(0)) == (1, (3, 0))
        assert guest.violations() == {"used_twice": 1}, "the driver knows nothing of this head"
        assert guest.driver.read(ring.avail_address + 2, 2) == b"\x01\x00"


async def test_waiting_in_vain_tells_the_counters(tmp_path: Path) -> None:
    async with connected(tmp_path) as (guest, _):
        with pytest.raises(TimeoutError, match=r"not reached in 0\.01 s: GuestCounters\(rx_frames=0"):
            await guest.wait_for(lambda c: c.rx_frames > 0, deadline_s=0.01)


async def test_senseless_sources_and_configurations_are_refused(tmp_path: Path) -> None:
    async with connected(tmp_path) as (guest, _):
        with pytest.raises(RefusedError, match="needs frames"):
            guest.start(source=Source())
        with pytest.raises(RefusedError, match="exceed tx buffers of 2048 bytes"):
            guest.start(source=Source(frames=(bytes(3000),)))
        with pytest.raises(RefusedError, match="at least 22 bytes"):
            guest.start(source=Source(pattern=Pattern(sizes=(21,))))
        with pytest.raises(ValueError, match="idle, sink, echo or check"):
            guest.start(rx="dance")  # type: ignore[arg-type]
    with pytest.raises(RefusedError, match="outside guest memory"):
        async with connected(tmp_path / "..", dataclasses.replace(CONFIG, rx=BufferLayout(pieces=(1 << 20,)))):
            pass


async def test_nobody_listening_is_a_host_error(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="is a back-end listening there"):
        async with BuiltinGuest.connect(tmp_path / "nothing"):
            pass


def test_counters_of_rust_and_python_have_the_same_names(tmp_path: Path) -> None:
    from mpassthru._core import GuestDriver  # noqa: PLC0415 (the one place that names it)

    driver = GuestDriver(CONFIG, DEFAULT_FEATURES)
    assert set(driver.counters()) == {field.name for field in dataclasses.fields(GuestCounters)}
