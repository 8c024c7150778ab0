"""Constraints: bounds on the costs of a trial, as [study] gives them.

As `{parameters = "<= 1e6"}`: an operator and a number, kept as they are written.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

from hpo.config.base import fail
from hpo.config.metrics import COSTS
from hpo.errors import nearest

OPERATORS = {"<=": operator.le, "<": operator.lt, ">=": operator.ge, ">": operator.gt}
NUMBER = r"[0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?"
BOUND = rf"^\s*([<>]=?)\s*({NUMBER})\s*$"
ALLOWED = "allowed: <=, <, >= or > and a number from 0, as in '<= 1e6'"


@dataclass(frozen=True)
class Constraint:
    """One cost and its bound."""

    name: str
    relation: str
    bound: str

    def __str__(self) -> str:
        """Return `parameters <= 1e6`."""
        return f"{self.name} {self.relation} {self.bound}"

    def is_met(self, value: float) -> bool:
        """Return whether `value` is within the bound."""
        return bool(OPERATORS[self.relation](value, float(self.bound)))

    def nearest_missed(self, reasons: Iterable[str]) -> float | None:
        """Return the value in `reasons`, as `unmet` gave them, that is nearest to the bound."""
        pattern = rf"\b{self.name} ([-0-9.,e+]+|inf|nan) is not {re.escape(self._bound)}(?:;|$)"
        texts = [text for reason in reasons for text in re.findall(pattern, reason)]
        values = [float(text.replace(",", "")) for text in texts]
        return min(values, key=lambda one: abs(one - float(self.bound)), default=None)

    @property
    def _bound(self) -> str:
        return f"{self.relation} {self.bound}"

    def complaint(self, value: float) -> str:
        """Return `parameters 2,278,604 is not <= 1e6`."""
        return f"{self.name} {format_cost(value)} is not {self._bound}"


def format_cost(value: float) -> str:
    """Return a cost for people: 2,278,604 or 12.35."""
    whole = math.isfinite(value) and value == int(value)
    return f"{int(value):,}" if whole else f"{value:.4g}" if value < 1000 else f"{value:,.1f}"


def _constraints(given: Any) -> Any:
    if not isinstance(given, Mapping):
        return given
    found = {name: _bound(name, text) for name, text in given.items()}
    return found or None


def _bound(name: str, text: Any) -> str:
    if name not in COSTS:
        fail(name, text, f"a constraint is on a cost of a trial, no metric; {nearest(name, COSTS)}")
    match = re.fullmatch(BOUND, text) if isinstance(text, str) else None
    if match is None or not _is_number(match[2]):
        fail(name, text, ALLOWED)
    return f"{match[1]} {match[2]}"


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False  # 1__0


_Table = Annotated[
    dict[str, str],
    WithJsonSchema(
        {
            "type": "object",
            "additionalProperties": False,
            "properties": {name: {"type": "string", "pattern": BOUND} for name in COSTS},
        }
    ),
]
Constraints = Annotated[_Table | None, BeforeValidator(_constraints)]


def parse_constraints(constraints: Mapping[str, str] | None) -> tuple[Constraint, ...]:
    """Return `constraints` of a StudyConfig, one by one."""
    return tuple(Constraint(name, *text.split()) for name, text in (constraints or {}).items())


def unmet_reason(constraints: Iterable[Constraint], costs: Mapping[str, float]) -> str | None:
    """Return, in words, which of `constraints` the known `costs` do not meet; None for none."""
    found = [
        one.complaint(costs[one.name])
        for one in constraints
        if one.name in costs and not one.is_met(costs[one.name])
    ]
    return "; ".join(found) or None


def to_relax(constraints: Iterable[Constraint], reasons: Collection[str]) -> str:
    """Return those of `constraints` that `reasons`, as `unmet` gave them, name, with the value that
    was nearest: `parameters = "<= 1e6" (the nearest: 2,278,604)`."""
    missed = {one: one.nearest_missed(reasons) for one in constraints}
    return ", ".join(
        f'{one.name} = "{one.relation} {one.bound}" (the nearest: {format_cost(value)})'
        for one, value in missed.items()
        if value is not None
    )
