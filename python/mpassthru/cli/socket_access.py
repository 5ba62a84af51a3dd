"""Who may connect to a socket path, as people write it."""

from __future__ import annotations

import grp
import pwd
import re

import typer

from mpassthru.broker.endpoint import SocketAccess


def parse_socket_access(owner: str | None, mode: str) -> SocketAccess:
    """Owner and permissions from `--socket-owner` (names or numbers, as for chown(1)) and `--socket-mode` (octal).

    Raises:
        typer.BadParameter: no such user or group, or no such mode.
    """
    if not re.fullmatch(r"(0o?)?[0-7]{3}", mode):
        raise typer.BadParameter(f"{mode!r} is not a mode; write it in octal, like 0660")
    user, _, group = (owner or "").partition(":")
    return SocketAccess(
        mode=int(mode, 8),
        uid=int(user) if user.isdecimal() else _uid(user),
        gid=int(group) if group.isdecimal() else _gid(group),
    )


def _uid(user: str) -> int:
    if not user:
        return -1
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError:
        raise typer.BadParameter(f"there is no user {user}; see getent passwd") from None


def _gid(group: str) -> int:
    if not group:
        return -1
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise typer.BadParameter(f"there is no group {group}; see getent group") from None
