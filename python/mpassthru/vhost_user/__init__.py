"""The back-end side of vhost-user, without knowledge of what is behind it; and a front-end to test it with."""

from mpassthru.vhost_user.connection import Connection
from mpassthru.vhost_user.features import DeviceStatus, ProtocolFeature, VirtioFeature, describe_bits
from mpassthru.vhost_user.frontend import Frontend
from mpassthru.vhost_user.memory import MemoryRegion, MemoryTable
from mpassthru.vhost_user.message import Message, RegionDescription, Request, VringAddress

__all__ = [
    "Connection",
    "DeviceStatus",
    "Frontend",
    "MemoryRegion",
    "MemoryTable",
    "Message",
    "ProtocolFeature",
    "RegionDescription",
    "Request",
    "VirtioFeature",
    "VringAddress",
    "describe_bits",
]
