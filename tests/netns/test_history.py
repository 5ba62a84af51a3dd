"""What the zero-copy vhosts of the past died of, shown not to happen here; each test names its ancestor.

The rest of that list is tested where it belongs: buffers and canaries in test_in_place, disconnects in test_attach,
head-of-line blocking by completions out of order in the pump's own tests, stops under flood in the zero-copy tests.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from mpassthru.testing.attached_port import AttachedPort, attached_port
from mpassthru.testing.guest import BuiltinGuest
from mpassthru.testing.guest_config import DEFAULT_FEATURES, GuestConfig, Pattern, Source
from mpassthru.testing.netns import Namespace, set_offloads
from mpassthru.testing.wire import PacketWire
from mpassthru.vhost_user import VirtioFeature

TIMEOUT_S = 20.0
MAC_A, MAC_B = bytes.fromhex("02000000000a"), bytes.fromhex("02000000000b")
SIZES = (60, 64, 512, 1514)


@asynccontextmanager
async def guest_on(
    namespace: Namespace, path: Path, *options: str, features: int = 0
) -> AsyncIterator[tuple[AttachedPort, BuiltinGuest]]:
    config = GuestConfig(features=DEFAULT_FEATURES | features)
    async with attached_port(namespace, path, *options) as port:
        await port.until_said("is ready")
        async with BuiltinGuest.connect(path, config, timeout_s=TIMEOUT_S) as guest:
            yield port, guest


@pytest.mark.parametrize("poll", ["busy", "adaptive", "interrupt"])
@pytest.mark.parametrize("burst", [1, 3, 256])
async def test_every_sent_buffer_comes_back_though_nothing_else_ever_happens(
    veth: Namespace, tmp_path: Path, poll: str, burst: int
) -> None:
    """vhost-net, bab632d69ee4: "buffers might never get used until some further action, e.g. device reset"."""
    async with guest_on(veth, tmp_path / "s", "--poll", poll) as (_, guest):
        for sent in range(burst, 4 * burst + 1, burst):
            guest.start(rx="idle", source=Source(pattern=Pattern(sizes=SIZES), count=burst, burst=burst))
            await guest.wait_for(lambda counters, sent=sent: counters.tx_frames == sent)  # type: ignore[misc]
        await guest.stop()
        assert guest.violations() == {}


async def test_disabled_rings_drain_and_carry_frames_again_once_enabled(veth: Namespace, tmp_path: Path) -> None:
    """DPDK, 11d5253a3e: a disabled ring has to drain."""
    async with guest_on(veth, tmp_path / "s") as (port, guest), PacketWire(veth.peer_ifindex) as wire:
        guest.start(rx="sink", source=Source(pattern=Pattern(sizes=SIZES)))
        wire.start_sending(Pattern(), count=1 << 40, rate_frames_per_s=10_000)
        await guest.wait_for(lambda counters: counters.tx_frames > 1000 and counters.rx_frames > 100)
        for _ in range(5):
            for index in guest.vrings:
                await guest.frontend.set_vring_enable(index, False)
            disabled = guest.counters()
            await guest.wait_for(lambda counters, past=disabled.tx_frames: counters.tx_frames > past + 1000)  # type: ignore[misc]
            await port.until(lambda report: report.rx.dropped.get("disabled", 0) > 0)
            assert guest.counters().rx_frames - disabled.rx_frames <= guest.config.queue_size
            for index in guest.vrings:
                await guest.frontend.set_vring_enable(index, True)
            await guest.wait_for(lambda counters, past=disabled.rx_frames: counters.rx_frames > past + 300)  # type: ignore[misc]
        wire.stop_sending()
        guest.start(rx="sink")
        await guest.stop()
        assert guest.violations() == {}
        report = await port.stop()
    assert not report.troubles


@pytest.mark.parametrize("features", [0, VirtioFeature.VIRTIO_F_RING_PACKED], ids=["split", "packed"])
async def test_no_frame_is_lost_that_rings_of_the_default_size_have_room_for(
    veth: Namespace, tmp_path: Path, features: int
) -> None:
    """OVS: "additional packet loss may be observed"."""
    count, portion = 9600, 96
    wire = PacketWire(veth.peer_ifindex)
    async with guest_on(veth, tmp_path / "s", features=features) as (port, guest), wire:
        guest.start(rx="check")
        await wire.send_in_portions(
            Pattern(sizes=SIZES), count=count, portion=portion, arrived=lambda: guest.counters().check_good
        )
        for sent in range(portion, count + 1, portion):
            guest.start(rx="check", source=Source(pattern=Pattern(seed=2, sizes=SIZES), count=portion, burst=8))
            await wire.wait_for(lambda counters, sent=sent: counters.check_good >= sent, deadline_s=TIMEOUT_S)  # type: ignore[misc]
        report = await port.stop()
        assert guest.counters().check_corrupt == guest.counters().check_duplicate == 0
        assert wire.counters().check_corrupt == wire.counters().check_duplicate == 0
    assert (report.rx.direct, report.rx.dropped) == (count, {})
    assert (report.tx.direct, report.tx.dropped) == (count, {})


async def test_two_guests_on_one_bridge_exchange_frames_in_place(veth: Namespace, tmp_path: Path) -> None:
    """Linux, 2012: zero-copy was "a performance regression" between guests of one host, for buffers were held."""
    other = second_pair_on_a_bridge(veth)
    rounds, portion = 50, 64
    async with (
        guest_on(veth, tmp_path / "a") as (port_a, guest_a),
        guest_on(other, tmp_path / "b") as (port_b, guest_b),
    ):
        patterns = (
            Pattern(seed=1, sizes=SIZES, source=MAC_A, destination=MAC_B),
            Pattern(seed=2, sizes=SIZES, source=MAC_B, destination=MAC_A),
        )
        for arrived in range(portion, rounds * portion + 1, portion):
            for guest, pattern in zip((guest_a, guest_b), patterns, strict=True):
                guest.start(rx="check", source=Source(pattern=pattern, count=portion, burst=8))
            for guest in (guest_a, guest_b):
                await guest.wait_for(lambda counters, arrived=arrived: counters.check_good >= arrived)  # type: ignore[misc]
        for guest, port in ((guest_a, port_a), (guest_b, port_b)):
            counters = guest.counters()
            assert (counters.check_corrupt, counters.check_duplicate, counters.check_missing) == (0, 0, 0)
            report = await port.stop()
            assert report.rx.copied_bytes == report.tx.copied_bytes == 0


def second_pair_on_a_bridge(namespace: Namespace) -> Namespace:
    """Add a pair like the first one to the namespace, and join the far ends of both by a bridge."""
    ends = ("mpt2", "mpt3")
    namespace.run("ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
    namespace.run("ip", "link", "add", "br0", "type", "bridge")
    for ifname in ends:
        set_offloads(ifname, enabled=False)
        namespace.run("ip", "link", "set", ifname, "up")
    for ifname in (namespace.peer, ends[1]):
        namespace.run("ip", "link", "set", ifname, "master", "br0")
    namespace.run("ip", "link", "set", "br0", "up")
    return replace(
        namespace,
        ifname=ends[0],
        ifindex=socket.if_nametoindex(ends[0]),
        peer=ends[1],
        peer_ifindex=socket.if_nametoindex(ends[1]),
    )
