"""What a guest does to prove that its network works: ping, iperf3 both ways, and a file both ways.

The peer is an address in a network namespace on the other side of the port. The guest always connects to the peer,
which has its listening sockets ready first, so that nothing is retried and nothing waits by the clock.
rx is towards the guest, tx is from the guest.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import re
import socket
import time
from asyncio.subprocess import Process
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

import msgspec

from mpassthru.testing.child import ChildError, last_lines, running_child
from mpassthru.testing.netns import Namespace
from mpassthru.testing.qemu import QemuGuest

Direction = Literal["rx", "tx"]
Progress = Callable[[int], None]
"""Called with the bytes moved so far."""

FILE_BYTES = 100_000_000
GUEST_FILE = "/tmp/file"  # noqa: S108 (in the guest, which is ours alone)
_CHUNK_BYTES = 256 * 1024
_Move = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass(frozen=True)
class Peer:
    """The other end of the wire: an IPv4 address that is configured in a namespace."""

    namespace: Namespace
    address: str

    def listen(self) -> socket.socket:
        """Return a socket listening on a free port of the peer."""
        with self.namespace.entered():
            return socket.create_server((self.address, 0))


class PingResult(msgspec.Struct, frozen=True, kw_only=True):
    """Echo requests that the guest sent; times are round trips."""

    sent: int
    received: int
    rtt_min_ms: float
    rtt_avg_ms: float
    rtt_max_ms: float


class ThroughputResult(msgspec.Struct, frozen=True, kw_only=True):
    """One run of iperf3 over TCP: what the receiver got."""

    direction: Direction
    bytes: int
    seconds: float
    bits_per_s: float
    retransmits: int


class FileResult(msgspec.Struct, frozen=True, kw_only=True):
    """A file sent over one TCP connection."""

    direction: Direction
    bytes: int
    seconds: float
    sha256_sent: str
    sha256_received: str

    @property
    def intact(self) -> bool:
        """Whether what arrived is what was sent."""
        return self.sha256_sent == self.sha256_received


class TrafficResult(msgspec.Struct, frozen=True, kw_only=True):
    """All that `exercise_guest` did."""

    ping: PingResult
    throughput: tuple[ThroughputResult, ThroughputResult]
    files: tuple[FileResult, FileResult]


async def exercise_guest(
    guest: QemuGuest,
    peer: Peer,
    *,
    throughput_s: int = 5,
    file_bytes: int = FILE_BYTES,
    announce: Callable[[str], None] = lambda _: None,
    progress: Progress | None = None,
) -> TrafficResult:
    """Ping the peer, measure TCP both ways, and send a file both ways, on an interface that is configured.

    Args:
        guest: The guest; its `programs` hold iperf3.
        peer: Whom it talks to.
        throughput_s: Seconds of iperf3 in each direction.
        file_bytes: Size of the file; twice that much memory is free in the guest.
        announce: Called with a line for people as each step begins.
        progress: Called with the bytes of a file moved so far.

    Raises:
        ChildError: A step failed. Files that differ are no error here: see `FileResult.intact`.
        TimeoutError: A step took too long.
    """
    announce(f"ping {peer.address} from the guest")
    pinged = await ping(guest, peer.address)
    announce(f"iperf3 towards the guest, {throughput_s} s")
    rx = await iperf3(guest, peer, "rx", duration_s=throughput_s)
    announce(f"iperf3 from the guest, {throughput_s} s")
    tx = await iperf3(guest, peer, "tx", duration_s=throughput_s)
    announce(f"a file of {file_bytes / 1e6:.0f} MB to the guest")
    file_rx = await send_file_to_guest(guest, peer, random_file(file_bytes), progress=progress)
    announce("the same file back from the guest")
    file_tx = await send_file_from_guest(guest, peer, progress=progress)
    return TrafficResult(ping=pinged, throughput=(rx, tx), files=(file_rx, file_tx))


async def configure_interface(guest: QemuGuest, address: str, *, interface: str = "eth0") -> None:
    """Give the guest's interface an address (`10.0.0.2/24`) and bring it up.

    Raises:
        ChildError: There is no such interface, or the address is not one.
    """
    await guest.run(f"ip address add {address} dev {interface} && ip link set {interface} up")


async def ping(guest: QemuGuest, address: str, *, count: int = 5, payload_bytes: int = 56) -> PingResult:
    """Ping an address from the guest, ten times a second.

    Raises:
        ChildError: No answer came at all.
        TimeoutError: The guest does not answer.
    """
    command = f"ping -c {count} -i 0.1 -W 2 -s {payload_bytes} {address}"
    return parse_ping((await guest.run(command, timeout_s=count * 2 + 10)).output)


def parse_ping(output: str) -> PingResult:
    """Read the statistics that busybox's ping prints at its end.

    Raises:
        ChildError: There are none.
    """
    counts = re.search(r"(\d+) packets transmitted, (\d+) packets received", output)
    times = re.search(r"round-trip min/avg/max = ([\d.]+)/([\d.]+)/([\d.]+) ms", output)
    if counts is None or times is None:
        raise ChildError(f"ping printed no statistics: {last_lines(output)}")
    low, average, high = (float(value) for value in times.groups())
    return PingResult(sent=int(counts[1]), received=int(counts[2]), rtt_min_ms=low, rtt_avg_ms=average, rtt_max_ms=high)


async def iperf3(guest: QemuGuest, peer: Peer, direction: Direction, *, duration_s: int = 5) -> ThroughputResult:
    """Measure TCP in one direction, with iperf3 at both ends (`programs` of the guest must hold it).

    Raises:
        ChildError: iperf3 failed at either end.
        TimeoutError: It did not end in time.
    """
    server = ["iperf3", "--server", "--one-off", "--forceflush", "--bind", peer.address]
    async with running_child(*server, namespace=peer.namespace) as process:
        await _wait_for_line(process, "Server listening", timeout_s=10.0)
        reverse = "--reverse" if direction == "rx" else ""
        command = f"iperf3 --client {peer.address} --time {duration_s} --json {reverse}"
        result = await guest.run(command, timeout_s=duration_s + 30, check=False)
    return parse_iperf3(result.output, direction)


def parse_iperf3(output: str, direction: Direction) -> ThroughputResult:
    """Read the JSON document that iperf3's client prints.

    Raises:
        ChildError: It says that the run failed, or is no JSON.
    """
    try:
        document = json.loads(output)
    except json.JSONDecodeError:
        raise ChildError(f"iperf3 printed no JSON: {last_lines(output)}") from None
    if "error" in document:
        raise ChildError(f"iperf3 failed: {document['error']}")
    sent, received = document["end"]["sum_sent"], document["end"]["sum_received"]
    return ThroughputResult(
        direction=direction,
        bytes=received["bytes"],
        seconds=received["seconds"],
        bits_per_s=received["bits_per_second"],
        retransmits=sent.get("retransmits", 0),
    )


async def _wait_for_line(process: Process, text: str, *, timeout_s: float) -> None:
    assert process.stdout is not None
    seen = ""
    async with asyncio.timeout(timeout_s):
        while text not in seen:
            line = await process.stdout.readline()
            if not line:
                raise ChildError(f"program ended before it said '{text}': {last_lines(seen)}")
            seen += line.decode(errors="replace")


def random_file(size_bytes: int = FILE_BYTES, *, seed: int = 1) -> bytes:
    """Return the same random bytes for the same seed: nothing on the way can compress or guess them."""
    return random.Random(seed).randbytes(size_bytes)  # noqa: S311 (no secret)


async def send_file_to_guest(
    guest: QemuGuest, peer: Peer, content: bytes, *, timeout_s: float = 120.0, progress: Progress | None = None
) -> FileResult:
    """Send a file from the peer to the guest, which keeps it as `GUEST_FILE` in its tmpfs.

    Raises:
        ChildError: The guest's part failed.
        TimeoutError: It took longer than `timeout_s` seconds.
    """

    async def move(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for offset in range(0, len(content), _CHUNK_BYTES):
            writer.write(content[offset : offset + _CHUNK_BYTES])
            await writer.drain()
            if progress:
                progress(min(offset + _CHUNK_BYTES, len(content)))

    seconds = await _exchange(guest, peer, move, f"> {GUEST_FILE} < /dev/null", timeout_s)
    return FileResult(
        direction="rx",
        bytes=len(content),
        seconds=seconds,
        sha256_sent=hashlib.sha256(content).hexdigest(),
        sha256_received=await _guest_sha256(guest),
    )


async def send_file_from_guest(
    guest: QemuGuest, peer: Peer, *, timeout_s: float = 120.0, progress: Progress | None = None
) -> FileResult:
    """Send the guest's `GUEST_FILE` to the peer.

    Raises:
        ChildError: The guest's part failed; there is no such file.
        TimeoutError: It took longer than `timeout_s` seconds.
    """
    digest = hashlib.sha256()
    received_bytes = 0

    async def move(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal received_bytes
        while chunk := await reader.read(_CHUNK_BYTES):
            digest.update(chunk)
            received_bytes += len(chunk)
            if progress:
                progress(received_bytes)

    seconds = await _exchange(guest, peer, move, f"< {GUEST_FILE}", timeout_s)
    return FileResult(
        direction="tx",
        bytes=received_bytes,
        seconds=seconds,
        sha256_sent=await _guest_sha256(guest),
        sha256_received=digest.hexdigest(),
    )


async def _exchange(guest: QemuGuest, peer: Peer, move: _Move, redirection: str, timeout_s: float) -> float:
    """Serve one connection at the peer with `move` while the guest's `nc` is the client; returns its seconds."""
    with peer.listen() as listener:
        host, port = listener.getsockname()
        serving = asyncio.create_task(_serve_once(listener, move))
        start_s = time.monotonic()
        try:
            await guest.run(f"nc {host} {port} {redirection}", timeout_s=timeout_s)
            seconds = time.monotonic() - start_s
            await serving
        finally:
            serving.cancel()
    return seconds


async def _serve_once(listener: socket.socket, move: _Move) -> None:
    listener.setblocking(False)
    connection, _ = await asyncio.get_running_loop().sock_accept(listener)
    reader, writer = await asyncio.open_connection(sock=connection)
    try:
        await move(reader, writer)
    finally:
        writer.close()
        await writer.wait_closed()


async def _guest_sha256(guest: QemuGuest) -> str:
    return (await guest.run(f"sha256sum {GUEST_FILE}", timeout_s=60)).output.split()[0]
