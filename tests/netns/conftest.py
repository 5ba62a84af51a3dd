"""A fresh network namespace with a veth pair for each test that asks for one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mpassthru.netdev.capabilities import Capability, effective_capabilities, missing_for_broker
from mpassthru.testing.netns import Namespace, veth_namespace


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip this folder, saying why, where the process may not make namespaces, load BPF or open AF_XDP sockets."""
    missing = missing_for_broker()
    if Capability.CAP_SYS_ADMIN not in effective_capabilities():
        missing.append("CAP_SYS_ADMIN")
    if not missing:
        return
    skip = pytest.mark.skip(reason=f"needs {', '.join(missing)}: run as root")
    for item in items:
        if "tests/netns" in item.path.as_posix():
            item.add_marker(skip)


@pytest.fixture
def veth() -> Iterator[Namespace]:
    """A veth pair with one queue, MTU 1500, offloads off. The test runs inside its namespace."""
    with veth_namespace() as namespace, namespace.entered():
        yield namespace


@pytest.fixture
def veth_two_queues() -> Iterator[Namespace]:
    """As `veth`, with two queues on each end."""
    with veth_namespace(queues=2) as namespace, namespace.entered():
        yield namespace
