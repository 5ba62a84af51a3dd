"""The network device that front-ends see: `mpassthru.vhost_user.Device` on top of the engine.

A queue pair gets its AF_XDP socket when its first virtqueue starts, for only then is the guest's memory known and
wanted; it loses it when buffers have to be taken back from the kernel (an rx virtqueue stops), when the memory map
changes, or when the port loses its interface. A virtqueue that goes on without the other one of its pair gets a new
one. The engine decides about buffers; this module decides about order: memory, socket, steering, virtqueue.

Nobody is told that a virtqueue has stopped, and no memory is unmapped, before no NIC can write to it any more: see
`mpassthru.worker.port_sockets`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Final

from mpassthru import _core
from mpassthru.control import Binding, Configure, ControlError
from mpassthru.errors import HostError, MpassthruError, RefusedError
from mpassthru.inflight_records import InflightRecords
from mpassthru.vhost_user import MemoryRegion, ProtocolFeature, VirtioFeature
from mpassthru.vhost_user.device import Vring
from mpassthru.vhost_user.message import VHOST_VRING_F_LOG
from mpassthru.vhost_user.vring import is_packed
from mpassthru.worker.async_engine import AsyncEngine
from mpassthru.worker.memlock import check_memlock, pinned_bytes
from mpassthru.worker.port_sockets import INTERFACE_AWAY, PortSockets
from mpassthru.worker.socket_client import SocketClient

FRAME_MIN_BYTES: Final = 60
ETHERTYPE_RARP: Final = 0x8035
LOGGED_PAGE_BYTES: Final = 4096
"""A bit of the migration log stands for so much memory (vhost-user.rst, "Migration")."""
DESCRIPTOR_BYTES: Final = 16
AVAIL_HEADER_BYTES: Final = 4
"""VIRTIO 1.3 sections 2.7.5 and 2.7.6; in the packed layout that is all of the driver's event suppression (2.8.10)."""

FEATURES: Final = (
    VirtioFeature.VIRTIO_F_VERSION_1
    | VirtioFeature.VIRTIO_F_INDIRECT_DESC
    | VirtioFeature.VIRTIO_F_EVENT_IDX
    | VirtioFeature.VIRTIO_F_RING_PACKED
    | VirtioFeature.VIRTIO_F_ANY_LAYOUT
    | VirtioFeature.VIRTIO_NET_F_MRG_RXBUF
    | VirtioFeature.VIRTIO_NET_F_MTU
    # The control virtqueue is the front-end's own business; some (cloud-hypervisor) have one only if we offer it.
    | VirtioFeature.VIRTIO_NET_F_CTRL_VQ
    | VirtioFeature.VIRTIO_NET_F_CTRL_RX
    | VirtioFeature.VIRTIO_NET_F_GUEST_ANNOUNCE
    | VirtioFeature.VHOST_F_LOG_ALL
    | VirtioFeature.VHOST_USER_F_PROTOCOL_FEATURES
)
TX_OFFLOADS: Final = (
    VirtioFeature.VIRTIO_NET_F_CSUM
    | VirtioFeature.VIRTIO_NET_F_HOST_TSO4
    | VirtioFeature.VIRTIO_NET_F_HOST_TSO6
    | VirtioFeature.VIRTIO_NET_F_HOST_ECN
    | VirtioFeature.VIRTIO_NET_F_HOST_USO
)
RX_OFFLOADS: Final = (
    VirtioFeature.VIRTIO_NET_F_GUEST_CSUM
    | VirtioFeature.VIRTIO_NET_F_GUEST_TSO4
    | VirtioFeature.VIRTIO_NET_F_GUEST_TSO6
    | VirtioFeature.VIRTIO_NET_F_GUEST_USO4
    | VirtioFeature.VIRTIO_NET_F_GUEST_USO6
)
PROTOCOL_FEATURES: Final = (
    ProtocolFeature.VHOST_USER_PROTOCOL_F_MQ
    | ProtocolFeature.VHOST_USER_PROTOCOL_F_LOG_SHMFD
    | ProtocolFeature.VHOST_USER_PROTOCOL_F_REPLY_ACK
    | ProtocolFeature.VHOST_USER_PROTOCOL_F_RARP
    | ProtocolFeature.VHOST_USER_PROTOCOL_F_MTU
    | ProtocolFeature.VHOST_USER_PROTOCOL_F_BACKEND_REQ
    | ProtocolFeature.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS
    | ProtocolFeature.VHOST_USER_PROTOCOL_F_STATUS
    | ProtocolFeature.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD
    | ProtocolFeature.VHOST_USER_PROTOCOL_F_RESET_DEVICE
)


class PortDevice:
    """One port's device.

    Args:
        engine: The data plane.
        client: Where AF_XDP sockets come from.
        configuration: Interface, queues and limits.
        on_running: Called with True when a virtqueue has started and none ran before, with False when the last has
            stopped.
        on_resumed: Called with a virtqueue and how many of its buffers an earlier worker had, if any.
        notice: Called with one line for the user.
        trouble: Called with one line that says what went wrong.
        records: Where to write down what is in flight, for front-ends that keep no record; None for nowhere.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        client: SocketClient,
        configuration: Configure,
        *,
        on_running: Callable[[bool], None],
        on_resumed: Callable[[int, int], None],
        notice: Callable[[str], None],
        trouble: Callable[[str], None],
        records: InflightRecords | None = None,
    ) -> None:
        self.queue_pairs_max = configuration.queue_pairs
        self.features = int(FEATURES)
        if self.queue_pairs_max > 1:
            self.features |= VirtioFeature.VIRTIO_NET_F_MQ
        if configuration.tx_offloads:
            self.features |= TX_OFFLOADS
        if configuration.rx_offloads:
            self.features |= RX_OFFLOADS
        if configuration.longer_buffers:
            self.features |= VirtioFeature.VIRTIO_NET_F_HASH_REPORT
        self.protocol_features = int(PROTOCOL_FEATURES)
        self._engine = engine
        self._client = client
        self._interface = configuration.binding
        """What the port is bound to, or was last."""
        self._on_running = on_running
        self._on_resumed = on_resumed
        self._notice = notice
        self._trouble = trouble
        self._records = records
        self._running: dict[int, Vring] = {}
        self._regions: tuple[MemoryRegion, ...] = ()
        self._address: bytes | None = None
        """The guest's, if the front-end said it."""
        self._announced_later: bytes | None = None
        """An address that could not be announced yet."""
        self._log_bytes = 0
        """Size of the migration log; 0 while there is none."""
        self._unlogged = False
        """A virtqueue ran with logging on while there was no log: QEMU sends it after the start."""
        self._pins_memory = configuration.pins_memory
        self._locked_bytes = 0
        """How much the broker allows to be locked."""
        self._sockets = PortSockets(engine, client, configuration, is_needed=self._runs, notice=notice)

    def _runs(self, queue_pair: int) -> bool:
        return bool(self._running.keys() & {2 * queue_pair, 2 * queue_pair + 1})

    async def rebind(self, binding: Binding | None) -> None:
        """Have the sockets on another interface, or on the same in another way, or none; virtqueues go on meanwhile.

        Raises:
            MpassthruError: a socket could not be had or bound; see `PortSockets.rebind`.
        """
        anew = await self._sockets.rebind(binding)
        self._interface = self._sockets.binding or self._interface
        address = (self._engine.guest_address(0) or self._address) if anew else self._announced_later
        if address is not None:
            await self.send_rarp(address)

    async def set_features(self, features: int) -> None:
        """Nothing to do: each virtqueue brings the features it runs with."""

    async def log_writes(self, on: bool) -> None:
        """Log writes to buffers, or no longer; each pump switches between two bursts.

        Raises:
            RefusedError: the log has no room for all of guest memory.
        """
        for index, vring in tuple(self._running.items()):
            features = vring.features & ~VirtioFeature.VHOST_F_LOG_ALL | (VirtioFeature.VHOST_F_LOG_ALL if on else 0)
            await self._log_vring(index, replace(vring, features=int(features)))

    async def set_log(self, fd: int, size_bytes: int, mmap_offset: int) -> None:
        """Replace the log; -1 for none.

        Virtqueues may have been started with logging on before: what they wrote since then, and what a worker before
        this one wrote without marking it, is unknown. Then all of guest memory is marked.

        Raises:
            HostError: the log cannot be mapped; the old one stays.
            RefusedError: it has no room for all of guest memory.
        """
        self._engine.map_log(fd, size_bytes, mmap_offset)
        self._log_bytes = size_bytes
        await self._log_running()
        if self._log_bytes and self._unlogged:
            self._unlogged = False
            if self._regions:
                self._engine.mark_all()

    async def set_log_fd(self, fd: int) -> None:
        """Replace the eventfd that tells of marked pages; -1 for none."""
        self._engine.set_log_fd(fd)
        await self._log_running()

    async def set_vring_log(self, index: int, log_guest_address: int | None) -> None:
        """Log writes to a used ring, or no longer.

        Raises:
            RefusedError: the log has no room for all of guest memory.
        """
        flags = 0 if log_guest_address is None else VHOST_VRING_F_LOG
        vring = replace(self._running[index], flags=flags, log_guest_address=log_guest_address or 0)
        await self._log_vring(index, vring)

    async def _log_running(self) -> None:
        for index, vring in tuple(self._running.items()):
            await self._log_vring(index, vring)

    async def _log_vring(self, index: int, vring: Vring) -> None:
        await self._engine.set_vring_log(index, vring.log_buffers, vring.log_used_address)
        self._running[index] = vring
        self._note_unlogged(vring)

    def _note_unlogged(self, vring: Vring) -> None:
        self._unlogged |= not self._log_bytes and vring.is_logged

    def _check_log(self, regions: Sequence[MemoryRegion]) -> None:
        """Front-ends make more room in the log before they add memory (vhost-user.rst, "Migration")."""
        last_page = max(region.guest_phys_address + region.size_bytes - 1 for region in regions) // LOGGED_PAGE_BYTES
        logged = any(vring.is_logged for vring in self._running.values())
        if logged and self._log_bytes and last_page // 8 >= self._log_bytes:
            raise RefusedError("the migration log has no room for the memory that is added")

    async def map_memory(self, regions: Sequence[MemoryRegion]) -> None:
        """Replace the guest's memory; sockets are closed first, for they pin the old one.

        Raises:
            RefusedError: the memlock limit or the kernel cannot take so much memory.
            HostError: a region cannot be mapped; EBUSY if a NIC may still write to the old one, which stays mapped.
        """
        async with self._sockets.changing:
            await self._sockets.give_up_all()
            self._regions = ()
            if regions:
                await self._reserve(regions)
            self._engine.map_memory(core_regions(regions))
            self._regions = tuple(regions)
            if not regions:
                self._address = self._announced_later = None  # that guest is gone
                await self._reserve(())

    async def add_memory(self, regions: Sequence[MemoryRegion]) -> bool:
        """Add to the guest's memory while virtqueues run; frames in it are copied until their socket is a newer one.

        Raises:
            RefusedError: the memlock limit or the budget does not allow so much memory, the kernel cannot take it, or
                writes to it could not be logged.
            HostError: a region cannot be mapped.
        """
        self._check_log(regions)
        async with self._sockets.changing:
            every = (*self._regions, *regions)
            await self._reserve(every)
            try:
                added = await self._engine.add_memory(core_regions(regions))
            except MpassthruError:
                await self._reserve(self._regions)
                raise
            if added:
                self._regions = every
                self._sockets.renewal.start()
            return added

    async def start_vring(self, index: int, vring: Vring) -> None:
        """Start a virtqueue, with a socket for its queue pair; without, as long as the interface is away.

        Raises:
            HostError: no socket could be had or bound.
            QueueFault: the rings are not in guest memory.
        """
        try:
            await self._sockets.attach(index // 2)
        except HostError as error:
            if error.errno not in INTERFACE_AWAY:
                raise
            self._sockets.attach_later(index // 2)
        first = not self._running
        self._note_unlogged(vring)
        self._running[index] = vring  # before the engine knows of it: a start that is cancelled is followed by a stop
        try:
            resumed = await self._engine.start_vring(index, vring_config(self._recorded(index, vring)))
        except MpassthruError:
            del self._running[index]
            raise
        if resumed:
            self._on_resumed(index, resumed)
        if first:
            self._on_running(True)
        if self._announced_later is not None:
            await self.send_rarp(self._announced_later)

    def _recorded(self, index: int, vring: Vring) -> Vring:
        """The vring with a record of what is in flight: the front-end's, or else ours."""
        if vring.inflight_fd >= 0 or self._records is None:
            return vring
        offset = self._records.offset_for(index, vring, self._regions)
        return vring if offset is None else replace(vring, inflight_fd=self._records.fd, inflight_offset=offset)

    async def stop_vring(self, index: int) -> int:
        """Stop a virtqueue; its base is returned when every buffer has come back and no NIC can write to one.

        Raises:
            HostError: EBUSY if the kernel does not let go of the hardware queue.
        """
        if index not in self._running:
            return 0  # its start was cancelled before the engine heard of it
        queue_pair = index // 2
        async with self._sockets.lock(queue_pair):
            if not self._engine.socket_attached(queue_pair):
                await self._sockets.prove_free(queue_pair)
            try:
                base = await self._engine.stop_vring(index)
            except HostError as error:
                if error.errno != errno.EBUSY:
                    raise
                # The kernel has buffers of it; only closing the socket brings them back.
                await self._sockets.close(queue_pair)
                base = await self._engine.stop_vring(index)
            # Not before: a virtqueue that could not be stopped is still to be stopped.
            self._forget_running(index)
        if index ^ 1 in self._running and not self._engine.socket_attached(queue_pair):
            self._sockets.attach_later(queue_pair)
        return base

    async def set_vring_enabled(self, index: int, enabled: bool) -> None:
        """Let a started virtqueue move frames, or not."""
        await self._engine.set_vring_enabled(index, enabled)

    async def set_vring_call(self, index: int, fd: int) -> None:
        """Replace the call eventfd; -1 for none."""
        await self._engine.set_vring_call(index, fd)

    async def set_vring_err(self, index: int, fd: int) -> None:
        """Replace the err eventfd; -1 for none."""
        await self._engine.set_vring_err(index, fd)

    async def set_mtu(self, mtu_bytes: int) -> None:
        """Check the MTU that the guest will be told.

        Raises:
            RefusedError: the interface cannot carry such frames.
        """
        interface = self._interface
        if interface is not None and mtu_bytes > interface.mtu_bytes:
            raise RefusedError(
                f"a guest MTU of {mtu_bytes} does not fit {interface.interface} (MTU {interface.mtu_bytes}): "
                f"use host_mtu={interface.mtu_bytes} or less"
            )

    async def send_rarp(self, mac: bytes) -> None:
        """Announce the guest's address to the network after a migration (vhost-user.rst, VHOST_USER_SEND_RARP).

        QEMU asks before it starts the guest too: then it goes out as soon as there is a socket.
        """
        self._address = mac
        if not self._engine.socket_attached(0):
            self._announced_later = mac
            return
        self._announced_later = None
        try:
            await self._engine.send_frame(0, rarp_frame(mac))
        except MpassthruError as error:
            # The guest's own next frame tells the network where it is: no reason to end its session.
            self._notice(f"cannot announce the guest's address: {error}")

    async def set_status(self, status: int) -> None:
        """Nothing to do: virtqueues tell what the driver is ready for."""

    async def reset(self) -> None:
        """Close every socket; the session has stopped the virtqueues."""
        for index in tuple(self._running):
            self._forget_running(index)
        async with self._sockets.changing:
            await self._sockets.give_up_all()

    def _forget_running(self, index: int) -> None:
        del self._running[index]
        if not self._running:
            self._on_running(False)

    def distrust(self, queue_pair: int, error: str, *, zero_copy: bool) -> Coroutine[None, None, None]:
        """The kernel answered with a buffer that it did not have, and the engine has closed that socket.

        In zero-copy mode that is the driver's doing. All queue pairs are that driver's, and go on in copy mode, where
        the kernel stands in between. If copy mode has gone wrong there is nothing to go on in: the engine has stopped
        both virtqueues until the front-end starts them again. docs/decisions/0012.

        Args:
            queue_pair: Whose socket it was.
            error: What the engine has seen.
            zero_copy: The socket's mode.

        Returns:
            What is left to do. What the socket was bound to is looked at now: its queue pair may have another one by
            the time that this is awaited.
        """
        bound = self._sockets.bound_to(queue_pair) or self._interface
        if zero_copy and bound is not None:
            self._sockets.distrust(bound.driver)
        return self._go_on_without(queue_pair, bound, error, zero_copy=zero_copy)

    async def _go_on_without(self, queue_pair: int, bound: Binding | None, error: str, *, zero_copy: bool) -> None:
        suspect = f"{error}; suspect its driver"
        if bound is not None:
            suspect = f"{suspect}, {bound.driver} of {bound.interface}"
        try:
            if zero_copy:
                self._trouble(f"{suspect}; going on in copy mode, as long as this worker lives")
                await self._sockets.leave_zero_copy(bound.driver if bound else None)
            else:
                self._trouble(f"{suspect}; both virtqueues of the pair stand still until the guest starts them anew")
                await self._sockets.give_up(queue_pair)
        except ControlError:
            return  # the broker is gone, and with it this process
        except MpassthruError as failure:
            self._trouble(f"queue pair {queue_pair} stands still: {failure}")

    def looks_unshared(self) -> bool:
        """Whether the rings of all running virtqueues hold nothing but zeros, as they do in memory that is not shared.

        A driver posts rx buffers when it starts, so that its rx rings at least are not zero for long. Read through the
        front-end's files, for a mapping is the engine's alone.
        """
        return bool(self._running) and not any(self._has_content(vring) for vring in self._running.values())

    def _has_content(self, vring: Vring) -> bool:
        table = self._read_memory(vring.desc_user_address, DESCRIPTOR_BYTES * vring.size)
        entries_bytes = 0 if is_packed(vring.features) else 2 * vring.size
        avail = self._read_memory(vring.avail_user_address, AVAIL_HEADER_BYTES + entries_bytes)
        return any(table) or any(avail)

    def _read_memory(self, user_address: int, size_bytes: int) -> bytes:
        """Guest memory at a front-end's address; what crosses into the next region is left out."""
        for region in self._regions:
            offset = user_address - region.user_address
            if 0 <= offset < region.size_bytes:
                return os.pread(region.fd, min(size_bytes, region.size_bytes - offset), region.mmap_offset + offset)
        return b""

    async def _reserve(self, regions: Sequence[MemoryRegion]) -> None:
        """Make sure that so much memory may be locked, before anything is."""
        if not self._pins_memory:
            return
        needed_bytes = pinned_bytes(regions, self.queue_pairs_max) if regions else 0
        if needed_bytes != self._locked_bytes:
            check_memlock(needed_bytes)
            await self._client.lock_memory(needed_bytes)
            self._locked_bytes = needed_bytes


def core_regions(regions: Sequence[MemoryRegion]) -> list[_core.MemoryRegion]:
    """Regions as the engine takes them."""
    return [
        _core.MemoryRegion(
            guest_phys_address=region.guest_phys_address,
            size_bytes=region.size_bytes,
            user_address=region.user_address,
            mmap_offset=region.mmap_offset,
            fd=region.fd,
        )
        for region in regions
    ]


def vring_config(vring: Vring) -> _core.VringConfig:
    """A virtqueue as the engine takes it."""
    return _core.VringConfig(
        size=vring.size,
        base=vring.base,
        desc_user_address=vring.desc_user_address,
        avail_user_address=vring.avail_user_address,
        used_user_address=vring.used_user_address,
        features=vring.features,
        enabled=vring.enabled,
        kick_fd=vring.kick_fd,
        call_fd=vring.call_fd,
        err_fd=vring.err_fd,
        record_fd=vring.inflight_fd,
        record_offset=vring.inflight_offset,
        log_buffers=vring.log_buffers,
        log_used_address=vring.log_used_address,
    )


def rarp_frame(mac: bytes) -> bytes:
    """A broadcast RARP request of a station for its own address (RFC 903), padded to the shortest Ethernet frame."""
    ethernet = b"\xff" * 6 + mac + ETHERTYPE_RARP.to_bytes(2, "big")
    hardware_ethernet, protocol_ipv4, request_reverse = 1, 0x0800, 3
    fixed = hardware_ethernet.to_bytes(2, "big") + protocol_ipv4.to_bytes(2, "big") + bytes((6, 4))
    body = fixed + request_reverse.to_bytes(2, "big") + (mac + bytes(4)) * 2
    return (ethernet + body).ljust(FRAME_MIN_BYTES, b"\0")
