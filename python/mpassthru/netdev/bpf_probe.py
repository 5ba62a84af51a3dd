"""Whether this process may load an XDP program: found out by loading the smallest one there is."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from typing import Final

from mpassthru.errors import HostError, errno_name

_SYS_BPF: Final = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "loongarch64": 280, "ppc64le": 361, "s390x": 351}
_BPF_PROG_LOAD: Final = 5
_BPF_PROG_TYPE_XDP: Final = 6
_XDP_PASS: Final = 2
_INSTRUCTION: Final = struct.Struct("=BBhi")
_MOV_R0: Final = 0xB7
_EXIT: Final = 0x95
_PROG_LOAD: Final = struct.Struct("=IIQQIIQI")
"""The start of `union bpf_attr` for BPF_PROG_LOAD: type, instruction count, instructions, license, log (3), version."""

_libc = ctypes.CDLL(None, use_errno=True)


def check_bpf_load() -> None:
    """Load an XDP program that passes every frame, and let go of it. Nothing is attached.

    Raises:
        HostError: EPERM without CAP_BPF and CAP_NET_ADMIN; ENOSYS if the kernel has no BPF.
    """
    number = _SYS_BPF.get(platform.machine())
    if number is None:
        raise HostError(
            errno.ENOSYS, f"cannot load BPF (ENOSYS): the number of bpf(2) on {platform.machine()} is not known"
        )
    program = _INSTRUCTION.pack(_MOV_R0, 0, 0, _XDP_PASS) + _INSTRUCTION.pack(_EXIT, 0, 0, 0)
    instructions = ctypes.create_string_buffer(program, len(program))
    license_text = ctypes.create_string_buffer(b"Apache-2.0")
    attributes = ctypes.create_string_buffer(
        _PROG_LOAD.pack(
            _BPF_PROG_TYPE_XDP,
            len(program) // _INSTRUCTION.size,
            ctypes.addressof(instructions),
            ctypes.addressof(license_text),
            0,
            0,
            0,
            0,
        ),
        _PROG_LOAD.size,
    )
    fd = _libc.syscall(number, _BPF_PROG_LOAD, attributes, _PROG_LOAD.size)
    if fd < 0:
        failed = ctypes.get_errno()
        raise HostError(
            failed,
            f"cannot load an XDP program ({errno_name(failed)}): "
            "run as root, or give the process CAP_BPF and CAP_NET_ADMIN",
        )
    os.close(fd)
