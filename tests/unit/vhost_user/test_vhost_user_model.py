"""A stateful model: whatever a front-end does in whatever order, the device sees exactly what follows from it."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from vhost_user_fakes import FEATURES, FakeDevice, memory_fd, open_fds, region, ring_address

from mpassthru.vhost_user import Frontend, Session, VirtioFeature
from mpassthru.vhost_user.connection import Connection

indices = st.integers(0, 2)
feature_sets = st.sampled_from(
    [FEATURES, FEATURES & ~VirtioFeature.VIRTIO_F_EVENT_IDX, FEATURES & ~VirtioFeature.VHOST_USER_F_PROTOCOL_FEATURES]
)
STEP = 3
"""How far the fake device gets between a start and a stop."""


@dataclass
class RingModel:
    size: int | None = None
    base: int | None = None
    shift: int | None = None
    enabled: bool | None = None
    kicked: bool = False
    running: bool = False
    call: bool = False


class SessionModel(RuleBasedStateMachine):
    """Regions 0 to 3 are one MiB each; vring 0 to 3 live in region 0."""

    def __init__(self) -> None:
        super().__init__()
        self.before = open_fds()
        self.loop = asyncio.new_event_loop()
        self.fds = [memory_fd() for _ in range(4)]
        self.event = os.eventfd(0)

    @initialize()
    def connect(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.device = FakeDevice(next_base=STEP)
        self.session = Session(Connection(theirs), self.device)
        self.task = self.loop.create_task(self.session.run())
        self.frontend = Frontend.from_socket(ours)
        self.rings = [RingModel() for _ in range(4)]
        self.slots: list[int] = []
        self.features: int | None = None
        self.run(self.frontend.set_protocol_features(self.device.protocol_features))

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(coroutine, 5))

    # ---- what the specification makes of it ----

    def settle(self) -> None:
        for ring in self.rings:
            known = None not in (self.features, ring.size, ring.base, ring.shift)
            if ring.kicked and known and 0 in self.slots:
                ring.running = True

    def pause(self, ring: RingModel) -> None:
        if ring.running:
            assert ring.base is not None
            ring.base = (ring.base + STEP) & 0xFFFF
            ring.running = False

    def pause_all(self) -> None:
        for ring in self.rings:
            self.pause(ring)

    # ---- what a front-end may do ----

    @rule(features=feature_sets)
    def set_features(self, features: int) -> None:
        self.run(self.frontend.set_features(features))
        if features != self.features:
            self.pause_all()
        self.features = features
        self.settle()

    @rule(slots=st.lists(st.integers(0, 3), unique=True, max_size=3))
    def set_mem_table(self, slots: list[int]) -> None:
        self.run(self.frontend.set_mem_table([region(self.fds[slot], slot=slot) for slot in slots]))
        self.memory_becomes(slots)

    @rule(slot=st.integers(0, 3))
    def add_mem_reg(self, slot: int) -> None:
        self.run(self.frontend.add_mem_reg(region(self.fds[slot], slot=slot)))
        self.memory_becomes([*self.slots, slot])

    @rule(slot=st.integers(0, 3))
    def rem_mem_reg(self, slot: int) -> None:
        self.run(self.frontend.rem_mem_reg(region(self.fds[slot], slot=slot)))
        self.memory_becomes([known for known in self.slots if known != slot])

    def memory_becomes(self, slots: list[int]) -> None:
        """Vrings run on if memory is only added, and the device can do that."""
        before, after = set(self.slots), set(slots)
        if after != before and not (after > before and self.device.can_add):
            self.pause_all()
        self.slots = slots
        self.settle()

    @rule(can_add=st.booleans())
    def change_device(self, can_add: bool) -> None:
        self.device.can_add = can_add

    @rule(index=indices, size=st.sampled_from([1, 64, 256]))
    def set_size(self, index: int, size: int) -> None:
        ring = self.rings[index]
        if ring.running or not self.may_configure(ring):
            return
        self.run(self.frontend.set_vring_num(index, size))
        ring.size = size
        self.settle()

    @rule(index=indices, base=st.integers(0, 0xFFFF))
    def set_base(self, index: int, base: int) -> None:
        ring = self.rings[index]
        if ring.running or not self.may_configure(ring):
            return
        self.run(self.frontend.set_vring_base(index, base))
        ring.base = base
        self.settle()

    @rule(index=indices, shift=st.sampled_from([0, 16, 64]))
    def set_address(self, index: int, shift: int) -> None:
        ring = self.rings[index]
        if not self.may_configure(ring):
            return
        self.run(self.frontend.set_vring_addr(ring_address(index, shift=shift)))
        if ring.shift != shift:
            self.pause(ring)
        ring.shift = shift
        self.settle()

    @rule(index=indices, base=st.integers(0, 0xFFFF))
    def start(self, index: int, base: int) -> None:
        """All that a start takes, as front-ends send it; the other rules cover it in parts and out of order."""
        if not self.rings[index].running:
            if self.features is None:
                self.set_features(FEATURES)
            self.add_mem_reg(0)
            self.set_size(index, 256)
            self.set_base(index, base)
            self.set_address(index, 0)
            self.kick(index)

    def may_configure(self, ring: RingModel) -> bool:
        """A vring that waits, with memory but not its own, would be an error to complete."""
        return not ring.kicked or not self.slots or 0 in self.slots

    @rule(index=indices)
    def kick(self, index: int) -> None:
        ring = self.rings[index]
        if self.slots and 0 not in self.slots:
            return
        self.run(self.frontend.set_vring_kick(index, self.event))
        self.pause(ring)
        ring.kicked = True
        self.settle()

    @rule(index=indices, given_fd=st.booleans())
    def set_call(self, index: int, given_fd: bool) -> None:
        self.run(self.frontend.set_vring_call(index, self.event if given_fd else None))
        self.rings[index].call = given_fd

    @rule(index=indices, enabled=st.booleans())
    def enable(self, index: int, enabled: bool) -> None:
        self.run(self.frontend.set_vring_enable(index, enabled))
        self.rings[index].enabled = enabled

    @rule(index=indices)
    def get_base(self, index: int) -> None:
        ring = self.rings[index]
        self.pause(ring)
        ring.kicked = False
        assert self.run(self.frontend.get_vring_base(index)) == (ring.base or 0)

    @rule()
    def reset_status(self) -> None:
        self.run(self.frontend.set_status(0))
        self.pause_all()
        for ring in self.rings:
            ring.kicked = False

    @rule()
    def reset_device(self) -> None:
        self.run(self.frontend.reset_device())
        self.rings = [RingModel(call=ring.call) for ring in self.rings]
        self.features = None

    @precondition(lambda self: any(ring.running for ring in self.rings))
    @rule()
    def reconnect(self) -> None:
        self.disconnect()
        self.connect()

    # ---- what must hold ----

    @invariant()
    def device_is_as_the_model_says(self) -> None:
        expected = {index: ring for index, ring in enumerate(self.rings) if ring.running}
        assert self.device.running.keys() == expected.keys()
        assert {r.guest_phys_address >> 20 for r in self.device.regions} == set(self.slots)
        for index, ring in expected.items():
            vring = self.device.running[index]
            assert self.features is not None
            enabled = not self.features & VirtioFeature.VHOST_USER_F_PROTOCOL_FEATURES
            assert vring.enabled == (enabled if ring.enabled is None else ring.enabled)
            assert (vring.size, vring.base, vring.features) == (ring.size, ring.base, self.features)
            assert vring.desc_user_address == ring_address(index, shift=ring.shift or 0).desc_user_address
            assert (vring.call_fd >= 0) == ring.call

    def disconnect(self) -> None:
        self.frontend.close()
        self.run(self.task)  # type: ignore[arg-type]
        assert not self.device.running
        assert not self.device.regions

    def teardown(self) -> None:
        if hasattr(self, "task"):
            self.disconnect()
        for fd in (*self.fds, self.event):
            os.close(fd)
        self.loop.close()
        assert open_fds() <= self.before


class SessionModelForLong(SessionModel):
    """The same, with more of it."""


TestSessionModel = pytest.mark.slow(SessionModel.TestCase)
TestSessionModel.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestSessionModelForLong = pytest.mark.soak(pytest.mark.timeout(3600)(SessionModelForLong.TestCase))
TestSessionModelForLong.settings = settings(max_examples=5000, stateful_step_count=100, deadline=None)
