"""What of the wire can be told without privileges; `tests/netns/test_wire.py` has the rest."""

from __future__ import annotations

import errno

import pytest

from mpassthru.errors import HostError, RefusedError
from mpassthru.testing import FrameGenerator, PacketWire, XdpSink

NO_SUCH_INTERFACE = 0x7FFF_FFFF


@pytest.mark.parametrize("length", [13, 3521])
def test_impossible_frame_lengths_are_refused(length: int) -> None:
    with pytest.raises(RefusedError, match=f"frames of {length} bytes: 14 to 3520 are possible"):
        FrameGenerator(1, bytes(length))


def test_unknown_xdp_mode_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="native or generic, not"):
        XdpSink(1, xdp_mode="magic")  # type: ignore[arg-type]


def test_missing_privilege_or_interface_is_a_host_error() -> None:
    with pytest.raises(HostError, match="AF_PACKET") as refused:
        PacketWire(NO_SUCH_INTERFACE)
    assert refused.value.errno in (errno.EPERM, errno.ENODEV)
