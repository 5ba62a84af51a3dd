"""What every test of a session does: negotiate, start a vring, watch the connection end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from vhost_user_fakes import (
    FEATURES,
    FakeDevice,
    connected,
    ring_address,
)

from mpassthru.errors import ProtocolError
from mpassthru.vhost_user import (
    SUPPORTED_PROTOCOL_FEATURES,
    Frontend,
    ProtocolFeature,
    Session,
    VirtioFeature,
)
from mpassthru.vhost_user.message import Empty, Payload

PROTOCOL_FEATURES = int(VirtioFeature.VHOST_USER_F_PROTOCOL_FEATURES)
NO_ACK = int(SUPPORTED_PROTOCOL_FEATURES & ~ProtocolFeature.VHOST_USER_PROTOCOL_F_REPLY_ACK)


@asynccontextmanager
async def negotiated(
    device: FakeDevice | None = None, *, features: int = FEATURES, protocol_features: int = -1
) -> AsyncIterator[tuple[Frontend, FakeDevice, Session, asyncio.Task[None]]]:
    device = device or FakeDevice(next_base=5)
    async with connected(device) as (frontend, session, task):
        await frontend.negotiate(features, protocol_features)
        yield frontend, device, session, task


async def start(frontend: Frontend, index: int, event: int, *, enable: bool = True, shift: int = 0) -> None:
    await frontend.set_vring_num(index, 256)
    await frontend.set_vring_base(index, 10)
    await frontend.set_vring_addr(ring_address(index, shift=shift))
    await frontend.set_vring_call(index, event)
    await frontend.set_vring_kick(index, event)
    if enable:
        await frontend.set_vring_enable(index, True)


async def ends_with(task: asyncio.Task[None], reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        await asyncio.wait_for(asyncio.shield(task), 5)


async def hangs_up(frontend: Frontend, task: asyncio.Task[None], reason: str, error: type[Exception]) -> None:
    """The session has ended with `error`, and the front-end sees the end of the connection."""
    with pytest.raises(error, match=reason):
        await asyncio.wait_for(asyncio.shield(task), 5)
    with pytest.raises(ProtocolError, match="closed the connection"):
        await frontend.get_features()


def encodable(data: bytes) -> Payload:
    """Any bytes as a payload."""

    class Raw(Empty):
        def encode(self) -> bytes:
            return data

    return Raw()
