"""What igb's zero-copy mode does when it runs out of buffers; plain AF_XDP, without a guest and without a data plane.

`igb_alloc_rx_buffers_zc` (drivers/net/ethernet/intel/igb/igb_xsk.c) marks the first descriptor that has no buffer, by a
length of 0, so that `igb_clean_rx_irq_zc` stops there. It does not if the buffers run out before the descriptor ring's
end. When all that was filled has been received, the driver goes on with descriptors of an earlier lap: it answers with
buffers that are not its own, and takes what lies there for frames. What a port does about it is in docs/zero-copy.md;
should the second test fail, the driver was mended.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest
from zero_copy_port import PortSlot

from mpassthru._core import SteeringProgram
from mpassthru.testing.child import run_child
from mpassthru.testing.xsk import Xsk, bound_xsk

pytestmark = pytest.mark.asyncio(loop_scope="session")

RING_DESCS = 256
"""Of igb's receive ring."""
AF_XDP_RING_DESCS = 1024
HEADER = bytes.fromhex("02000000000102000000000288b5")
NO_MORE_S = 0.5
CARRIER_TIMEOUT_S = 20


class Wire:
    """Numbered frames to igb, and the answers of a socket on it."""

    def __init__(self, xsk: Xsk, peer: socket.socket) -> None:
        self._xsk, self._peer = xsk, peer
        self._free = list(range(2 * AF_XDP_RING_DESCS))
        self._posted: set[int] = set()
        self._sent = 0

    def lap(self, buffers: int) -> int:
        """Post some buffers, send as many frames; how many answers name a buffer that was not posted."""
        chunks = [self._free.pop(0) for _ in range(buffers)]
        self._posted.update(chunks)
        self._xsk.post(*chunks)
        wrong = 0
        for number in range(self._sent, self._sent + buffers):
            self._peer.send((HEADER + number.to_bytes(4, "big")).ljust(60, b"\0"))
            wrong += self._take(number)
        self._sent += buffers
        while (answer := self._xsk.answer(NO_MORE_S)) is not None:
            assert answer[0] not in self._posted
            wrong += 1
        assert not self._posted, "every frame has arrived"
        return wrong

    def _take(self, number: int) -> int:
        """The answers up to the frame with this number; how many are wrong."""
        wrong = 0
        while (answer := self._xsk.answer()) is not None:
            chunk, frame = answer
            if chunk not in self._posted:
                wrong += 1
                continue
            self._posted.remove(chunk)
            self._free.append(chunk)
            assert frame[14:18] == number.to_bytes(4, "big")
            return wrong
        raise TimeoutError(f"frame {number} did not arrive")


@asynccontextmanager
async def igb_wire() -> AsyncIterator[Wire]:
    ifindex = socket.if_nametoindex("igb")
    with (
        closing(SteeringProgram.attach(ifindex, xdp_mode="native", queue_count=1)) as program,
        bound_xsk(ifindex, mode="zero-copy", ring_descs=AF_XDP_RING_DESCS, posted=0) as xsk,
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as peer,
    ):
        program.steer_queue(0, steer="passthru")
        program.set_socket(0, xsk.socket.fileno())
        async with asyncio.timeout(CARRIER_TIMEOUT_S):
            while Path("/sys/class/net/igb/carrier").read_text() != "1\n":  # noqa: ASYNC110, ASYNC240
                await asyncio.sleep(0.01)
        peer.bind(("igb-peer", 0))
        yield Wire(xsk, peer)


async def test_igb_answers_truly_as_long_as_its_ring_is_filled_to_the_end(slot: PortSlot) -> None:
    await slot.leave()
    await run_child("ip", "link", "set", "dev", "igb-peer", "up")
    await run_child("ip", "link", "set", "dev", "igb", "up")
    async with igb_wire() as wire:
        assert [wire.lap(buffers) for buffers in (200, 226, 86, 100)] == [0, 0, 0, 0]


async def test_igb_answers_with_buffers_it_does_not_have_once_they_ran_out_before_its_rings_end(slot: PortSlot) -> None:
    await slot.leave()
    async with igb_wire() as wire:
        # The ring stands at 170, all of it was used before, and 30 buffers are not enough for the 86 up to its end.
        assert [wire.lap(buffers) for buffers in (200, 226)] == [0, 0]
        assert wire.lap(30) > 0
