"""Feature bits of virtio and vhost-user, under the names of their specifications.

Values are masks (`1 << bit`), ready for GET_FEATURES and SET_FEATURES.
"""

from __future__ import annotations

from enum import IntFlag


class VirtioFeature(IntFlag):
    """Features of GET_FEATURES: VIRTIO 1.3 sections 5.1.3 (net) and 6 (reserved bits), and vhost's own."""

    VIRTIO_NET_F_CSUM = 1 << 0
    VIRTIO_NET_F_GUEST_CSUM = 1 << 1
    VIRTIO_NET_F_CTRL_GUEST_OFFLOADS = 1 << 2
    VIRTIO_NET_F_MTU = 1 << 3
    VIRTIO_NET_F_MAC = 1 << 5
    VIRTIO_NET_F_GUEST_TSO4 = 1 << 7
    VIRTIO_NET_F_GUEST_TSO6 = 1 << 8
    VIRTIO_NET_F_GUEST_ECN = 1 << 9
    VIRTIO_NET_F_GUEST_UFO = 1 << 10
    VIRTIO_NET_F_HOST_TSO4 = 1 << 11
    VIRTIO_NET_F_HOST_TSO6 = 1 << 12
    VIRTIO_NET_F_HOST_ECN = 1 << 13
    VIRTIO_NET_F_HOST_UFO = 1 << 14
    VIRTIO_NET_F_MRG_RXBUF = 1 << 15
    VIRTIO_NET_F_STATUS = 1 << 16
    VIRTIO_NET_F_CTRL_VQ = 1 << 17
    VIRTIO_NET_F_CTRL_RX = 1 << 18
    VIRTIO_NET_F_CTRL_VLAN = 1 << 19
    VIRTIO_NET_F_GUEST_ANNOUNCE = 1 << 21
    VIRTIO_NET_F_MQ = 1 << 22
    VIRTIO_NET_F_CTRL_MAC_ADDR = 1 << 23
    VIRTIO_F_NOTIFY_ON_EMPTY = 1 << 24
    VHOST_F_LOG_ALL = 1 << 26
    VIRTIO_F_ANY_LAYOUT = 1 << 27
    VIRTIO_F_INDIRECT_DESC = 1 << 28
    VIRTIO_F_EVENT_IDX = 1 << 29
    VHOST_USER_F_PROTOCOL_FEATURES = 1 << 30
    VIRTIO_F_VERSION_1 = 1 << 32
    VIRTIO_F_ACCESS_PLATFORM = 1 << 33
    VIRTIO_F_RING_PACKED = 1 << 34
    VIRTIO_F_IN_ORDER = 1 << 35
    VIRTIO_F_ORDER_PLATFORM = 1 << 36
    VIRTIO_F_SR_IOV = 1 << 37
    VIRTIO_F_NOTIFICATION_DATA = 1 << 38
    VIRTIO_F_NOTIF_CONFIG_DATA = 1 << 39
    VIRTIO_F_RING_RESET = 1 << 40
    VIRTIO_NET_F_GUEST_USO4 = 1 << 54
    VIRTIO_NET_F_GUEST_USO6 = 1 << 55
    VIRTIO_NET_F_HOST_USO = 1 << 56
    VIRTIO_NET_F_HASH_REPORT = 1 << 57
    VIRTIO_NET_F_GUEST_HDRLEN = 1 << 59
    VIRTIO_NET_F_RSS = 1 << 60
    VIRTIO_NET_F_RSC_EXT = 1 << 61
    VIRTIO_NET_F_STANDBY = 1 << 62
    VIRTIO_NET_F_SPEED_DUPLEX = 1 << 63


class ProtocolFeature(IntFlag):
    """Features of GET_PROTOCOL_FEATURES (vhost-user.rst, "Protocol features")."""

    VHOST_USER_PROTOCOL_F_MQ = 1 << 0
    VHOST_USER_PROTOCOL_F_LOG_SHMFD = 1 << 1
    VHOST_USER_PROTOCOL_F_RARP = 1 << 2
    VHOST_USER_PROTOCOL_F_REPLY_ACK = 1 << 3
    VHOST_USER_PROTOCOL_F_MTU = 1 << 4
    VHOST_USER_PROTOCOL_F_BACKEND_REQ = 1 << 5
    VHOST_USER_PROTOCOL_F_CROSS_ENDIAN = 1 << 6
    VHOST_USER_PROTOCOL_F_CRYPTO_SESSION = 1 << 7
    VHOST_USER_PROTOCOL_F_PAGEFAULT = 1 << 8
    VHOST_USER_PROTOCOL_F_CONFIG = 1 << 9
    VHOST_USER_PROTOCOL_F_BACKEND_SEND_FD = 1 << 10
    VHOST_USER_PROTOCOL_F_HOST_NOTIFIER = 1 << 11
    VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD = 1 << 12
    VHOST_USER_PROTOCOL_F_RESET_DEVICE = 1 << 13
    VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS = 1 << 14
    VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS = 1 << 15
    VHOST_USER_PROTOCOL_F_STATUS = 1 << 16
    VHOST_USER_PROTOCOL_F_XEN_MMAP = 1 << 17
    VHOST_USER_PROTOCOL_F_SHARED_OBJECT = 1 << 18
    VHOST_USER_PROTOCOL_F_DEVICE_STATE = 1 << 19


class DeviceStatus(IntFlag):
    """The device status field of SET_STATUS and GET_STATUS (VIRTIO 1.3 section 2.1); 0 is a reset."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    DEVICE_NEEDS_RESET = 64
    FAILED = 128


def describe_bits(kind: type[IntFlag], bits: int) -> str:
    """Name each set bit of `bits`; bits without a name in `kind` appear as `bit N`."""
    names = {flag.value: flag.name or "" for flag in kind}
    masks = (1 << position for position in range(bits.bit_length()))
    return ", ".join(names.get(mask, f"bit {mask.bit_length() - 1}") for mask in masks if bits & mask)
