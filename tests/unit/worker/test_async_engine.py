"""Events of the engine on the loop: none is lost, and an operation without end ends the process."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
from fake_engine import FakeEngine, FakeEvent

from mpassthru._core import SocketConfig
from mpassthru.worker import async_engine
from mpassthru.worker.async_engine import AsyncEngine

TIMEOUT_S = 5.0


@pytest.fixture
def fake() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def hangs() -> asyncio.Queue[str]:
    return asyncio.Queue()


@pytest.fixture
async def engine(fake: FakeEngine, hangs: asyncio.Queue[str]) -> AsyncIterator[AsyncEngine]:
    engine = AsyncEngine(cast(Any, fake), lambda event: None, on_hang=hangs.put_nowait)
    yield engine
    engine.close()


async def test_trouble_that_cannot_be_told_does_not_keep_an_operation_from_ending(fake: FakeEngine) -> None:
    def fail(event: object) -> None:
        raise ConnectionError("nobody listens")

    said: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(context["exception"]))
    engine = AsyncEngine(cast(Any, fake), fail)
    fake.emit(FakeEvent(kind="fault", vring=1))

    assert await asyncio.wait_for(engine.stop_vring(0), TIMEOUT_S) == 42

    engine.close()
    assert [str(error) for error in said] == ["nobody listens"]


async def test_operation_without_end_is_told(
    fake: FakeEngine, engine: AsyncEngine, hangs: asyncio.Queue[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(async_engine, "OPERATION_TIMEOUT_S", 0.01)
    fake.held = {"stop"}
    stopping = asyncio.create_task(engine.stop_vring(0))

    assert "stop_vring has not ended within 0.01 s" in await asyncio.wait_for(hangs.get(), TIMEOUT_S)

    stopping.cancel()


async def test_operation_without_end_is_told_even_if_nobody_waits_for_it(
    fake: FakeEngine, engine: AsyncEngine, hangs: asyncio.Queue[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(async_engine, "ATTACH_TIMEOUT_S", 0.01)
    fake.held = {"attach"}
    config = SocketConfig(socket_fd=-1, ifindex=1, queue_id=0, mode="copy", frame_max_bytes=1518)
    attaching = asyncio.create_task(engine.attach_socket(0, config))
    await asyncio.sleep(0)
    attaching.cancel()

    assert "attach_socket has not ended" in await asyncio.wait_for(hangs.get(), TIMEOUT_S)


async def test_caller_that_is_cancelled_learns_of_it_when_the_operation_has_ended(
    fake: FakeEngine, engine: AsyncEngine
) -> None:
    fake.held = {"stop"}
    stopping = asyncio.create_task(engine.stop_vring(0))
    for _ in range(3):
        await asyncio.sleep(0)
        stopping.cancel()
    await asyncio.sleep(0)
    assert not stopping.done()

    fake.end_held()
    await asyncio.wait({stopping}, timeout=TIMEOUT_S)
    assert stopping.cancelled()


async def test_operation_that_ends_is_not_taken_for_a_hang(
    fake: FakeEngine, engine: AsyncEngine, hangs: asyncio.Queue[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(async_engine, "OPERATION_TIMEOUT_S", 0.2)
    await engine.stop_vring(0)
    fake.held = {"start"}
    starting = asyncio.create_task(engine.start_vring(0, cast(Any, None)))

    assert "start_vring" in await asyncio.wait_for(hangs.get(), TIMEOUT_S), "the operation before has ended"

    starting.cancel()


def test_process_ends_with_one_line_though_a_thread_hangs() -> None:
    program = (
        "import threading; from mpassthru.worker.async_engine import end_process\n"
        "threading.Thread(target=threading.Event().wait).start(); end_process('it hangs')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=10 * TIMEOUT_S, check=False
    )

    assert (done.returncode, done.stderr) == (1, "it hangs\n")
