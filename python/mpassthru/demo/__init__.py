"""`mpassthru demo`: a guest, a host interface, real traffic between them, and a verdict.

The interface is one end of a veth pair in a namespace of its own.

`builtin` needs no VM: the guest is a virtio-net driver in this process. `qemu` boots a Linux kernel. Both start
`mpassthru attach` as a user would; nothing of either is left behind, however they end.
"""

from mpassthru.demo.builtin import run_builtin
from mpassthru.demo.qemu import run_qemu
from mpassthru.demo.report import Check, DemoReport

__all__ = ["Check", "DemoReport", "run_builtin", "run_qemu"]
