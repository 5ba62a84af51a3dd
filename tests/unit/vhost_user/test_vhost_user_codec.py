"""The wire format: round trips, layouts to the byte, and strictness."""

from __future__ import annotations

import struct
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpassthru.errors import ProtocolError
from mpassthru.vhost_user.features import ProtocolFeature, VirtioFeature, describe_bits
from mpassthru.vhost_user.message import (
    PAYLOAD_MAX_BYTES,
    U64,
    Empty,
    Header,
    Inflight,
    MacAddress,
    Payload,
    RegionDescription,
    RegionTable,
    Request,
    SingleRegion,
    VringAddress,
    VringFile,
    VringState,
    encode_message,
    request_name,
)

u16 = st.integers(0, 2**16 - 1)
u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
regions = st.builds(RegionDescription, u64, u64, u64, u64)
payloads: st.SearchStrategy[Payload] = st.one_of(
    st.builds(Empty),
    st.builds(U64, u64),
    st.builds(MacAddress, st.binary(min_size=6, max_size=6)),
    st.builds(VringState, u32, u32),
    st.builds(VringAddress, u32, u32, u64, u64, u64, u64),
    st.builds(VringFile, st.integers(0, 255), st.booleans()),
    st.builds(SingleRegion, regions),
    st.builds(RegionTable, st.lists(regions, max_size=8).map(tuple)),
    st.builds(Inflight, u64, u64, u16, u16),
)
PAYLOAD_TYPES: list[Any] = [
    Header,
    Empty,
    U64,
    MacAddress,
    VringState,
    VringAddress,
    VringFile,
    SingleRegion,
    RegionTable,
    Inflight,
]


@given(payloads)
def test_payload_survives_the_wire(payload: Payload) -> None:
    assert type(payload).decode(payload.encode()) == payload


@given(st.sampled_from(PAYLOAD_TYPES), st.binary(max_size=400))
def test_random_bytes_decode_or_are_a_protocol_error(kind: Any, data: bytes) -> None:
    try:
        decoded = kind.decode(data)
    except ProtocolError:
        return
    assert len(decoded.encode()) == len(data)


@given(payloads, st.integers(0, 300))
def test_truncated_payload_is_a_protocol_error(payload: Payload, cut: int) -> None:
    data = payload.encode()
    if cut < len(data):
        with pytest.raises(ProtocolError, match="bytes"):
            type(payload).decode(data[:cut])
    with pytest.raises(ProtocolError):
        type(payload).decode(data + b"\0")


@pytest.mark.skipif(sys.byteorder != "little", reason="the bytes are written down in little-endian order")
def test_layouts_are_those_of_the_specification() -> None:
    address = VringAddress(1, 2, desc_user_address=3, used_user_address=4, avail_user_address=5, log_guest_address=6)
    assert address.encode() == struct.pack("<IIQQQQ", 1, 2, 3, 4, 5, 6)
    region = RegionDescription(guest_phys_address=1, size_bytes=2, user_address=3, mmap_offset=4)
    assert RegionTable((region,)).encode() == struct.pack("<IIQQQQ", 1, 0, 1, 2, 3, 4)
    assert SingleRegion(region).encode() == struct.pack("<QQQQQ", 0, 1, 2, 3, 4)
    assert VringFile(7, has_fd=True).encode() == struct.pack("<Q", 7)
    assert VringFile(7, has_fd=False).encode() == struct.pack("<Q", 0x107)
    assert Inflight(1, 2, queues=3, queue_size=4).encode() == struct.pack("<QQHHI", 1, 2, 3, 4, 0)
    assert MacAddress(b"\x52\x54\x00\x12\x34\x56").encode() == bytes.fromhex("5254001234560000")
    assert encode_message(11, VringState(2, 3), reply=True) == struct.pack("<IIIII", 11, 5, 8, 2, 3)
    assert encode_message(1, Empty(), need_reply=True) == struct.pack("<III", 1, 9, 0)


@pytest.mark.parametrize(
    ("request_id", "flags", "size_bytes", "reason"),
    [
        (1, 0, 0, "version"),
        (1, 2, 0, "version"),
        (1, 0x11, 0, "undefined bits"),
        (1, 1, PAYLOAD_MAX_BYTES + 1, "payload of 4097 bytes"),
    ],
)
def test_bad_header_is_a_protocol_error(request_id: int, flags: int, size_bytes: int, reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        Header.decode(struct.pack("=III", request_id, flags, size_bytes))


def test_vring_file_with_undefined_bits_is_a_protocol_error() -> None:
    with pytest.raises(ProtocolError, match="undefined bits"):
        VringFile.decode(struct.pack("=Q", 0x200))


def test_table_of_more_than_eight_regions_is_a_protocol_error() -> None:
    with pytest.raises(ProtocolError, match="9 memory regions"):
        RegionTable.decode(struct.pack("=II", 9, 0) + bytes(9 * 32))


def test_names_are_for_people() -> None:
    assert request_name(Request.VHOST_USER_SET_MEM_TABLE) == "SET_MEM_TABLE"
    assert request_name(99) == "message 99"
    assert describe_bits(VirtioFeature, 1 << 34 | 1 << 15 | 1 << 52) == (
        "VIRTIO_NET_F_MRG_RXBUF, VIRTIO_F_RING_PACKED, bit 52"
    )
    assert describe_bits(ProtocolFeature, 1 << 3) == "VHOST_USER_PROTOCOL_F_REPLY_ACK"
