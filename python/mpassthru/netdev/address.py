"""An interface's own MAC address, as it is now."""

from __future__ import annotations

import fcntl
import socket
import struct
from typing import Final

from mpassthru.errors import attempting

_SIOCGIFHWADDR: Final = 0x8927
_IFREQ_WITH_ADDRESS: Final = struct.Struct("=16sH6s16x")
"""`struct ifreq` with a `struct sockaddr`: name, family, address."""


def read_address(ifindex: int) -> bytes:
    """The address that the interface has now.

    Raises:
        HostError: ENXIO or ENODEV if it is gone.
    """
    with attempting(f"read the address of interface {ifindex}"):
        request = _IFREQ_WITH_ADDRESS.pack(socket.if_indextoname(ifindex).encode(), 0, bytes(6))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            answer = fcntl.ioctl(sock, _SIOCGIFHWADDR, request)
    _name, _family, address = _IFREQ_WITH_ADDRESS.unpack(answer)
    return bytes(address)
