"""What the pump's loop costs for a frame, counted exactly, against what is on record in bench/instructions.json."""

from __future__ import annotations

import json
from itertools import groupby

import pytest

from bench.cargo import ROOT
from bench.micro import Scene, count_instructions

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # the program is built first

TOLERANCE = 1.10
"""Counts are exact for one compiler, C library and CPU; versions of them were seen to differ by some per cent."""


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return count_instructions()


def test_no_frame_costs_more_instructions_than_are_on_record(scenes: list[Scene]) -> None:
    recorded = json.loads((ROOT / "bench/instructions.json").read_text())["instructions"]
    assert {scene.name for scene in scenes} == set(recorded)
    exceeded = {
        scene.name: f"{scene.instructions} instead of {recorded[scene.name]}"
        for scene in scenes
        if scene.instructions > recorded[scene.name] * TOLERANCE
    }
    assert not exceeded, "tune, or say in the commit that changes bench/instructions.json why a frame costs more"


def test_where_nobody_copies_a_long_frame_costs_what_a_short_one_does(scenes: list[Scene]) -> None:
    direct = sorted((scene.way, scene.burst, scene.instructions) for scene in scenes if scene.path == "direct")
    for place, counts in groupby(direct, key=lambda it: it[:2]):
        assert len({count for *_, count in counts}) == 1, place
