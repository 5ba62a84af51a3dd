"""The budget for locked memory: how much of the host's memory ports may have locked, this one and all together.

What a port holds is a number in a file of its own, in a directory that all ports of the host share (`RUNTIME_DIR`). The
port's broker has the file locked (flock(2)) as long as it lives: a file that can be locked by another is that of a
broker which is gone, whatever ended it, and counts for nothing. No daemon is needed, and nothing has to be cleaned up.

Looking and writing are one step under the lock of the directory. Who may read a file may lock it, and so pretend that
a port is alive: only the owner and the group of the directory may. docs/decisions/0011.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, Self

import msgspec

from mpassthru.errors import HostError, MpassthruError, RefusedError, attempting, errno_name
from mpassthru.netdev import format_bytes

RUNTIME_DIR: Final = Path("/run/mpassthru")
LOCK: Final = "lock"
LEFT_TO_THE_HOST_BYTES: Final = 1 << 30
LEFT_TO_THE_HOST_SHARE: Final = 10
"""By default the host keeps this much of its memory for itself, or this part of it, whichever is less."""
HOLDING_MAX_BYTES: Final = 4096
"""A file in the directory has a hundred bytes."""
FILE_MODE: Final = 0o640
LOCK_MODE: Final = 0o660
"""A directory with a group of its own, and set-group-ID, serves brokers that are not root's."""


class Holding(msgspec.Struct, frozen=True):
    """What one port holds."""

    interface: str
    pid: int
    """Of its broker."""
    locked_bytes: int


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    """How much may be locked."""

    port_max_bytes: int | None = None
    """By this port; None for as much as all may."""
    host_max_bytes: int
    """By all ports of the host together."""


def default_host_max_bytes() -> int:
    """What all ports may lock together if nobody says otherwise."""
    total_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return total_bytes - min(LEFT_TO_THE_HOST_BYTES, total_bytes // LEFT_TO_THE_HOST_SHARE)


class LockedMemory:
    """One port's place in the accounts of the host.

    Args:
        directory: Where the accounts are kept; made if it is not there. None to know of no other port.
        interface: The port's, to tell others who holds what.
        budget: What is allowed.

    Raises:
        HostError: the accounts cannot be kept there.
    """

    def __init__(self, directory: Path | None, interface: str, budget: Budget) -> None:
        self._directory = directory
        self._interface = interface
        self.budget = budget
        self.locked_bytes = 0
        self._fd, self._path = -1, ""
        if directory is None:
            return
        with _accounts_error(directory):
            directory.mkdir(mode=0o755, exist_ok=True)
        with locked_accounts(directory):
            self._fd, self._path = tempfile.mkstemp(prefix="port-", dir=directory)
            try:
                os.fchmod(self._fd, FILE_MODE)
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._write(0)
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def lock(self, wanted_bytes: int) -> None:
        """Have so much memory locked in all, in place of what was before.

        Raises:
            RefusedError: that is more than a budget allows; what was before stays.
            HostError: the accounts cannot be read or written.
        """
        if self._directory is None:
            self._check(wanted_bytes, [])
            self.locked_bytes = wanted_bytes
            return
        with locked_accounts(self._directory):
            if wanted_bytes > self.locked_bytes:
                self._check(wanted_bytes, [other for path, other in _holdings(self._directory) if path != self._path])
            self._write(wanted_bytes)

    def move(self, interface: str) -> None:
        """The port is bound to another interface: others are to know it by that.

        Raises:
            HostError: the accounts cannot be written.
        """
        self._interface = interface
        if self._directory is not None:
            with locked_accounts(self._directory):
                self._write(self.locked_bytes)

    def close(self) -> None:
        """Hold nothing any more. May be repeated.

        Raises:
            HostError: the file cannot be removed; it counts for nothing.
        """
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            with attempting(f"remove {self._path}"), contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)

    def _check(self, wanted_bytes: int, others: Sequence[Holding]) -> None:
        port_max_bytes, host_max_bytes = self.budget.port_max_bytes, self.budget.host_max_bytes
        wanted = f"cannot lock {format_bytes(wanted_bytes)} of memory for a guest on {self._interface}"
        if port_max_bytes is not None and wanted_bytes > port_max_bytes:
            raise RefusedError(
                f"{wanted}: this port's budget is {format_bytes(port_max_bytes)}; "
                "give the guest less memory, or raise --locked-memory"
            )
        held_bytes = sum(other.locked_bytes for other in others)
        if wanted_bytes + held_bytes > host_max_bytes:
            raise RefusedError(
                f"{wanted}: all ports of this host may lock {format_bytes(host_max_bytes)}, and others hold "
                f"{format_bytes(held_bytes)}{_who(others)}; "
                "give the guest less memory, end another one, or raise --locked-memory-all"
            )

    def _write(self, locked_bytes: int) -> None:
        content = msgspec.json.encode(Holding(self._interface, os.getpid(), locked_bytes))
        os.pwrite(self._fd, content, 0)
        os.ftruncate(self._fd, len(content))
        self.locked_bytes = locked_bytes


def holdings(directory: Path = RUNTIME_DIR) -> list[Holding]:
    """What the ports of this host hold. Empty where there have never been any.

    Raises:
        HostError: the accounts cannot be read.
    """
    if not (directory / LOCK).exists():
        return []
    with locked_accounts(directory):
        return [holding for _, holding in _holdings(directory)]


def _holdings(directory: Path) -> Iterator[tuple[str, Holding]]:
    """Path and content of each live port's file; those of ports that are gone are removed. The accounts are locked."""
    for path in sorted(directory.glob("port-*")):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue  # a port that ends takes its file away whoever has the accounts locked
        try:
            if _is_abandoned(fd):
                path.unlink(missing_ok=True)
            else:
                yield str(path), msgspec.json.decode(os.read(fd, HOLDING_MAX_BYTES), type=Holding)
        finally:
            os.close(fd)


def _is_abandoned(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def locked_accounts(directory: Path) -> Iterator[None]:
    """Nobody else changes anything in the directory meanwhile.

    Raises:
        HostError: it cannot be locked.
    """
    with _accounts_error(directory):
        fd = os.open(directory / LOCK, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, LOCK_MODE)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


@contextlib.contextmanager
def _accounts_error(directory: Path) -> Iterator[None]:
    try:
        yield
    except MpassthruError:
        raise
    except msgspec.DecodeError as error:
        raise RefusedError(f"the accounts of locked memory in {directory} are broken ({error}): remove them") from error
    except OSError as error:
        advice = {
            errno.EACCES: "let this user write there, or choose another directory for all ports with --runtime-dir",
            errno.ENOENT: "make its parent directory, or choose another directory for all ports with --runtime-dir",
        }.get(error.errno or 0, "choose another directory for all ports with --runtime-dir")
        raise HostError(
            error.errno or 0,
            f"cannot keep the accounts of locked memory in {directory} ({errno_name(error.errno)}): {advice}",
        ) from error


def _who(others: Iterable[Holding]) -> str:
    names = [f"{format_bytes(other.locked_bytes)} for {other.interface} (pid {other.pid})" for other in others]
    return f" ({', '.join(names)})" if names else ""
