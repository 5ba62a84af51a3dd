"""Random packets as a guest hands them to a NIC with offloads, and what the kernel itself makes of them.

Scapy makes the packets and judges checksums, the kernel segments them. Neither has seen our code.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from scapy.layers.inet import IP, TCP, UDP, in4_pseudoheader
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrHopByHop, IPv6ExtHdrRouting, in6_pseudoheader
from scapy.layers.l2 import Dot1AD, Dot1Q, Ether
from scapy.packet import Raw
from scapy.utils import checksum

from mpassthru.testing.net_header import GSO_ECN, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, NEEDS_CSUM, NetHeader
from mpassthru.testing.netns import Namespace

ETH_P_ALL: Final = 3
PACKET_OUTGOING: Final = 4
PACKET_AUXDATA: Final = 8
PACKET_VNET_HDR: Final = 15
SOL_PACKET: Final = 263
SO_RCVBUFFORCE: Final = 33
TP_STATUS_VLAN_VALID: Final = 0x10
AUXDATA: Final = struct.Struct("=IIIHHHH")
VNET_HDR_BYTES: Final = 10
ADDRESSES_BYTES: Final = 12
PAYLOAD_MAX_BYTES: Final = 60_000
CWR: Final = 0x80
RECEIVE_BUFFER_BYTES: Final = 64 << 20


@dataclass(frozen=True)
class Request:
    """A frame, what is asked of it, and how many frames it becomes."""

    frame: bytes
    header: NetHeader
    frames: int


def random_request(source: random.Random, *, mtu_bytes: int = 1500) -> Request:
    """A frame of any kind that offloads are for."""
    network = _ipv4(source) if source.random() < 0.5 else _ipv6(source)
    transport = _tcp(source) if source.random() < 0.75 else UDP(sport=source.randrange(1, 65536), dport=9)
    packet = _ethernet(source) / network / transport
    headers, transport_bytes = len(packet), len(transport)
    size_max = mtu_bytes + 14 - headers
    if source.random() < 0.3:
        return _request(source, packet, transport_bytes, 0, source.randrange(0, size_max))
    size = size_max if source.random() < 0.5 else source.randrange(16, size_max)
    # The kernel refuses to cut what needs no cutting.
    return _request(
        source, packet, transport_bytes, size, source.randrange(size + 1, min(PAYLOAD_MAX_BYTES, 60 * size))
    )


def stream_request(payload_bytes: int, size: int) -> Request:
    """A part of a TCP stream over IPv4 with timestamps, as Linux sends them."""
    timestamp: list[Any] = [("NOP", None), ("NOP", None), ("Timestamp", (1, 1))]
    transport = TCP(sport=1, dport=9, seq=1, ack=1, flags="A", options=timestamp)
    packet = Ether(dst="02:00:00:00:00:01", src="02:00:00:00:00:02") / IP(src="10.9.0.1", dst="10.9.0.2") / transport
    return _request(random.Random(1), packet, len(transport), size, payload_bytes)


def _request(source: random.Random, packet: Any, transport_bytes: int, size: int, payload_bytes: int) -> Request:
    is_tcp, is_ipv4 = TCP in packet, IP in packet
    start, field = len(packet) - transport_bytes, 16 if is_tcp else 6
    frame = bytearray(bytes(packet / Raw(_payload(source, payload_bytes))))
    # A driver leaves the sum of the pseudo header where the checksum belongs.
    transport, length = packet[TCP if is_tcp else UDP], len(frame) - start
    pseudo_header = in4_pseudoheader if is_ipv4 else in6_pseudoheader
    pseudo = pseudo_header(6 if is_tcp else 17, transport.underlayer, length)
    frame[start + field : start + field + 2] = (0xFFFF ^ checksum(bytes(pseudo))).to_bytes(2, "big")
    gso_type = 0
    if size:
        gso_type = GSO_UDP_L4 if not is_tcp else GSO_TCPV4 if is_ipv4 else GSO_TCPV6
        if is_tcp and int(packet[TCP].flags) & CWR and source.random() < 0.5:
            gso_type |= GSO_ECN
    header = NetHeader(
        flags=NEEDS_CSUM,
        gso_type=gso_type,
        header_bytes=len(packet),
        gso_size=size,
        csum_start=start,
        csum_offset=field,
    )
    return Request(bytes(frame), header, -(-payload_bytes // size) if size else 1)


def _payload(source: random.Random, count: int) -> bytes:
    """Random bytes, or the same ones all over: sums that end in zeros."""
    return source.randbytes(count) if source.random() < 0.8 else bytes([source.choice((0, 0xFF))]) * count


def _ethernet(source: random.Random) -> Any:
    """With up to two tags."""
    tags = source.choice((0, 0, 0, 1, 2))
    packet = Ether(dst="02:00:00:00:00:01", src="02:00:00:00:00:02")
    if tags == 2:
        packet /= Dot1AD(vlan=source.randrange(4095), prio=source.randrange(8))
    if tags:
        packet /= Dot1Q(vlan=source.randrange(4095), prio=source.randrange(8))
    return packet


def _ipv4(source: random.Random) -> Any:
    # NOPs and an end: what options mean is nothing to a NIC.
    options = b"\x01" * (4 * source.choice((0, 0, 0, 1, 5, 10)))
    identification = source.choice((0, 0xFFFE, source.randrange(0x10000)))
    return IP(
        src="10.9.0.1",
        dst="10.9.0.2",
        id=identification,
        flags=source.choice(("", "DF")),
        tos=source.randrange(256),
        options=options or [],
    )


def _ipv6(source: random.Random) -> Any:
    packet = IPv6(src="fd00::1", dst="fd00::2", tc=source.randrange(256), fl=source.randrange(1 << 20))
    for extension in source.choices(
        (IPv6ExtHdrHopByHop, IPv6ExtHdrDestOpt, IPv6ExtHdrRouting), k=source.choice((0, 0, 1, 2))
    ):
        # Hop-by-hop options are the first, if any are there (RFC 8200 section 4.1).
        if extension is not IPv6ExtHdrHopByHop or (isinstance(packet, IPv6) and not packet.payload):
            packet /= (
                IPv6ExtHdrRouting(addresses=["fd00::3"], segleft=1) if extension is IPv6ExtHdrRouting else extension()
            )
    return packet


def _tcp(source: random.Random) -> Any:
    options: list[Any] = [("Timestamp", (source.randrange(1 << 32), 1)), ("NOP", None), ("NOP", None)]
    return TCP(
        sport=source.randrange(1, 65536),
        dport=9,
        seq=source.choice((0xFFFF_FF00, source.randrange(1 << 32))),
        ack=source.randrange(1 << 32),
        flags=source.randrange(256),
        window=source.randrange(0x10000),
        urgptr=source.randrange(0x10000),
        options=source.choice(([], options, [*options, ("SAck", (1, 2, 3, 4))])),
    )


def verify(frame: bytes) -> None:
    """Scapy's verdict on lengths and checksums: with those that it makes, the frame is the same."""
    packet = Ether(frame)
    for layer, names in ((IP, ("len", "chksum")), (IPv6, ("plen",)), (TCP, ("chksum",)), (UDP, ("len", "chksum"))):
        if layer in packet:
            for name in names:
                packet[layer].delfieldval(name)
    assert bytes(packet) == frame, packet


class Capture:
    """What arrives at the peer's end of a veth pair, VLAN tags included."""

    def __init__(self, packets: socket.socket) -> None:
        self._packets = packets

    async def receive(self, count: int, *, deadline_s: float = 20.0) -> list[bytes]:
        """The next frames."""
        frames: list[bytes] = []
        async with asyncio.timeout(deadline_s):
            while len(frames) < count:
                try:
                    message = self._packets.recvmsg(1 << 16, 256)
                except BlockingIOError:
                    await _readable(self._packets)
                    continue
                if message[3][2] != PACKET_OUTGOING:
                    frames.append(_tagged(message[0], message[1]))
        return frames


async def _readable(packets: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(packets, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(packets)


def _tagged(frame: bytes, ancillary: list[tuple[int, int, bytes]]) -> bytes:
    """The frame with the tag that the kernel took off."""
    for level, kind, data in ancillary:
        if (level, kind) == (SOL_PACKET, PACKET_AUXDATA):
            status, *_, tci, tpid = AUXDATA.unpack_from(data)
            if status & TP_STATUS_VLAN_VALID:
                return frame[:ADDRESSES_BYTES] + struct.pack("!HH", tpid, tci) + frame[ADDRESSES_BYTES:]
    return frame


@contextmanager
def capturing(namespace: Namespace) -> Iterator[Capture]:
    """A socket at the wire's other end that sees every frame, from now on."""
    with namespace.entered():
        packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    with packets:
        packets.bind((namespace.peer, ETH_P_ALL))
        packets.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER_BYTES)
        packets.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
        packets.setblocking(False)
        yield Capture(packets)


class KernelSegmentation:
    """Sends requests into a veth pair without offloads: the kernel cuts them and makes checksums before they leave."""

    def __init__(self, packets: socket.socket, capture: Capture) -> None:
        self._packets, self._capture = packets, capture

    async def segments(self, request: Request) -> list[bytes]:
        """What the kernel sends for a request."""
        self._packets.send(request.header.pack(VNET_HDR_BYTES) + request.frame)
        return await self._capture.receive(request.frames)


@contextmanager
def kernel_segmentation(namespace: Namespace) -> Iterator[KernelSegmentation]:
    """The oracle, on a veth pair of its own whose offloads are off."""
    with namespace.entered():
        packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    with packets, capturing(namespace) as capture:
        packets.bind((namespace.ifname, 0))
        packets.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        yield KernelSegmentation(packets, capture)
