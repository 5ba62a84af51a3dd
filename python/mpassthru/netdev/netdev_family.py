"""The NETDEV generic netlink family: XDP features of a device, and which queues have an AF_XDP socket.

Numbers are those of Documentation/netlink/specs/netdev.yaml. Each function returns None where the kernel is too old to
answer.
"""

from __future__ import annotations

import errno
import os
from typing import Any, Final

from pyroute2.netlink import NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, genlmsg
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.generic import AsyncGenericNetlinkSocket

from mpassthru.netdev.facts import XDP_ACT_BASIC, XDP_ACT_REDIRECT, XDP_ACT_XSK_ZEROCOPY, XdpFeatures

_NETDEV_CMD_DEV_GET: Final = 1
_NETDEV_CMD_QUEUE_GET: Final = 10
_QUEUE_TYPE_RX: Final = 0

XSK_ATTRIBUTE_SINCE: Final = (6, 14)
"""The kernel that first said which queue has an AF_XDP socket; before, silence means nothing."""


def kernel_version(release: str) -> tuple[int, int]:
    """Major and minor number of a kernel release such as ``6.18.44-amd64``."""
    major, minor = release.split("-", 1)[0].split(".")[:2]
    return int(major), int(minor.rstrip("+"))


def kernel_names_xsk_queues() -> bool:
    """Whether the running kernel says which queue has an AF_XDP socket."""
    return kernel_version(os.uname().release) >= XSK_ATTRIBUTE_SINCE


class _DeviceMessage(genlmsg):  # type: ignore[misc] # pyroute2 has no types
    prefix = "NETDEV_A_DEV_"
    nla_map = (
        ("NETDEV_A_DEV_UNSPEC", "none"),
        ("NETDEV_A_DEV_IFINDEX", "uint32"),
        ("NETDEV_A_DEV_PAD", "hex"),
        ("NETDEV_A_DEV_XDP_FEATURES", "uint64"),
        ("NETDEV_A_DEV_XDP_ZC_MAX_SEGS", "uint32"),
    )


class _QueueMessage(genlmsg):  # type: ignore[misc] # pyroute2 has no types
    prefix = "NETDEV_A_QUEUE_"
    nla_map = (
        ("NETDEV_A_QUEUE_UNSPEC", "none"),
        ("NETDEV_A_QUEUE_ID", "uint32"),
        ("NETDEV_A_QUEUE_IFINDEX", "uint32"),
        ("NETDEV_A_QUEUE_TYPE", "uint32"),
        ("NETDEV_A_QUEUE_NAPI_ID", "uint32"),
        ("NETDEV_A_QUEUE_DMABUF", "uint32"),
        ("NETDEV_A_QUEUE_IO_URING", "hex"),
        ("NETDEV_A_QUEUE_XSK", "hex"),
    )


class _Family(AsyncGenericNetlinkSocket):  # type: ignore[misc] # pyroute2 has no types
    module_err_level = "debug"  # an old kernel is no error of ours


async def xdp_features(ifindex: int) -> XdpFeatures | None:
    """What the driver can do with XDP.

    Raises:
        NetlinkError: the kernel refused, for another reason than its age.
    """
    request = _DeviceMessage()
    request["cmd"] = _NETDEV_CMD_DEV_GET
    request["attrs"] = [("NETDEV_A_DEV_IFINDEX", ifindex)]
    replies = await _ask(request, NLM_F_REQUEST | NLM_F_ACK)
    if not replies:
        return None
    bits = replies[0].get_attr("NETDEV_A_DEV_XDP_FEATURES") or 0
    needed = XDP_ACT_BASIC | XDP_ACT_REDIRECT
    return XdpFeatures(
        native=bits & needed == needed,
        zero_copy=bool(bits & XDP_ACT_XSK_ZEROCOPY),
        zero_copy_max_segments=replies[0].get_attr("NETDEV_A_DEV_XDP_ZC_MAX_SEGS") or 1,
    )


async def xsk_queues(ifindex: int) -> tuple[int, ...] | None:
    """Receive queues that an AF_XDP socket is bound to, or was until a moment ago.

    The attribute goes only when the kernel has let go of the socket's buffers: it is the proof that no NIC writes to
    them any more. Does not tell the kernel's age: see `XSK_ATTRIBUTE_SINCE`.

    Raises:
        NetlinkError: the kernel refused, for another reason than its age.
    """
    request = _QueueMessage()
    request["cmd"] = _NETDEV_CMD_QUEUE_GET
    request["attrs"] = [("NETDEV_A_QUEUE_IFINDEX", ifindex)]
    replies = await _ask(request, NLM_F_REQUEST | NLM_F_DUMP)
    if replies is None:
        return None
    return tuple(
        sorted(
            reply.get_attr("NETDEV_A_QUEUE_ID")
            for reply in replies
            if reply.get_attr("NETDEV_A_QUEUE_TYPE") == _QUEUE_TYPE_RX
            and any(name == "NETDEV_A_QUEUE_XSK" for name, _value in reply["attrs"])
        )
    )


async def _ask(request: Any, flags: int) -> list[Any] | None:
    try:
        async with _Family() as family:
            await family.bind("netdev", type(request))
            replies = await family.nlm_request(request, msg_type=family.prid, msg_flags=flags)
            return [reply async for reply in replies]
    except NetlinkError as error:
        if error.code in (errno.ENOENT, errno.EOPNOTSUPP):
            return None  # no such family, no such command
        raise
