"""Whether guests really run under KVM on this machine: by running one, of a single sector."""

from __future__ import annotations

import asyncio

from mpassthru.testing.child import memory_file, running_child

# A boot sector that writes 0x21 to the isa-debug-exit device, so that QEMU exits with status 2 * 0x21 + 1.
_PROBE_SECTOR = bytes.fromhex("b021 e6f4 f4").ljust(510, b"\0") + b"\x55\xaa"  # mov al,0x21; out 0xf4,al; hlt
_PROBE_EXIT_STATUS = 2 * 0x21 + 1
_PROBE_DEADLINE_S = 2.0
_kvm_probed: dict[str, bool] = {}


async def kvm_works(qemu: str = "qemu-system-x86_64") -> bool:
    """Return whether a guest really runs under KVM here; asked once per process.

    /dev/kvm tells too little: in some nested and sandboxed machines it opens, and the guest fails or crawls.
    """
    if qemu not in _kvm_probed:
        _kvm_probed[qemu] = await _boots_under_kvm(qemu)
    return _kvm_probed[qemu]


async def _boots_under_kvm(qemu: str) -> bool:
    arguments = [qemu, "-nodefaults", "-no-user-config", "-display", "none", "-machine", "q35", "-m", "16M"]
    arguments += ["-accel", "kvm", "-cpu", "host", "-device", "isa-debug-exit,iobase=0xf4,iosize=1"]
    with memory_file("sector", _PROBE_SECTOR) as sector:
        arguments += ["-drive", f"file=/proc/self/fd/{sector},format=raw,if=ide,readonly=on", "-no-reboot"]
        async with running_child(*arguments, pass_fds=[sector]) as process:
            try:
                async with asyncio.timeout(_PROBE_DEADLINE_S):
                    await process.communicate()
            except TimeoutError:
                return False
        return process.returncode == _PROBE_EXIT_STATUS
