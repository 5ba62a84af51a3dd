"""The back-end side of vhost-user, without knowledge of what is behind it; and a front-end to test it with."""

from mpassthru.vhost_user.backend import Backend
from mpassthru.vhost_user.connection import Connection
from mpassthru.vhost_user.device import Device, Vring
from mpassthru.vhost_user.features import DeviceStatus, ProtocolFeature, VirtioFeature, describe_bits
from mpassthru.vhost_user.frontend import Frontend
from mpassthru.vhost_user.inflight import InflightArea
from mpassthru.vhost_user.memory import MemoryRegion, MemoryTable
from mpassthru.vhost_user.message import Message, RegionDescription, Request, VringAddress
from mpassthru.vhost_user.session import SUPPORTED_PROTOCOL_FEATURES, Counters, Session, StillInUseError

__all__ = [
    "SUPPORTED_PROTOCOL_FEATURES",
    "Backend",
    "Connection",
    "Counters",
    "Device",
    "DeviceStatus",
    "Frontend",
    "InflightArea",
    "MemoryRegion",
    "MemoryTable",
    "Message",
    "ProtocolFeature",
    "RegionDescription",
    "Request",
    "Session",
    "StillInUseError",
    "VirtioFeature",
    "Vring",
    "VringAddress",
    "describe_bits",
]
