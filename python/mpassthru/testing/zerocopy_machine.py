"""The host of the zero-copy tests: a machine in QEMU whose NICs have zero-copy drivers, running this repository.

No physical NIC is needed: QEMU emulates igb, and virtio_net over the DMA API; both drivers of an unmodified kernel have
AF_XDP zero-copy. The machine boots from memory in seconds. Its root is this machine's file system, read-only under an
overlay, so that a command finds the repository, its virtual environment and its programs at the same paths; one folder
is shared writable, for reports. The wires are inside as well: each NIC under test is joined with a plain one to play
the other end.

```
python -m mpassthru.testing.zerocopy_machine $(tools/zerocopy-machine) --share build/reports -- pytest tests/zerocopy
```
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mpassthru.errors import MpassthruError
from mpassthru.testing.child import ChildError, last_lines, memory_file, running_child
from mpassthru.testing.initramfs import GuestKernel, build_initramfs
from mpassthru.testing.kvm import kvm_works

MODULES: Final = ("9pnet_virtio", "9p", "overlay", "veth", "virtio_net", "igb")
HUGEPAGES: Final = 320
"""Of 2 MiB, for guests in the machine."""
IN_MACHINE: Final = "MPASSTHRU_ZERO_COPY_MACHINE"
"""Environment variable that is set in the machine."""
_ENDED: Final = "zerocopy-machine: ended with status "
_HUB_WARNING: Final = "is not connected to host network"
"""Of QEMU, about wires that are inside the machine on purpose."""
_CONSOLE_KEPT_LINES: Final = 40

# Guest offloads off, and DMA addresses by the DMA API: without either, virtio_net has no zero-copy.
_ZERO_COPY_VIRTIO: Final = (
    "virtio-net-pci,iommu_platform=on,disable-legacy=on,"
    "guest_csum=off,guest_tso4=off,guest_tso6=off,guest_ufo=off,guest_ecn=off"
)


@dataclass(frozen=True, slots=True)
class Nic:
    """A NIC of the machine: its name there, its address, QEMU's device, and the wire that it is on."""

    name: str
    mac: str
    device: str
    wire: int


NICS: Final = (
    Nic("virtio", "52:54:00:00:01:01", _ZERO_COPY_VIRTIO, 1),
    Nic("virtio-peer", "52:54:00:00:01:02", "virtio-net-pci", 1),
    Nic("igb", "52:54:00:00:02:01", "igb", 2),
    Nic("igb-peer", "52:54:00:00:02:02", "virtio-net-pci", 2),
)


@dataclass(frozen=True, kw_only=True)
class MachineConfig:
    """What the machine is made of.

    Attributes:
        qemu: A tree into which Debian's QEMU packages were unpacked.
        kernel: A kernel whose igb and virtio_net have zero-copy (6.14 or later).
        memory_mib: Its memory, in MiB.
        cpus: Its virtual CPUs.
        share: A folder that is writable in the machine, at the same path.
    """

    qemu: Path
    kernel: GuestKernel
    memory_mib: int = 3072
    cpus: int = 2
    share: Path | None = None


async def run_in_machine(
    config: MachineConfig, command: Sequence[str], *, timeout_s: float, say: Callable[[str], None], cwd: Path
) -> int:
    """Boot the machine, run a command in it as root, and end it.

    Args:
        config: The machine.
        command: Program and arguments.
        timeout_s: Seconds for all of it.
        say: Called with each line that the machine prints, from the kernel's first to the command's last.
        cwd: The command's working directory.

    Returns:
        The command's exit status.

    Raises:
        ChildError: QEMU or the machine ended before the command did; the message has its last lines.
        TimeoutError: the command did not end in time; the machine is gone.
    """
    root = build_initramfs(init_script(config, command, cwd), kernel=config.kernel, modules=MODULES)
    lines: deque[str] = deque(maxlen=_CONSOLE_KEPT_LINES)
    with memory_file("initramfs", root) as initramfs:
        # KVM is asked for with the installed QEMU, which finds its firmware by itself.
        arguments = qemu_arguments(config, f"/proc/self/fd/{initramfs}", kvm=await kvm_works())
        async with asyncio.timeout(timeout_s), running_child(*arguments, pass_fds=[initramfs]) as process:
            assert process.stdout is not None
            async for line in process.stdout:
                text = line.decode(errors="replace").rstrip("\r\n")
                if text.startswith(_ENDED):
                    return int(text.removeprefix(_ENDED))
                if not text.endswith(_HUB_WARNING):
                    lines.append(text)
                    say(text)
    raise ChildError(f"the zero-copy machine ended early: {last_lines(chr(10).join(lines))}")


def init_script(config: MachineConfig, command: Sequence[str], cwd: Path) -> str:
    """What the machine does from its first process on; for busybox's sh."""
    rename = "\n".join(f"        {nic.mac}) ip link set dev ${{nic##*/}} name {nic.name};;" for nic in NICS)
    share = ""
    if config.share is not None:
        path = shlex.quote(f"/root{config.share.absolute()}")
        share = f"mkdir -p {path} && mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144 share {path}"
    inside = shlex.quote(f"cd {shlex.quote(str(cwd.absolute()))} && exec {shlex.join(command)}")
    return f"""#!/bin/sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in /modules/*.ko; do insmod "$module" || echo "init: cannot insert $module"; done
ip link set lo up
for nic in /sys/class/net/*; do
    case $(cat "$nic/address") in
{rename}
    esac
done
mkdir -p /host /changes /root
# What is read once stays read: nobody changes the tree under the tests.
mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144,cache=loose,ro host /host
mount -t tmpfs tmp /changes
mkdir /changes/upper /changes/work
mount -t overlay -o lowerdir=/host,upperdir=/changes/upper,workdir=/changes/work overlay /root
for folder in proc sys dev; do mount --move /$folder /root/$folder; done
# /tmp stays that of the overlay: the repository may lie below it.
mount -t tmpfs tmp /root/run; chmod 1777 /root/tmp
mkdir -p /root/dev/shm && mount -t tmpfs tmp /root/dev/shm
mount -t bpf bpf /root/sys/fs/bpf
{share}
# A virtio-serial port would be faster; the console also carries what a dying kernel says.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
{IN_MACHINE}=1 /bin/chroot /root /bin/bash -c {inside} </root/dev/null 2>&1
echo "{_ENDED}$?"
/bin/poweroff -f
"""


def qemu_arguments(config: MachineConfig, initramfs: str, *, kvm: bool) -> list[str]:
    """QEMU's command line."""
    program = config.qemu / "usr/bin/qemu-system-x86_64"
    arguments = [str(program), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-machine", "q35"]
    for folder in ("usr/share/qemu", "usr/share/seabios"):
        arguments += ["-L", str(config.qemu / folder), "-L", f"/{folder}"]
    arguments += ["-accel", "kvm", "-cpu", "host"] if kvm else ["-accel", "tcg,thread=multi", "-cpu", "max"]
    arguments += ["-m", f"{config.memory_mib}M", "-smp", str(config.cpus), "-serial", "stdio"]
    arguments += ["-kernel", str(config.kernel.image), "-initrd", initramfs]
    arguments += ["-append", f"console=ttyS0 quiet panic=-1 net.ifnames=0 hugepages={HUGEPAGES}"]
    shares = {"host": ("/", "readonly=on,multidevs=remap")}
    if config.share is not None:
        shares["share"] = (str(config.share.absolute()), "readonly=off,multidevs=remap")
    for tag, (path, options) in shares.items():
        arguments += ["-fsdev", f"local,id={tag},path={path},security_model=none,{options}"]
        arguments += ["-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]
    for nic in NICS:
        arguments += ["-netdev", f"hubport,id={nic.name},hubid={nic.wire}"]
        arguments += ["-device", f"{nic.device},netdev={nic.name},mac={nic.mac},romfile="]
    return arguments


def main() -> int:
    """Run a command in the machine; its exit status is ours."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("qemu", type=Path, help="tree of unpacked QEMU packages (tools/zerocopy-machine prints both)")
    parser.add_argument("kernel", type=Path, help="tree of an unpacked kernel")
    parser.add_argument("--share", type=Path, help="folder that is writable in the machine")
    parser.add_argument("--timeout", type=float, default=900.0, metavar="S", help="seconds for all of it")
    parser.add_argument("command", nargs="+", help="command to run in the machine, after --")
    options = parser.parse_args()
    try:
        config = MachineConfig(qemu=options.qemu, kernel=GuestKernel.find(options.kernel), share=options.share)
        return asyncio.run(
            run_in_machine(
                config,
                options.command,
                timeout_s=options.timeout,
                say=lambda line: print(line, flush=True),
                cwd=Path.cwd(),
            )
        )
    except TimeoutError:
        print(f"zerocopy-machine: not done after {options.timeout:g} s, ended", file=sys.stderr)
    except MpassthruError as error:
        print(f"zerocopy-machine: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
