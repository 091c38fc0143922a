"""A set of group indices that stays small: sorted, disjoint, half-open intervals."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable


class IndexSet:
    """Indices that only grow in number; nearly contiguous ones cost one interval.

    Groups are numbered 0, 1, 2, … and trained nearly in order, so the memory of every group a run
    has ever consumed fits in a few numbers inside each checkpoint.
    """

    def __init__(self, intervals: Iterable[Iterable[int]] = ()) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        for start, end in intervals:
            if start >= end or (self._ends and start <= self._ends[-1]):
                raise ValueError(
                    f"got interval [{start}, {end}) after {self.intervals()}; must be sorted, disjoint"
                )
            self._starts.append(start)
            self._ends.append(end)

    def __contains__(self, index: int) -> bool:
        place = bisect_right(self._starts, index) - 1
        return place >= 0 and index < self._ends[place]

    def __len__(self) -> int:
        return sum(self._ends) - sum(self._starts)

    def add(self, index: int) -> None:
        """Add one index; raises ValueError when it is already there, so nothing counts twice."""
        if index in self:
            raise ValueError(f"index {index} is already in the set")
        place = bisect_right(self._starts, index)
        joins_left = place > 0 and self._ends[place - 1] == index
        joins_right = place < len(self._starts) and self._starts[place] == index + 1
        if joins_left and joins_right:
            self._ends[place - 1] = self._ends.pop(place)
            self._starts.pop(place)
        elif joins_left:
            self._ends[place - 1] += 1
        elif joins_right:
            self._starts[place] -= 1
        else:
            self._starts.insert(place, index)
            self._ends.insert(place, index + 1)

    def intervals(self) -> list[list[int]]:
        """[[start, end), …], as JSON keeps it."""
        return [[start, end] for start, end in zip(self._starts, self._ends, strict=True)]
