"""Have a NIC receive what is addressed to the guest: its own filter knows only the host's addresses.

Asked for by memberships of a packet socket (packet(7)), which the kernel ends with the socket: nothing is left behind,
however the broker ends. The socket itself receives nothing.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple, Self

from mpassthru.errors import HostError, errno_name
from mpassthru.steering import Filter

_SOL_PACKET: Final = 263
_PACKET_ADD_MEMBERSHIP: Final = 1
_PACKET_DROP_MEMBERSHIP: Final = 2
_PACKET_MR_MULTICAST: Final = 0
_PACKET_MR_PROMISC: Final = 1
_PACKET_MR_ALLMULTI: Final = 2
_PACKET_MR_UNICAST: Final = 3
_PACKET_MREQ: Final = struct.Struct("=iHH8s")
"""`struct packet_mreq`: ifindex, type, length of the address, address."""


class _Membership(NamedTuple):
    kind: int
    address: bytes = b""


class AddressFilter:
    """What an interface receives for the guest, until closed.

    Args:
        ifname: For errors.
        ifindex: In the current network namespace.

    Raises:
        HostError: EPERM without CAP_NET_RAW.
    """

    def __init__(self, ifname: str, ifindex: int) -> None:
        self._ifname = ifname
        self._ifindex = ifindex
        self._held: set[_Membership] = set()
        try:
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        except OSError as error:
            raise self._failed(error) from error

    def __enter__(self) -> Self:
        """Itself, closed at the end of a `with`."""
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def receive(self, wanted: Filter) -> None:
        """Receive these addresses from now on; those that go on being wanted are received without a gap.

        Raises:
            HostError: ENODEV if the interface is gone.
        """
        memberships = set(_memberships(wanted))
        try:
            for membership in memberships - self._held:
                self._set(_PACKET_ADD_MEMBERSHIP, membership)
                self._held.add(membership)
            for membership in self._held - memberships:
                self._set(_PACKET_DROP_MEMBERSHIP, membership)
                self._held.discard(membership)
        except OSError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Receive what the host alone wants."""
        self._socket.close()

    def _set(self, operation: int, membership: _Membership) -> None:
        kind, address = membership
        self._socket.setsockopt(_SOL_PACKET, operation, _PACKET_MREQ.pack(self._ifindex, kind, len(address), address))

    def _failed(self, error: OSError) -> HostError:
        return HostError(
            error.errno or 0,
            f"cannot have {self._ifname} receive frames for the guest ({errno_name(error.errno)}): "
            "run as root, or give the process CAP_NET_RAW",
        )


def _memberships(wanted: Filter) -> Iterator[_Membership]:
    if wanted.unicast is None:
        yield _Membership(_PACKET_MR_PROMISC)
        return
    for address in wanted.unicast:
        yield _Membership(_PACKET_MR_UNICAST, address)
    if wanted.multicast is None:
        yield _Membership(_PACKET_MR_ALLMULTI)
        return
    for address in wanted.multicast:
        yield _Membership(_PACKET_MR_MULTICAST, address)
