"""Other people's bpf_links: what an administrator does with `bpftool link detach`."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import struct

from mpassthru.testing.netns import Namespace

_SYS_BPF = 321
_BPF_OBJ_GET_INFO_BY_FD = 15
_BPF_LINK_GET_FD_BY_ID = 30
_BPF_LINK_GET_NEXT_ID = 31
_BPF_LINK_DETACH = 34
_BPF_LINK_TYPE_XDP = 6
_INFO_BYTES = 128

_libc = ctypes.CDLL(None, use_errno=True)


def detach_program(namespace: Namespace) -> None:
    """Take the XDP program off the namespace's interface, whoever holds its link.

    Raises:
        LookupError: it has none.
    """
    # By the program, for an interface has the same index as others in other namespaces.
    (link,) = json.loads(namespace.run("ip", "-json", "-details", "link", "show", "dev", namespace.ifname))
    program = link["xdp"]["prog"]["id"]
    link_id = 0
    while (next_id := _next_link(link_id)) is not None:
        link_id = next_id
        if _type_and_program(link_id) == (_BPF_LINK_TYPE_XDP, program):
            _detach(link_id)
            return
    raise LookupError(f"no link has program {program} on {namespace.ifname}")


def _detach(link_id: int) -> None:
    fd = _bpf(_BPF_LINK_GET_FD_BY_ID, ctypes.create_string_buffer(struct.pack("=I", link_id), 16))
    try:
        _bpf(_BPF_LINK_DETACH, ctypes.create_string_buffer(struct.pack("=I", fd), 4))
    finally:
        os.close(fd)


def _next_link(link_id: int) -> int | None:
    attr = ctypes.create_string_buffer(struct.pack("=II", link_id, 0), 12)
    try:
        _bpf(_BPF_LINK_GET_NEXT_ID, attr)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    return int(struct.unpack_from("=II", attr)[1])


def _type_and_program(link_id: int) -> tuple[int, int]:
    fd = _bpf(_BPF_LINK_GET_FD_BY_ID, ctypes.create_string_buffer(struct.pack("=I", link_id), 16))
    info = ctypes.create_string_buffer(_INFO_BYTES)
    try:
        attr = struct.pack("=IIQ", fd, _INFO_BYTES, ctypes.addressof(info))
        _bpf(_BPF_OBJ_GET_INFO_BY_FD, ctypes.create_string_buffer(attr, 16))
    finally:
        os.close(fd)
    # struct bpf_link_info begins with type, id and prog_id.
    kind, _, program = struct.unpack_from("=III", info)
    return kind, program


def _bpf(command: int, attr: ctypes.Array[ctypes.c_char]) -> int:
    result: int = _libc.syscall(_SYS_BPF, command, attr, len(attr))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
