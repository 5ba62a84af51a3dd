"""What only the driver knows of an interface, asked by the ethtool ioctl: its name, its queues, its offloads."""

from __future__ import annotations

import array
import errno
import fcntl
import socket
import struct
from typing import Final, NamedTuple

from pyroute2.ethtool.ioctl import IoctlEthtool, NotSupportedError

from mpassthru.netdev.facts import Offloads, QueueCounts

_SIOCETHTOOL: Final = 0x8946
_ETHTOOL_GDRVINFO: Final = 0x00000003
_DRVINFO: Final = struct.Struct("=I32s32s32s32s32s12sIIIII")
"""`struct ethtool_drvinfo`: cmd, driver, version, fw_version, bus_info, …"""
_IFREQ_WITH_POINTER: Final = struct.Struct("16sP16x")

UNFINISHED_OFFLOADS: Final = (
    "tx-checksum-ip-generic",
    "tx-tcp-segmentation",
    "tx-tcp6-segmentation",
    "tx-udp-segmentation",
)
"""Offloads of a veth's sender that make it hand on frames without a checksum, or larger than the MTU."""


class Driver(NamedTuple):
    """A driver's name, and the PCI address of its device where it has one."""

    name: str | None
    bus_address: str | None


def read_driver(ifname: str) -> Driver:
    """The driver of an interface, as `ethtool -i` shows it; None for a software device that gives no name.

    Raises:
        OSError: ENODEV if there is no such interface.
    """
    info = array.array("B", _DRVINFO.pack(_ETHTOOL_GDRVINFO, *[b""] * 6, *[0] * 5))
    request = _IFREQ_WITH_POINTER.pack(ifname.encode(), info.buffer_info()[0])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            fcntl.ioctl(sock, _SIOCETHTOOL, request)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                return Driver(None, None)
            raise
    _cmd, name, _version, _firmware, bus, *_ = _DRVINFO.unpack(info)
    return Driver(_text(name), _text(bus))


def read_queues(ifname: str, *, rx: int, tx: int) -> QueueCounts:
    """Queues in use and possible, as `ethtool -l` shows them.

    Args:
        ifname: The interface.
        rx: Receive queues that the kernel counts, where the driver does not answer.
        tx: The same for transmit queues.

    Raises:
        NoSuchDevice: the interface is gone.
    """
    with _Ethtool(ifname) as ethtool:
        try:
            channels = ethtool.get_channels()
        except NotSupportedError:
            return QueueCounts(rx=rx, tx=tx, rx_max=rx, tx_max=tx)
    return QueueCounts(
        rx=channels.rx_count + channels.combined_count,
        tx=channels.tx_count + channels.combined_count,
        rx_max=max(channels.max_rx, channels.max_combined),
        tx_max=max(channels.max_tx, channels.max_combined),
    )


def read_offloads(ifname: str) -> Offloads:
    """Offloads that change a received frame before AF_XDP sees it.

    Raises:
        NoSuchDevice: the interface is gone.
    """
    active = _active_features(ifname)
    return Offloads(
        rx_vlan_strip="rx-vlan-hw-parse" in active,
        lro="rx-lro" in active,
        gro_hw="rx-gro-hw" in active,
        rx_fcs="rx-fcs" in active,
        rx_all="rx-all" in active,
    )


def read_unfinished_offloads(ifname: str) -> tuple[str, ...]:
    """Which of `UNFINISHED_OFFLOADS` are on.

    Raises:
        NoSuchDevice: the interface is gone.
    """
    active = _active_features(ifname)
    return tuple(name for name in UNFINISHED_OFFLOADS if name in active)


def _active_features(ifname: str) -> set[str]:
    with _Ethtool(ifname) as ethtool:
        features = ethtool.get_features()
        return {name for name, active, *_ in features if active}


class _Ethtool(IoctlEthtool):  # type: ignore[misc] # pyroute2 has no types
    """pyroute2's ioctl interface, closed at the end of a `with`."""

    def __enter__(self) -> _Ethtool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _text(field: bytes) -> str | None:
    return field.split(b"\0", 1)[0].decode(errors="replace") or None
