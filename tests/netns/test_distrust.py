"""The kernel answers with a buffer that it does not have: its rx ring is changed behind the worker's back."""

from __future__ import annotations

from pathlib import Path

from mpassthru.testing.attached_port import attached_port
from mpassthru.testing.guest import BuiltinGuest
from mpassthru.testing.guest_config import GuestConfig, Pattern
from mpassthru.testing.netns import Namespace
from mpassthru.testing.wire import PacketWire
from mpassthru.testing.xsk import answering_twice

FRAMES = 5
RX_RING_DESCS = 1024
PATTERN = Pattern(seed=1, sizes=(60, 1514))


async def test_queue_pair_stops_at_the_first_wrong_answer_and_runs_again_when_the_guest_starts_it(
    veth: Namespace, tmp_path: Path
) -> None:
    path = tmp_path / "port.sock"
    async with PacketWire(veth.peer_ifindex) as wire, attached_port(veth, path, "--mode", "copy") as port:
        await port.until_said("ready")
        async with BuiltinGuest.connect(path, GuestConfig(canaries=True)) as guest:

            async def receive() -> None:
                good = guest.counters().check_good + FRAMES
                await wire.send_in_portions(PATTERN, count=FRAMES, arrived=lambda: guest.counters().rx_frames)
                counters = guest.counters()
                assert (counters.check_good, counters.check_corrupt, counters.check_duplicate) == (good, 0, 0)

            guest.start(rx="check")
            await receive()
            pid = (await port.until(lambda report: report.mode == "copy")).worker_pid
            assert pid is not None
            async with answering_twice(pid, frames=FRAMES, ring_descs=RX_RING_DESCS):
                await wire.send(PATTERN, count=FRAMES)
            said = await port.until_said("stand still until the guest starts them anew")
            assert "the kernel has received into a buffer that was not given to it" in said
            assert "suspect its driver, veth of" in said
            report = await port.until(
                lambda report: report.mode == "detached" and "unknown_answer" in report.rx.dropped
            )
            assert report.rx.dropped["unknown_answer"] == 1
            assert guest.counters().rx_frames == FRAMES + 1, "nothing after the first wrong answer"

            await guest.stop()
            assert guest.violations() == {}
            await guest.start_device()
            guest.start(rx="check")
            await receive()
            assert guest.check_canaries() == 0
