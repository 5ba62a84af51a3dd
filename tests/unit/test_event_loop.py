"""An event loop that the kernel refuses, or refuses something to, is one line and not a traceback or a hang."""

from __future__ import annotations

import asyncio
import errno
import os
import socket

import pytest

from mpassthru import event_loop
from mpassthru.errors import HostError


async def answer() -> int:
    return 42


async def wait_for_ever() -> None:
    await asyncio.get_running_loop().create_future()


def test_program_runs_to_its_result() -> None:
    assert event_loop.run(answer()) == 42


def test_error_of_the_program_is_its_own() -> None:
    async def fail() -> None:
        raise ValueError("its own")

    with pytest.raises(ValueError, match="its own"):
        event_loop.run(fail())


def test_loop_that_cannot_be_had_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> object:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(socket, "socketpair", refuse)
    with pytest.raises(HostError, match=r"cannot start an event loop \(EMFILE\): raise the limit .*ulimit -n"):
        event_loop.run(answer())
    assert capfd.readouterr() == ("", "")


def test_callback_that_the_kernel_refuses_something_ends_the_program() -> None:
    def refuse() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def wait() -> None:
        asyncio.get_running_loop().call_soon(refuse)
        await wait_for_ever()

    with pytest.raises(HostError, match=r"cannot wait for events \(ENOSPC\)"):
        event_loop.run(wait())
