"""Who is late, by how much, and what that costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from fitcast.units import Said, refusal

DAY = timedelta(days=1)
# By a platform's mark, which does not say how much: costs a day, and is no time that a file has.
MARKED = timedelta(microseconds=1)


@dataclass(frozen=True)
class Policy:
    """When work is due and what lateness costs; by default it is only listed.

    Args:
        due: For all; nobody is late if None.
        extensions: By student, another time.
        percent: Of the points, taken for each day that has begun after the due time.
        most: Percent that are taken at most.
        grace_minutes: That cost nothing.
    """

    due: datetime | None = None
    extensions: Mapping[str, datetime] = field(default_factory=dict)
    percent: float = 0.0
    most: float = 100.0
    grace_minutes: float = 0.0

    def __post_init__(self) -> None:
        for name in ("percent", "most"):
            value = getattr(self, name)
            if not 0 <= value <= 100:
                raise refusal(
                    f"late {name}", "be from 0 to 100", value, "it is percent of the points"
                )
        if self.percent and self.due is None and not self.extensions:
            raise refusal(
                "--due", "be given with --late-percent", Said("none"), "say when the work was due"
            )

    def by(self, student: str, handed_in: datetime | None) -> timedelta:
        """How late somebody is; zero if in time or unknown."""
        due = self.extensions.get(student, self.due)
        if due is None or handed_in is None or handed_in <= due:
            return timedelta()
        late = handed_in - due
        return late if late > timedelta(minutes=self.grace_minutes) else timedelta()

    def costs(self, late: timedelta) -> float:
        """The share of the points that it costs, from 0 to 1."""
        return min(self.most, self.percent * math.ceil(late / DAY)) / 100


def show_late(late: timedelta) -> str:
    """`1 d 2 h 03 min`; `some time` where a platform says no more; empty for none."""
    if late == MARKED:
        return "some time"
    minutes = int(late.total_seconds() // 60)
    days, minutes = divmod(minutes, 24 * 60)
    if not late:
        return ""
    return (f"{days} d " if days else "") + f"{minutes // 60} h {minutes % 60:02d} min"
