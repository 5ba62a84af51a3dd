"""Whose process the worker is, decided before anything is changed."""

from __future__ import annotations

import os

import pytest

from mpassthru.broker import worker_user
from mpassthru.broker.worker_user import NOBODY, worker_ids
from mpassthru.errors import RefusedError


@pytest.fixture(autouse=True)
def _root_with_every_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(worker_user, "missing_for_worker_user", list[str])


def test_worker_of_a_root_broker_is_nobodys() -> None:
    assert worker_ids(None) == (NOBODY, NOBODY)


def test_worker_of_another_broker_stays_its_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)

    assert worker_ids(None) == (None, None)


def test_root_is_refused_with_the_reason() -> None:
    with pytest.raises(RefusedError, match=r"cannot run the worker as root: uid 0 opens root's files"):
        worker_ids("root")


def test_user_that_does_not_exist_is_refused() -> None:
    with pytest.raises(RefusedError, match="there is no such user"):
        worker_ids("no-such-user")


@pytest.mark.parametrize("user", [None, "nobody"])
def test_broker_that_may_not_change_users_is_refused(monkeypatch: pytest.MonkeyPatch, user: str | None) -> None:
    monkeypatch.setattr(worker_user, "missing_for_worker_user", lambda: ["CAP_SETUID"])

    with pytest.raises(RefusedError, match="cannot run the worker as nobody without CAP_SETUID: run as root"):
        worker_ids(user)
