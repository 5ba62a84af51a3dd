"""Memory files that no process can shrink: whoever maps one cannot be killed by SIGBUS."""

from __future__ import annotations

import fcntl
import os

from mpassthru.errors import HostError, errno_name


def make_sealed_memory(name: str, size_bytes: int) -> int:
    """Make a memfd of a size that stays.

    Args:
        name: What /proc shows.
        size_bytes: Its size; pages that are never written take no memory.

    Returns:
        The descriptor, the caller's to close.

    Raises:
        HostError: it cannot be made.
    """
    fd = -1
    try:
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, size_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        raise HostError(
            error.errno or 0,
            f"cannot make the memory file {name} of {size_bytes} bytes ({errno_name(error.errno)}): "
            "raise ulimit -n, or free some memory",
        ) from error
    return fd
