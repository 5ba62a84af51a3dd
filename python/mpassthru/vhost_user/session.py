"""One front-end's connection: the back-end side of vhost-user, driving a `Device`.

Messages are handled one after the other, in order. How a failure ends:

* ProtocolError: the front-end broke the protocol. The connection ends.
* Any other MpassthruError, of the device or of a message that is not offered: a non-zero acknowledgement if the
  front-end asked for one (REPLY_ACK), otherwise the connection ends, for a front-end that goes on as if it had
  worked would be wrong about the device.

Invariant: when `run` returns, however it does, every vring is stopped, no memory is mapped and every descriptor that
the front-end sent is closed. If the device does not let go of a vring or of memory, `run` ends with a StillInUseError:
no other session may have that device.

Front-ends differ in order and repetition; what is accepted for their sake is said at each handler.
vhost-user.rst, "Front-end message types".
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from mpassthru.errors import HostError, MpassthruError, ProtocolError, RefusedError
from mpassthru.vhost_user.connection import Connection
from mpassthru.vhost_user.device import Device
from mpassthru.vhost_user.features import ProtocolFeature, VirtioFeature, describe_bits
from mpassthru.vhost_user.handlers import FdReply, can_be_acknowledged, find_rule, handles
from mpassthru.vhost_user.inflight import InflightArea
from mpassthru.vhost_user.memory import MemoryRegion, MemoryTable
from mpassthru.vhost_user.message import (
    U64,
    VHOST_VRING_F_LOG,
    Empty,
    Inflight,
    LogDescription,
    MacAddress,
    Message,
    Payload,
    RegionTable,
    Request,
    SingleRegion,
    VringAddress,
    VringFile,
    VringState,
)
from mpassthru.vhost_user.vring import VRING_SIZE_MAX, Ring, RingPhase

log = logging.getLogger(__name__)

MEM_SLOTS_MAX = 32
"""Regions of guest memory that a session holds; each keeps one descriptor open."""

MTU_MIN_BYTES, MTU_MAX_BYTES = 68, 65535
"""VIRTIO 1.3 section 5.1.4.1: the device's `mtu`."""

ONE_FD = range(1, 2)
AT_MOST_ONE_FD = range(2)
FD_PER_REGION = range(9)

SUPPORTED_PROTOCOL_FEATURES = (
    ProtocolFeature.VHOST_USER_PROTOCOL_F_MQ
    | ProtocolFeature.VHOST_USER_PROTOCOL_F_LOG_SHMFD
    | ProtocolFeature.VHOST_USER_PROTOCOL_F_RARP
    | ProtocolFeature.VHOST_USER_PROTOCOL_F_REPLY_ACK
    | ProtocolFeature.VHOST_USER_PROTOCOL_F_MTU
    | ProtocolFeature.VHOST_USER_PROTOCOL_F_BACKEND_REQ
    | ProtocolFeature.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD
    | ProtocolFeature.VHOST_USER_PROTOCOL_F_RESET_DEVICE
    | ProtocolFeature.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS
    | ProtocolFeature.VHOST_USER_PROTOCOL_F_STATUS
)
"""What a session can answer; a device offers these or fewer."""

_SLOTS = ProtocolFeature.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS
_INFLIGHT = ProtocolFeature.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD
_STATUS = ProtocolFeature.VHOST_USER_PROTOCOL_F_STATUS
_LOG = ProtocolFeature.VHOST_USER_PROTOCOL_F_LOG_SHMFD


class StillInUseError(MpassthruError):
    """The device goes on with what a front-end gave it, though that is gone. Only its end brings that back."""


@dataclass(slots=True)
class Counters:
    """What a back-end saw, over all its connections."""

    connections: int = 0
    messages: int = 0
    protocol_errors: int = 0
    refusals: int = 0
    """Messages answered with a non-zero acknowledgement."""


class Session:
    """State of one connection, which it owns.

    Attributes:
        features: Acknowledged virtio features; None until SET_FEATURES.
        protocol_features: Acknowledged protocol features.
        memory: The front-end's memory, as mapped by the device.
        rings: Every vring that the device has, by index.
        status: The virtio device status.
    """

    def __init__(self, connection: Connection, device: Device, counters: Counters | None = None) -> None:
        assert not device.protocol_features & ~SUPPORTED_PROTOCOL_FEATURES, "a device offers what the session answers"
        self.features: int | None = None
        self.protocol_features = 0
        self.memory = MemoryTable()
        self.rings = [Ring(index, device) for index in range(2 * device.queue_pairs_max)]
        self.status = 0
        self.counters = counters if counters is not None else Counters()
        self._backend_req_fd = -1
        self._inflight: InflightArea | None = None
        self._connection = connection
        self._device = device

    async def run(self) -> None:
        """Answer messages until the front-end disconnects; then leave nothing behind.

        Raises:
            ProtocolError: the front-end broke the protocol, or asked for what is not offered without asking whether it
                worked. One line that names the message and the reason.
            MpassthruError: the device failed, and the front-end had not asked whether it worked.
            StillInUseError: the device could not be taken back from the front-end.
        """
        try:
            while (message := await self._connection.receive()) is not None:
                self.counters.messages += 1
                with message:
                    # There may always be a next message: other tasks get their turn between two.
                    await asyncio.sleep(0)
                    await self._handle(message)
        except ConnectionError as error:
            log.debug("front-end gone before it read its reply: %s", error)
        except ProtocolError:
            self.counters.protocol_errors += 1
            raise
        finally:
            await self._close()

    async def _handle(self, message: Message) -> None:
        try:
            reply = await self._dispatch(message)
        except ProtocolError as error:
            raise ProtocolError(f"{message.name}: {error}") from error
        except MpassthruError as error:
            if not self._wants_acknowledgement(message):
                raise _ending(message, error) from error
            self.counters.refusals += 1
            log.warning("%s refused: %s", message.name, error)
            reply = U64(1)
        if reply is None and self._wants_acknowledgement(message):
            reply = U64(0)
        if isinstance(reply, FdReply):
            try:
                await self._connection.send(message.request, reply.payload, reply=True, fds=(reply.fd,))
            finally:
                os.close(reply.fd)
        elif reply is not None:
            await self._connection.send(message.request, reply, reply=True)

    async def _dispatch(self, message: Message) -> Payload | FdReply | None:
        if message.is_reply:
            raise ProtocolError("a reply, to nothing that was asked")
        rule = find_rule(message)
        return await rule.handler(self, *rule.arguments(message, self._device.protocol_features))

    def _wants_acknowledgement(self, message: Message) -> bool:
        negotiated = self.protocol_features & ProtocolFeature.VHOST_USER_PROTOCOL_F_REPLY_ACK
        return message.needs_reply and bool(negotiated) and can_be_acknowledged(message.request)

    async def _close(self) -> None:
        failures: list[MpassthruError] = []
        try:
            for ring in self.rings:
                try:
                    await ring.stop()
                except MpassthruError as error:
                    log.error("vring %d at the end of the connection: %s", ring.index, error)  # noqa: TRY400
                    failures.append(error)
            try:
                await self._device.map_memory(())
            except MpassthruError as error:
                log.error("guest memory at the end of the connection: %s", error)  # noqa: TRY400
                failures.append(error)
            await self._device.set_log_fd(-1)
            await self._device.set_log(-1, 0, 0)
        finally:
            for ring in self.rings:
                ring.close()
            self._keep_backend_req_fd(-1)
            self._keep_inflight(None)
            self.memory.close_except(MemoryTable())
            self.memory = MemoryTable()
            self._connection.close()
        if failures:
            raise StillInUseError(f"what the front-end gave is still in use: {failures[0]}") from failures[0]

    # ---- negotiation ---------------------------------------------------------------------------------------

    @handles(Request.VHOST_USER_GET_FEATURES, Empty, has_reply=True)
    async def _get_features(self) -> U64:
        return U64(self._device.features)

    @handles(Request.VHOST_USER_SET_FEATURES, U64)
    async def _set_features(self, payload: U64) -> None:
        """QEMU repeats this for each queue pair, when earlier ones run already: nothing to do if nothing changed.

        Logging is switched without stopping a vring: a migration begins and ends under traffic.
        """
        features = payload.value
        if unknown := features & ~self._device.features:
            raise ProtocolError(f"not offered: {describe_bits(VirtioFeature, unknown)}")
        if features == self.features and any(ring.started for ring in self.rings):
            return
        if self.features is not None and features ^ self.features == VirtioFeature.VHOST_F_LOG_ALL:
            await self._device.log_writes(bool(features & VirtioFeature.VHOST_F_LOG_ALL))
            self.features = features
            return
        async with self._rings_paused():
            await self._device.set_features(features)
            self.features = features

    @handles(Request.VHOST_USER_GET_PROTOCOL_FEATURES, Empty, has_reply=True)
    async def _get_protocol_features(self) -> U64:
        self._need_protocol_features()
        return U64(self._device.protocol_features)

    @handles(Request.VHOST_USER_SET_PROTOCOL_FEATURES, U64)
    async def _set_protocol_features(self, payload: U64) -> None:
        self._need_protocol_features()
        if unknown := payload.value & ~self._device.protocol_features:
            raise ProtocolError(f"not offered: {describe_bits(ProtocolFeature, unknown)}")
        self.protocol_features = payload.value

    @handles(Request.VHOST_USER_GET_QUEUE_NUM, Empty, needs=ProtocolFeature.VHOST_USER_PROTOCOL_F_MQ, has_reply=True)
    async def _get_queue_num(self) -> U64:
        return U64(self._device.queue_pairs_max)

    @handles(Request.VHOST_USER_SET_OWNER, Empty)
    async def _set_owner(self) -> None:
        """The connection itself says whose session this is."""

    @handles(Request.VHOST_USER_RESET_OWNER, Empty)
    async def _reset_owner(self) -> None:
        """Deprecated; the specification's advice is to ignore it or to disable all rings.

        Disabled only where the front-end can enable them again.
        """
        if (self.features or 0) & VirtioFeature.VHOST_USER_F_PROTOCOL_FEATURES:
            for ring in self.rings:
                await self._enable(ring, False)

    # ---- guest memory --------------------------------------------------------------------------------------

    @handles(Request.VHOST_USER_SET_MEM_TABLE, RegionTable, fds=FD_PER_REGION)
    async def _set_mem_table(self, payload: RegionTable, message: Message) -> None:
        """Repeated at each start of the driver; a table that did not change keeps its mapping.

        Regions that were there before keep theirs, by the descriptors that came first.
        """
        if len(payload.regions) != len(message.fds):
            raise ProtocolError(f"{len(message.fds)} descriptors came along with {len(payload.regions)} regions")
        pairs = zip(payload.regions, message.fds, strict=True)
        table = MemoryTable(MemoryRegion.from_description(region, fd) for region, fd in pairs)
        if self.memory.is_same_memory(table):
            return
        message.take_fds()
        kept = self.memory.replaced_by(table)
        table.close_except(kept)
        await self._map(kept)

    @handles(Request.VHOST_USER_GET_MAX_MEM_SLOTS, Empty, needs=_SLOTS, has_reply=True)
    async def _get_max_mem_slots(self) -> U64:
        return U64(MEM_SLOTS_MAX)

    @handles(Request.VHOST_USER_ADD_MEM_REG, SingleRegion, fds=ONE_FD, needs=_SLOTS)
    async def _add_mem_reg(self, payload: SingleRegion, message: Message) -> None:
        """QEMU 7.2 with several queue pairs sends each region once per pair: the same region again is no change."""
        region = MemoryRegion.from_description(payload.region, message.fds[0])
        known = self.memory.find(payload.region)
        if known is not None and known.is_same_memory(region):
            return
        if len(self.memory) >= MEM_SLOTS_MAX:
            raise RefusedError(f"{region} is one more than the {MEM_SLOTS_MAX} memory slots")
        table = self.memory.with_region(region)
        message.take_fds()
        await self._map(table)

    @handles(Request.VHOST_USER_REM_MEM_REG, SingleRegion, fds=AT_MOST_ONE_FD, needs=_SLOTS)
    async def _rem_mem_reg(self, payload: SingleRegion, _message: Message) -> None:
        """A descriptor that older front-ends send along is closed. A region already gone is QEMU 7.2 once more.

        The answer says that nothing of ours, of the kernel's or of the NIC's can touch the region any more.
        """
        region = self.memory.find(payload.region)
        if region is None:
            log.debug("region at %#x to remove is not mapped", payload.region.guest_phys_address)
            return
        await self._map(self.memory.without_region(region))

    # ---- migration -----------------------------------------------------------------------------------------

    @handles(Request.VHOST_USER_SET_LOG_BASE, LogDescription, fds=AT_MOST_ONE_FD, needs=_LOG, has_reply=True)
    async def _set_log_base(self, payload: LogDescription, message: Message) -> U64:
        """Answered once nothing refers to the old log, which the front-end reads a last time then.

        Repeated with another size when guest memory grows. A log that cannot be had ends the connection: front-ends
        do not look into the reply, and would go on migrating without the pages that are written here.
        """
        if not self.protocol_features & _LOG or not message.fds:
            raise RefusedError("a log without descriptor cannot be mapped; it needs VHOST_USER_PROTOCOL_F_LOG_SHMFD")
        await self._device.set_log(message.fds[0], payload.size_bytes, payload.mmap_offset)
        return U64(0)

    @handles(Request.VHOST_USER_SET_LOG_FD, Empty, fds=AT_MOST_ONE_FD, needs=_LOG)
    async def _set_log_fd(self, message: Message) -> None:
        await self._device.set_log_fd(message.fds[0] if message.fds else -1)

    # ---- vrings --------------------------------------------------------------------------------------------

    @handles(Request.VHOST_USER_SET_VRING_NUM, VringState)
    async def _set_vring_num(self, payload: VringState) -> None:
        ring = self._ring(payload.index)
        ring.set_size(payload.num)
        await ring.start_if_ready(self.memory, self.features)

    @handles(Request.VHOST_USER_SET_VRING_ADDR, VringAddress)
    async def _set_vring_addr(self, payload: VringAddress) -> None:
        """May come again while the vring runs: the same addresses are no change, others move it with its base."""
        ring = self._ring(payload.index)
        offered = VHOST_VRING_F_LOG if self._device.features & VirtioFeature.VHOST_F_LOG_ALL else 0
        if payload.flags & ~offered:
            raise RefusedError(f"flags {payload.flags:#x}: only logging is possible, and only if it was offered")
        for part, address, alignment_bytes in (
            # VIRTIO 1.3 section 2.7
            ("descriptor table", payload.desc_user_address, 16),
            ("avail ring", payload.avail_user_address, 2),
            ("used ring", payload.used_user_address, 4),
        ):
            if address % alignment_bytes:
                raise ProtocolError(f"{part} at {address:#x} is not aligned to {alignment_bytes} bytes")
        if ring.started and ring.lies_at(payload):
            await ring.change_log(payload)
            return
        await ring.pause()
        ring.address = payload
        await ring.start_if_ready(self.memory, self.features)

    @handles(Request.VHOST_USER_SET_VRING_BASE, VringState)
    async def _set_vring_base(self, payload: VringState) -> None:
        ring = self._ring(payload.index)
        ring.set_base(payload.num)
        await ring.start_if_ready(self.memory, self.features)

    @handles(Request.VHOST_USER_GET_VRING_BASE, VringState, has_reply=True)
    async def _get_vring_base(self, payload: VringState) -> VringState:
        """Also asked for vrings that never started."""
        ring = self._ring(payload.index)
        await ring.stop()
        return VringState(ring.index, ring.base or 0)

    @handles(Request.VHOST_USER_SET_VRING_KICK, VringFile, fds=AT_MOST_ONE_FD)
    async def _set_vring_kick(self, payload: VringFile, message: Message) -> None:
        """Starts the vring. A new descriptor for a running one restarts it where it is."""
        ring = self._ring(payload.index)
        if _checked_fd(payload, message) < 0:
            raise RefusedError(f"vring {ring.index} would have to be polled; only kicks by descriptor are offered")
        await ring.pause()
        ring.set_kick(message.take_fds()[0])
        try:
            await ring.start_if_ready(self.memory, self.features)
        except MpassthruError:
            ring.set_kick(-1)
            raise

    @handles(Request.VHOST_USER_SET_VRING_CALL, VringFile, fds=AT_MOST_ONE_FD)
    async def _set_vring_call(self, payload: VringFile, message: Message) -> None:
        """Before the vring starts (DPDK sends it first of all), and at any time while it runs (interrupt masking)."""
        ring = self._ring(payload.index)
        fd = _checked_fd(payload, message)
        if ring.started:
            await self._device.set_vring_call(ring.index, fd)
        message.take_fds()
        ring.set_call(fd)

    @handles(Request.VHOST_USER_SET_VRING_ERR, VringFile, fds=AT_MOST_ONE_FD)
    async def _set_vring_err(self, payload: VringFile, message: Message) -> None:
        ring = self._ring(payload.index)
        fd = _checked_fd(payload, message)
        if ring.started:
            await self._device.set_vring_err(ring.index, fd)
        message.take_fds()
        ring.set_err(fd)

    @handles(Request.VHOST_USER_SET_VRING_ENABLE, VringState)
    async def _set_vring_enable(self, payload: VringState) -> None:
        """QEMU sends this before SET_FEATURES, so that having offered protocol features is all that can be asked."""
        self._need_protocol_features()
        ring = self._ring(payload.index)
        if payload.num not in (0, 1):
            raise ProtocolError(f"vring {ring.index}: {payload.num} is neither 0 nor 1")
        await self._enable(ring, bool(payload.num))

    # ---- what is in flight ---------------------------------------------------------------------------------

    @handles(Request.VHOST_USER_GET_INFLIGHT_FD, Inflight, needs=_INFLIGHT, has_reply=True)
    async def _get_inflight_fd(self, payload: Inflight) -> FdReply:
        """Once in the front-end's life; it hands what it gets to us, and to each back-end after us."""
        self._check_inflight(payload)
        area = InflightArea.make(payload.queues, payload.queue_size)
        return FdReply(area.description, area.fd)

    @handles(Request.VHOST_USER_SET_INFLIGHT_FD, Inflight, fds=ONE_FD, needs=_INFLIGHT)
    async def _set_inflight_fd(self, payload: Inflight, message: Message) -> None:
        """Holds for vrings that start from now on."""
        self._check_inflight(payload)
        area = InflightArea.of_frontend(payload, message.fds[0])
        message.take_fds()
        self._keep_inflight(area)

    # ---- device --------------------------------------------------------------------------------------------

    @handles(Request.VHOST_USER_SEND_RARP, MacAddress, needs=ProtocolFeature.VHOST_USER_PROTOCOL_F_RARP)
    async def _send_rarp(self, payload: MacAddress) -> None:
        await self._device.send_rarp(payload.mac)

    @handles(Request.VHOST_USER_NET_SET_MTU, U64, needs=ProtocolFeature.VHOST_USER_PROTOCOL_F_MTU)
    async def _net_set_mtu(self, payload: U64) -> None:
        if not MTU_MIN_BYTES <= payload.value <= MTU_MAX_BYTES:
            raise RefusedError(f"an MTU of {payload.value} bytes; {MTU_MIN_BYTES} to {MTU_MAX_BYTES} are possible")
        await self._device.set_mtu(payload.value)

    @handles(
        Request.VHOST_USER_SET_BACKEND_REQ_FD,
        Empty,
        fds=ONE_FD,
        needs=ProtocolFeature.VHOST_USER_PROTOCOL_F_BACKEND_REQ,
    )
    async def _set_backend_req_fd(self, message: Message) -> None:
        """Kept open while the connection lasts: front-ends take its end for a failed back-end."""
        self._keep_backend_req_fd(message.take_fds()[0])

    @handles(Request.VHOST_USER_SET_STATUS, U64, needs=_STATUS)
    async def _set_status(self, payload: U64) -> None:
        """VIRTIO 1.3 section 2.1: eight bits; 0 is a reset, after which no vring may be touched.

        Bases outlive it: QEMU 7.2 asks for them afterwards.
        """
        if payload.value > 0xFF:
            raise ProtocolError(f"a device status of {payload.value:#x}; it has eight bits")
        if payload.value == 0:
            await self._stop_all()
        await self._device.set_status(payload.value)
        self.status = payload.value

    @handles(Request.VHOST_USER_GET_STATUS, Empty, needs=_STATUS, has_reply=True)
    async def _get_status(self) -> U64:
        return U64(self.status)

    @handles(Request.VHOST_USER_RESET_DEVICE, Empty, needs=ProtocolFeature.VHOST_USER_PROTOCOL_F_RESET_DEVICE)
    async def _reset_device(self) -> None:
        """Memory and call descriptors stay: QEMU sends neither again after a reset."""
        await self._stop_all()
        await self._device.reset()
        for ring in self.rings:
            ring.forget()
        self.features = None
        self.status = 0

    # ---- what handlers share -------------------------------------------------------------------------------

    def _ring(self, index: int) -> Ring:
        if index >= len(self.rings):
            raise ProtocolError(f"vring {index} of a device with {len(self.rings)}")
        return self.rings[index]

    def _need_protocol_features(self) -> None:
        if not self._device.features & VirtioFeature.VHOST_USER_F_PROTOCOL_FEATURES:
            raise RefusedError("VHOST_USER_F_PROTOCOL_FEATURES was not offered")

    def _check_inflight(self, payload: Inflight) -> None:
        if not 0 < payload.queues <= len(self.rings):
            raise ProtocolError(f"an area for {payload.queues} vrings of a device with {len(self.rings)}")
        if not 0 < payload.queue_size <= VRING_SIZE_MAX:
            raise ProtocolError(f"vrings of {payload.queue_size} entries; 1 to {VRING_SIZE_MAX} are possible")

    def _keep_inflight(self, area: InflightArea | None) -> None:
        if self._inflight is not None:
            self._inflight.close()
        self._inflight = area
        for ring in self.rings:
            ring.inflight = area

    def _keep_backend_req_fd(self, fd: int) -> None:
        if self._backend_req_fd >= 0:
            os.close(self._backend_req_fd)
        self._backend_req_fd = fd

    async def _enable(self, ring: Ring, enabled: bool) -> None:
        if ring.started and ring.is_enabled(self.features or 0) != enabled:
            await self._device.set_vring_enabled(ring.index, enabled)
        ring.enabled = enabled

    async def _stop_all(self) -> None:
        for ring in self.rings:
            await ring.stop()

    @asynccontextmanager
    async def _rings_paused(self) -> AsyncIterator[None]:
        """Stop the vrings that run for the length of a `with`; afterwards start every vring that can, also on failure.

        Not when cancelled: then the session is about to end.
        """
        try:
            for ring in self.rings:
                await ring.pause()
            yield
        except MpassthruError:
            await self._resume()
            raise
        await self._resume()

    async def _resume(self) -> None:
        """Start the waiting vrings. One whose parts are not in memory waits on: QEMU removes regions to add others."""
        for ring in self.rings:
            if ring.lies_in(self.memory, self.features):
                await ring.start_if_ready(self.memory, self.features)
            elif ring.phase is RingPhase.WAITING:
                log.warning("vring %d stands still: it is outside the memory that the front-end sent", ring.index)

    async def _map(self, table: MemoryTable) -> None:
        """Replace the memory map; `table` belongs to the session from here on. After a failure the old map is back.

        Running vrings go on if memory was only added; else they are stopped meanwhile.
        """
        old = self.memory
        try:
            if not await self._only_add(table):
                await self._replace(table)
        finally:
            # Whatever came of it, only the regions that are mapped now keep their descriptors.
            for region in {*old, *table}.difference(self.memory):
                os.close(region.fd)

    async def _only_add(self, table: MemoryTable) -> bool:
        """Add what `table` has more, while vrings run. False if that is not how it differs, or cannot be done."""
        added = table.added_to(self.memory)
        if added is None or (added and not any(ring.started for ring in self.rings)):
            return False
        if added and not await self._device.add_memory(added):
            return False
        self.memory = table
        await self._resume()
        return True

    async def _replace(self, table: MemoryTable) -> None:
        old = self.memory
        async with self._rings_paused():
            self.memory = table
            try:
                await self._device.map_memory(table.regions)
            except MpassthruError:
                await self._map_again(old)
                raise

    async def _map_again(self, old: MemoryTable) -> None:
        self.memory = old
        try:
            await self._device.map_memory(old.regions)
        except MpassthruError:
            self.memory = MemoryTable()
            raise


def _checked_fd(payload: VringFile, message: Message) -> int:
    """The descriptor that came along, still the message's; -1 if the payload says that there is none."""
    if payload.has_fd != bool(message.fds):
        raise ProtocolError(
            f"vring {payload.index}: {len(message.fds)} descriptors came along, "
            f"and the payload says {int(payload.has_fd)}"
        )
    return message.fds[0] if message.fds else -1


def _ending(message: Message, error: MpassthruError) -> MpassthruError:
    """What ends the connection when `error` cannot be said to the front-end."""
    line = f"{message.name}: {error}"
    return HostError(error.errno or 0, line) if isinstance(error, HostError) else ProtocolError(line)
