"""Offloads are offered where frames stay in place with them, or where they were asked for."""

from __future__ import annotations

import msgspec
import pytest

from mpassthru.broker import tx_offloads
from mpassthru.broker.tx_offloads import TxOffloads, offers_tx_offloads
from mpassthru.control import SocketMode
from mpassthru.errors import RefusedError
from mpassthru.rules import ZeroCopyRules

ONE_PIECE = ZeroCopyRules(
    frame_room_bytes=1536,
    direct=True,
    rx_write_max_bytes=1536,
    rx_write_align_bytes=1,
    rx_write_before_bytes=0,
    tx_frame_max_bytes=1518,
    tx_frame_min_bytes=60,
    tx_pieces_max=1,
    contiguity="backing-page",
)
EIGHT_PIECES = msgspec.structs.replace(ONE_PIECE, tx_pieces_max=8)
BOUNCE_ONLY = msgspec.structs.replace(EIGHT_PIECES, direct=False)


class Lines(list[str]):
    """What the user was told."""

    def say(self, line: str) -> None:
        self.append(line)


@pytest.mark.parametrize("rules", [None, EIGHT_PIECES], ids=["copy mode", "zero-copy in several pieces"])
def test_auto_offers_them_where_payload_stays_in_place_and_says_nothing(rules: ZeroCopyRules | None) -> None:
    lines = Lines()
    assert offers_tx_offloads("auto", "copy" if rules is None else "zero-copy", rules, lines)
    assert not lines


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        (ONE_PIECE, "the driver's zero-copy mode sends no frame in several pieces"),
        (BOUNCE_ONLY, "--bounce-only"),
        (None, "Linux before 6.6"),
    ],
    ids=["one piece", "bounce only", "old kernel"],
)
def test_auto_does_not_where_every_frame_would_be_copied_and_says_why(
    rules: ZeroCopyRules | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tx_offloads, "has_multi_buffer", lambda: False)
    lines = Lines()
    mode: SocketMode = "copy" if rules is None else "zero-copy"
    assert not offers_tx_offloads("auto", mode, rules, lines)
    assert len(lines) == 1
    assert reason in lines[0]
    assert "--tx-offloads on" in lines[0]
    assert offers_tx_offloads("on", mode, rules, lines)


@pytest.mark.parametrize("choice", ["on", "off"])
def test_choice_of_the_user_is_taken(choice: TxOffloads) -> None:
    lines = Lines()
    assert offers_tx_offloads(choice, "zero-copy", ONE_PIECE, lines) == (choice == "on")
    assert offers_tx_offloads(choice, "copy", None, lines) == (choice == "on")
    assert not lines


def test_mode_packet_has_none() -> None:
    lines = Lines()
    assert not offers_tx_offloads("auto", "packet", None, lines)
    assert not lines
    with pytest.raises(RefusedError, match="--tx-offloads"):
        offers_tx_offloads("on", "packet", None, lines)
