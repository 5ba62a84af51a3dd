"""A stateful model of a port and the interfaces of its host: whatever happens to them, the keeper brings it to rest.

At rest the port is bound to the interface that it is to have, if that is fit, or waits for what it lacks; and it holds
nothing that it has no use for.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any, cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from keeper_world import NAMES, QUEUES, THEIRS, Host, ModelMonitor, ModelPort, Nic

from mpassthru.broker import binding as binding_module
from mpassthru.broker import keeper as keeper_module
from mpassthru.broker.binding_state import BindingState, Need
from mpassthru.broker.keeper import Keeper
from mpassthru.broker.options import AttachOptions
from mpassthru.errors import MpassthruError
from mpassthru.netdev.link_events import Appeared, LinkEvent, Moved, MtuChanged, Removed, SetUp

TIMEOUT_S = 5.0
names = st.sampled_from(NAMES)


class KeeperModel(RuleBasedStateMachine):
    """A port with two queue pairs among three interfaces."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()

    @initialize()
    def start(self) -> None:
        self.host = Host({name: Nic(ifindex) for ifindex, name in enumerate(NAMES, 2)})
        self.ifindexes = len(NAMES) + 2
        self.port = ModelPort(self.host)
        self.wanted: str | None = NAMES[0]
        self.mtu_bytes = 1500
        self.options = AttachOptions(interface=NAMES[0], queues=QUEUES, mode="copy")
        self.run(self._start())

    async def _start(self) -> None:
        interface = await self.host.find(NAMES[0])
        assert interface is not None
        taken = await self.host.take(interface, self.options, 1, self.port)

        def make_monitor(hear: Callable[[tuple[LinkEvent, ...]], None], _trouble: object) -> ModelMonitor:
            self.monitor = ModelMonitor(hear)
            return self.monitor

        self.keeper = Keeper(
            self.options,
            self.port,
            taken,
            find=self.host.find,
            take=cast(Any, self.host.take),
            make_monitor=make_monitor,
        )
        await self.keeper.start()
        self.task = asyncio.create_task(self.keeper.run())

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(coroutine, TIMEOUT_S))

    def tell(self, nic: Nic, event: LinkEvent) -> None:
        """What a monitor that follows the interface would tell."""
        if self.monitor.followed[1] == nic.ifindex or isinstance(event, Appeared):
            self.monitor.hear((event,))

    def present(self, name: str) -> Nic | None:
        nic = self.host.nics.get(name)
        return nic if nic is not None and not nic.away else None

    # ---- what may happen to interfaces ----

    @rule(name=names, up=st.booleans())
    def set_up_or_down(self, name: str, up: bool) -> None:
        if (nic := self.present(name)) is not None and nic.up != up:
            nic.up = up
            self.tell(nic, SetUp(up))

    @rule(name=names, mtu_bytes=st.sampled_from([1400, 1500, 3000, 9217]))
    def set_mtu(self, name: str, mtu_bytes: int) -> None:
        if (nic := self.present(name)) is not None and nic.mtu_bytes != mtu_bytes:
            nic.mtu_bytes = mtu_bytes
            self.tell(nic, MtuChanged(mtu_bytes))

    @rule(name=names, rx_queues=st.integers(1, QUEUES))
    def set_queues(self, name: str, rx_queues: int) -> None:
        if (nic := self.present(name)) is not None:
            nic.rx_queues = rx_queues
            self.monitor.hear(())

    @rule(name=names)
    def remove(self, name: str) -> None:
        if (nic := self.present(name)) is not None:
            del self.host.nics[name]
            self.tell(nic, Removed())

    @rule(name=names)
    def make(self, name: str) -> None:
        if name not in self.host.nics:
            self.host.nics[name] = Nic(self.ifindexes, up=False)
            self.ifindexes += 1
            self.tell(self.host.nics[name], Appeared(name))

    @rule(name=names, briefly=st.booleans())
    def move_away(self, name: str, briefly: bool) -> None:
        if (nic := self.present(name)) is not None:
            nic.up, nic.away = False, not briefly
            self.tell(nic, Moved())

    @rule(name=names)
    def move_back(self, name: str) -> None:
        if (nic := self.host.nics.get(name)) is not None and nic.away:
            nic.away = False
            self.tell(nic, Appeared(name))

    @rule(name=names)
    def take_program_off(self, name: str) -> None:
        if (nic := self.present(name)) is not None and nic.program is not None:
            nic.program = None
            self.monitor.hear(())

    @rule(name=names)
    def others_attach_a_program(self, name: str) -> None:
        if (nic := self.present(name)) is not None and nic.program is None:
            nic.program = THEIRS
            self.monitor.hear(())

    @rule(name=names, owned=st.booleans())
    def others_take_a_queue(self, name: str, owned: bool) -> None:
        nic = self.present(name)
        ours = self.port.binding is not None and nic is not None and self.port.binding.ifindex == nic.ifindex
        if nic is not None and not ours:
            nic.owned_queue = 0 if owned else None

    @rule(rebinds=st.integers(0, 2), takes=st.integers(0, 2))
    def the_kernel_is_about_to_refuse(self, rebinds: int, takes: int) -> None:
        self.port.fail, self.host.fail_take = rebinds, takes

    # ---- what the user may ask for ----

    @rule(name=names)
    def bind(self, name: str) -> None:
        before = (self.keeper.state, self.port.binding)
        self.port.fail = self.host.fail_take = 0
        nic = self.present(name)
        here = self.keeper.state is BindingState.BOUND and name == self.port.status.interface
        fit = nic is not None and nic.lack() is None and nic.program is None and nic.mtu_bytes >= self.mtu_bytes
        if fit or here:
            self.run(self.keeper.bind(name))
            self.wanted = name
        else:
            with pytest.raises(MpassthruError):
                self.run(self.keeper.bind(name))
            # A port that waits may have stopped waiting meanwhile.
            assert before[0] is BindingState.WAITING or (self.keeper.state, self.port.binding) == before

    @rule()
    def unbind(self) -> None:
        self.run(self.keeper.unbind())
        self.wanted = None

    # ---- what must hold ----

    @invariant()
    def port_comes_to_rest(self) -> None:
        async def rests() -> None:
            while (wrong := self._what_is_wrong()) is not None:
                self.wrong = wrong
                if (await asyncio.wait({self.task}, timeout=0.001))[0]:
                    self.task.result()

        try:
            self.run(rests())
        except TimeoutError:
            raise AssertionError(f"{self.wrong}: {self.port.status} {self.host}") from None
        if self.port.binding is not None:
            self.mtu_bytes = self.port.binding.mtu_bytes

    def _what_is_wrong(self) -> str | None:
        """Why the port is not at rest; None if it is."""
        if self.wanted is None:
            return self._differs(BindingState.UNBOUND, None, None, {})
        nic, ours = self.host.nics.get(self.wanted), self.host.ours()
        lack = Need.INTERFACE if nic is None else nic.lack()
        if nic is None or lack is not None:
            may_stay = {self.wanted: ours[self.wanted]} if lack is Need.UP and self.wanted in ours else {}
            return self._differs(BindingState.WAITING, lack, None, may_stay)
        return self._differs(
            BindingState.BOUND, None, (nic.ifindex, nic.mtu_bytes), dict.fromkeys([self.wanted], nic.program)
        )

    def _differs(
        self, state: BindingState, need: Need | None, bound_to: tuple[int, int] | None, programs: dict[str, int | None]
    ) -> str | None:
        status, binding = self.port.status, self.port.binding
        now = (
            status.binding,
            status.lack and status.lack.need,
            binding and (binding.ifindex, binding.mtu_bytes),
            self.host.ours(),
        )
        wanted = (state, need, bound_to, programs)
        return None if now == wanted else f"{now} is not {wanted}"

    def teardown(self) -> None:
        if hasattr(self, "task"):
            self.task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                self.run(cast(Any, self.task))
            self.keeper.close()
            assert self.host.ours() == {}
        self.loop.close()


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DOWN_PATIENCE_S", "RELEASE_TIMEOUT_S"):
        monkeypatch.setattr(keeper_module, name, 0.0)
    for name in ("LOOK_INTERVAL_S", "RELEASE_PAUSE_S", "SECOND_LOOK_S", "RETRY_PAUSE_MAX_S"):
        monkeypatch.setattr(keeper_module, name, 0.0005)
    monkeypatch.setattr(binding_module, "RELEASE_TIMEOUT_S", 0.0)


class KeeperModelForLong(KeeperModel):
    """The same, with more of it."""


TestKeeperModel = pytest.mark.slow(KeeperModel.TestCase)
TestKeeperModel.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestKeeperModelForLong = pytest.mark.soak(pytest.mark.timeout(3600)(KeeperModelForLong.TestCase))
TestKeeperModelForLong.settings = settings(max_examples=5000, stateful_step_count=100, deadline=None)
