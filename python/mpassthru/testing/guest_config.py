"""How the built-in guest is set up, what it is told to do, and what it counts. Plain data; see `guest`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mpassthru.vhost_user.features import ProtocolFeature, VirtioFeature

RxRole = Literal["idle", "sink", "echo", "check"]
"""What is done with received frames: left in the used ring; counted; sent back out of the same buffer with MAC
addresses swapped; compared byte for byte with what their own header promises (see `Pattern`)."""

DEFAULT_FEATURES = (
    VirtioFeature.VIRTIO_F_VERSION_1
    | VirtioFeature.VIRTIO_NET_F_MRG_RXBUF
    | VirtioFeature.VIRTIO_F_EVENT_IDX
    | VirtioFeature.VIRTIO_F_INDIRECT_DESC
)
DEFAULT_PROTOCOL_FEATURES = (
    ProtocolFeature.VHOST_USER_PROTOCOL_F_MQ
    | ProtocolFeature.VHOST_USER_PROTOCOL_F_REPLY_ACK
    | ProtocolFeature.VHOST_USER_PROTOCOL_F_STATUS
    | ProtocolFeature.VHOST_USER_PROTOCOL_F_RESET_DEVICE
    | ProtocolFeature.VHOST_USER_PROTOCOL_F_RARP
    | ProtocolFeature.VHOST_USER_PROTOCOL_F_MTU
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A region of guest memory.

    Attributes:
        guest_phys_address: Where the guest sees it.
        size_bytes: A multiple of the page size.
        backing: `memfd`; `huge-memfd` (2 MiB pages, which must be reserved); `private-memfd`, mapped so that the
            back-end never sees what the driver writes, as with a VM without `share=on`; `file`, which no UMEM takes.
        mmap_offset_bytes: Where in its file it begins.
    """

    guest_phys_address: int = 0x4000_0000
    size_bytes: int = 64 << 20
    backing: Literal["memfd", "huge-memfd", "private-memfd", "file"] = "memfd"
    mmap_offset_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferLayout:
    """Where a queue's buffers lie and how each is cut into descriptors.

    Piece k of buffer n begins `offset_bytes + (n * len(pieces) + k) * stride_bytes` into the queue's share of its
    region. Any offset and stride will do, odd ones too.

    Attributes:
        count: Buffers; 0 for as many as the ring holds.
        pieces: Bytes of each descriptor of a buffer, including room for the virtio-net header: `(1536,)`; `(12, 2048)`
            for a header apart; `(256,)` for mergeable buffers of which a frame needs several. A tx frame uses only as
            many pieces as it fills.
        stride_bytes: Between starts of pieces; 0 for the longest piece rounded up to 64.
        offset_bytes: Of the first piece, from a page boundary.
        region: Index of the region.
        indirect: Chains of several descriptors go by indirect tables.
    """

    count: int = 0
    pieces: tuple[int, ...] = (2048,)
    stride_bytes: int = 0
    offset_bytes: int = 0
    region: int = 0
    indirect: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestConfig:
    """How a guest is set up.

    Attributes:
        regions: Its memory.
        ring_region: Index of the region of rings and indirect tables.
        queue_pairs: More than one needs VIRTIO_NET_F_MQ, which is then asked for.
        queue_size: Descriptors of each ring, a power of two.
        features: Asked for; what is not offered is gone without. Without VERSION_1 and MRG_RXBUF the virtio-net
            header has 10 bytes, else 12.
        protocol_features: Asked for.
        rx: Receive buffers.
        tx: Transmit buffers of sources.
        polling: Poll the used rings instead of sleeping until called; costs a core for each queue pair.
        canaries: Guard all memory that is neither ring nor posted buffer, and compare what was sent and what lies
            behind received frames. Slow: for proofs, not for benches.
        capture_frames: Keep the first so many frames that each queue pair receives, for `take_captured`.
    """

    regions: tuple[Region, ...] = (Region(),)
    ring_region: int = 0
    queue_pairs: int = 1
    queue_size: int = 256
    features: int = DEFAULT_FEATURES
    protocol_features: int = DEFAULT_PROTOCOL_FEATURES
    rx: BufferLayout = BufferLayout()
    tx: BufferLayout = BufferLayout()
    polling: bool = False
    canaries: bool = False
    capture_frames: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pattern:
    """Frames that prove their own content: ethertype 0x88b5, sequence, length, seed, and a pattern made of these.

    Attributes:
        seed: Tells streams apart; queue pair n uses `seed + n`.
        destination: MAC address, 6 bytes.
        source: MAC address, 6 bytes.
        sizes: Frame sizes in bytes without FCS, at least 22, used in turn.
    """

    seed: int = 1
    destination: bytes = b"\x02\x00\x00\x00\x00\x01"
    source: bytes = b"\x02\x00\x00\x00\x00\x02"
    sizes: tuple[int, ...] = (60,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What a queue pair sends: `pattern`, or else `frames` in turn.

    Attributes:
        frames: Whole Ethernet frames.
        pattern: Frames that can be checked.
        count: Frames each queue pair sends; None for no end.
        rate_frames_per_s: Of each queue pair; None for as fast as it goes.
        burst: Frames published at once, at most.
        first_sequence: Of the pattern; None to go on where this queue pair's last source ended.
        headers: Virtio-net headers, for frames in turn (see `NetHeader`); none for zeros.
    """

    frames: tuple[bytes, ...] = ()
    pattern: Pattern | None = None
    count: int | None = None
    rate_frames_per_s: float | None = None
    burst: int = 64
    first_sequence: int | None = None
    headers: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestCounters:
    """What a guest counted. Bytes are frame bytes, without the virtio-net header.

    Attributes:
        rx_frames: Frames received.
        rx_bytes: Bytes received.
        rx_multi_buffer_frames: Frames that came in more than one buffer.
        rx_empty_buffers: Buffers returned with length 0.
        tx_posted: Frames that sources handed to the device.
        echo_posted: Frames that echoes handed to the device.
        echo_refused: Echoes that would need a chain of more than 32 descriptors; not sent.
        tx_frames: Frames, of both, that the device has used.
        tx_bytes: Bytes that the device has used.
        kicks: Kicks sent.
        calls: Calls received.
        sleeps: Times a thread slept.
        rx_tail_bytes_changed: Bytes behind the used length that changed (with `canaries`).
        tx_bytes_changed: Bytes of sent buffers that came back changed (with `canaries`).
        check_good: Checked frames without fault, each sequence once.
        check_corrupt: Frames of our ethertype with wrong bytes or length.
        check_duplicate: Good frames seen before.
        check_reordered: Good frames after one with a higher sequence.
        check_foreign: Frames of other ethertypes.
        check_missing: Sequences below the highest seen that never came.
    """

    rx_frames: int = 0
    rx_bytes: int = 0
    rx_multi_buffer_frames: int = 0
    rx_empty_buffers: int = 0
    tx_posted: int = 0
    echo_posted: int = 0
    echo_refused: int = 0
    tx_frames: int = 0
    tx_bytes: int = 0
    kicks: int = 0
    calls: int = 0
    sleeps: int = 0
    rx_tail_bytes_changed: int = 0
    tx_bytes_changed: int = 0
    check_good: int = 0
    check_corrupt: int = 0
    check_duplicate: int = 0
    check_reordered: int = 0
    check_foreign: int = 0
    check_missing: int = 0
