"""Reading capability sets, and the parent that is gone. Giving privileges up is tested in tests/netns, as root."""

from __future__ import annotations

import os

import pytest

from mpassthru.worker import privileges

STATUS = "Name:\tx\nCapInh:\t0000000000000000\nCapPrm:\t0000000000004001\nCapEff:\t0000000000004000\n"


def test_capability_sets_are_read_by_number() -> None:
    assert privileges.permitted_capabilities(STATUS) == {0, 14}
    assert privileges.effective_capabilities(STATUS) == {privileges.CAP_IPC_LOCK}


def test_status_without_capabilities_is_an_error() -> None:
    with pytest.raises(ValueError, match="no CapEff"):
        privileges.effective_capabilities("Name:\tx\n")


def test_process_whose_parent_is_gone_ends_at_once() -> None:
    with pytest.raises(SystemExit):
        privileges.die_with_parent(parent_pid=1 if os.getppid() != 1 else 2)
