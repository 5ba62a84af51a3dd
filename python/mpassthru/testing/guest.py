"""The built-in guest: a vhost-user front-end with a virtio-net driver, where a test, demo or bench would need a VM.

```python
async with BuiltinGuest.connect("/run/port.sock", GuestConfig(canaries=True)) as guest:
    guest.start(rx="check", source=Source(pattern=Pattern(sizes=(60, 1514)), count=10_000))
    await guest.wait_for(lambda c: c.tx_frames >= 10_000 and c.check_good >= 10_000, deadline_s=10)
    await guest.stop()
    assert not guest.violations() and guest.check_canaries() == 0
```

The conversation is Python's, by `mpassthru.vhost_user`; frames are Rust's, on one thread per queue pair that never
touches Python (`crates/testing`). The back-end may live in this process or in another. rx is towards this guest.

The driver trusts no device: every head that comes back is compared with what was posted (`violations`), every byte
around the buffers can be (`check_canaries`), and a test can break any rule itself (`ring`).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from mpassthru._core import GuestDriver, GuestRing
from mpassthru.errors import HostError, RefusedError, errno_name
from mpassthru.testing.guest_config import GuestConfig, GuestCounters, RxRole, Source
from mpassthru.testing.net_header import NetHeader
from mpassthru.vhost_user.features import DeviceStatus, ProtocolFeature, VirtioFeature
from mpassthru.vhost_user.frontend import Frontend
from mpassthru.vhost_user.inflight import InflightArea
from mpassthru.vhost_user.memory import MemoryRegion
from mpassthru.vhost_user.message import VringAddress
from mpassthru.vhost_user.vring import PACKED_START, is_packed

POLL_INTERVAL_S = 0.002


@dataclass(slots=True)
class BuiltinGuest:
    """A guest, connected to a back-end. Made by `connect`, `listen` or `over`.

    Attributes:
        config: As given.
        frontend: The connection; free for any other message.
        driver: The Rust half.
        bases: Ring bases for the next start, by virtqueue; those reported by GET_VRING_BASE after `stop`.
        device_running: Between `start_device` and `stop`.
    """

    config: GuestConfig
    frontend: Frontend
    driver: GuestDriver
    bases: list[int]
    device_running: bool = False
    _inflight: InflightArea | None = None

    # ---- making one ----------------------------------------------------------------------------------------

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(
        cls,
        socket_path: str | Path,
        config: GuestConfig | None = None,
        *,
        start_device: bool = True,
        timeout_s: float = 5.0,
    ) -> AsyncIterator[Self]:
        """Connect to a listening back-end, and set up the device.

        Args:
            socket_path: The back-end's vhost-user socket.
            config: Defaults to `GuestConfig()`.
            start_device: Also hand over memory and rings; False leaves that to `start_device`.
            timeout_s: Seconds that bound each message.

        Raises:
            HostError: nobody listens there, or there is no such memory.
            RefusedError: the back-end has too few queue pairs, or the configuration makes no sense.
            ProtocolError: the back-end broke the protocol.
        """
        frontend = await Frontend.connect(socket_path, timeout_s=timeout_s)
        async with cls.over(frontend, config, start_device=start_device) as guest:
            yield guest

    @classmethod
    @contextlib.asynccontextmanager
    async def listen(
        cls,
        socket_path: str | Path,
        config: GuestConfig | None = None,
        *,
        start_device: bool = True,
        timeout_s: float = 5.0,
        accept_timeout_s: float = 30.0,
    ) -> AsyncIterator[Self]:
        """Listen, wait for a back-end (`--connect`), and set up the device.

        Args:
            socket_path: Made here; unlinked once the back-end has connected.
            config: Defaults to `GuestConfig()`.
            start_device: As in `connect`.
            timeout_s: Seconds that bound each message.
            accept_timeout_s: Seconds to wait for the back-end.

        Raises:
            HostError: the socket cannot be made.
            TimeoutError: no back-end connected.
        """
        sock = await _accept_one(Path(socket_path), accept_timeout_s)
        async with cls.over(
            Frontend.from_socket(sock, timeout_s=timeout_s), config, start_device=start_device
        ) as guest:
            yield guest

    @classmethod
    @contextlib.asynccontextmanager
    async def over(
        cls, frontend: Frontend, config: GuestConfig | None = None, *, start_device: bool = True
    ) -> AsyncIterator[Self]:
        """Negotiate over `frontend`, which it closes in the end, and set up the device."""
        config = GuestConfig() if config is None else config
        with frontend:
            features = await _negotiate(frontend, config)
            driver = GuestDriver(config, features)
            guest = cls(config, frontend, driver, bases=[])
            guest.bases = guest._first_bases()
            try:
                if start_device:
                    await guest.start_device()
                yield guest
            finally:
                guest.frontend.close()  # another one after `reconnect`
                if guest._inflight is not None:
                    guest._inflight.close()
                driver.park()

    # ---- the device ----------------------------------------------------------------------------------------

    async def start_device(self, *, regions: Sequence[int] | None = None, vrings: Sequence[int] | None = None) -> None:
        """Start as a VMM does: features again, memory, every ring at its base in `bases`, enable, and a kick each.

        Args:
            regions: Indices of the regions of memory that are handed over; None for all.
            vrings: Which rings; None for all.
        """
        vrings = self.vrings if vrings is None else vrings
        await self.frontend.set_features(self.frontend.features)
        await self.set_memory(regions)
        await self._hand_over_inflight()
        for index in vrings:
            await self.start_vring(index)
        await self._enable_vrings()
        if self._has(ProtocolFeature.VHOST_USER_PROTOCOL_F_STATUS):
            status = DeviceStatus.ACKNOWLEDGE | DeviceStatus.DRIVER | DeviceStatus.FEATURES_OK | DeviceStatus.DRIVER_OK
            await self.frontend.set_status(status)
        self.device_running = True
        for index in vrings:
            self.ring(index).kick()

    async def set_memory(self, regions: Sequence[int] | None = None) -> None:
        """Hand over the table of these regions, by index; None for all."""
        every = self.memory
        await self.frontend.set_mem_table(every if regions is None else [every[index] for index in regions])

    @property
    def memory(self) -> list[MemoryRegion]:
        """All regions of memory, as they are handed over."""
        return [MemoryRegion(*region) for region in self.driver.regions()]

    async def start_vring(self, index: int) -> None:
        """Hand over one ring, at its base in `bases`."""
        ring = self.ring(index)
        address = VringAddress(
            index=index,
            flags=0,
            desc_user_address=ring.user_address(ring.desc_address),
            used_user_address=ring.user_address(ring.used_address),
            avail_user_address=ring.user_address(ring.avail_address),
        )
        await self.frontend.set_vring_num(index, ring.size)
        await self.frontend.set_vring_base(index, self.bases[index])
        await self.frontend.set_vring_addr(address)
        await self.frontend.set_vring_err(index, ring.err_fd)
        await self.frontend.set_vring_call(index, ring.call_fd)
        await self.frontend.set_vring_kick(index, ring.kick_fd)

    async def _enable_vrings(self) -> None:
        if self.frontend.features & VirtioFeature.VHOST_USER_F_PROTOCOL_FEATURES:
            for index in self.vrings:
                await self.frontend.set_vring_enable(index, True)

    async def _hand_over_inflight(self) -> None:
        """Keep what a back-end writes down of what is in flight, and give it to the next (INFLIGHT_SHMFD)."""
        if not self._has(ProtocolFeature.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD):
            return
        if self._inflight is None:
            self._inflight = await self.frontend.get_inflight_fd(len(self.vrings), self.config.queue_size)
        await self.frontend.set_inflight_fd(self._inflight)

    async def stop(self) -> list[int]:
        """Stop every ring (GET_VRING_BASE) and park the driver.

        What the device neither used nor gave back is counted in `violations` from here on. Posted buffers stay
        posted: `start_device` goes on where this ended.

        Returns:
            The ring bases, by virtqueue; also in `bases`.
        """
        self.bases = [await self.frontend.get_vring_base(index) for index in self.vrings]
        self.device_running = False
        self.driver.settle(self.bases)
        return self.bases

    async def reset(self) -> None:
        """Stop if running, reset the device if it can be, and start over with empty rings and fresh buffers."""
        if self.device_running:
            await self.stop()
        if self._has(ProtocolFeature.VHOST_USER_PROTOCOL_F_RESET_DEVICE):
            await self.frontend.reset_device()
        self.driver.reset()
        self.bases = self._first_bases()
        await self.start_device()

    async def reconnect(self, frontend: Frontend) -> None:
        """Go on with another connection after the back-end died, as QEMU does: from the used index of each ring.

        Raises:
            RefusedError: the new back-end offers other features than the driver runs with.
        """
        self.frontend.close()
        self.device_running = False
        features = self.frontend.features
        self.frontend = frontend
        if await _negotiate(frontend, self.config) != features:
            raise RefusedError("the back-end came back with other features: reset the guest instead")
        # Packed rings have no index in memory: QEMU tells the next back-end what it told the last one.
        if not is_packed(features):
            self.bases = [self.ring(index).used_idx for index in self.vrings]
        # First, so that nothing which waits in the tx rings is discarded (vhost-user.rst, "Ring states").
        await self._enable_vrings()
        await self.start_device()

    def _first_bases(self) -> list[int]:
        first = PACKED_START if is_packed(self.frontend.features) else 0
        return [first for _ in self.vrings]

    @property
    def vrings(self) -> range:
        """Indices of all virtqueues: rx of queue pair n is 2n, tx is 2n + 1."""
        return range(2 * self.config.queue_pairs)

    def _has(self, feature: ProtocolFeature) -> bool:
        return bool(self.frontend.protocol_features & feature)

    # ---- the driver ----------------------------------------------------------------------------------------

    def start(
        self,
        *,
        rx: RxRole = "sink",
        source: Source | None = None,
        queue_pair: int | None = None,
        polling: bool | None = None,
    ) -> None:
        """Give queue pairs their roles and run them. May be called again at any time: the device does not notice.

        Args:
            rx: What is done with received frames.
            source: What is sent; None for nothing but echoes.
            queue_pair: One; None for all, each with a source of its own.
            polling: None for the configuration's.

        Raises:
            RefusedError: the source's frames do not fit the tx buffers, or make no sense.
        """
        pairs: Sequence[int] = range(self.config.queue_pairs) if queue_pair is None else (queue_pair,)
        for pair in pairs:
            self.driver.start(pair, rx=rx, source=source, polling=polling)

    def pause(self) -> None:
        """End the driver's threads; the device goes on with what is posted. `start` resumes."""
        self.driver.park()

    def counters(self, queue_pair: int | None = None) -> GuestCounters:
        """One queue pair's counters, or the sum over all; `check_*` are always over all."""
        return GuestCounters(**self.driver.counters(queue_pair))

    def violations(self) -> dict[str, int]:
        """What the device did that no device may do, by name; empty is good."""
        return {name: count for name, count in self.driver.violations().items() if count}

    def check_canaries(self, *, tails: bool = True) -> int:
        """Count bytes that nobody had a right to change. Needs `canaries`; may be called at any time.

        They are outside every ring and buffer, in rx buffers behind the used length, or in tx buffers that came back.

        Args:
            tails: Those behind the used length count. A device may change them (VIRTIO 1.3 section 2.7.8.2), and ours
                does where frames arrive in several pieces, which are then moved.
        """
        counters = self.counters()
        changed = self.driver.changed_gap_bytes() + counters.tx_bytes_changed
        return changed + (counters.rx_tail_bytes_changed if tails else 0)

    async def wait_for(self, condition: Callable[[GuestCounters], bool], *, deadline_s: float = 5.0) -> GuestCounters:
        """Wait until `condition` holds for the counters; returns those for which it did.

        Raises:
            TimeoutError: it did not within `deadline_s` seconds; the message has the counters.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline_s):
                # The counters are those of Rust threads, which do not touch Python: nobody could set an Event.
                while not condition(counters := self.counters()):  # noqa: ASYNC110
                    await asyncio.sleep(POLL_INTERVAL_S)
                return counters
        violations = self.violations() or "none"
        raise TimeoutError(f"not reached in {deadline_s} s: {self.counters()}, violations: {violations}")

    def take_captured(self) -> list[bytes]:
        """The frames captured since last taken."""
        return [frame for _, frame in self.driver.take_captured()]

    def take_captured_packets(self) -> list[tuple[NetHeader, bytes]]:
        """As `take_captured`, each with its virtio-net header."""
        return [(NetHeader.unpack(header), frame) for header, frame in self.driver.take_captured()]

    def ring(self, index: int) -> GuestRing:
        """Bare access to a virtqueue, for tests that misbehave. Do not use it on a queue pair that is running."""
        return self.driver.ring(index)


async def _negotiate(frontend: Frontend, config: GuestConfig) -> int:
    """Negotiate features and check that there are queue pairs enough."""
    wanted = config.features
    if config.queue_pairs > 1:
        wanted |= VirtioFeature.VIRTIO_NET_F_MQ
    features = await frontend.negotiate(wanted, config.protocol_features)
    if config.queue_pairs > 1:
        has_mq = frontend.protocol_features & ProtocolFeature.VHOST_USER_PROTOCOL_F_MQ
        available = await frontend.get_queue_num() if has_mq else 1
        if available < config.queue_pairs:
            raise RefusedError(
                f"the back-end has {available} queue pairs, the guest wants {config.queue_pairs}: start it with more"
            )
    return features


async def _accept_one(path: Path, timeout_s: float) -> socket.socket:
    """Wait for one connection on a socket that exists only meanwhile."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as listener:
        try:
            listener.bind(str(path))
        except OSError as error:
            reason = (
                f"cannot listen on {path} ({errno_name(error.errno)}): "
                "is there a guest already, or a socket left behind?"
            )
            raise HostError(error.errno or 0, reason) from error
        try:
            listener.listen(1)
            async with asyncio.timeout(timeout_s):
                sock, _ = await asyncio.get_running_loop().sock_accept(listener)
        finally:
            path.unlink()  # noqa: ASYNC240 (takes no time)
    return sock
