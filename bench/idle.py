"""`python -m bench.idle`: what ports cost while nothing happens, and how long a frame takes that comes then.

Round trips are those of one frame at a time, a millisecond apart, so that everybody sleeps in between: to the built-in
guest, which sends it back, and on a bare veth pair to the kernel, which answers an ICMP echo request. The guest's
answer takes two threads that have to be woken, the port's and the guest's; the kernel's takes none.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

import msgspec

from bench.backends import GUEST
from bench.cargo import ROOT
from bench.cpu import cpu_time
from bench.machine import machine
from bench.placement import Placement
from mpassthru.testing.attached_port import attached_port
from mpassthru.testing.guest import BuiltinGuest
from mpassthru.testing.netns import Namespace, veth_namespace

_ETHERTYPE: Final = 0x88B5
_ETHERTYPE_IPV4: Final = 0x0800
_PERIOD_S: Final = 0.001
_SETTLE_S: Final = 5.0
_GUEST_ADDRESS, _WIRE_ADDRESS = "192.0.2.1", "192.0.2.2"


class RoundTrips(msgspec.Struct, frozen=True, kw_only=True):
    """Of frames of 64 bytes, one at a time."""

    through: str
    p50_us: float
    p99_us: float
    p999_us: float
    lost: int


class Idle(msgspec.Struct, frozen=True, kw_only=True):
    """A run."""

    target: str
    ok: bool
    machine: dict[str, str]
    ports: int
    seconds: float
    share_of_a_core: float
    """CPU time of all processes of all ports, by the time that passed."""
    round_trips: tuple[RoundTrips, ...]


def round_trips(namespace: Namespace, through: str, frame: bytes, ethertype: int, count: int) -> RoundTrips:
    """Send a frame from the wire's end, with a number as its last bytes, wait for it to return, and so on."""
    with namespace.entered():
        wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    taken_s, lost = [], 0
    with wire:
        wire.bind((namespace.peer, ethertype))
        wire.settimeout(0.1)
        for number in range(count):
            numbered = frame[:-8] + _numbered(number)
            start_s = time.perf_counter()
            wire.send(numbered)
            try:
                while wire.recv(2048)[-8:] != numbered[-8:]:
                    pass
                taken_s.append(time.perf_counter() - start_s)
            except TimeoutError:
                lost += 1
            time.sleep(_PERIOD_S)
    taken_s.sort()
    p50, p99, p999 = (round(1e6 * taken_s[int(share * (len(taken_s) - 1))], 1) for share in (0.5, 0.99, 0.999))
    return RoundTrips(through=through, p50_us=p50, p99_us=p99, p999_us=p999, lost=lost)


def _numbered(number: int) -> bytes:
    """A number, and what makes a checksum over both the same for all."""
    return struct.pack("!II", number, number ^ 0xFFFFFFFF)


def to_the_kernel(count: int) -> RoundTrips:
    """Over a bare veth pair."""
    with veth_namespace() as namespace:
        mac, peer_mac = (_mac(namespace, end) for end in (namespace.ifname, namespace.peer))
        namespace.run("ip", "address", "add", f"{_GUEST_ADDRESS}/24", "dev", namespace.ifname)
        at_peer = ("lladdr", peer_mac.hex(":"), "dev", namespace.ifname)
        namespace.run("ip", "neighbour", "replace", _WIRE_ADDRESS, *at_peer)
        request = _echo_request(mac + peer_mac)
        return round_trips(namespace, "bare veth, the kernel answers", request, _ETHERTYPE_IPV4, count)


def _mac(namespace: Namespace, ifname: str) -> bytes:
    (link,) = json.loads(namespace.run("ip", "-j", "link", "show", "dev", ifname))
    return bytes.fromhex(link["address"].replace(":", ""))


def _echo_request(addresses: bytes) -> bytes:
    """Of 64 bytes, and numbered 0."""
    icmp = struct.pack("!BBHHH", 8, 0, 0, 1, 1) + bytes(64 - 14 - 20 - 8 - 8) + _numbered(0)
    icmp = icmp[:2] + struct.pack("!H", _checksum(icmp)) + icmp[4:]
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(icmp), 0, 0, 64, 1, 0, *_addresses())
    ip = ip[:10] + struct.pack("!H", _checksum(ip)) + ip[12:]
    return addresses + struct.pack("!H", _ETHERTYPE_IPV4) + ip + icmp


def _addresses() -> tuple[bytes, bytes]:
    return socket.inet_aton(_WIRE_ADDRESS), socket.inet_aton(_GUEST_ADDRESS)


def _checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


async def to_a_guest(mode: str, count: int) -> RoundTrips:
    """Through a port."""
    with veth_namespace() as namespace, tempfile.TemporaryDirectory(prefix="mpassthru-bench-") as folder:
        path = Path(folder) / "port.sock"
        async with attached_port(namespace, path, "--mode", mode) as port:
            await port.until_said("is ready")
            async with BuiltinGuest.connect(path, GUEST) as guest:
                await port.until(lambda report: report.guest == "running")
                guest.start(rx="echo")
                frame = b"\x02\0\0\0\0\1" + b"\x02\0\0\0\0\2" + struct.pack("!H", _ETHERTYPE) + bytes(50)
                return round_trips(namespace, f"mpassthru {mode}, its guest answers", frame, _ETHERTYPE, count)


async def share_of_a_core(ports: int, seconds: float) -> float:
    """What so many ports use, each with a guest that does nothing, once all workers have come."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mpassthru-bench-")))
        pids: list[int] = []
        for number in range(ports):
            path = folder / f"{number}.sock"
            namespace = stack.enter_context(veth_namespace())
            port = await stack.enter_async_context(attached_port(namespace, path, "--mode", "copy", interval_s=60))
            await port.until_said("is ready", timeout_s=60)
            guest = await stack.enter_async_context(BuiltinGuest.connect(path, GUEST))
            guest.start(rx="sink")
            pids.append(port.pid)
        await asyncio.sleep(_SETTLE_S)
        processes = [process for pid in pids for process in _family(pid)]
        before_s, start_s = _cpu_s(processes), time.monotonic()
        await asyncio.sleep(seconds)
        return (_cpu_s(processes) - before_s) / (time.monotonic() - start_s)


def _cpu_s(pids: list[int]) -> float:
    return sum(cpu_time(pid).total_s for pid in pids)


def _family(pid: int) -> Iterator[int]:
    """A process and all that come from it."""
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from _family(int(child))


def main() -> int:
    """Measure, print and write the report; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.idle", description=__doc__)
    parser.add_argument("--ports", type=int, default=16, metavar="N", help="at once")
    parser.add_argument("--seconds", type=float, default=10.0, metavar="S", help="that they do nothing")
    parser.add_argument("--frames", type=int, default=2000, metavar="N", help="that are sent, one at a time")
    parser.add_argument("--report", type=Path, default=ROOT / "build/reports/bench-idle.json", metavar="FILE")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        print("bench.idle: run as root: it makes network namespaces and loads BPF programs", file=sys.stderr)
        return 1
    idle = asyncio.run(measure(arguments.ports, arguments.seconds, arguments.frames))
    arguments.report.parent.mkdir(parents=True, exist_ok=True)
    arguments.report.write_bytes(msgspec.json.format(msgspec.json.encode(idle), indent=2) + b"\n")
    print(f"{idle.ports} idle ports: {100 * idle.share_of_a_core:.2f} % of a core")
    for it in idle.round_trips:
        print(f"{it.through}: p50 {it.p50_us} µs, p99 {it.p99_us} µs, p99.9 {it.p999_us} µs, {it.lost} lost")
    return 0


async def measure(ports: int, seconds: float, frames: int) -> Idle:
    """Measure everything."""
    described = machine(Placement())
    through = [to_the_kernel(frames)] + [await to_a_guest(mode, frames) for mode in ("copy", "packet")]
    share = await share_of_a_core(ports, seconds)
    return Idle(
        target="bench-idle",
        ok=True,
        machine=described,
        ports=ports,
        seconds=seconds,
        share_of_a_core=share,
        round_trips=tuple(through),
    )


if __name__ == "__main__":
    sys.exit(main())
