"""A guest on a NIC in zero-copy mode: one frame each way, in place."""

from __future__ import annotations

from pathlib import Path

from mpassthru.testing.attached_port import attached_port
from mpassthru.testing.guest import BuiltinGuest
from mpassthru.testing.guest_config import BufferLayout, GuestConfig, Pattern, Region, Source
from mpassthru.testing.netns import Namespace
from mpassthru.testing.wire import PacketWire

GUEST = GuestConfig(
    regions=(Region(backing="huge-memfd", size_bytes=16 << 20),), rx=BufferLayout(pieces=(2048,)), canaries=True
)


async def test_one_frame_each_way_without_a_copy(wire: Namespace, tmp_path: Path) -> None:
    path = tmp_path / "port.sock"
    async with attached_port(wire, path, "--mode", "zero-copy") as port:
        await port.until_said("ready", timeout_s=60)
        async with PacketWire(wire.peer_ifindex) as peer, BuiltinGuest.connect(path, GUEST, timeout_s=30) as guest:
            guest.start(rx="check", source=Source(pattern=Pattern(seed=7, sizes=(1514,)), count=1))
            try:
                await peer.wait_for(lambda c: c.check_good >= 1, deadline_s=10)
                await peer.send(Pattern(seed=3, sizes=(1514,)), count=1)
                await guest.wait_for(lambda c: c.check_good >= 1, deadline_s=10)
            finally:
                print("\n".join(port.lines), port.report)
            await guest.stop()
            assert guest.violations() == {}
        report = await port.stop(timeout_s=30)
    assert report.mode == "zero-copy"
    assert (report.rx.direct, report.tx.direct) == (1, 1)
    assert report.rx.copied_bytes == report.tx.copied_bytes == 0
