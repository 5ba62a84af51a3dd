from __future__ import annotations

import hashlib

import pytest

from mpassthru.testing.child import ChildError
from mpassthru.testing.scenario_qemu import FileResult, PingResult, parse_iperf3, parse_ping, random_file

PING = """PING 10.0.0.1 (10.0.0.1): 56 data bytes
64 bytes from 10.0.0.1: seq=0 ttl=64 time=1.301 ms

--- 10.0.0.1 ping statistics ---
5 packets transmitted, 4 packets received, 20% packet loss
round-trip min/avg/max = 1.301/9.951/33.706 ms
"""

IPERF3 = """{"end": {
    "sum_sent": {"bytes": 9, "seconds": 1.0, "bits_per_second": 72, "retransmits": 3},
    "sum_received": {"bytes": 8, "seconds": 1.5, "bits_per_second": 64.0}}}
"""


def test_ping_statistics_are_read() -> None:
    expected = PingResult(sent=5, received=4, rtt_min_ms=1.301, rtt_avg_ms=9.951, rtt_max_ms=33.706)
    assert parse_ping(PING) == expected


def test_ping_without_statistics_is_an_error() -> None:
    with pytest.raises(ChildError, match="Network is unreachable"):
        parse_ping("ping: sendto: Network is unreachable\n")


def test_throughput_is_what_the_receiver_got() -> None:
    result = parse_iperf3(IPERF3, "rx")
    assert (result.direction, result.bytes, result.seconds, result.bits_per_s, result.retransmits) == (
        "rx",
        8,
        1.5,
        64,
        3,
    )


@pytest.mark.parametrize(
    ("output", "message"),
    [('{"error": "unable to connect"}', "unable to connect"), ("sh: iperf3: not found", "not found")],
)
def test_failed_iperf3_is_an_error(output: str, message: str) -> None:
    with pytest.raises(ChildError, match=message):
        parse_iperf3(output, "tx")


def test_file_is_the_same_for_the_same_seed() -> None:
    assert random_file(1000) == random_file(1000)
    assert random_file(1000) != random_file(1000, seed=2)
    assert len(random_file(1001)) == 1001


def test_file_is_intact_only_if_the_hashes_agree() -> None:
    digest = hashlib.sha256(b"x").hexdigest()
    sent = FileResult(direction="tx", bytes=1, seconds=1.0, sha256_sent=digest, sha256_received=digest)
    broken = FileResult(direction="tx", bytes=1, seconds=1.0, sha256_sent=digest, sha256_received="0")
    assert sent.intact
    assert not broken.intact
