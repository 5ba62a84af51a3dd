"""What both demos share: a veth pair in a namespace of its own, a real broker and worker on it, and the live table."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from mpassthru.live_view import View
from mpassthru.testing.attached_port import AttachedPort, attached_port
from mpassthru.testing.netns import Namespace, veth_namespace

QUIET_LINES = ("mode:", "XDP:", "guest:", "virtqueue", "worker", "session")
"""Beginnings of the port's lines that tell the demo's story; the options for QEMU do not."""


@dataclass(frozen=True)
class Scene:
    """Where a demo plays."""

    namespace: Namespace
    port: AttachedPort
    socket_path: Path


@contextlib.asynccontextmanager
async def scene(view: View, *, interval_s: float, options: tuple[str, ...] = ()) -> AsyncIterator[Scene]:
    """Set the scene, show the port's figures while the block runs, and strike it.

    Args:
        view: Shows what goes on.
        interval_s: Seconds between figures.
        options: For `mpassthru attach`.

    Raises:
        HostError: the namespace or the port cannot be had.
        ChildError: the port did not start.
    """
    with veth_namespace() as namespace, tempfile.TemporaryDirectory(prefix="mpassthru-demo-") as folder:
        path = Path(folder) / "port.sock"
        view.say(f"network namespace with a veth pair: {namespace.ifname} is the host's NIC, {namespace.peer} the wire")
        async with attached_port(namespace, path, *options, interval_s=interval_s) as port:
            await port.until_said("is ready")
            showing = asyncio.create_task(_show(port, view))
            try:
                yield Scene(namespace, port, path)
            finally:
                showing.cancel()
                await asyncio.gather(showing, return_exceptions=True)


async def _show(port: AttachedPort, view: View) -> None:
    said = 0
    while True:
        await port.news()
        for line in port.lines[said:]:
            if line.startswith(QUIET_LINES):
                view.say(line)
        said = len(port.lines)
        if port.report is not None:
            view.show(port.report)
