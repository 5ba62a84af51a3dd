"""Whose process a worker is: never root's.

Without any capability root still opens what belongs to root: /etc/shadow, or /proc/sys/kernel/core_pattern, which the
kernel runs. So a worker of a root broker becomes `nobody`, or a user of its own.
"""

from __future__ import annotations

import os
import pwd
from typing import Final

from mpassthru.errors import RefusedError
from mpassthru.netdev.capabilities import missing_for_worker_user

NOBODY: Final = 65534
"""The kernel's overflow id, for user and group: it owns nothing."""


def worker_ids(user: str | None) -> tuple[int | None, int | None]:
    """User and group id of the worker; None for both if it stays the broker's user, who is not root then.

    Args:
        user: What the user asked for; None for `nobody` if the broker is root.

    Raises:
        RefusedError: no such user, root, or this process may not start processes of another user.
    """
    if user is None and os.geteuid() != 0:
        return None, None
    name = user or "nobody"
    uid, gid = _ids_of(user) if user else (NOBODY, NOBODY)
    if uid == 0:
        raise RefusedError(
            f"cannot run the worker as {name}: uid 0 opens root's files without any capability; "
            "name a user of its own, or leave --user out for nobody"
        )
    if missing := missing_for_worker_user():
        raise RefusedError(
            f"cannot run the worker as {name} without {', '.join(missing)}: run as root, or grant what is missing"
        )
    return uid, gid


def _ids_of(user: str) -> tuple[int, int]:
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        raise RefusedError(f"cannot run the worker as {user}: there is no such user; see getent passwd") from None
    return entry.pw_uid, entry.pw_gid
