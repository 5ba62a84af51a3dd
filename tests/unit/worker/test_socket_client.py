"""Answers are those to the question that was asked, also after somebody stopped waiting for one."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from typing import Any, cast

import pytest

from mpassthru import control
from mpassthru.errors import HostError
from mpassthru.worker.socket_client import SocketClient


class Channel:
    """Keeps what the worker says."""

    def __init__(self) -> None:
        self.sent: list[object] = []

    def send(self, message: object) -> None:
        self.sent.append(message)


@pytest.fixture
def channel() -> Channel:
    return Channel()


@pytest.fixture
def client(channel: Channel) -> SocketClient:
    return SocketClient(cast(Any, channel))


async def begin(question: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """Ask, and come back when everybody waits."""
    task = asyncio.create_task(question)
    for _ in range(5):
        await asyncio.sleep(0)
    return task


async def test_answer_to_a_cancelled_question_is_not_taken_for_that_to_the_next(
    client: SocketClient, channel: Channel
) -> None:
    given_up = await begin(client.freed(0))
    given_up.cancel()
    await asyncio.wait({given_up})
    asking = await begin(client.freed(0))
    assert len(channel.sent) == 1, "the second question waits for the first one's answer"

    client.answered(control.SocketFreed(queue_pair=0), [])
    await begin(asyncio.sleep(0))
    assert (len(channel.sent), asking.done()) == (2, False)
    client.answered(control.SocketFreed(queue_pair=0), [])
    await asyncio.wait_for(asking, 1)


async def test_socket_that_comes_after_its_asker_has_gone_is_closed(client: SocketClient) -> None:
    given_up = await begin(client.want(0, 1))
    given_up.cancel()
    await asyncio.wait({given_up})
    fd = os.open("/dev/null", os.O_RDONLY)

    client.answered(control.SocketGranted(queue_pair=0), [fd])
    await begin(asyncio.sleep(0))

    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


async def test_socket_that_comes_too_late_is_closed_and_the_next_question_gets_its_own(
    client: SocketClient,
) -> None:
    asking = asyncio.create_task(client.lock_memory(1))
    with pytest.raises(HostError, match="does not answer"):
        await client._ask(0, lambda: None, timeout_s=0.01)
    late, in_time = (os.open("/dev/null", os.O_RDONLY) for _ in range(2))
    wanting = await begin(client.want(0, 1))
    client.answered(control.SocketGranted(queue_pair=0), [late])
    await begin(asyncio.sleep(0))
    client.answered(control.SocketGranted(queue_pair=0), [in_time])
    client.answered(control.MemoryGranted(), [])

    assert await asyncio.wait_for(wanting, 1) == in_time
    await asyncio.wait_for(asking, 1)
    os.close(in_time)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(late)


async def test_answer_that_nobody_asked_for_is_ignored_and_its_socket_closed(client: SocketClient) -> None:
    fd = os.open("/dev/null", os.O_RDONLY)
    client.answered(control.SocketGranted(queue_pair=3), [fd])
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
