"""Reads an `Interface`: rtnetlink for the link, NETDEV netlink for XDP, ethtool for the driver, sysfs for its place."""

from __future__ import annotations

import errno
from typing import Any, Final

from pyroute2 import AsyncIPRoute
from pyroute2.ethtool.ioctl import EthtoolError, NoSuchDevice
from pyroute2.netlink.exceptions import NetlinkError

from mpassthru.errors import HostError, host_error
from mpassthru.netdev import ethtool, netdev_family, pci
from mpassthru.netdev.facts import Interface, QueueCounts, VethPeer, XdpProgram, XdpProgramMode
from mpassthru.netdev.link_events import LinkState

_IFF_UP: Final = 1
_IFF_LOWER_UP: Final = 1 << 16
_XDP_MODES: Final[dict[str, XdpProgramMode]] = {
    "xdp": "native",
    "xdpgeneric": "generic",
    "xdpoffload": "offloaded",
    "xdpmulti": "mixed",
}


async def read_interface(ifname: str) -> Interface:
    """Everything that is known about an interface of the current network namespace.

    Raises:
        HostError: ENODEV if there is no such interface, or it goes away meanwhile; what the kernel else refused.
    """
    try:
        async with AsyncIPRoute() as route:
            link = await _link(route, ifname)
            veth_peer = await _veth_peer(route, link)
        return await _describe(ifname, link, veth_peer)
    except HostError:
        raise
    except (OSError, NetlinkError, EthtoolError) as error:
        number = _errno_of(error)
        if number == errno.ENODEV:
            raise no_such_interface(ifname) from error
        raise host_error(f"read interface {ifname}", OSError(number, "")) from error


async def find_interface(ifname: str, ifindex: int | None = None) -> Interface | None:
    """As `read_interface`; None if there is no such interface.

    Args:
        ifname: Its name; does not matter if `ifindex` is given.
        ifindex: Its index, by which it is found whatever it is called by now.

    Raises:
        HostError: the kernel refused for another reason.
    """
    while (link := await read_link(ifname, ifindex)) is not None:
        try:
            interface = await read_interface(link.name)
        except HostError as error:
            if error.errno != errno.ENODEV:
                raise
            continue  # renamed meanwhile, or gone
        if interface.ifindex == link.ifindex:
            return interface
    return None


async def read_link(ifname: str, ifindex: int | None = None) -> LinkState | None:
    """What a port on an interface depends on, at less cost than `read_interface`; None if there is no such interface.

    Args:
        ifname: Its name; does not matter if `ifindex` is given.
        ifindex: Its index, by which it is found whatever it is called by now.

    Raises:
        HostError: the kernel refused for another reason.
    """
    found = {"ifname": ifname} if ifindex is None else {"index": ifindex}
    while True:
        try:
            async with AsyncIPRoute() as route:
                links: list[Any] = list(await route.link("get", **found))
            return _state_of(links[0]) if links else None
        except NoSuchDevice:
            continue  # renamed meanwhile, or gone: netlink tells which
        except (OSError, NetlinkError, EthtoolError) as error:
            number = _errno_of(error)
            if number == errno.ENODEV:
                return None
            raise host_error(f"read interface {ifname}", OSError(number, "")) from error


def _state_of(link: Any) -> LinkState:
    name = link.get_attr("IFLA_IFNAME")
    queues = _queues(name, link)
    program = _xdp_program(link)
    return LinkState(
        ifindex=link["index"],
        name=name,
        up=bool(link["flags"] & _IFF_UP),
        carrier=bool(link["flags"] & _IFF_LOWER_UP),
        mtu_bytes=link.get_attr("IFLA_MTU"),
        xdp_program_id=program.id if program else None,
        rx_queues=queues.rx,
        tx_queues=queues.tx,
    )


def _queues(ifname: str, link: Any) -> QueueCounts:
    return ethtool.read_queues(
        ifname, rx=link.get_attr("IFLA_NUM_RX_QUEUES") or 1, tx=link.get_attr("IFLA_NUM_TX_QUEUES") or 1
    )


def no_such_interface(ifname: str) -> HostError:
    """The error for an interface that is not there."""
    return HostError(errno.ENODEV, f"cannot find interface {ifname} (ENODEV): 'ip link' lists those that exist")


async def _link(route: AsyncIPRoute, ifname: str) -> Any:
    if not 0 < len(ifname.encode()) < 16:  # IFNAMSIZ
        raise no_such_interface(ifname)
    links: list[Any] = list(await route.link("get", ifname=ifname))
    if not links:
        raise no_such_interface(ifname)
    return links[0]


async def _veth_peer(route: AsyncIPRoute, link: Any) -> VethPeer | None:
    ifindex = link.get_attr("IFLA_LINK")
    if link.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND") != "veth" or not ifindex:
        return None
    if link.get_attr("IFLA_LINK_NETNSID") is not None:
        return VethPeer(ifindex=ifindex, ifname=None)
    peers: list[Any] = list(await route.link("get", index=ifindex))
    ifname = peers[0].get_attr("IFLA_IFNAME")
    return VethPeer(ifindex=ifindex, ifname=ifname, unfinished_offloads=ethtool.read_unfinished_offloads(ifname))


async def _describe(ifname: str, link: Any, veth_peer: VethPeer | None) -> Interface:
    ifindex = link["index"]
    driver = ethtool.read_driver(ifname)
    return Interface(
        name=ifname,
        ifindex=ifindex,
        mac=link.get_attr("IFLA_ADDRESS") or "",
        mtu_bytes=link.get_attr("IFLA_MTU"),
        up=bool(link["flags"] & _IFF_UP),
        operstate=(link.get_attr("IFLA_OPERSTATE") or "unknown").lower(),
        driver=driver.name or link.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND"),
        bus_address=driver.bus_address,
        queues=_queues(ifname, link),
        offloads=ethtool.read_offloads(ifname),
        xdp_program=_xdp_program(link),
        xdp_features=await netdev_family.xdp_features(ifindex),
        xsk_queues=await netdev_family.xsk_queues(ifindex) if netdev_family.kernel_names_xsk_queues() else None,
        iommu=pci.iommu_kind(driver.bus_address),
        numa_node=pci.numa_node(driver.bus_address),
        veth_peer=veth_peer,
        virtio_header_bytes=pci.virtio_header_bytes(driver.bus_address) if driver.name == "virtio_net" else None,
        virtio_dma_api=pci.virtio_uses_dma_api(driver.bus_address) if driver.name == "virtio_net" else None,
    )


def _xdp_program(link: Any) -> XdpProgram | None:
    mode = link.get_nested("IFLA_XDP", "IFLA_XDP_ATTACHED")
    if mode is None:
        return None
    # Programs in several modes at once have an id each; the first is enough to say what is in the way.
    attributes = dict(link.get_attr("IFLA_XDP")["attrs"])
    ids = [attributes[name] for name in _XDP_ID_ATTRIBUTES if attributes.get(name)]
    return XdpProgram(id=ids[0] if ids else 0, mode=_XDP_MODES.get(mode, "mixed"))


_XDP_ID_ATTRIBUTES: Final = ("IFLA_XDP_PROG_ID", "IFLA_XDP_DRV_PROG_ID", "IFLA_XDP_SKB_PROG_ID", "IFLA_XDP_HW_PROG_ID")


def _errno_of(error: Exception) -> int | None:
    match error:
        case NoSuchDevice():
            return errno.ENODEV
        case EthtoolError():
            return errno.EOPNOTSUPP
        case NetlinkError():
            return int(error.code)
    return getattr(error, "errno", None)
