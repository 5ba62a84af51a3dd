"""A port's figures over the life of several workers."""

from __future__ import annotations

import msgspec

from mpassthru.broker.status import total
from mpassthru.report import DirectionReport


def of(step: int) -> DirectionReport:
    """A report in which every figure is another multiple of `step`."""
    fields = enumerate(msgspec.structs.fields(DirectionReport), 1)
    figures = {field.name: {"x": n * step} if field.default_factory is dict else n * step for n, field in fields}
    return msgspec.convert(figures, DirectionReport)


def test_every_figure_goes_on_counting() -> None:
    assert total(of(1), of(100)) == of(101)
    assert total(of(1), DirectionReport()) == of(1)
