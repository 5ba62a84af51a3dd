"""Several hosts on one wire: a network namespace for each, joined by a bridge in another one.

The bridge's own interface is the peer that guests on any of the hosts talk to.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from mpassthru.testing.netns import Namespace, empty_namespace, veth_namespace, wait_running

BRIDGE = "br0"


@contextmanager
def bridged_hosts(count: int, *, timeout_s: float = 5.0) -> Iterator[tuple[Namespace, list[Namespace]]]:
    """Make `count` namespaces, each with a host interface, and the namespace of the bridge that joins them.

    Returns:
        The bridge's namespace, in which `ifname` and `peer` are the bridge itself, and those of the hosts, whose `peer`
        is a port of the bridge in the other namespace.

    Raises:
        HostError: EPERM without CAP_SYS_ADMIN and CAP_NET_ADMIN; ETIMEDOUT if there is no carrier in time.
        subprocess.CalledProcessError: ip(8) failed.
    """
    with ExitStack() as resources:
        fd = resources.enter_context(empty_namespace())
        wire = Namespace(fd, BRIDGE, 0, BRIDGE, 0)
        # Ports forward at once; nobody asks who listens to which multicast group.
        wire.run("ip", "link", "add", BRIDGE, "type", "bridge", "stp_state", "0", "mcast_snooping", "0")
        wire.run("ip", "link", "set", BRIDGE, "up")
        hosts = []
        for number in range(count):
            host = resources.enter_context(veth_namespace())
            port = f"host{number}"
            with wait_running(host, {host.ifindex}, timeout_s=timeout_s):
                host.run("ip", "link", "set", host.peer, "netns", f"/proc/{os.getpid()}/fd/{fd}", "name", port)
                wire.run("ip", "link", "set", port, "master", BRIDGE, "up")
            hosts.append(replace(host, peer=port))
        yield wire, hosts


def add_tap(wire: Namespace, name: str) -> None:
    """Add a tap interface to the bridge, for a guest whose QEMU runs in the bridge's namespace.

    Raises:
        subprocess.CalledProcessError: ip(8) failed.
    """
    wire.run("ip", "tuntap", "add", name, "mode", "tap")
    wire.run("ip", "link", "set", name, "master", BRIDGE, "up")
