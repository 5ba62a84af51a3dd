"""The far end of a veth pair, where a test would need a switch and another machine.

* `FrameGenerator`: one frame, millions of times a second, for receive throughput.
* `PacketWire`: patterned frames both ways, each checked byte for byte and accounted for.
* `XdpSink`: exact counts of what arrives, at any speed, for transmit throughput.

Each works in the network namespace that the calling thread is in when it is made, and stays there whoever uses it:

```python
with namespace.entered():
    wire = PacketWire(namespace.peer_ifindex)
async with wire:
    counters = await wire.send(Pattern(sizes=(60, 1514)), count=10_000, rate_frames_per_s=50_000)
    await wire.wait_for(lambda c: c.received >= 10_000)
```

Interfaces are named by index, for names are looked up in the namespace of whoever asks. All of this needs root.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Literal, Self

from mpassthru import _core
from mpassthru.testing.guest_config import Pattern

POLL_INTERVAL_S = 0.002


@dataclass(frozen=True, slots=True, kw_only=True)
class WireCounters:
    """What a `PacketWire` counted.

    Attributes:
        sent: Frames that the kernel took.
        sent_bytes: Their bytes.
        send_retries: Times that the kernel had no room and was asked again; nothing was lost.
        received: Frames received.
        received_bytes: Their bytes.
        kernel_drops: Frames that arrived and found no room in the socket (PACKET_STATISTICS).
        check_good: Frames without fault, each sequence once.
        check_corrupt: Patterned frames with wrong bytes or length.
        check_duplicate: Good frames seen before.
        check_reordered: Good frames after one with a higher sequence.
        check_foreign: Frames of other ethertypes; only with `all_ethertypes`.
        check_missing: Sequences below the highest seen that never came.
    """

    sent: int = 0
    sent_bytes: int = 0
    send_retries: int = 0
    received: int = 0
    received_bytes: int = 0
    kernel_drops: int = 0
    check_good: int = 0
    check_corrupt: int = 0
    check_duplicate: int = 0
    check_reordered: int = 0
    check_foreign: int = 0
    check_missing: int = 0


class PacketWire:
    """Sends and receives patterned frames through AF_PACKET; receives from the moment it is made until `close`.

    What the interface under test sends, guest or host, is checked by the frames' own headers (`Pattern`). A veth
    whose other end cannot keep up drops silently: give a rate, or use `send_in_portions`.
    """

    def __init__(self, ifindex: int, *, all_ethertypes: bool = False, capture_frames: int = 0) -> None:
        """Open the wire.

        Args:
            ifindex: In the calling thread's network namespace.
            all_ethertypes: Receive everything, not only patterned frames.
            capture_frames: Keep the first so many frames, for `take_captured`.

        Raises:
            HostError: EPERM without CAP_NET_RAW and CAP_NET_ADMIN, ENODEV without such an interface.
        """
        self._core: _core.PacketWire | None = _core.PacketWire(
            ifindex, all_ethertypes=all_ethertypes, capture_frames=capture_frames
        )

    @property
    def _wire(self) -> _core.PacketWire:
        if self._core is None:
            raise ValueError("the wire is closed")
        return self._core

    async def send(
        self,
        pattern: Pattern,
        *,
        count: int,
        rate_frames_per_s: float | None = None,
        first_sequence: int | None = None,
        deadline_s: float = 30.0,
    ) -> WireCounters:
        """Send `count` frames and wait until the kernel has them all.

        Args:
            pattern: The frames.
            count: How many.
            rate_frames_per_s: None for as fast as it goes.
            first_sequence: None to go on where the last frames ended.
            deadline_s: Seconds to wait.

        Raises:
            HostError: the kernel refused a frame.
            TimeoutError: not all were sent in time.
        """
        self.start_sending(pattern, count=count, rate_frames_per_s=rate_frames_per_s, first_sequence=first_sequence)
        try:
            await _until(lambda: not self._wire.is_sending(), deadline_s, self.counters)
        finally:
            self.stop_sending()
        return self.counters()

    async def send_in_portions(
        self,
        pattern: Pattern,
        *,
        count: int,
        arrived: Callable[[], int],
        portion: int = 128,
        deadline_s: float = 30.0,
    ) -> WireCounters:
        """Send `count` frames so that none can be lost for want of room: each portion waits until the last arrived.

        Args:
            pattern: The frames.
            count: How many.
            arrived: Counts arrivals, from any number on: `lambda: guest.counters().rx_frames`.
            portion: Frames on their way at once, at most; less than rings and queues hold.
            deadline_s: Seconds to wait for each portion.

        Raises:
            HostError: the kernel refused a frame.
            TimeoutError: a portion was not sent, or did not arrive, in time.
        """
        goal = arrived()
        while count > 0:
            frames = min(count, portion)
            await self.send(pattern, count=frames, deadline_s=deadline_s)
            count -= frames
            goal += frames
            await _until(lambda goal=goal: arrived() >= goal, deadline_s, self.counters)  # type: ignore[misc]
        return self.counters()

    def start_sending(
        self,
        pattern: Pattern,
        *,
        count: int,
        rate_frames_per_s: float | None = None,
        first_sequence: int | None = None,
    ) -> None:
        """Start what `send` waits for.

        Raises:
            RefusedError: it is sending already, or the pattern has impossible sizes.
        """
        self._wire.start_sending(
            pattern, count=count, rate_frames_per_s=rate_frames_per_s, first_sequence=first_sequence
        )

    def stop_sending(self) -> None:
        """End sending early; harmless when it has ended. What is sent next has to wait for `sending_ended`."""
        if self._core is not None:
            self._core.stop_sending()

    async def sending_ended(self, *, deadline_s: float = 5.0) -> WireCounters:
        """Wait until nothing is being sent any more.

        Raises:
            TimeoutError: it still is after `deadline_s` seconds.
        """
        return await self.wait_for(lambda _: not self._wire.is_sending(), deadline_s=deadline_s)

    def send_frame(self, frame: bytes) -> None:
        """Send one frame as it is.

        Raises:
            HostError: the kernel refused it.
        """
        self._wire.send_frame(frame)

    def counters(self) -> WireCounters:
        """All counts so far.

        Raises:
            HostError: receiving failed.
        """
        return WireCounters(**self._wire.counters())

    async def wait_for(self, condition: Callable[[WireCounters], bool], *, deadline_s: float = 5.0) -> WireCounters:
        """Wait until `condition` holds for the counters; returns those for which it did.

        Raises:
            TimeoutError: it did not within `deadline_s` seconds; the message has the counters.
        """
        await _until(lambda: condition(self.counters()), deadline_s, self.counters)
        return self.counters()

    def reset_check(self) -> None:
        """Forget sequences and the check's counts, before another stream with the same seed."""
        self._wire.reset_check()

    def take_captured(self) -> list[bytes]:
        """The frames captured since last taken."""
        return self._wire.take_captured()

    def close(self) -> None:
        """Stop sending and receiving. Harmless when repeated."""
        self._core = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()


class FrameGenerator:
    """Sends copies of one frame, by BPF_PROG_TEST_RUN in live-frame mode: the kernel itself sends.

    On veth the other end must run a native XDP program (an attached port does; a generic one is not enough) or have
    GRO on. What its ring cannot hold is lost there: `sent` says what was sent, count arrivals at the other end.
    """

    def __init__(self, ifindex: int, frame: bytes) -> None:
        """Prepare to send `frame`, 14 to 3520 bytes, out of an interface of the calling thread's namespace.

        Raises:
            HostError: EPERM without CAP_NET_ADMIN and CAP_BPF.
            RefusedError: a frame of impossible length.
        """
        self._core = _core.FrameGenerator(ifindex, frame)

    @property
    def sent(self) -> int:
        """Frames sent, in all runs."""
        return self._core.sent

    async def run(
        self,
        *,
        count: int | None = None,
        duration_s: float | None = None,
        rate_frames_per_s: float | None = None,
    ) -> int:
        """Send until `count` frames are sent or `duration_s` seconds have passed; with neither, until cancelled.

        Returns:
            Frames sent by this run; exactly `count` unless `duration_s` came first.

        Raises:
            HostError: the kernel refused, ENODEV if there is no such interface.
        """
        before = self.sent
        async with self.running(count=count, duration_s=duration_s, rate_frames_per_s=rate_frames_per_s):
            await _until(lambda: not self._core.is_active(), None, lambda: self.sent)
        return self.sent - before

    @contextlib.asynccontextmanager
    async def running(
        self,
        *,
        count: int | None = None,
        duration_s: float | None = None,
        rate_frames_per_s: float | None = None,
    ) -> AsyncIterator[None]:
        """As `run`, but for the length of a block, after which it has stopped and `sent` is exact."""
        self._core.start(count=count, duration_s=duration_s, rate_frames_per_s=rate_frames_per_s)
        try:
            yield
        finally:
            self._core.stop()
            await _until(lambda: not self._core.is_active(), None, lambda: self.sent)


class XdpSink:
    """Counts every frame that an interface receives, and drops it before the network stack sees it."""

    def __init__(self, ifindex: int, *, xdp_mode: Literal["native", "generic"] = "native") -> None:
        """Attach to an interface of the calling thread's network namespace.

        Raises:
            HostError: EBUSY if an XDP program is there, EPERM without CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN.
        """
        self._core: _core.XdpSink | None = _core.XdpSink.attach(ifindex, xdp_mode=xdp_mode)

    @property
    def frames(self) -> int:
        """Frames counted."""
        return self._counters()[0]

    @property
    def bytes(self) -> int:
        """Bytes counted, without FCS."""
        return self._counters()[1]

    def _counters(self) -> tuple[int, int]:
        if self._core is None:
            raise ValueError("the sink is closed")
        return self._core.counters()

    async def wait_for(self, frames: int, *, deadline_s: float = 5.0) -> int:
        """Wait until so many frames are counted; returns their number.

        Raises:
            TimeoutError: they did not come within `deadline_s` seconds.
        """
        await _until(lambda: self.frames >= frames, deadline_s, lambda: f"{self.frames} of {frames} frames")
        return self.frames

    def close(self) -> None:
        """Detach the program. Harmless when repeated."""
        self._core = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


async def _until(condition: Callable[[], bool], deadline_s: float | None, state: Callable[[], object]) -> None:
    """Wait for `condition`; TimeoutError tells the `state` then."""
    try:
        async with asyncio.timeout(deadline_s):
            # What is waited for happens on Rust threads and in the kernel: nobody could set an Event.
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(POLL_INTERVAL_S)
    except TimeoutError:
        raise TimeoutError(f"not reached in {deadline_s} s: {state()}") from None
