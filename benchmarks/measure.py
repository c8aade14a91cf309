"""What a benchmark says: a value against a stated baseline from the same run, and the target that it should meet."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Measurement:
    """One line of the table. `ratio` is value over baseline; None where a figure stands for itself."""

    name: str
    value: float
    unit: str
    baseline: str = ""
    ratio: float | None = None
    # Such as ">= 200000" or "< 1000"; empty: no target.
    target: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without one."""
        if not self.target:
            return None
        relation, _, number = self.target.partition(" ")
        bound = float(number)
        return {">=": self.value >= bound, "<=": self.value <= bound, "<": self.value < bound, ">": self.value > bound}[
            relation
        ]

    def to_json(self) -> dict[str, object]:
        """The row of build/bench.json."""
        return asdict(self) | {"met": self.met}
