"""Zero-copy networking for unmodified virtual machines: vhost-user in front, AF_XDP behind."""

from mpassthru.errors import HostError, MpassthruError, ProtocolError, QueueFault, RefusedError
from mpassthru.report import DirectionReport, PortReport

__all__ = [
    "DirectionReport",
    "HostError",
    "MpassthruError",
    "PortReport",
    "ProtocolError",
    "QueueFault",
    "RefusedError",
]
