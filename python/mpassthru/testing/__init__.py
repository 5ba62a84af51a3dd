"""What stands in for a VM, a switch and a machine in tests, demo and benches. Public; see each module."""

from mpassthru.testing.guest import BuiltinGuest
from mpassthru.testing.guest_config import BufferLayout, GuestConfig, GuestCounters, Pattern, Region, Source
from mpassthru.testing.wire import FrameGenerator, PacketWire, WireCounters, XdpSink

__all__ = [
    "BufferLayout",
    "BuiltinGuest",
    "FrameGenerator",
    "GuestConfig",
    "GuestCounters",
    "PacketWire",
    "Pattern",
    "Region",
    "Source",
    "WireCounters",
    "XdpSink",
]
