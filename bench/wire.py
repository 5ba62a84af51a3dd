"""The far end of the veth pair: sends what goes to the guest, counts and drops what comes from it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

from bench.load import Load
from bench.placement import Placement
from mpassthru.testing.guest_config import Pattern
from mpassthru.testing.netns import Namespace
from mpassthru.testing.wire import FrameGenerator, PacketWire, XdpSink

ETHERNET_HEADER: Final = b"\x02\0\0\0\0\1" + b"\x02\0\0\0\0\2" + b"\x88\xb5"
_STILL_S: Final = 0.03
_NO_END: Final = 1 << 40


def frame_of(size_bytes: int) -> bytes:
    """The frame that is sent, of an ethertype that nobody takes."""
    return ETHERNET_HEADER + bytes(size_bytes - len(ETHERNET_HEADER))


class Wire:
    """The far end, for the length of a namespace's life."""

    def __init__(self, namespace: Namespace, placement: Placement) -> None:
        """Attach the sink.

        Raises:
            HostError: EPERM without root.
        """
        self._namespace = namespace
        self._placement = placement
        with namespace.entered():
            self._sink = XdpSink(namespace.peer_ifindex)

    @property
    def arrived(self) -> int:
        """Frames that came from the guest."""
        return self._sink.frames

    def lost_on_the_pair(self) -> int:
        """Frames that were sent to the guest and that the interface's ring had no room for."""
        statistics = json.loads(self._namespace.run("ip", "-j", "-s", "link", "show", self._namespace.peer))
        dropped: int = statistics[0]["stats64"]["tx"]["dropped"]
        return dropped

    @asynccontextmanager
    async def sending(self, load: Load) -> AsyncIterator[Callable[[], int]]:
        """Send for the length of the block; yields what tells how many were sent, exactly after the block.

        Without a rate, copies of one frame leave by the kernel's own hand, as many as it can; at a rate, patterned
        frames through AF_PACKET, as those of any program.
        """
        async with AsyncExitStack() as resources:
            if load.rate_frames_per_s is None:
                with self._namespace.entered():
                    generator = FrameGenerator(self._namespace.peer_ifindex, frame_of(load.frame_bytes))
                await resources.enter_async_context(generator.running())
                self._placement.place_wire()
                yield lambda: generator.sent
                return
            with self._namespace.entered():
                wire = await resources.enter_async_context(PacketWire(self._namespace.peer_ifindex))
            pattern = Pattern(sizes=(load.frame_bytes,))
            wire.start_sending(pattern, count=_NO_END, rate_frames_per_s=load.rate_frames_per_s)
            self._placement.place_wire()
            sent = 0
            try:
                yield lambda: sent or wire.counters().sent
            finally:
                wire.stop_sending()
                sent = await still(lambda: wire.counters().sent)

    def close(self) -> None:
        """Detach the sink."""
        self._sink.close()


async def still(read: Callable[[], int], *, deadline_s: float = 5.0) -> int:
    """Wait until a count has stopped to change; returns it.

    Raises:
        TimeoutError: it goes on.
    """
    async with asyncio.timeout(deadline_s):
        before = read()
        while True:
            await asyncio.sleep(_STILL_S)
            if (now := read()) == before:
                return now
            before = now
