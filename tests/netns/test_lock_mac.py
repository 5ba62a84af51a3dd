"""`--lock-mac`: frames with another source never leave, even if the guest rewrites them behind the check."""

from __future__ import annotations

import ctypes
import socket
import struct
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from mpassthru.testing.attached_port import AttachedPort, attached_port
from mpassthru.testing.child import running_child
from mpassthru.testing.guest import BuiltinGuest
from mpassthru.testing.guest_config import BufferLayout, GuestConfig, Pattern, Source
from mpassthru.testing.netns import Namespace
from mpassthru.testing.wire import PacketWire

MINE = bytes.fromhex("020000000002")
SECOND = bytes.fromhex("020000000003")
OTHER = bytes.fromhex("020000000004")
LOCK = ("--lock-mac", MINE.hex(":"), "--lock-mac", SECOND.hex(":"))
HEADER_BYTES = 12
SIZES = (60, 61, 590, 1514)
FRAMES = 2000
RACED_FRAMES = 300_000
QUEUE_SIZE = 16
"""So few buffers that each is rewritten while it is on its way."""
NO_END = 1 << 40

SOL_PACKET = 263
PACKET_STATISTICS = 6
PACKET_IGNORE_OUTGOING = 23
SO_ATTACH_FILTER = 26

LAYOUTS = {
    "one-piece": BufferLayout(),
    "header-apart": BufferLayout(pieces=(12, 2048)),
    "odd-chains": BufferLayout(pieces=(7, 13, 700, 900), indirect=True),
}
MODES = ("copy", "packet")


class _Filter(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("filter", ctypes.POINTER(_Filter)))


def not_from(source: bytes) -> bytes:
    """A classic BPF program that takes frames with another source, in place: `struct sock_fprog`."""
    high, low = struct.unpack("!IH", source)
    instructions = (_Filter * 6)(
        (0x20, 0, 0, 6),  # ld [6]
        (0x15, 0, 2, high),  # jne #high, take
        (0x28, 0, 0, 10),  # ldh [10]
        (0x15, 1, 0, low),  # jeq #low, leave
        (0x06, 0, 0, 0xFFFF),  # take: ret
        (0x06, 0, 0, 0),  # leave: ret
    )
    not_from.kept = instructions  # type: ignore[attr-defined] # the kernel copies it when it is attached
    return bytes(_Program(len(instructions), instructions))


@contextmanager
def spoofed_on_wire(veth: Namespace) -> Iterator[socket.socket]:
    """A socket that receives what arrives at the wire's far end with another source than the guest's."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sock:
        sock.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, not_from(MINE))
        sock.bind((veth.peer, 3))  # ETH_P_ALL
        yield sock


def count(sock: socket.socket) -> int:
    """Frames that passed the socket's filter, also those that it had no room for."""
    packets, _drops = struct.unpack("=II", sock.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
    return int(packets)


@asynccontextmanager
async def locked_guest(
    veth: Namespace, folder: Path, config: GuestConfig, *options: str
) -> AsyncIterator[tuple[AttachedPort, BuiltinGuest]]:
    async with attached_port(veth, folder / "s", *options) as port:
        await port.until_said("is ready")
        async with BuiltinGuest.connect(folder / "s", config) as guest:
            await port.until(lambda report: report.guest == "running" and report.mode != "detached")
            yield port, guest


def sends(source: bytes, count: int, *, rate_frames_per_s: float | None = 50_000) -> Source:
    pattern = Pattern(source=source, sizes=SIZES)
    return Source(pattern=pattern, count=count, rate_frames_per_s=rate_frames_per_s)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
async def test_frames_of_the_guests_addresses_arrive_intact_and_others_are_dropped_and_counted(
    veth: Namespace, tmp_path: Path, layout: str, mode: str
) -> None:
    config = GuestConfig(tx=LAYOUTS[layout], canaries=True)
    async with (
        PacketWire(veth.peer_ifindex) as wire,
        locked_guest(veth, tmp_path, config, "--mode", mode, *LOCK) as (port, guest),
    ):
        for number, source in enumerate((MINE, OTHER, SECOND), 1):
            guest.start(source=sends(source, FRAMES))
            await guest.wait_for(lambda counters, number=number: counters.tx_frames == number * FRAMES)
        on_wire = await wire.wait_for(lambda counters: counters.received + counters.kernel_drops >= 2 * FRAMES)
        report = await port.until(lambda report: report.tx.frames + sum(report.tx.dropped.values()) >= 3 * FRAMES)
        await guest.stop()
        assert not guest.violations()
        assert guest.check_canaries() == 0
    assert (on_wire.check_corrupt, report.tx.frames) == (0, 2 * FRAMES)
    assert report.tx.dropped == {"spoofed": FRAMES}
    if mode == "copy":
        assert report.tx.bounced == {}
        assert report.tx.copied_bytes == 2 * FRAMES * 14
    assert not report.troubles


RACER = """
import mmap, sys
fd, size, mine, other, *places = sys.argv[1:]
memory = mmap.mmap(int(fd), int(size))
mine, other = bytes.fromhex(mine), bytes.fromhex(other)
slices = [slice(int(place), int(place) + 6) for place in places]
print("racing", flush=True)
while True:
    for source in (other, mine):
        for place in slices:
            memory[place] = source
"""


@asynccontextmanager
async def rewriting(guest: BuiltinGuest) -> AsyncIterator[None]:
    """A second CPU of the guest that changes the source in all its tx buffers, and back, all the time."""
    ((start, size, _user, offset, fd),) = guest.driver.regions()
    assert offset == 0
    ring = guest.ring(1)
    buffers = {ring.descriptor(head)[0] for head in range(ring.size)} - {0}
    places = [str(address - start + HEADER_BYTES + 6) for address in buffers]
    racer = (sys.executable, "-c", RACER, str(fd), str(size), MINE.hex(), OTHER.hex(), *places)
    async with running_child(*racer, pass_fds=(fd,)) as child:
        assert child.stdout is not None
        assert await child.stdout.readline() == b"racing\n"
        yield


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("locked", [True, False])
async def test_guest_that_rewrites_its_source_behind_the_check_sends_what_was_checked(
    veth: Namespace, tmp_path: Path, mode: str, locked: bool
) -> None:
    config = GuestConfig(queue_size=QUEUE_SIZE)
    options = ("--lock-mac", MINE.hex(":")) if locked else ()
    with spoofed_on_wire(veth) as wire:
        async with locked_guest(veth, tmp_path, config, "--mode", mode, *options) as (port, guest):
            # Once around the ring, for its descriptors to show where the buffers are.
            guest.start(source=Source(pattern=Pattern(source=MINE), count=QUEUE_SIZE))
            await guest.wait_for(lambda counters: counters.tx_frames == QUEUE_SIZE)
            async with rewriting(guest):
                guest.start(source=Source(pattern=Pattern(source=MINE), count=RACED_FRAMES))
                await guest.wait_for(lambda counters: counters.tx_frames == QUEUE_SIZE + RACED_FRAMES, deadline_s=60)
            report = await port.until(
                lambda report: report.tx.frames + report.tx.dropped.get("spoofed", 0) == QUEUE_SIZE + RACED_FRAMES
            )
            assert not guest.violations()
        spoofed = count(wire)

    if locked:
        assert spoofed == 0, f"of {report.tx.frames}"
        assert report.tx.frames > RACED_FRAMES // 10, "the guest's own source was there in time"
        assert report.tx.dropped["spoofed"] > 0, "the other one, too"
    else:
        assert spoofed > 0, "without a lock they leave"
