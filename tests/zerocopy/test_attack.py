"""What the wire may bring: frames far too long, too short, and with tags. Nothing outside posted buffers changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from zero_copy_port import GUEST_KINDS, SOME_SIZES, ZeroCopyPort, huge_guest

from mpassthru.testing.guest_config import BufferLayout, GuestConfig, Pattern

pytestmark = pytest.mark.asyncio(loop_scope="session")

ADDRESSES = b"\xff" * 6 + b"\x02\0\0\0\0\x01"
TAG = bytes.fromhex("8100 0042")
LONG_SIZES = (
    *range(1515, 1600),
    *range(1600, 2100, 7),
    2047,
    2048,
    2049,
    3000,
    4095,
    4096,
    4097,
    6000,
    8999,
    9000,
    9014,
)
RUNT_SIZES = tuple(range(14, 60))
ROUNDS = 3
WRITE_MAX_BYTES = {"virtio": 1536, "igb": 1552}
"""By driver, what `netdev.zero_copy` says at MTU 1500."""
HEADER_BYTES = 12


def exact_buffers(port: ZeroCopyPort) -> GuestConfig:
    """The shortest buffers that are given to the NIC, at odd addresses, each between canaries."""
    length = HEADER_BYTES + WRITE_MAX_BYTES[port.ifname]
    return huge_guest(rx=BufferLayout(pieces=(length,), stride_bytes=length + 5, offset_bytes=8191))


def attack_frames() -> list[bytes]:
    """Frames that no honest sender sends at MTU 1500, and the longest ones that it does."""
    untagged = [ADDRESSES + b"\x88\xb6" + b"A" * (size - 14) for size in (*RUNT_SIZES, *LONG_SIZES)]
    tagged = [ADDRESSES + TAG * tags + b"\x88\xb6" + b"T" * 1500 for tags in (1, 2)]
    return untagged + tagged * 20


GUESTS: dict[str, Callable[[ZeroCopyPort], GuestConfig]] = {
    "exact": exact_buffers,
    "linux-hash-report": lambda port: replace(GUEST_KINDS["linux-hash-report"]),
    "linux-default": lambda port: replace(GUEST_KINDS["linux-default"]),
}


@pytest.mark.parametrize("kind", GUESTS)
async def test_no_frame_from_the_wire_writes_outside_the_buffers(port: ZeroCopyPort, kind: str) -> None:
    async with port.stay(GUESTS[kind](port)) as stay:
        guest = stay.guest
        guest.start(rx="sink")
        for _ in range(ROUNDS):
            for frame in attack_frames():
                port.peer.send_frame(frame)
            # The wire keeps its order: once these have passed, so have those before.
            passed = guest.counters().rx_frames
            await port.peer.send(Pattern(seed=1, sizes=(1514,)), count=8)
            await guest.wait_for(lambda c, passed=passed: c.rx_frames >= passed + 8, deadline_s=10)
            assert guest.driver.changed_gap_bytes() == 0
    if kind != "linux-default":
        assert stay.rx.direct > stay.rx.frames / 2
        assert stay.rx.bounced.keys() <= port.may_bounce

    # The queue is in order still: a new guest gets every frame.
    async with port.stay(GUESTS[kind](port)) as stay:
        stay.guest.start(rx="check")
        await port.receive(stay.guest, SOME_SIZES)
        assert stay.guest.check_canaries() == 0
