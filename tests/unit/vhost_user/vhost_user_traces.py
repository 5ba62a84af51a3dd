"""What real front-ends sent to a back-end of two queue pairs, recorded with QEMU 7.2.22 and DPDK 22.11 on Debian 12.

Addresses were shortened; order, flags, payload sizes and descriptors are theirs. Each step is the message, how many
descriptors came along, and the exact bytes of the reply ("" for none).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from vhost_user_fakes import FEATURES, USER_BASE, ring_address

from mpassthru.vhost_user import SUPPORTED_PROTOCOL_FEATURES, Request, VirtioFeature

_R = Request
NEED_REPLY = 0x9
PLAIN = 0x1
REPLY = 0x5
QEMU_FEATURES = int(
    VirtioFeature.VHOST_USER_F_PROTOCOL_FEATURES | VirtioFeature.VIRTIO_F_VERSION_1 | VirtioFeature.VIRTIO_NET_F_MTU
)
DPDK_FEATURES = int(
    VirtioFeature.VHOST_USER_F_PROTOCOL_FEATURES
    | VirtioFeature.VIRTIO_F_VERSION_1
    | VirtioFeature.VIRTIO_F_INDIRECT_DESC
    | VirtioFeature.VIRTIO_NET_F_MRG_RXBUF
    | VirtioFeature.VIRTIO_NET_F_MQ
)


@dataclass(frozen=True)
class Step:
    """One message as a front-end sent it."""

    data: bytes
    fds: int
    reply: bytes


def message(request: int, payload: bytes = b"", *, flags: int = PLAIN) -> bytes:
    """Built by hand, so that the traces do not depend on the codec under test."""
    return struct.pack("=III", request, flags, len(payload)) + payload


def step(
    request: Request, payload: bytes = b"", *, fds: int = 0, flags: int = PLAIN, reply: bytes | None = None
) -> Step:
    answer = b"" if reply is None else message(request, reply, flags=REPLY)
    return Step(message(request, payload, flags=flags), fds, answer)


def u64(value: int) -> bytes:
    return struct.pack("=Q", value)


def state(index: int, num: int) -> bytes:
    return struct.pack("=II", index, num)


ACK = u64(0)


def _qemu_pair_init(first: int) -> list[Step]:
    queue_num = [step(_R.VHOST_USER_GET_QUEUE_NUM, reply=u64(2))] if first == 0 else []
    owner = (
        [
            step(_R.VHOST_USER_SET_BACKEND_REQ_FD, fds=1, flags=NEED_REPLY, reply=ACK),
            step(_R.VHOST_USER_SET_OWNER),
        ]
        if first == 0
        else []
    )
    files = [
        step(request, u64(index), fds=1)
        for index in (first, first + 1)
        for request in (_R.VHOST_USER_SET_VRING_CALL, _R.VHOST_USER_SET_VRING_ERR)
    ]
    return [
        step(_R.VHOST_USER_GET_FEATURES, reply=u64(FEATURES)),
        step(_R.VHOST_USER_GET_PROTOCOL_FEATURES, reply=u64(SUPPORTED_PROTOCOL_FEATURES)),
        step(_R.VHOST_USER_SET_PROTOCOL_FEATURES, u64(SUPPORTED_PROTOCOL_FEATURES)),
        *queue_num,
        step(_R.VHOST_USER_GET_MAX_MEM_SLOTS, reply=u64(32)),
        *owner,
        step(_R.VHOST_USER_GET_FEATURES, reply=u64(FEATURES)),
        *files,
    ]


def _vring_start(index: int) -> list[Step]:
    return [
        step(_R.VHOST_USER_SET_VRING_NUM, state(index, 256)),
        step(_R.VHOST_USER_SET_VRING_BASE, state(index, 0)),
        step(_R.VHOST_USER_SET_VRING_ADDR, ring_address(index).encode()),
        step(_R.VHOST_USER_SET_VRING_KICK, u64(index), fds=1),
    ]


def _add_mem_reg(slot: int) -> Step:
    payload = struct.pack("=QQQQQ", 0, slot << 20, 1 << 20, USER_BASE + (slot << 20), 0)
    return step(_R.VHOST_USER_ADD_MEM_REG, payload, fds=1, flags=NEED_REPLY, reply=ACK)


QEMU_START = [
    *_qemu_pair_init(0),
    *_qemu_pair_init(2),
    *[step(_R.VHOST_USER_SET_VRING_ENABLE, state(index, int(index < 2))) for index in (0, 1, 2, 3, 0, 1, 2, 3)],
    step(_R.VHOST_USER_NET_SET_MTU, u64(1500), flags=NEED_REPLY, reply=ACK),
    step(_R.VHOST_USER_SET_VRING_ENABLE, state(0, 1)),
    step(_R.VHOST_USER_SET_VRING_ENABLE, state(1, 1)),
    step(_R.VHOST_USER_SET_FEATURES, u64(QEMU_FEATURES)),
    step(_R.VHOST_USER_GET_STATUS, reply=u64(0)),
    step(_R.VHOST_USER_SET_STATUS, u64(8)),
    _add_mem_reg(0),
    _add_mem_reg(1),
    *_vring_start(0),
    step(_R.VHOST_USER_SET_VRING_CALL, u64(0), fds=1),
    *_vring_start(1),
    step(_R.VHOST_USER_SET_VRING_CALL, u64(1), fds=1),
    step(_R.VHOST_USER_GET_STATUS, reply=u64(8)),
    step(_R.VHOST_USER_SET_STATUS, u64(15)),
]
"""A guest's driver starts one of two queue pairs."""

QEMU_STOP = [
    step(_R.VHOST_USER_SET_STATUS, u64(0)),
    step(_R.VHOST_USER_GET_VRING_BASE, state(0, 0), reply=state(0, 7)),
    step(_R.VHOST_USER_GET_VRING_BASE, state(1, 0), reply=state(1, 7)),
]
"""The driver goes. QEMU 7.2 says reset first, and asks for the bases afterwards."""

DPDK_START = [
    step(_R.VHOST_USER_SET_OWNER),
    step(_R.VHOST_USER_GET_FEATURES, reply=u64(FEATURES)),
    step(_R.VHOST_USER_GET_PROTOCOL_FEATURES, reply=u64(SUPPORTED_PROTOCOL_FEATURES)),
    step(_R.VHOST_USER_SET_PROTOCOL_FEATURES, u64(0x10009)),
    *[step(_R.VHOST_USER_SET_VRING_CALL, u64(index), fds=1) for index in (0, 2, 1, 3)],
    step(_R.VHOST_USER_SET_FEATURES, u64(DPDK_FEATURES)),
    step(_R.VHOST_USER_SET_STATUS, u64(11), flags=NEED_REPLY, reply=ACK),
    step(_R.VHOST_USER_GET_STATUS, reply=u64(11)),
    step(
        _R.VHOST_USER_SET_MEM_TABLE,
        struct.pack("=IIQQQQ", 1, 0, USER_BASE, 1 << 20, USER_BASE, 0),
        fds=1,
        flags=NEED_REPLY,
        reply=ACK,
    ),
    *[part for index in (0, 2, 1, 3) for part in _vring_start(index)],
    step(_R.VHOST_USER_SET_VRING_ENABLE, state(0, 1)),
    step(_R.VHOST_USER_SET_VRING_ENABLE, state(1, 1)),
    step(_R.VHOST_USER_SET_STATUS, u64(15), flags=NEED_REPLY, reply=ACK),
]
"""virtio-user in dpdk-testpmd with two queue pairs, of which it enables one."""

DPDK_STOP = [
    step(_R.VHOST_USER_SET_VRING_ENABLE, state(0, 0)),
    step(_R.VHOST_USER_SET_VRING_ENABLE, state(1, 0)),
    *[step(_R.VHOST_USER_GET_VRING_BASE, state(index, 0), reply=state(index, 7)) for index in range(4)],
]
