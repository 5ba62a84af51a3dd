"""The sockets of a port's queue pairs: what they are bound to, and how they come, are exchanged and go.

A queue pair has a socket while one of its virtqueues runs and the port is bound to an interface. Without one,
virtqueues run on all the same: nothing is received, and what the guest sends is dropped after a moment (the engine's
business).

In zero-copy mode a NIC writes to the guest's buffers for some 40 ms after a socket was closed. So buffers go back to
the guest, and the next socket is bound, only after the broker has seen the hardware queue free (`prove_free`); who has
heard that a virtqueue stopped, or that memory is no longer used, can rely on it.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

from mpassthru import _core
from mpassthru.control import Binding, Configure, ControlError, SocketMode
from mpassthru.errors import HostError, MpassthruError
from mpassthru.rules import ZeroCopyRules
from mpassthru.worker.async_engine import AsyncEngine
from mpassthru.worker.socket_client import SocketClient
from mpassthru.worker.socket_renewal import SocketRenewal

ATTACH_AGAIN_AFTER_S: Final = 0.2
"""How long a virtqueue may be without socket after the other one of its pair was stopped. A front-end that stops all of
them does so one after the other, and would have guest memory pinned anew in between for nothing."""
ATTACH_AGAIN_PAUSE_MAX_S: Final = 5.0
INTERFACE_AWAY: Final = frozenset({errno.ENETDOWN, errno.ENODEV, errno.ENXIO, errno.EINVAL})
"""What a bind says of an interface that is down, gone, or has lost the queue; the broker will hear of it too."""
_EARLIER_WORKER: Final = 0
"""Stands for the serial number of what an earlier worker's socket was bound to."""


class PortSockets:
    """The sockets of one port.

    Args:
        engine: The data plane.
        client: Where sockets come from.
        configuration: What they are bound to at first.
        is_needed: Whether a virtqueue of a queue pair runs.
        notice: Called with one line for the user.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        client: SocketClient,
        configuration: Configure,
        *,
        is_needed: Callable[[int], bool],
        notice: Callable[[str], None],
    ) -> None:
        self.queue_pairs_max = configuration.queue_pairs
        self.binding = configuration.binding
        """None while the port has no interface."""
        self.changing = asyncio.Lock()
        """Held by whoever changes guest memory or the binding."""
        self.renewal = SocketRenewal(self, engine, notice)
        self._engine = engine
        self._client = client
        self._is_needed = is_needed
        self._notice = notice
        self._attaching = [asyncio.Lock() for _ in range(configuration.queue_pairs)]
        self._bound_to: dict[int, Binding] = {}
        """What the broker takes queue pairs to be bound to; between two sockets, what the last one was bound to."""
        self._distrusted: set[str | None] = set()
        """Drivers whose zero-copy mode has gone wrong: sockets on their interfaces are in copy mode from then on."""
        self._unproven = dict.fromkeys(configuration.unproven, _EARLIER_WORKER)
        """Queue pairs whose last zero-copy socket is closed, and whose hardware queue was not seen free since; with the
        serial number of what it was bound to."""
        self._attaching_again: set[asyncio.Task[None]] = set()
        self._preparing: set[int] = set()
        self._prepared: dict[int, int] = {}
        """Queue pairs whose next socket is being prepared, or is, and is the one that the broker granted last; with the
        serial number of what it is to be bound to."""

    def lock(self, queue_pair: int) -> asyncio.Lock:
        """Held by whoever gives a queue pair a socket, or takes it away."""
        return self._attaching[queue_pair]

    @asynccontextmanager
    async def _every_lock(self) -> AsyncIterator[None]:
        """While held, no queue pair gets a socket or loses it but by the holder."""
        async with AsyncExitStack() as held:
            for lock in self._attaching:
                await held.enter_async_context(lock)
            yield

    # ---- one after the other ---------------------------------------------------------------------------------

    async def attach(self, queue_pair: int, *, for_running: bool = False) -> None:
        """Give a queue pair a socket, unless it has one or the port has no interface.

        Args:
            queue_pair: Which.
            for_running: Only if a virtqueue runs.

        Raises:
            MpassthruError: none could be had or bound.
        """
        async with self.lock(queue_pair):
            binding = self.binding
            if binding is None or self._engine.socket_attached(queue_pair):
                return
            if for_running and not self._is_needed(queue_pair):
                self._end_exchange(queue_pair)
                return
            bind = self._bind_prepared
            if self._prepared.get(queue_pair) != binding.serial:
                self._discard_prepared(queue_pair)
                bind = self._bind_new
            if bind == self._bind_new or self._unproven.get(queue_pair) != binding.serial:
                # A new socket gives the buffers of the one before back to their virtqueues.
                await self.prove_free(queue_pair)
            self._bound_to[queue_pair] = binding
            try:
                await self._client.bound(queue_pair, await bind(queue_pair, binding))
            except BaseException:
                if self._engine.socket_attached(queue_pair):
                    await self._detach(queue_pair)
                # The broker's copy would keep the socket, and with it all of guest memory pinned.
                self._tell_released(queue_pair)
                raise

    def attach_later(self, queue_pair: int) -> None:
        """Give what still runs of a queue pair a new socket, in the background, sooner or later."""
        again = asyncio.create_task(self._attach_again(queue_pair))
        self._attaching_again.add(again)
        again.add_done_callback(self._attaching_again.discard)

    async def _attach_again(self, queue_pair: int) -> None:
        pause_s, told = ATTACH_AGAIN_AFTER_S, False
        while True:
            await asyncio.sleep(pause_s)
            try:
                await self.attach(queue_pair, for_running=True)
            except ControlError:
                return  # the broker is gone, and with it this process
            except MpassthruError as error:
                if not told:
                    self._notice(f"queue pair {queue_pair} stands still until it has a socket again: {error}")
                told, pause_s = True, min(2 * pause_s, ATTACH_AGAIN_PAUSE_MAX_S)
            else:
                return

    async def give_up(self, queue_pair: int) -> None:
        """Close a socket; its virtqueues stay, and its buffers go back to them when they stop or get a new one.

        Raises:
            HostError: EBUSY if the kernel does not let go of the hardware queue.
        """
        async with self.lock(queue_pair):
            await self.close(queue_pair)

    async def give_up_all(self) -> None:
        """Close every socket, and exchange none any more.

        Raises:
            HostError: EBUSY if the kernel does not let go of a hardware queue.
        """
        await self.renewal.stop()
        for queue_pair in range(self.queue_pairs_max):
            await self.give_up(queue_pair)

    async def close(self, queue_pair: int) -> None:
        """As `give_up`, by whoever holds the queue pair's lock."""
        self._discard_prepared(queue_pair)
        if self._engine.socket_attached(queue_pair):
            await self._detach(queue_pair)
            if queue_pair not in self._unproven:
                self._tell_released(queue_pair)
        else:
            self._end_exchange(queue_pair)
        await self.prove_free(queue_pair)

    def _end_exchange(self, queue_pair: int) -> None:
        """No socket follows the last one: if that is not said by `prove_free`, say it."""
        self._discard_prepared(queue_pair)
        if queue_pair in self._bound_to and queue_pair not in self._unproven:
            self._tell_released(queue_pair)

    def _tell_released(self, queue_pair: int) -> None:
        self._bound_to.pop(queue_pair, None)
        self._client.released(queue_pair)

    async def prove_free(self, queue_pair: int) -> None:
        """Wait until no NIC can write to the buffers of the last socket.

        Raises:
            HostError: the kernel still holds the hardware queue.
        """
        if queue_pair in self._unproven:
            await self._client.freed(queue_pair)
            del self._unproven[queue_pair]
            self._bound_to.pop(queue_pair, None)

    async def _detach(self, queue_pair: int) -> None:
        binding = self._bound_to.get(queue_pair)
        if binding is not None and binding.socket_mode == "zero-copy":
            self._unproven[queue_pair] = binding.serial
        await self._engine.detach_socket(queue_pair)

    # ---- exchanged -------------------------------------------------------------------------------------------

    async def rebind(self, binding: Binding | None) -> bool:
        """Have the sockets on another interface, or on the same in another way, or none.

        What takes long, pinning guest memory, happens before the present sockets are closed.

        Args:
            binding: What to bind to; if it is what sockets are bound to already, only missing ones are made.

        Returns:
            Whether a queue pair has a socket that it had not before.

        Raises:
            MpassthruError: a socket could not be had or bound; the others were.
        """
        async with self.changing:
            await self.renewal.stop()
            if binding is None:
                self.binding = None
                await self._close_all()
                return False
            await self._prepare_for(binding)
            async with self._every_lock():
                # A socket bound elsewhere, beside one of before, would register guest memory once more.
                for queue_pair in range(self.queue_pairs_max):
                    await self._close_other(queue_pair, binding)
                self.binding = binding
            before = self._attached()
            errors = await self._attach_needed()
            self.renewal.start()
        if errors:
            raise errors[0]
        return self._attached() != before

    async def _prepare_for(self, binding: Binding) -> None:
        """Register guest memory on a first socket for another binding, if that can be done beside the present ones."""
        others = [pair for pair in self._attached() if self._bound_to[pair] != binding and self._is_needed(pair)]
        if not others or binding.socket_mode == "packet":
            return
        try:
            await self._prepare(others[0], binding)
        except HostError as error:
            if error.errno != errno.ENOBUFS:
                raise
            # The memlock limit does not allow for the memory twice: the present ones have to go first.

    async def _close_other(self, queue_pair: int, binding: Binding) -> None:
        """Close a socket that is bound to something else, by whoever holds the queue pair's lock."""
        if self._engine.socket_attached(queue_pair) and self._bound_to[queue_pair] != binding:
            await self._detach(queue_pair)
            if queue_pair not in self._prepared:
                self._tell_released(queue_pair)

    async def _attach_needed(self) -> list[MpassthruError]:
        errors: list[MpassthruError] = []
        for queue_pair in range(self.queue_pairs_max):
            try:
                await self.attach(queue_pair, for_running=True)
            except ControlError:
                raise
            except MpassthruError as error:
                errors.append(error)
        return errors

    async def _close_all(self) -> None:
        """Close every socket and give the guest back what it had, so that its virtqueues do not stand still."""
        for queue_pair in range(self.queue_pairs_max):
            async with self.lock(queue_pair):
                try:
                    await self.close(queue_pair)
                except HostError as error:
                    # Nothing is given back then, nor bound to: whoever wants to asks again.
                    self._notice(f"buffers of queue pair {queue_pair} are not given back yet: {error}")
                else:
                    await self._engine.reclaim(queue_pair)

    def _attached(self) -> set[int]:
        return {pair for pair in range(self.queue_pairs_max) if self._engine.socket_attached(pair)}

    async def prepare_socket(self, queue_pair: int) -> None:
        """Make a socket with all of guest memory, for `replace_sockets`; the present one goes on meanwhile.

        Raises:
            HostError: no socket could be had, or the memory could not be pinned once more (ENOBUFS: the memlock limit).
        """
        if (binding := self._bound_to.get(queue_pair)) is not None:
            await self._prepare(queue_pair, binding)

    async def _prepare(self, queue_pair: int, binding: Binding) -> None:
        async with self.lock(queue_pair):
            fd = await self._client.want(queue_pair, binding.serial)
            self._preparing.add(queue_pair)
        try:
            await self._engine.prepare_socket(queue_pair, self._socket_config(binding, queue_pair, fd))
        except BaseException:
            self._preparing.discard(queue_pair)
            raise
        finally:
            os.close(fd)
        if queue_pair in self._preparing:
            self._prepared[queue_pair] = binding.serial
        else:
            self._engine.discard_prepared(queue_pair)  # the socket that it was to replace is gone
        self._preparing.discard(queue_pair)

    async def replace_sockets(self, queue_pairs: Sequence[int]) -> None:
        """Give queue pairs that have a socket another one, without a virtqueue noticing more than lost frames.

        Raises:
            MpassthruError: a socket could not be had or bound; its queue pair has none then, and is tried again later.
        """
        for queue_pair in queue_pairs:
            async with self.lock(queue_pair):
                if self._engine.socket_attached(queue_pair):
                    await self._detach(queue_pair)
        await self._attach_anew(queue_pairs)

    async def _attach_anew(self, queue_pairs: Sequence[int]) -> None:
        errors: list[MpassthruError] = []
        for queue_pair in queue_pairs:
            try:
                await self._replace(queue_pair)
            except MpassthruError as error:
                errors.append(error)
                self.attach_later(queue_pair)
        if errors:
            raise errors[0]

    async def _replace(self, queue_pair: int) -> None:
        try:
            await self.attach(queue_pair, for_running=True)
        except HostError:
            # A NIC whose link has to come back first takes longer than a bind waits; now the queue is seen free.
            await self.attach(queue_pair, for_running=True)

    def bound_to(self, queue_pair: int) -> Binding | None:
        """What a queue pair's socket is bound to; None if it has none."""
        return self._bound_to.get(queue_pair)

    def distrust(self, driver: str | None) -> None:
        """Have all sockets that come in copy mode on interfaces of a driver."""
        self._distrusted.add(driver)

    async def leave_zero_copy(self, driver: str | None) -> None:
        """Exchange the sockets on interfaces of a distrusted driver for ones in copy mode.

        Raises:
            MpassthruError: a socket could not be had or bound; its queue pair has none then, and is tried again later.
        """
        async with self.changing:
            # All at once, also those that are just being bound or exchanged: what is left in zero-copy mode would force
            # it upon those that share its UMEM.
            async with self._every_lock():
                of_driver = sorted(pair for pair, bound in self._bound_to.items() if bound.driver == driver)
                for queue_pair in of_driver:
                    self._discard_prepared(queue_pair)
                pairs = [pair for pair in of_driver if self._engine.socket_attached(pair)]
                for queue_pair in pairs:
                    await self._detach(queue_pair)
            await self._attach_anew(pairs)

    def _discard_prepared(self, queue_pair: int) -> None:
        self._preparing.discard(queue_pair)
        if self._prepared.pop(queue_pair, None) is not None:
            self._engine.discard_prepared(queue_pair)

    async def _bind_prepared(self, queue_pair: int, binding: Binding) -> SocketMode:
        """Bind the socket that was prepared.

        On the queue of the one before, it is the proof that no NIC writes for that one any more.
        """
        del self._prepared[queue_pair]
        zero_copy = await self._engine.attach_prepared(queue_pair)
        self._unproven.pop(queue_pair, None)
        return "zero-copy" if zero_copy else "copy"

    async def _bind_new(self, queue_pair: int, binding: Binding) -> SocketMode:
        """Bind a new socket; its mode. The engine tries for a while if the kernel still takes an earlier one down."""
        fd = await self._client.want(queue_pair, binding.serial)
        try:
            zero_copy = await self._engine.attach_socket(queue_pair, self._socket_config(binding, queue_pair, fd))
            if binding.socket_mode == "packet":
                return "packet"
            return "zero-copy" if zero_copy else "copy"
        finally:
            os.close(fd)

    def _socket_config(self, binding: Binding, queue_pair: int, fd: int) -> _core.SocketConfig:
        distrusted = binding.driver in self._distrusted
        rules = None if distrusted else binding.zero_copy_rules
        return _core.SocketConfig(
            socket_fd=fd,
            ifindex=binding.ifindex,
            queue_id=binding.queue_ids[queue_pair],
            mode="copy" if distrusted else binding.socket_mode,
            frame_max_bytes=rules.frame_room_bytes if rules else binding.frame_max_bytes,
            room_bytes=None if rules else binding.room_bytes,
            zero_copy_rules=core_rules(rules) if rules else None,
        )


def core_rules(rules: ZeroCopyRules) -> _core.ZeroCopyRules:
    """The rules as the engine takes them."""
    return _core.ZeroCopyRules(
        direct=rules.direct,
        rx_write_max_bytes=rules.rx_write_max_bytes,
        rx_write_align_bytes=rules.rx_write_align_bytes,
        rx_write_before_bytes=rules.rx_write_before_bytes,
        rx_buffers_min=rules.rx_buffers_min,
        tx_frame_max_bytes=rules.tx_frame_max_bytes,
        tx_frame_min_bytes=rules.tx_frame_min_bytes,
        tx_pieces_max=rules.tx_pieces_max,
        contiguity=rules.contiguity,
    )
