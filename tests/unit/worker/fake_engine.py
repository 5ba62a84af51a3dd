"""An engine without a data plane: it records calls, and ends operations at once or when told to."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, field

from mpassthru._core import SocketConfig
from mpassthru.errors import HostError


@dataclass
class FakeEvent:
    kind: str = "completed"
    token: int = 0
    vring: int = 0
    value: int = 0
    error: Exception | None = None


@dataclass
class FakeEngine:
    """`attach_errors` and the like are those of the next operations, one each; `held` operations do not end."""

    calls: list[str] = field(default_factory=list)
    attach_errors: list[Exception] = field(default_factory=list)
    start_errors: list[Exception] = field(default_factory=list)
    stop_errors: list[Exception] = field(default_factory=list)
    send_errors: list[Exception] = field(default_factory=list)
    held: set[str] = field(default_factory=set)
    attached: set[int] = field(default_factory=set)
    resumed: dict[int, int] = field(default_factory=dict)
    zero_copy: bool = False
    kernel_has_buffers: bool = False
    prepare_errors: list[Exception] = field(default_factory=list)
    add_error: Exception | None = None
    can_add: bool = True
    lacking: set[int] = field(default_factory=set)
    """Queue pairs whose socket was made before memory was added."""
    address: bytes | None = None
    """Of the guest, if it has sent something."""
    modes: list[str] = field(default_factory=list)
    """Of the sockets that were asked for, prepared ones included."""
    closed: bool = False

    def __post_init__(self) -> None:
        self.event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._events: list[FakeEvent] = []
        self._held_operations: list[tuple[FakeEvent, Callable[[], None]]] = []
        self._tokens = 0

    def emit(self, event: FakeEvent) -> None:
        self._events.append(event)
        os.eventfd_write(self.event_fd, 1)

    def end_held(self) -> None:
        """Let the operations that were held end."""
        while self._held_operations:
            event, effect = self._held_operations.pop(0)
            effect()
            self.emit(event)

    def drain_events(self) -> list[FakeEvent]:
        events, self._events = self._events, []
        return events

    def map_memory(self, regions: list[object]) -> None:
        assert not self.attached, "memory changed under a socket"
        self.calls.append(f"map {len(regions)}")

    def add_memory(self, regions: list[object]) -> list[int] | None:
        if self.add_error is not None:
            raise self.add_error
        if not self.can_add:
            return None
        self.lacking |= self.attached
        return [self._operation(f"add {len(regions)}")]

    def prepare_socket(self, queue_pair: int, config: SocketConfig) -> int:
        self.modes.append(config.mode)
        return self._operation(
            f"prepare {queue_pair}", error=self.prepare_errors.pop(0) if self.prepare_errors else None
        )

    def discard_prepared(self, queue_pair: int) -> None:
        self.calls.append(f"discard {queue_pair}")

    def attach_prepared(self, queue_pair: int) -> int:
        return self._attach(f"attach-prepared {queue_pair}", queue_pair, zero_copy=self.zero_copy)

    def socket_lacks_memory(self, queue_pair: int) -> bool:
        return queue_pair in self.lacking

    def attach_socket(self, queue_pair: int, config: SocketConfig) -> int:
        self.modes.append(config.mode)
        return self._attach(f"attach {queue_pair}", queue_pair, zero_copy=config.mode == "zero-copy")

    def _attach(self, call: str, queue_pair: int, *, zero_copy: bool) -> int:
        error = self.attach_errors.pop(0) if self.attach_errors else None

        def attached() -> None:
            if error is None:
                self.attached.add(queue_pair)
                self.lacking.discard(queue_pair)

        return self._operation(call, value=int(zero_copy), error=error, effect=attached)

    def detach_socket(self, queue_pair: int) -> int:
        def detached() -> None:
            self.attached.discard(queue_pair)
            self.lacking.discard(queue_pair)

        return self._operation(f"detach {queue_pair}", effect=detached)

    def reclaim(self, queue_pair: int) -> int:
        assert queue_pair not in self.attached, "under a socket"
        return self._operation(f"reclaim {queue_pair}")

    def guest_address(self, queue_pair: int) -> bytes | None:
        return self.address

    def start_vring(self, index: int, config: object) -> int:
        error = self.start_errors.pop(0) if self.start_errors else None
        return self._operation(f"start {index}", value=self.resumed.get(index, 0), error=error)

    def stop_vring(self, index: int) -> int:
        busy = self.kernel_has_buffers and index // 2 in self.attached
        error: Exception | None = HostError(errno.EBUSY, "the kernel has buffers of it") if busy else None
        if self.stop_errors:
            error = self.stop_errors.pop(0)
        return self._operation(f"stop {index}", value=42, error=error)

    def set_vring_enabled(self, index: int, enabled: bool) -> int:
        return self._operation(f"enable {index} {enabled}")

    def set_vring_call(self, index: int, fd: int) -> int:
        return self._operation(f"call {index}")

    def set_vring_err(self, index: int, fd: int) -> int:
        return self._operation(f"err {index}")

    def socket_attached(self, queue_pair: int) -> bool:
        return queue_pair in self.attached

    def map_log(self, fd: int, *, size_bytes: int = 0, offset: int = 0) -> None:
        self.calls.append(f"log {fd >= 0} {size_bytes} {offset}")

    def set_log_fd(self, fd: int) -> None:
        self.calls.append(f"log-fd {fd >= 0}")

    def mark_all(self) -> None:
        self.calls.append("mark-all")

    def set_vring_log(self, index: int, log_buffers: bool, log_used_address: int | None) -> int:
        return self._operation(f"vring-log {index} {log_buffers} {log_used_address}")

    def send_frame(self, queue_pair: int, frame: bytes) -> int:
        error = self.send_errors.pop(0) if self.send_errors else None
        return self._operation(f"send {queue_pair} {frame.hex()}", error=error)

    def counters(self) -> dict[str, object]:
        direction = {"frames": 1, "bytes": 60, "direct": 1, "bounced": {}, "dropped": {"runt": 2}, "copied_bytes": 0}
        return {"rx": direction, "tx": direction}

    def close(self) -> None:
        self.closed = True
        os.close(self.event_fd)

    def _operation(
        self, call: str, value: int = 0, error: Exception | None = None, effect: Callable[[], None] = lambda: None
    ) -> int:
        """`effect` is what shows when the operation has ended."""
        self.calls.append(call)
        self._tokens += 1
        event = FakeEvent(token=self._tokens, value=value, error=error)
        if call.split(maxsplit=1)[0] in self.held:
            self._held_operations.append((event, effect))
        else:
            effect()
            self.emit(event)
        return self._tokens
