"""Have a NIC receive what is addressed to the guest: its own filter knows only the host's address.

Asked for by a membership of a packet socket (packet(7)), which the kernel ends with the socket: nothing is left behind,
however the broker ends. The socket itself receives nothing.
"""

from __future__ import annotations

import socket
import struct
from typing import Final

from mpassthru.errors import HostError, errno_name

_SOL_PACKET: Final = 263
_PACKET_ADD_MEMBERSHIP: Final = 1
_PACKET_MR_PROMISC: Final = 1
_PACKET_MR_UNICAST: Final = 3
_PACKET_MREQ: Final = struct.Struct("=iHH8s")
"""`struct packet_mreq`: ifindex, type, length of the address, address."""


def receive_for_guest(ifname: str, ifindex: int, mac: bytes) -> socket.socket:
    """Let frames for the guest pass the NIC's filter until the socket is closed.

    Args:
        ifname: For the error.
        ifindex: In the current network namespace.
        mac: The guest's address; empty for every address (promiscuous mode).

    Raises:
        HostError: EPERM without CAP_NET_RAW, ENODEV if the interface is gone.
    """
    kind = _PACKET_MR_UNICAST if mac else _PACKET_MR_PROMISC
    request = _PACKET_MREQ.pack(ifindex, kind, len(mac), mac)
    try:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        try:
            sock.setsockopt(_SOL_PACKET, _PACKET_ADD_MEMBERSHIP, request)
        except OSError:
            sock.close()
            raise
    except OSError as error:
        number = error.errno or 0
        raise HostError(
            number,
            f"cannot have {ifname} receive frames for the guest ({errno_name(number)}): "
            "run as root, or give the process CAP_NET_RAW",
        ) from error
    return sock
