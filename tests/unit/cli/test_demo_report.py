"""The demo's verdict: what fails it."""

from __future__ import annotations

import msgspec
import pytest

from mpassthru.broker.status import AttachReport, PortStatus
from mpassthru.demo.report import port_checks
from mpassthru.report import DirectionReport

GOOD_DIRECTION = DirectionReport(frames=1000, bytes=60_000, direct=995, bounced={"x": 5}, copied_bytes=300)
GOOD = msgspec.structs.replace(PortStatus(interface="mpt0").report(), rx=GOOD_DIRECTION, tx=GOOD_DIRECTION)


def failed(report: AttachReport) -> list[str]:
    return [check.name for check in port_checks(report) if not check.ok]


def test_good_port_passes() -> None:
    assert failed(GOOD) == []


@pytest.mark.parametrize(
    ("direction", "name"),
    [
        (DirectionReport(), "frames moved"),
        (DirectionReport(frames=1000, direct=989, bounced={"x": 11}), "directly from or to guest memory"),
        (DirectionReport(frames=1000, direct=1000, copied_bytes=1), "bytes copied in user space"),
    ],
    ids=["no frames", "too few direct", "copies on the direct path"],
)
@pytest.mark.parametrize("side", ["rx", "tx"])
def test_bad_direction_fails_it(direction: DirectionReport, name: str, side: str) -> None:
    report = msgspec.structs.replace(GOOD, **{side: direction})

    assert f"{side}: {name}" in failed(report)


def test_headers_that_are_made_fail_nothing() -> None:
    split = DirectionReport(frames=1000, direct=1000, header_split=9, copied_bytes=594, header_bytes=594)

    assert failed(msgspec.structs.replace(GOOD, tx=split)) == []


def test_trouble_of_the_port_fails_it() -> None:
    report = msgspec.structs.replace(GOOD, troubles=("virtqueue 0 stopped",))

    assert failed(report) == ["port without errors"]
