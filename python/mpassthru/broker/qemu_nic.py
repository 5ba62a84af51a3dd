"""What QEMU knows of one virtio-net device: which one is ours, and what its guest wants to receive.

QEMU answers the guest's control virtqueue itself, and tells a vhost-user back-end nothing of it; its monitor does
(`query-rx-filter`). As in QEMU 7.2:

* `broadcast-allowed` is the guest's wish *not* to have broadcast (hw/net/virtio-net.c: virtio_net_query_rxfilter), and
  false for every guest that says nothing. It is not used: guests have broadcast.
* `query-chardev` loses the path of a socket that is connected (before 10.0), so that is read from QOM, where each
  chardev has its address. Which chardev a network back-end has, only `info network` of the human monitor tells.
* Frames with a tag of VLAN 0 pass here whatever the guest says (see `mpassthru.steering`); QEMU would ask its table.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal, NamedTuple

import msgspec

from mpassthru.errors import MpassthruError
from mpassthru.qmp import QmpClient, QmpCommandError
from mpassthru.steering import TABLE_MAX, Filter

_NIC: Final = re.compile(r"([#\w.-]+): index=\d+,type=nic,")
_BACKEND: Final = re.compile(r" \\ ([#\w.-]+): index=\d+,type=vhost-user,vhost-user\d+ to ([#\w.-]+)")
_MAC: Final = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")

RxState = Literal["normal", "none", "all"]


class NicNotFoundError(MpassthruError):
    """QEMU has no device that is known to be ours; that may pass."""


class RxFilter(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """One device in the answer to `query-rx-filter`."""

    promiscuous: bool
    unicast: RxState
    unicast_overflow: bool
    unicast_table: list[str]
    multicast: RxState
    multicast_overflow: bool
    multicast_table: list[str]
    vlan: RxState
    vlan_table: list[int]
    main_mac: str

    def asked(self) -> Filter:
        """What the guest asks for, as QEMU's own device would take it (receive_filter)."""
        if self.promiscuous:
            return Filter(unicast=None, multicast=None, broadcast=True, vlans=None)
        stations, groups = [self.main_mac, *self.unicast_table], self.multicast_table
        return Filter(
            unicast=_wanted(self.unicast, stations, self.unicast_overflow, group_bit=0),
            multicast=_wanted(self.multicast, groups, self.multicast_overflow, group_bit=1),
            broadcast=True,
            vlans=None if self.vlan == "all" else tuple(sorted({vlan for vlan in self.vlan_table if 0 < vlan < 4096})),
        )


class _ChardevAddress(msgspec.Struct, frozen=True):
    """A chardev's `addr`: of those of type `unix` the path."""

    path: str | None = None


class _RunState(msgspec.Struct, frozen=True):
    status: str


class Wired(NamedTuple):
    """A device of QEMU's with a vhost-user back-end."""

    nic: str
    backend: str
    chardev: str


async def find_nic(client: QmpClient, *, socket_path: Path | None, name: str | None) -> str:
    """The name of the device whose back-end we are.

    Args:
        client: A session with QEMU.
        socket_path: Our vhost-user socket; None if it is not known by a path.
        name: What the user calls the device, or its network back-end; None to find it by the socket, or without one
            by being the only one.

    Raises:
        NicNotFoundError: none, or more than one, is ours.
        QmpError: QEMU does not answer as expected.
    """
    text = await client.execute("human-monitor-command", command_line="info network", result=str)
    wired = tuple(wired_nics(text))
    if name is not None:
        return next((each.nic for each in wired if name in (each.nic, each.backend)), name)
    if socket_path is not None:
        paths = {chardev: await _path_of(client, chardev) for chardev in {each.chardev for each in wired}}
        ours = [each for each in wired if _is_same(paths[each.chardev], socket_path)]
    else:
        ours = list(wired)
    if len(ours) != 1:
        there = ", ".join(each.nic for each in wired) or "none"
        place = f"on {socket_path}" if socket_path is not None else "known to be ours"
        raise NicNotFoundError(
            f"QEMU has {'no' if not ours else 'more than one'} vhost-user network device {place} (it has: {there}); "
            "name it by --qmp-nic"
        )
    return ours[0].nic


async def read_filter(client: QmpClient, nic: str) -> RxFilter:
    """What a device's guest wants to receive; QEMU tells of the next change by `NIC_RX_FILTER_CHANGED`.

    Raises:
        NicNotFoundError: there is no such device (any more), or it is none that has filters.
        QmpError: QEMU does not answer as expected.
    """
    try:
        (answer,) = await client.execute("query-rx-filter", name=nic, result=tuple[RxFilter])
    except QmpCommandError as error:
        raise NicNotFoundError(str(error)) from error
    return answer


async def is_awaited(client: QmpClient) -> bool:
    """Whether the guest is still to come, from another host or a file: its devices' state will be what it brings.

    Raises:
        QmpError: QEMU does not answer as expected.
    """
    return (await client.execute("query-status", result=_RunState)).status == "inmigrate"


def wired_nics(info_network: str) -> Iterator[Wired]:
    """Devices and their vhost-user back-ends in what `info network` says: a line for each, the device first.

    A device of several queue pairs has a line for each, and so has its back-end.
    """
    nic = None
    seen: set[str] = set()
    for line in info_network.splitlines():
        if (device := _NIC.match(line)) is not None:
            nic = device[1]
        elif (backend := _BACKEND.match(line)) is not None and nic is not None and nic not in seen:
            seen.add(nic)
            yield Wired(nic, backend[1], backend[2])


async def _path_of(client: QmpClient, chardev: str) -> str | None:
    try:
        address = await client.execute(
            "qom-get", path=f"/chardevs/{chardev}", property="addr", result=_ChardevAddress | None
        )
    except QmpCommandError:
        return None  # it is gone meanwhile, or is no socket
    return address.path if address is not None else None


def _is_same(path: str | None, ours: Path) -> bool:
    return path is not None and os.path.realpath(path) == os.path.realpath(ours)


def _wanted(state: RxState, listed: list[str], overflow: bool, *, group_bit: int) -> tuple[bytes, ...] | None:
    """Addresses of one kind; those that are of the other kind, or none at all, match no frame."""
    if state == "all" or (state == "normal" and overflow):
        return None
    if state == "none":
        return ()
    table = {bytes.fromhex(text.replace(":", "")) for text in listed if _MAC.fullmatch(text)}
    table = {mac for mac in table if mac[0] & 1 == group_bit and mac != b"\xff" * 6}
    return None if len(table) > TABLE_MAX else tuple(sorted(table))
