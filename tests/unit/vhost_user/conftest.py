"""Descriptors that front-ends send."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from vhost_user_fakes import memory_fd


@pytest.fixture
def fd() -> Iterator[int]:
    fd = memory_fd()
    yield fd
    os.close(fd)


@pytest.fixture
def event() -> Iterator[int]:
    fd = os.eventfd(0)
    yield fd
    os.close(fd)
