"""DPDK's virtio-user driver as the guest: needs root and Debian's dpdk-dev."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--frames N`."""
    parser.addoption("--frames", type=int, default=500_000, help="frames to move in each test of virtio-user")


@pytest.fixture(scope="session")
def frames(pytestconfig: pytest.Config) -> int:
    """How many frames each test moves."""
    count: int = pytestconfig.getoption("--frames")
    return count
