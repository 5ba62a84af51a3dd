"""The doctor's judgement, and its report as data and as a table. Runs with and without privileges."""

from __future__ import annotations

import resource
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from mpassthru import doctor, doctor_checks
from mpassthru.errors import HostError
from mpassthru.netdev import Interface, Offloads, QueueCounts, Refusal, XdpFeatures, XdpProgram, zero_copy_rules
from mpassthru.netdev.capabilities import Capability
from mpassthru.rules import ZeroCopyRules

NIC = Interface(
    name="eth9",
    ifindex=9,
    mac="02:00:00:00:00:09",
    mtu_bytes=1500,
    up=True,
    operstate="up",
    driver="ixgbe",
    bus_address="0000:3b:00.0",
    queues=QueueCounts(rx=2, tx=2, rx_max=8, tx_max=8),
    offloads=Offloads(rx_vlan_strip=False, lro=False, gro_hw=False),
    xdp_features=XdpFeatures(native=True, zero_copy=True, zero_copy_max_segments=1),
    xsk_queues=(),
)


def but(**changes: object) -> Interface:
    return msgspec.structs.replace(NIC, **changes)


def shown(report: doctor.Report) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(doctor.render(report))
    return capture.get()


def test_report_of_loopback_fails_for_its_mtu_and_says_so_last() -> None:
    report = doctor.diagnose("lo")
    mtu = next(check for check in report.checks if check.name == "MTU")
    assert mtu.status == "fail"
    assert "mtu 9216" in mtu.advice
    assert report.failed
    assert report.mode == "none"
    assert "A guest cannot be attached:" in shown(report)


def test_report_of_the_machine_names_every_part_once() -> None:
    report = doctor.diagnose()
    names = [check.name for check in report.checks]
    assert names == ["kernel", "AF_XDP", "capabilities", "BPF", "guest cost", "memlock", "locked memory", "hugepages"]
    assert report.interface is None
    assert report.mode is None


def test_report_is_json_and_comes_back_equal() -> None:
    report = doctor.diagnose("lo")
    assert msgspec.json.decode(msgspec.json.encode(report), type=doctor.Report) == report


def test_every_failed_check_has_advice() -> None:
    for check in doctor.diagnose("lo", guest_size_bytes=1 << 50).checks:
        assert check.status == "ok" or check.advice


def test_no_such_interface_is_an_error_not_a_report() -> None:
    with pytest.raises(HostError, match="no-such-if"):
        doctor.diagnose("no-such-if")


def test_guest_larger_than_a_umem_fails_with_the_limit() -> None:
    cost, check = doctor_checks.guest_cost(64 << 30)
    assert cost is None
    assert check.status == "fail"
    assert "16777215 chunks" in check.advice


def test_guest_larger_than_free_kernel_memory_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_checks, "_available_bytes", lambda: 1 << 20)
    cost, check = doctor_checks.guest_cost(1 << 30)
    assert cost is not None
    assert check.status == "fail"
    assert "1 MiB are available" in check.found


@pytest.mark.parametrize(
    ("limits", "capabilities", "status", "found"),
    [
        ((1 << 40, 1 << 40), set(), "ok", "limit 1024 GiB"),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), set(), "ok", "limit unlimited"),
        ((1 << 23, resource.RLIM_INFINITY), set(), "ok", "hard limit unlimited"),
        ((1 << 23, 1 << 23), {Capability.CAP_SYS_RESOURCE}, "ok", "allows to raise it"),
        ((1 << 23, 1 << 23), {Capability.CAP_IPC_LOCK}, "ok", "keeps CAP_IPC_LOCK"),
        ((1 << 23, 1 << 23), set(), "fail", "neither CAP_SYS_RESOURCE nor CAP_IPC_LOCK"),
    ],
)
def test_memlock_is_judged_by_limit_then_capabilities(
    monkeypatch: pytest.MonkeyPatch,
    limits: tuple[int, int],
    capabilities: set[Capability],
    status: str,
    found: str,
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(doctor_checks, "effective_capabilities", lambda: frozenset(capabilities))
    check = doctor_checks.memlock(4 << 30)
    assert check.status == status
    assert found in check.found


def test_hugepages_are_counted_by_size(tmp_path: Path) -> None:
    for name, free in (("hugepages-2048kB", 10), ("hugepages-1048576kB", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "free_hugepages").write_text(f"{free}\n")
    enough = doctor_checks.hugepages(2 << 30, directory=tmp_path)
    too_few = doctor_checks.hugepages(3 << 30, directory=tmp_path)
    assert (enough.status, enough.found) == ("ok", "10 x 2 MiB free, 2 x 1 GiB free")
    assert too_few.status == "warn"
    assert "vm.nr_hugepages=1536" in too_few.advice


def test_old_kernel_fails() -> None:
    assert doctor_checks.kernel("5.10.0-30-amd64").status == "fail"
    assert doctor_checks.kernel("5.11.0").status == "ok"


def test_xdp_program_in_the_way_fails_with_its_id() -> None:
    check = doctor_checks.xdp_program(but(xdp_program=XdpProgram(id=77, mode="native")))
    assert check.status == "fail"
    assert check.found == "id 77 is attached (native mode)"


async def test_taken_queue_warns_while_another_is_free_and_fails_when_none_is() -> None:
    assert (await doctor_checks.xsk_sockets(NIC)).status == "ok"
    assert (await doctor_checks.xsk_sockets(but(xsk_queues=(0,)))).status == "warn"
    assert (await doctor_checks.xsk_sockets(but(xsk_queues=(0, 1)))).status == "fail"


def test_translating_iommu_warns_with_the_boot_option() -> None:
    assert "iommu=pt" in doctor_checks.iommu(but(iommu="translating")).advice
    assert doctor_checks.iommu(but(iommu="identity", numa_node=1)).found == "identity; NUMA node 1"


def test_driver_without_native_xdp_is_said_to_use_generic() -> None:
    features = XdpFeatures(native=False, zero_copy=False, zero_copy_max_segments=1)
    assert doctor_checks.driver(but(xdp_features=features)).status == "warn"
    assert "generic XDP" in doctor_checks.mode(but(xdp_features=features), Refusal("none")).found


def test_mode_is_zero_copy_with_its_bound_or_copy_with_the_reason() -> None:
    rules = zero_copy_rules(NIC, dma_is_bounced=False)
    assert isinstance(rules, ZeroCopyRules)
    assert doctor_checks.mode(NIC, rules).found.startswith("zero-copy")
    refused = doctor_checks.mode(NIC, Refusal("for no reason"))
    assert refused.found.startswith("copy")
    assert "for no reason" in refused.advice


def test_bound_beyond_a_linux_guests_buffers_is_warned_of() -> None:
    check = doctor_checks.zero_copy_bound(NIC, expect_rules(but(driver="igb")))
    assert check.status == "warn"
    assert "hash=on" in check.advice
    short = doctor_checks.zero_copy_bound(
        NIC, expect_rules(but(driver="virtio_net", mtu_bytes=1382, virtio_header_bytes=12))
    )
    assert short.status == "ok"


def expect_rules(interface: Interface) -> ZeroCopyRules:
    rules = zero_copy_rules(interface, dma_is_bounced=False)
    assert isinstance(rules, ZeroCopyRules)
    return rules
