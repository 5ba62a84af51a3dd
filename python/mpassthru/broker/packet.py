"""Mode `packet`: a packet socket (AF_PACKET) where there is no XDP, or for comparison. No program is attached.

The worker could take a packet socket to another interface. One in a fanout group stays where it is
(net/packet/af_packet.c: packet_do_bind), so the broker binds it and makes it the only member of a group of its own.
What remains is that a frame may be sent with another interface's address: see docs/threat-model.md.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from typing import Final

from mpassthru.broker.xsk import SEND_BUFFER_BYTES, raise_send_buffer
from mpassthru.errors import HostError, errno_name

_ETH_P_ALL: Final = 0x0003
_SOL_PACKET: Final = 263
_PACKET_FANOUT: Final = 18
_PACKET_IGNORE_OUTGOING: Final = 23
_PACKET_FANOUT_LB: Final = 1
_PACKET_FANOUT_FLAG_UNIQUEID: Final = 0x2000
_ANY_GROUP: Final = (_PACKET_FANOUT_LB | _PACKET_FANOUT_FLAG_UNIQUEID) << 16


class NoSteering:
    """Stands where the XDP program would: every frame of the interface comes to the socket by itself."""

    def set_socket(self, queue_id: int, socket_fd: int) -> None:
        """Nothing to do: the socket is bound."""

    def clear_socket(self, queue_id: int) -> None:
        """Nothing to do: the socket is closed."""

    def counters(self) -> dict[int, dict[str, int]]:
        """No program, no counters."""
        return {}


def create_packet_socket(ifindex: int) -> socket.socket:
    """Create a packet socket that receives what arrives at an interface, and cannot be bound to another one.

    Args:
        ifindex: Of the current network namespace.

    Raises:
        HostError: EPERM without CAP_NET_RAW; ENODEV without such an interface.
    """
    try:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
    except OSError as error:
        raise _refused("open a packet socket", error) from error
    try:
        with contextlib.suppress(OSError):  # Linux 4.20; before, the guest hears what the host sends
            sock.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
        raise_send_buffer(sock, SEND_BUFFER_BYTES)
        sock.bind((socket.if_indextoname(ifindex), _ETH_P_ALL))
        sock.setsockopt(_SOL_PACKET, _PACKET_FANOUT, _ANY_GROUP)
    except OSError as error:
        sock.close()
        raise _refused(f"bind a packet socket to interface {ifindex}", error) from error
    return sock


def _refused(operation: str, error: OSError) -> HostError:
    number = error.errno or errno.ENODEV  # if_indextoname has no errno
    advice = "run as root, or give CAP_NET_RAW" if number == errno.EPERM else "is the interface there, and up?"
    return HostError(number, f"cannot {operation} ({errno_name(number)}): {advice}")
