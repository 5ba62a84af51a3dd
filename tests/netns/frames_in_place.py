"""What tests of frames in a guest's own buffers share: every byte known, at both ends of the wire."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from mpassthru.testing.guest import BuiltinGuest
from mpassthru.testing.guest_config import GuestConfig, Source
from mpassthru.testing.netns import Namespace

ETH_P_ALL = 3
PACKET_OUTGOING = 4
WINDOW = 16
"""Frames on their way at once: fewer than any ring or socket buffer holds, so that none is lost."""


@contextmanager
def packet_socket(namespace: Namespace) -> Iterator[socket.socket]:
    """A socket at the wire's other end that sees every frame."""
    with namespace.entered():
        packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    with packets:
        packets.bind((namespace.peer, ETH_P_ALL))
        packets.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        packets.setblocking(False)
        yield packets


def frames_of(sizes: Iterable[int], seed: int) -> list[bytes]:
    """One frame of each size, otherwise random."""
    source = random.Random(seed)
    return [b"\xff" * 6 + b"\x02\0\0\0\0\1" + b"\x88\xb5" + source.randbytes(size - 14) for size in sizes]


def proving(config: GuestConfig, frames: int) -> GuestConfig:
    """The same guest, which guards its memory and keeps the first `frames` frames."""
    return GuestConfig(
        **{name: getattr(config, name) for name in ("regions", "queue_size", "features", "rx", "tx")},
        canaries=True,
        capture_frames=frames,
    )


async def receive_all(
    guest: BuiltinGuest, peer: socket.socket, frames: list[bytes], *, window: int = WINDOW, tails: bool = True
) -> None:
    """Send frames to the guest and compare what lies in its buffers; then stop it.

    Args:
        guest: With room for all frames.
        peer: The other end of the wire.
        frames: What to send.
        window: Frames on their way at once.
        tails: Nothing may be written behind a frame in its buffer.
    """
    guest.start(rx="sink")
    received: list[bytes] = []
    for start in range(0, len(frames), window):
        part = frames[start : start + window]
        for frame in part:
            peer.send(frame)
        sent = start + len(part)
        await guest.wait_for(lambda c, sent=sent: c.rx_frames >= sent)
        received += guest.take_captured()
    assert received == frames
    await guest.stop()
    assert guest.violations() == {}
    assert guest.check_canaries(tails=tails) == 0


async def send_all(guest: BuiltinGuest, peer: socket.socket, frames: list[bytes]) -> None:
    """Send frames from the guest and compare what comes out of the port; then stop it."""
    for start in range(0, len(frames), WINDOW):
        part = tuple(frames[start : start + WINDOW])
        guest.start(source=Source(frames=part, count=len(part)))
        assert await receive(peer, len(part)) == list(part)
    await guest.wait_for(lambda c: c.tx_frames == len(frames))
    await guest.stop()
    assert guest.violations() == {}
    assert guest.check_canaries() == 0


async def receive(packets: socket.socket, count: int) -> list[bytes]:
    """The next frames that come out of the port."""
    frames: list[bytes] = []
    async with asyncio.timeout(10):
        while len(frames) < count:
            # More than any frame has: cut at nothing.
            frame, address = await asyncio.get_running_loop().sock_recvfrom(packets, 1 << 16)
            if address[2] != PACKET_OUTGOING:
                frames.append(frame)
    return frames
