"""Starting asyncio, which takes file descriptors and memory like everything else."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

from mpassthru.errors import EXHAUSTED, HostError, MpassthruError, host_error

T = TypeVar("T")


@contextlib.contextmanager
def ungrouped() -> Iterator[None]:
    """Around a task group: what a task of it failed with is raised as it is, and not in an exception group."""
    try:
        yield
    except* (MpassthruError, OSError) as errors:
        raise errors.exceptions[0] from None


def run(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run`, but what the kernel refuses to the event loop itself is an error like others.

    Raises:
        HostError: there can be no event loop; or a callback of it failed for want of something, and whoever waited for
            it would have waited for ever.
    """
    try:
        loop = _new_loop()
    except HostError:
        main.close()
        raise
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(_until_callback_fails(main))


async def _until_callback_fails(main: Coroutine[Any, Any, T]) -> T:
    loop = asyncio.get_running_loop()
    failed: list[OSError] = []
    task = asyncio.ensure_future(main)

    def on_exception(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in EXHAUSTED:
            loop.default_exception_handler(context)
            return
        failed.append(error)
        task.cancel()

    loop.set_exception_handler(on_exception)
    try:
        return await task
    except BaseException as error:
        if failed:
            raise host_error("wait for events", failed[0]) from error
        raise


def _new_loop() -> asyncio.AbstractEventLoop:
    refused: HostError | None = None
    unraisable_hook = sys.unraisablehook
    # A loop that is only half made complains when it is forgotten, which is in this block (Python 3.11).
    sys.unraisablehook = lambda _: None
    try:
        return asyncio.new_event_loop()
    except OSError as error:
        refused = host_error("start an event loop", error)
    finally:
        sys.unraisablehook = unraisable_hook
    raise refused
