from __future__ import annotations

from pathlib import Path

import pytest

from mpassthru.errors import RefusedError
from mpassthru.testing.child import ChildError
from mpassthru.testing.testpmd import (
    ForwardStats,
    PortStats,
    Testpmd,
    VhostPort,
    VirtioUser,
    _check_start,
    memory_arguments,
    parse_forward_stats,
    parse_port_stats,
)

PORT_STATS = """show port stats all

  ######################## NIC statistics for port 0  ########################
  RX-packets: 11         RX-missed: 12         RX-bytes:  13
  RX-errors: 14
  RX-nombuf:  15
  TX-packets: 16         TX-errors: 17         TX-bytes:  18

  Throughput (since last show)
  Rx-pps:            0          Rx-bps:            0
  Tx-pps:            0          Tx-bps:            0
  ############################################################################

  ######################## NIC statistics for port 1  ########################
  RX-packets: 21         RX-missed: 22         RX-bytes:  23
  RX-errors: 24
  RX-nombuf:  25
  TX-packets: 26         TX-errors: 27         TX-bytes:  28
"""

FORWARD_STATS = """stop
Telling cores to stop...
  ---------------------- Forward statistics for port 0  ----------------------
  RX-packets: 1              RX-dropped: 2             RX-total: 3
  TX-packets: 4              TX-dropped: 5             TX-total: 9
  ----------------------------------------------------------------------------

  +++++++++++++++ Accumulated forward statistics for all ports+++++++++++++++
  RX-packets: 101            RX-dropped: 102           RX-total: 203
  TX-packets: 104            TX-dropped: 105           TX-total: 209
  ++++++++++++++++++++++++++++++++++++++++++++++++++++++++++++++++++++++++++++
Done.
"""


def test_port_statistics_are_read_by_port() -> None:
    ports = parse_port_stats(PORT_STATS)
    assert ports[0] == PortStats(
        rx_frames=11,
        rx_missed=12,
        rx_bytes=13,
        rx_errors=14,
        rx_no_buffer=15,
        tx_frames=16,
        tx_errors=17,
        tx_bytes=18,
    )
    assert ports[1].rx_frames == 21
    assert set(ports) == {0, 1}


def test_port_statistics_without_a_counter_are_refused() -> None:
    with pytest.raises(ChildError, match="RX-nombuf"):
        parse_port_stats(PORT_STATS.replace("RX-nombuf", "RX-other"))


def test_forward_statistics_are_those_of_all_ports() -> None:
    expected = ForwardStats(rx_frames=101, rx_dropped=102, tx_frames=104, tx_dropped=105)
    assert parse_forward_stats(FORWARD_STATS) == expected


def test_forward_statistics_of_a_port_that_was_not_started_are_refused() -> None:
    with pytest.raises(ChildError, match="Packet forwarding not started"):
        parse_forward_stats("stop\nPacket forwarding not started\n")


def test_driver_options_not_given_are_not_passed() -> None:
    assert VirtioUser(path=Path("/s")).vdev(0) == "net_virtio_user0,path=/s"


def test_driver_options_given_are_passed() -> None:
    port = VirtioUser(path=Path("/s"), queues=2, queue_size=1024, mrg_rxbuf=False, server=True)
    assert port.vdev(1) == "net_virtio_user1,path=/s,queues=2,queue_size=1024,mrg_rxbuf=0,server=1"


def test_vhost_port_names_its_socket_as_the_driver_does() -> None:
    assert VhostPort(path=Path("/s"), client=True).vdev(0) == "net_vhost0,iface=/s,client=1"


@pytest.mark.parametrize(("free", "first"), [(512, "--in-memory"), (511, "--no-huge")])
def test_huge_pages_are_used_if_enough_are_free(free: int, first: str) -> None:
    meminfo = f"MemTotal: 1 kB\nHugePages_Total: 9999\nHugePages_Free: {free}\nHugepagesize:       2048 kB\n"
    assert memory_arguments(meminfo)[0] == first


def test_a_port_that_could_not_be_made_is_an_error() -> None:
    log = "vhost_user_setup(): connect error, No such file\nEAL: Bus (vdev) probe failed.\ntestpmd> "
    with pytest.raises(ChildError, match="connect error, No such file"):
        _check_start(log)


def test_one_cpu_is_not_enough() -> None:
    with pytest.raises(RefusedError, match="two CPUs"):
        Testpmd([], cores=[0])
