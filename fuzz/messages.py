"""vhost-user messages from a front-end that knows no shame, against a session over a device that checks every call.

A case is a session: a recorded start sequence of a real front-end, cut, spliced and with bytes, sizes and descriptors
changed, or messages made up from the payloads that exist. All of it is sent, the front-end hangs up, and the session
runs to its end without an event loop: where it would have to wait, it hangs, and that is a failure, as is any end but a
clean one or a ProtocolError, a reply that is not one, a vring left running, memory left mapped, a descriptor left open.

A case is made from its number and the seed alone; to see one again: fuzz/messages.py --seed S --first N --cases 1.
"""

from __future__ import annotations

import argparse
import array
import json
import logging
import os
import random
import resource
import signal
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/unit/vhost_user"))

from vhost_user_fakes import FEATURES, MEMORY_BYTES, USER_BASE, FakeDevice, memory_fd, ring_address
from vhost_user_traces import DPDK_START, DPDK_STOP, QEMU_START, QEMU_STOP, Step, message

from mpassthru.errors import HostError, MpassthruError, ProtocolError, RefusedError
from mpassthru.vhost_user import Session, StillInUseError
from mpassthru.vhost_user.connection import Connection

TRACES = (QEMU_START + QEMU_STOP, DPDK_START + DPDK_STOP)
DEVICE_CALLS = ("set_features", "map_memory", "start_vring", "set_vring_enabled", "set_vring_call", "set_status")
NUMBERS = (0, 1, 2, 3, 4, 5, 255, 256, 0x101, 32768, 65535, 65536, 2**31, 2**32 - 1, 2**63, 2**64 - 4096, 2**64 - 1)
ADDRESSES = (0, 4096, USER_BASE, USER_BASE + 0x4000, USER_BASE + MEMORY_BYTES, 2**64 - 4096)
PAYLOADS_OF: dict[int, tuple[int, ...]] = {
    **dict.fromkeys((1, 3, 4, 15, 17, 21, 34, 36, 40), (0,)),
    **dict.fromkeys((2, 16, 19, 20, 39), (1,)),
    **dict.fromkeys((8, 10, 11, 12, 13, 14, 18), (3,)),
    **{5: (6,), 9: (4,), 37: (5,), 38: (5,)},
}
"""By request, the payloads of `made_up` that belong to it."""

FDS_OF = {12: 1, 13: 1, 14: 1, 21: 1, 37: 1}
HEADER = struct.Struct("=III")
CASE_LIMIT_S = 10
STEPS_MAX = 20_000


class Fuzzer:
    """The descriptors that every case sends, and what became of the cases."""

    def __init__(self) -> None:
        self.messages = 0
        self.ends: Counter[str] = Counter()
        self._fds = [memory_fd(), os.eventfd(0), memory_fd(), os.open("/dev/null", os.O_RDWR)]
        self._lowest_fd = self._next_fd()

    def run(self, rng: random.Random) -> None:
        """Run one case.

        Raises:
            AssertionError: something promised does not hold.
        """
        steps = make_case(rng)
        device = FakeDevice()
        expected: tuple[type[MpassthruError], ...] = (ProtocolError,)
        if rng.random() < 0.2:
            error = rng.choice((RefusedError("as told"), HostError(12, "as told (ENOMEM)")))
            device.failures[rng.choice(DEVICE_CALLS)] = error
            expected = (ProtocolError, HostError, StillInUseError)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with ours:
            ours.setblocking(False)
            self._send(ours, steps, rng)
            ours.shutdown(socket.SHUT_WR)
            session = Session(Connection(theirs), device)
            end = drive(session.run())
            replies = _read_all(ours)
        assert end is None or isinstance(end, expected), repr(end)
        assert end is None or "\n" not in str(end), "an error is one line"
        check_replies(replies)
        assert not device.running, "a vring was left running"
        assert not device.starting, "a vring was left starting"
        assert not device.regions, "memory was left mapped"
        assert self._next_fd() == self._lowest_fd, "a descriptor was left open, or one too many closed"
        self.messages += session.counters.messages
        self.ends["clean" if end is None else type(end).__name__] += 1

    def _send(self, sock: socket.socket, steps: list[Step], rng: random.Random) -> None:
        for step in steps:
            of_memory = step.data[:4] in (b"\x05\0\0\0", b"\x25\0\0\0")
            first = 0 if of_memory else 1
            odd = rng.randrange(4) if rng.random() < 0.02 else 0
            fds = array.array("i", [self._fds[(first + odd) % 4]] * step.fds)
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)] if step.fds else []
            try:
                sock.sendmsg([step.data or b"\0"], ancillary)
            except BlockingIOError:
                return  # more than a socket takes; what was sent is a case too

    @staticmethod
    def _next_fd() -> int:
        """The lowest number that is free: every descriptor left open makes it another."""
        fd = os.dup(0)
        os.close(fd)
        return fd


def drive(run: Coroutine[Any, Any, None]) -> MpassthruError | None:
    """Run a session to its end; all that it can wait for is a turn."""
    try:
        for _ in range(STEPS_MAX):
            run.send(None)
    except StopIteration:
        return None
    except MpassthruError as error:
        return error
    raise AssertionError("the session does not end")


def _read_all(sock: socket.socket) -> bytes:
    data = bytearray()
    try:
        while chunk := sock.recv(65536):
            data += chunk
    except (BlockingIOError, ConnectionResetError):
        pass  # the session closed with messages unread
    return bytes(data)


def check_replies(data: bytes) -> None:
    """Whole messages of version 1, each marked as a reply, none with a payload that no reply has."""
    position = 0
    while position < len(data):
        _request, flags, size_bytes = HEADER.unpack_from(data, position)
        assert flags == 0x5, f"flags {flags:#x} in a reply"
        assert size_bytes in (8, 40), f"a reply of {size_bytes} bytes"
        position += HEADER.size + size_bytes
    assert position == len(data), "a reply is whole"


def make_case(rng: random.Random) -> list[Step]:
    """A sequence of messages: sound at first, then less so."""
    trace = rng.choice(TRACES)
    steps = list(trace[: rng.choice((0, 4, 12, rng.randrange(len(trace)), len(trace)))])
    for _ in range(rng.randrange(6)):
        steps.insert(rng.randint(0, len(steps)), made_up(rng) if rng.random() < 0.7 else rng.choice(trace))
    for _ in range(rng.randrange(4)):
        if steps:
            _change(steps, rng)
    return steps


def _change(steps: list[Step], rng: random.Random) -> None:
    index = rng.randrange(len(steps))
    step = steps[index]
    match rng.randrange(8):
        case 0:
            del steps[index]
        case 1:
            other = rng.randrange(len(steps))
            steps[index], steps[other] = steps[other], step
        case 2:
            steps.insert(index, step)
        case 3:
            steps[index] = Step(step.data, rng.choice((0, 1, 2, 7, 8, 9, 20)), b"")
        case 4:
            steps[index] = Step(step.data[: rng.randrange(len(step.data) + 1)], step.fds, b"")
        case 5:
            steps[index] = Step(with_number(step.data, rng), step.fds, b"")
        case 6:
            steps[index] = Step(step.data + rng.randbytes(rng.randrange(64)), step.fds, b"")
        case _:
            data = bytearray(step.data)
            for _ in range(rng.randint(1, 4)):
                if data:
                    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            steps[index] = Step(bytes(data), step.fds, b"")


def with_number(data: bytes, rng: random.Random) -> bytes:
    """Another number in a field of header or payload."""
    width = rng.choice((4, 8))
    if len(data) < width:
        return data
    at = rng.randrange(0, len(data) - width + 1, 4)
    number = rng.choice(NUMBERS + ADDRESSES) & ((1 << 8 * width) - 1)
    return data[:at] + number.to_bytes(width, sys.byteorder) + data[at + width :]


def made_up(rng: random.Random) -> Step:
    """A message of its own: a payload that exists, though perhaps not for this request."""
    number, address = rng.choice(NUMBERS), rng.choice(ADDRESSES)
    region = struct.pack("=QQQQ", address, rng.choice((0, 4096, MEMORY_BYTES, number)), rng.choice(ADDRESSES), 0)
    payloads = (
        b"",
        struct.pack("=Q", rng.choice((number, FEATURES, FEATURES & number))),
        struct.pack("=II", rng.randrange(6), number & 0xFFFF_FFFF),
        struct.pack("=II", rng.randrange(4), rng.choice((0, 0, 1, 64, 256))),
        ring_address(rng.randrange(4), shift=rng.choice((0, 0, 1, 16, MEMORY_BYTES))).encode(),
        bytes(8) + region,
        struct.pack("=II", count := rng.randrange(10), 0) + region * count,
        rng.randbytes(rng.randrange(64)),
    )
    request = rng.randrange(1, 45)
    choice = rng.choice(PAYLOADS_OF.get(request, range(8))) if rng.random() < 0.8 else rng.randrange(8)
    flags = rng.choice((0x1, 0x1, 0x1, 0x9, 0x9, 0x9) if rng.random() < 0.9 else (0x5, 0x2, 0x11))
    fds = FDS_OF.get(request, 0) if rng.random() < 0.8 else rng.randrange(10)
    return Step(message(request, payloads[choice], flags=flags), count if request == 5 else fds, b"")


def _hung(*_: object) -> None:
    raise AssertionError(f"a case takes longer than {CASE_LIMIT_S} s")


def main() -> None:
    """Run the cases that the command line asks for; figures go to stdout, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGALRM, _hung)
    fuzzer = Fuzzer()
    start_s, usage = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF)
    for number in range(options.first, options.first + options.cases):
        signal.alarm(CASE_LIMIT_S)
        try:
            fuzzer.run(random.Random(f"{options.seed} {number}"))  # noqa: S311
        except BaseException:
            print(f"case {number} of seed {options.seed} fails", file=sys.stderr)
            raise
    signal.alarm(0)
    after = resource.getrusage(resource.RUSAGE_SELF)
    figures = {
        "cases": options.cases,
        "messages_handled": fuzzer.messages,
        "ends": dict(fuzzer.ends),
        "seconds": round(time.monotonic() - start_s, 1),
        "cpu_seconds": round(after.ru_utime + after.ru_stime - usage.ru_utime - usage.ru_stime, 1),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
