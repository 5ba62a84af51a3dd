"""The host's side of a port: what an interface is and can do, and AF_XDP sockets on its queues.

Read an interface with `read_interface`, judge it with `checks`, price a guest with `umem_cost`.
"""

from mpassthru.netdev.address import read_address
from mpassthru.netdev.af_xdp import bind_error, open_xsk_socket, probe_bind
from mpassthru.netdev.checks import (
    CHUNK_MTU_MAX_BYTES,
    FRAME_MAX_BYTES,
    MTU_MAX_BYTES,
    check_queue,
    frame_max_bytes,
    has_multi_buffer,
    other_queues_warning,
    room_bytes,
    warnings_for,
)
from mpassthru.netdev.drivers import NO_ZERO_COPY, ZERO_COPY, DriverFacts
from mpassthru.netdev.facts import (
    Interface,
    Offloads,
    QueueCounts,
    VethPeer,
    XdpFeatures,
    XdpProgram,
)
from mpassthru.netdev.netdev_family import kernel_version
from mpassthru.netdev.reader import find_interface, no_such_interface, read_interface, read_link
from mpassthru.netdev.umem_cost import UMEM_MAX_BYTES, UmemCost, format_bytes, umem_cost
from mpassthru.netdev.zero_copy import Refusal, zero_copy_rules

__all__ = [
    "CHUNK_MTU_MAX_BYTES",
    "FRAME_MAX_BYTES",
    "MTU_MAX_BYTES",
    "NO_ZERO_COPY",
    "UMEM_MAX_BYTES",
    "ZERO_COPY",
    "DriverFacts",
    "Interface",
    "Offloads",
    "QueueCounts",
    "Refusal",
    "UmemCost",
    "VethPeer",
    "XdpFeatures",
    "XdpProgram",
    "bind_error",
    "check_queue",
    "find_interface",
    "format_bytes",
    "frame_max_bytes",
    "has_multi_buffer",
    "kernel_version",
    "no_such_interface",
    "open_xsk_socket",
    "other_queues_warning",
    "probe_bind",
    "read_address",
    "read_interface",
    "read_link",
    "room_bytes",
    "umem_cost",
    "warnings_for",
    "zero_copy_rules",
]
