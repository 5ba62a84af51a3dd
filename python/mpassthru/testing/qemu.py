"""A real Linux guest: an unmodified kernel in QEMU, driven from asyncio.

QEMU gets its connections to us (QMP, and a virtio-serial port on which the guest runs commands) as fds, so nothing
is left in the file system and nothing has to be waited for by polling. The guest's memory is a memfd that back-ends
can map; its console is kept for error messages.
"""

from __future__ import annotations

import asyncio
import base64
import socket
from asyncio.subprocess import Process
from collections import deque
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from mpassthru.qmp import QmpClient, QmpError
from mpassthru.testing.child import ChildError, last_lines, memory_file, running_child
from mpassthru.testing.initramfs import build_initramfs, find_program
from mpassthru.testing.kvm import kvm_works
from mpassthru.testing.qemu_config import Accelerator, GuestConfig, qemu_arguments

_CONSOLE_KEPT_LINES = 200
_ANSWER_GRACE_S = 15.0
"""How long after a command's own deadline the guest may take to say so; more, and it counts as dead."""

# Commands come as lines "DEADLINE_S BASE64"; each is answered by "STATUS LENGTH" and its output. A read returns
# end-of-file as long as QEMU has not told the driver that we are connected, hence the outer loop.
_INIT = r"""#!/bin/sh
/bin/busybox --install -s /bin
export PATH=/bin HOME=/root
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs -o size=90% tmp /tmp
for module in /modules/*.ko; do insmod "$module" || echo "init: cannot insert $module"; done
ip link set lo up
until port=$(ls /dev/vport*p1 2>/dev/null); do usleep 10000; done
exec 3<>"$port"
while :; do
    while read -r deadline_s command <&3; do
        echo "$command" | base64 -d >/tmp/.command
        timeout -s KILL "$deadline_s" sh /tmp/.command >/tmp/.output 2>&1 </dev/null 3>&-
        echo "$? $(wc -c </tmp/.output)" >&3
        cat /tmp/.output >&3
    done
    usleep 10000
done
"""
_KILLED_BY_TIMEOUT = 128 + 9


@dataclass(frozen=True)
class CommandResult:
    """What a command in the guest did."""

    exit_status: int
    output: str


class QemuGuest:
    """A guest that is up while its `async with` block runs.

    ``async with QemuGuest(config) as guest: await guest.run("ip address")``
    """

    def __init__(self, config: GuestConfig, *, boot_timeout_s: float = 30.0) -> None:
        self._config = config
        self._boot_timeout_s = boot_timeout_s
        self._resources = AsyncExitStack()
        self._console: deque[str] = deque(maxlen=_CONSOLE_KEPT_LINES)
        self._one_command = asyncio.Lock()
        self._process: Process
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter
        self.qmp: QmpClient
        self.accelerator: Accelerator

    async def __aenter__(self) -> Self:
        """Boot the guest and wait until it takes commands, or until QEMU waits for one that migrates here.

        Raises:
            ChildError: QEMU or the guest failed; the message ends with its last console lines.
            RefusedError: A program, a module or busybox is missing.
            TimeoutError: The guest is not up within the boot timeout.
        """
        try:
            async with asyncio.timeout(self._boot_timeout_s):
                await self._boot()
        except TimeoutError:
            tail = last_lines(self.console)
            await self._resources.aclose()
            raise TimeoutError(f"the guest is not up after {self._boot_timeout_s} s; its console: {tail}") from None
        except BaseException:
            await self._resources.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End QEMU and everything that belongs to it."""
        await self._resources.aclose()

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        return self._process.pid

    @property
    def console(self) -> str:
        """The last lines that QEMU and the guest's serial console printed."""
        return "\n".join(self._console)

    async def run(self, command: str, *, timeout_s: float = 30.0, check: bool = True) -> CommandResult:
        """Run a shell command in the guest; commands run one after the other.

        Args:
            command: For busybox's sh; may have several lines.
            timeout_s: Seconds after which the guest kills it (rounded up to whole ones).
            check: Raise if it fails.

        Raises:
            ChildError: It failed and `check` is set, or the guest is gone.
            TimeoutError: It was killed at its deadline, or the guest no longer answers.
        """
        deadline_s = max(1, int(-(-timeout_s // 1)))
        request = f"{deadline_s} {base64.b64encode(command.encode()).decode()}\n"
        try:
            async with self._one_command, asyncio.timeout(deadline_s + _ANSWER_GRACE_S):
                self._writer.write(request.encode())
                await self._writer.drain()
                status, length = (await self._reader.readuntil()).split()
                output = (await self._reader.readexactly(int(length))).decode(errors="replace")
        except TimeoutError:
            raise TimeoutError(f"the guest does not answer `{command}`: {last_lines(self.console)}") from None
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise await self._lost(command) from error
        result = CommandResult(int(status), output)
        if result.exit_status == _KILLED_BY_TIMEOUT:
            raise TimeoutError(f"`{command}` was killed in the guest after {deadline_s} s: {last_lines(output)}")
        if check and result.exit_status:
            raise ChildError(f"`{command}` failed in the guest ({result.exit_status}): {last_lines(output)}")
        return result

    async def kill(self) -> None:
        """SIGKILL QEMU and wait until it is gone; harmless if it is gone already."""
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()

    async def _lost(self, command: str) -> ChildError:
        """Return the error that says how QEMU ended, once it did."""
        status = await self._process.wait()
        return ChildError(f"QEMU ended with status {status} during `{command}`: {last_lines(self.console)}")

    async def _boot(self) -> None:
        config = self._config
        find_program(config.qemu, "qemu-system-x86")
        choice = config.accelerator
        self.accelerator = choice if choice != "auto" else "kvm" if await kvm_works(config.qemu) else "tcg"
        modules = ["virtio_pci", "virtio_net", "virtio_console", *config.modules]
        root = build_initramfs(_INIT, kernel=config.kernel, modules=modules, programs=config.programs)
        command, command_theirs = socket.socketpair()
        qmp, qmp_theirs = socket.socketpair()
        with memory_file("initramfs", root) as initramfs, command_theirs, qmp_theirs:
            self._reader, self._writer = await asyncio.open_connection(sock=command)
            self._resources.callback(self._writer.close)
            self.qmp = await QmpClient.connect(qmp)
            self._resources.callback(self.qmp.close)
            arguments = qemu_arguments(config, accelerator=self.accelerator, initramfs=f"/proc/self/fd/{initramfs}")
            arguments += ["-chardev", f"socket,id=qmp,fd={qmp_theirs.fileno()}", "-mon", "chardev=qmp,mode=control"]
            arguments += ["-device", "virtio-serial-pci", "-device", "virtserialport,chardev=command,nr=1"]
            arguments += ["-chardev", f"socket,id=command,fd={command_theirs.fileno()}"]
            fds = [initramfs, command_theirs.fileno(), qmp_theirs.fileno()]
            child = running_child(*arguments, namespace=config.namespace, pass_fds=fds)
            self._process = await self._resources.enter_async_context(child)
        console = asyncio.create_task(self._keep_console())
        self._resources.callback(console.cancel)
        try:
            await self.qmp.negotiate()
        except QmpError as error:
            raise await self._lost("(start)") from error
        if not config.incoming:
            await self.run("true", timeout_s=self._boot_timeout_s)

    async def _keep_console(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            self._console.append(line.decode(errors="replace").rstrip())
