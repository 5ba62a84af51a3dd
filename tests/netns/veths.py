"""More veth pairs in a namespace than the one that it is made with."""

from __future__ import annotations

from mpassthru.testing.netns import Namespace, set_offloads


def make_veth(namespace: Namespace, ifname: str, peer: str, *, queues: int = 1, mtu: int = 1500) -> None:
    """Make a pair as `veth_namespace` does, both ends up; the carrier is not waited for."""
    size = ("mtu", str(mtu), "numrxqueues", str(queues), "numtxqueues", str(queues))
    namespace.run("ip", "link", "add", ifname, *size, "type", "veth", "peer", "name", peer, *size)
    with namespace.entered():
        for end in (ifname, peer):
            set_offloads(end, enabled=False)
    for end in (peer, ifname):
        namespace.run("ip", "link", "set", "dev", end, "up")
