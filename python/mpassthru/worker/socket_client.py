"""Getting AF_XDP sockets from the broker: asked for, bound by us, steered to by the broker, given back."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable

from mpassthru.control import (
    BrokerMessage,
    ControlChannel,
    SocketBound,
    SocketFreed,
    SocketGranted,
    SocketMode,
    SocketRefused,
    SocketReleased,
    SocketSteered,
    SocketWanted,
    WorkerMessage,
    close_fds,
)
from mpassthru.errors import HostError, RefusedError

ANSWER_TIMEOUT_S = 5.0
FREED_TIMEOUT_S = 20.0
"""More than the broker takes before it gives up."""


class SocketClient:
    """The worker's side of the socket messages. One question per queue pair is open at a time."""

    def __init__(self, channel: ControlChannel[WorkerMessage, BrokerMessage]) -> None:
        self._channel = channel
        self._answers: dict[int, asyncio.Future[int]] = {}

    async def want(self, queue_pair: int) -> int:
        """Ask for a socket.

        Returns:
            The fd of a new AF_XDP socket, the caller's to close.

        Raises:
            HostError: the broker could not create one, or does not answer.
        """
        return await self._ask(queue_pair, lambda: self._channel.send(SocketWanted(queue_pair=queue_pair)))

    async def bound(self, queue_pair: int, mode: SocketMode) -> None:
        """Say that the socket is bound and wait until the queue's frames go to it.

        Raises:
            HostError: the broker could not put it into the XSKMAP, or does not answer.
        """
        await self._ask(queue_pair, lambda: self._channel.send(SocketBound(queue_pair=queue_pair, mode=mode)))

    def released(self, queue_pair: int) -> None:
        """Say that the socket is closed."""
        self._channel.send(SocketReleased(queue_pair=queue_pair))

    async def freed(self, queue_pair: int) -> None:
        """Say that the socket is closed, and wait until no NIC can write to its buffers any more. May be repeated.

        Raises:
            HostError: the kernel still holds the queue, or the broker does not answer.
        """
        message = SocketReleased(queue_pair=queue_pair, await_free=True)
        await self._ask(queue_pair, lambda: self._channel.send(message), timeout_s=FREED_TIMEOUT_S)

    def answered(self, message: SocketGranted | SocketSteered | SocketFreed | SocketRefused, fds: list[int]) -> None:
        """Take the broker's answer; fds that nobody waits for are closed."""
        answer = self._answers.get(message.queue_pair)
        if answer is None or answer.done():
            close_fds(fds)
            return
        match message:
            case SocketGranted():
                answer.set_result(fds[0])
            case SocketSteered() | SocketFreed():
                answer.set_result(-1)
            case SocketRefused(errno=0, error=error):
                answer.set_exception(RefusedError(error))
            case SocketRefused(errno=number, error=error):
                answer.set_exception(HostError(number, error))

    async def _ask(self, queue_pair: int, send: Callable[[], None], *, timeout_s: float = ANSWER_TIMEOUT_S) -> int:
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._answers[queue_pair] = answer
        try:
            send()
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError as error:
            raise HostError(
                errno.ETIMEDOUT, f"the broker does not answer for queue pair {queue_pair} within {timeout_s:g} s"
            ) from error
        except asyncio.CancelledError:
            if answer.done() and not answer.cancelled() and answer.exception() is None and answer.result() >= 0:
                os.close(answer.result())
            raise
        finally:
            del self._answers[queue_pair]
