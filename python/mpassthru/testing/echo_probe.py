"""How long a guest is out of reach: ICMP echo requests at a steady rate, and the longest gap between two answers.

A program of its own (``python -m mpassthru.testing.echo_probe ADDRESS``), for its clock must not wait for anybody else.
Each line on standard input asks for the figures since the line before, as one line of JSON; the end of input ends it.
The guest's kernel answers by itself, so that nothing in the guest has to be scheduled for it.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import struct
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec

from mpassthru.testing.child import running_child
from mpassthru.testing.netns import Namespace

PERIOD_S = 0.001
_ECHO_REQUEST, _ECHO_REPLY = 8, 0
_ICMP = struct.Struct("!BBHHH")
_IP_HEADER_BYTES = 20


class EchoFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen since the figures before.

    Attributes:
        sent: Echo requests.
        received: Answers.
        longest_gap_ms: Longest time without an answer.
    """

    sent: int = 0
    received: int = 0
    longest_gap_ms: float = 0.0


class EchoProbe:
    """A running probe."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def figures(self) -> EchoFigures:
        """What was seen since this was asked last."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"\n")
        await self._process.stdin.drain()
        return msgspec.json.decode(await self._process.stdout.readline(), type=EchoFigures)


@asynccontextmanager
async def echo_probe(namespace: Namespace, address: str) -> AsyncIterator[EchoProbe]:
    """Probe an address from a namespace for the length of the block."""
    command = (sys.executable, "-m", "mpassthru.testing.echo_probe", address)
    async with running_child(*command, namespace=namespace, stdin=asyncio.subprocess.PIPE) as process:
        yield EchoProbe(process)


def main() -> None:
    """Probe until standard input ends."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    sock.connect((sys.argv[1], 0))
    sock.setblocking(False)
    identifier = os.getpid() & 0xFFFF
    sent = received = 0
    longest_s, answered_s = 0.0, time.monotonic()
    due_s = answered_s
    while True:
        readable, _, _ = select.select([sock, sys.stdin], [], [], max(0.0, due_s - time.monotonic()))
        now_s = time.monotonic()
        if sock in readable and _is_reply(sock.recv(2048), identifier):
            received += 1
            longest_s, answered_s = max(longest_s, now_s - answered_s), now_s
        if sys.stdin in readable:
            if not os.read(sys.stdin.fileno(), 4096):
                return
            longest_s = max(longest_s, now_s - answered_s)
            figures = EchoFigures(sent=sent, received=received, longest_gap_ms=round(longest_s * 1000, 1))
            print(msgspec.json.encode(figures).decode(), flush=True)
            sent = received = 0
            longest_s, answered_s = 0.0, now_s
        if now_s >= due_s:
            _send(sock, _echo_request(identifier, sent & 0xFFFF))
            sent += 1
            # Requests that could not be sent in time are left out: the rate is an upper limit.
            due_s = max(due_s + PERIOD_S, now_s)


def _send(sock: socket.socket, request: bytes) -> None:
    try:
        sock.send(request)
    except (BlockingIOError, OSError):
        return  # nobody is there at the moment: that is what the gap shows


def _echo_request(identifier: int, sequence: int) -> bytes:
    total = (_ECHO_REQUEST << 8) + identifier + sequence
    total = (total & 0xFFFF) + (total >> 16)  # three numbers of 16 bits: one carry at most
    return _ICMP.pack(_ECHO_REQUEST, 0, 0xFFFF - total, identifier, sequence)


def _is_reply(packet: bytes, identifier: int) -> bool:
    if len(packet) < _IP_HEADER_BYTES + _ICMP.size:
        return False
    kind, _code, _checksum, whose, _sequence = _ICMP.unpack_from(packet, _IP_HEADER_BYTES)
    return bool(kind == _ECHO_REPLY and whose == identifier)


if __name__ == "__main__":
    main()
