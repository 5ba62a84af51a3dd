"""The table of messages that a session answers: which payload and descriptors each carries, and what it needs.

A handler is a method of the session, declared with `@handles`; it takes the decoded payload if there is one, then the
`Message` if descriptors may come along. What it returns is the reply of its own that the specification asks for.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from mpassthru.errors import ProtocolError, RefusedError
from mpassthru.vhost_user.features import ProtocolFeature
from mpassthru.vhost_user.message import Empty, Message, Payload, Request


@dataclass(frozen=True, slots=True)
class FdReply:
    """A reply that brings a descriptor, which is closed when it has been sent."""

    payload: Payload
    fd: int


Handler = Callable[..., Awaitable[Payload | FdReply | None]]
AnyHandler = TypeVar("AnyHandler", bound=Handler)

NO_FEATURE = ProtocolFeature(0)
NO_FDS = range(1)


@dataclass(frozen=True, slots=True)
class Rule:
    """How one message is admitted.

    Attributes:
        payload: The payload's type.
        fds: Legal numbers of descriptors.
        needs: The protocol feature that must have been offered, if any.
        has_reply: The message has a reply of its own, and so no acknowledgement.
    """

    handler: Handler
    payload: type[Payload]
    fds: range
    needs: ProtocolFeature
    has_reply: bool

    def arguments(self, message: Message, offered: int) -> tuple[Any, ...]:
        """Check a message and decode what its handler takes.

        Raises:
            ProtocolError: the payload or the number of descriptors is not this message's.
            RefusedError: the message needs a feature that was not offered.
        """
        if self.needs & ~offered:
            raise RefusedError(f"{self.needs.name} was not offered")
        if len(message.fds) not in self.fds:
            expected = " to ".join(dict.fromkeys((str(self.fds[0]), str(self.fds[-1]))))
            raise ProtocolError(f"{len(message.fds)} descriptors came along instead of {expected}")
        payload = self.payload.decode(message.payload)
        arguments: tuple[Any, ...] = () if isinstance(payload, Empty) else (payload,)
        return arguments if self.fds == NO_FDS else (*arguments, message)


HANDLERS: dict[int, Rule] = {}


def handles(
    request: Request,
    payload: type[Payload],
    *,
    fds: range = NO_FDS,
    needs: ProtocolFeature = NO_FEATURE,
    has_reply: bool = False,
) -> Callable[[AnyHandler], AnyHandler]:
    """Declare a method of the session as the handler of `request`."""

    def register(handler: AnyHandler) -> AnyHandler:
        HANDLERS[request] = Rule(handler, payload, fds, needs, has_reply)
        return handler

    return register


_R = Request

# Pinned pages cannot come later: registering the UMEM would fetch all of them at once.
_POSTCOPY = "VHOST_USER_PROTOCOL_F_PAGEFAULT (postcopy needs guest memory that is not pinned; use precopy)"

NOT_OFFERED: dict[int, str] = {
    _R.VHOST_USER_IOTLB_MSG: "VIRTIO_F_ACCESS_PLATFORM",
    _R.VHOST_USER_SET_VRING_ENDIAN: "VHOST_USER_PROTOCOL_F_CROSS_ENDIAN",
    _R.VHOST_USER_GET_CONFIG: "VHOST_USER_PROTOCOL_F_CONFIG",
    _R.VHOST_USER_SET_CONFIG: "VHOST_USER_PROTOCOL_F_CONFIG",
    _R.VHOST_USER_CREATE_CRYPTO_SESSION: "VHOST_USER_PROTOCOL_F_CRYPTO_SESSION",
    _R.VHOST_USER_CLOSE_CRYPTO_SESSION: "VHOST_USER_PROTOCOL_F_CRYPTO_SESSION",
    _R.VHOST_USER_POSTCOPY_ADVISE: _POSTCOPY,
    _R.VHOST_USER_POSTCOPY_LISTEN: _POSTCOPY,
    _R.VHOST_USER_POSTCOPY_END: _POSTCOPY,
    _R.VHOST_USER_GPU_SET_SOCKET: "a GPU",
    _R.VHOST_USER_VRING_KICK: "VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS",
    _R.VHOST_USER_GET_SHARED_OBJECT: "VHOST_USER_PROTOCOL_F_SHARED_OBJECT",
    _R.VHOST_USER_SET_DEVICE_STATE_FD: "VHOST_USER_PROTOCOL_F_DEVICE_STATE",
    _R.VHOST_USER_CHECK_DEVICE_STATE: "VHOST_USER_PROTOCOL_F_DEVICE_STATE",
}
"""Messages without a handler, and what was not offered that they belong to."""

NOT_OFFERED_WITH_REPLY = frozenset(
    {
        _R.VHOST_USER_GET_CONFIG,
        _R.VHOST_USER_CREATE_CRYPTO_SESSION,
        _R.VHOST_USER_POSTCOPY_ADVISE,
        _R.VHOST_USER_GET_SHARED_OBJECT,
        _R.VHOST_USER_SET_DEVICE_STATE_FD,
    }
)
"""Those whose reply is not a plain u64, so that a refusal cannot be said by acknowledgement."""


def find_rule(message: Message) -> Rule:
    """The rule for a message.

    Raises:
        RefusedError: no handler; says what the message belongs to.
    """
    if rule := HANDLERS.get(message.request):
        return rule
    if missing := NOT_OFFERED.get(message.request):
        raise RefusedError(f"{missing} was not offered")
    raise RefusedError("no such message is known")


def can_be_acknowledged(request: int) -> bool:
    """Whether a plain acknowledgement is what the front-end would wait for."""
    rule = HANDLERS.get(request)
    return not rule.has_reply if rule else request not in NOT_OFFERED_WITH_REPLY
