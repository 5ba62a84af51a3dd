"""What a port counted between two looks at it."""

from __future__ import annotations

from mpassthru.report import DirectionReport


def difference(now: DirectionReport, then: DirectionReport) -> DirectionReport:
    """What was counted in between; reasons that did not occur are left out."""

    def by_reason(new: dict[str, int], old: dict[str, int]) -> dict[str, int]:
        return {reason: count - old.get(reason, 0) for reason, count in new.items() if count > old.get(reason, 0)}

    return DirectionReport(
        frames=now.frames - then.frames,
        bytes=now.bytes - then.bytes,
        direct=now.direct - then.direct,
        header_split=now.header_split - then.header_split,
        bounced=by_reason(now.bounced, then.bounced),
        dropped=by_reason(now.dropped, then.dropped),
        offloaded=by_reason(now.offloaded, then.offloaded),
        copied_bytes=now.copied_bytes - then.copied_bytes,
        header_bytes=now.header_bytes - then.header_bytes,
    )
