"""Sockets as the broker deals with them: made for a worker, steered to when they are bound, seen to be gone.

An AF_XDP socket's fd is kept only from its creation until it is in the XSKMAP: an open copy would keep the socket, and
with it the queue, alive.

A zero-copy socket that a worker was given may have been bound, whatever the worker says or whether it still lives. So
its hardware queue counts as held, by whatever interface and worker come after it, until it was seen free.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Final, NamedTuple, Protocol

from mpassthru.control import Binding, ControlError
from mpassthru.errors import RefusedError

FREE_TIMEOUT_S: Final = 15.0
"""How long a queue may be held after its socket was closed; a NIC whose link has to come back takes seconds."""


class WaitQueueFree(Protocol):
    """`mpassthru.netdev.af_xdp.wait_queue_free`."""

    async def __call__(self, ifname: str, ifindex: int, queue_id: int, *, timeout_s: float) -> None:
        """Return when no NIC can write to the last socket's buffers; HostError if that does not come to pass."""


class Steering(Protocol):
    """What a port needs of `_core.SteeringProgram`."""

    def set_socket(self, queue_id: int, socket_fd: int) -> None:
        """Send a queue's frames to a socket."""

    def clear_socket(self, queue_id: int) -> None:
        """Drop a queue's frames."""

    def counters(self) -> dict[int, dict[str, int]]:
        """Frames of each queue, by name."""


class _HardwareQueue(NamedTuple):
    interface: str
    ifindex: int
    queue_id: int


class _Grant(NamedTuple):
    sock: socket.socket
    binding: Binding
    steering: Steering


class SocketGrants:
    """The sockets of a port, over all its workers and interfaces.

    Args:
        queue_pairs: Of the port.
        new_socket: Makes a socket for an interface: AF_XDP, or in mode `packet` a bound packet socket.
        wait_free: Waits until the kernel has let go of a queue.
    """

    def __init__(self, queue_pairs: int, new_socket: Callable[[int], socket.socket], wait_free: WaitQueueFree) -> None:
        self._queue_pairs = queue_pairs
        self._new_socket = new_socket
        self._wait_free = wait_free
        self._offers: dict[int, tuple[Binding, Steering]] = {}
        self._granted: dict[int, _Grant] = {}
        self._steered: dict[int, tuple[Steering, int]] = {}
        self._held: dict[int, set[_HardwareQueue]] = {}

    @property
    def unproven(self) -> tuple[int, ...]:
        """Queue pairs of which a hardware queue is held, as far as is known."""
        return tuple(sorted(self._held))

    def offer(self, binding: Binding, steering: Steering) -> None:
        """Grant sockets for a binding from now on."""
        self._offers[binding.serial] = (binding, steering)

    def withdraw_all_but(self, binding: Binding | None) -> None:
        """Grant sockets for no other binding any more."""
        for serial in [serial for serial in self._offers if binding is None or serial != binding.serial]:
            del self._offers[serial]

    def grant(self, queue_pair: int, serial: int) -> socket.socket:
        """Make a socket for a queue pair, which stays ours.

        Raises:
            HostError: it cannot be made.
            RefusedError: the port is no longer bound to that.
            ControlError: there is no such queue pair.
        """
        self._check(queue_pair)
        self._forget(queue_pair)
        if serial not in self._offers:
            raise RefusedError("the port's interface has just changed")
        binding, steering = self._offers[serial]
        sock = self._new_socket(binding.ifindex)
        self._granted[queue_pair] = _Grant(sock, binding, steering)
        if binding.socket_mode == "zero-copy":
            queue = _HardwareQueue(binding.interface, binding.ifindex, binding.queue_ids[queue_pair])
            self._held.setdefault(queue_pair, set()).add(queue)
        return sock

    def steer(self, queue_pair: int, *, pins_memory: bool) -> None:
        """Send frames to the socket that was granted, which is bound now; our copy is closed.

        Args:
            queue_pair: Which.
            pins_memory: The worker has leave to lock memory.

        Raises:
            HostError: the XSKMAP does not take it.
            ControlError: it was not granted, or must not have been bound.
        """
        self._check(queue_pair)
        grant = self._granted.get(queue_pair)
        if grant is None:
            raise ControlError(f"the worker bound a socket of queue pair {queue_pair} that it was not given")
        if not pins_memory and grant.binding.socket_mode != "packet":
            raise ControlError(f"the worker bound a socket of queue pair {queue_pair} without leave to lock memory")
        queue_id = grant.binding.queue_ids[queue_pair]
        try:
            grant.steering.set_socket(queue_id, grant.sock.fileno())
        finally:
            self._forget(queue_pair)
        self._steered[queue_pair] = (grant.steering, queue_id)

    def release(self, queue_pair: int, *, keep_granted: bool = False) -> None:
        """A queue pair's socket is closed: its queue's frames go nowhere.

        Args:
            queue_pair: Which.
            keep_granted: The socket that was granted last is another, and is still to be bound.

        Raises:
            ControlError: there is no such queue pair.
        """
        self._check(queue_pair)
        if not keep_granted:
            self._forget(queue_pair)
        if (steered := self._steered.pop(queue_pair, None)) is not None:
            steering, queue_id = steered
            steering.clear_socket(queue_id)

    def release_all(self) -> None:
        """The worker is gone, and the kernel has closed its sockets."""
        self.forget_granted()
        self._steered.clear()

    def forget_granted(self) -> None:
        """Close what was never bound: it would keep the memory that is registered on it pinned."""
        for queue_pair in list(self._granted):
            self._forget(queue_pair)

    async def until_free(self, queue_pair: int) -> None:
        """Wait until no NIC can write to the buffers of any socket that a queue pair had.

        Raises:
            HostError: the kernel still holds a hardware queue.
        """
        for queue in list(self._held.get(queue_pair, ())):
            await self._wait_free(*queue, timeout_s=FREE_TIMEOUT_S)
            if not any(binding.ifindex == queue.ifindex for binding, _ in self._offers.values()):
                # Otherwise a worker may bind a socket there at any time.
                self._held[queue_pair].discard(queue)
        if not self._held.get(queue_pair):
            self._held.pop(queue_pair, None)

    def _check(self, queue_pair: int) -> None:
        if not 0 <= queue_pair < self._queue_pairs:
            raise ControlError(f"the worker named queue pair {queue_pair}, which it does not have")

    def _forget(self, queue_pair: int) -> None:
        grant = self._granted.pop(queue_pair, None)
        if grant is not None:
            grant.sock.close()
