"""Values as text: numbers, durations, sizes, plurals; table cells with their sort keys."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal would obey instead of showing it (but for tabs and line ends), and what cannot be
encoded."""


def printable(text: str) -> str:
    """Return `text` for a terminal: control characters, and those that turn its direction, as
    \\x1b."""
    return UNPRINTABLE.sub(lambda match: repr(match[0])[1:-1], text)


def spreadsheet_text(text: str) -> str:
    """Return `text` for a cell of a spreadsheet: what it would run as a formula gets a leading
    apostrophe; a number does not."""
    if not text.startswith(("=", "+", "-", "@", "\t", "\r")):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text


MISSING = "–"


@dataclass(frozen=True)
class Cell:
    """One cell; `key` is a number or text to sort by, None goes last; `kind` is a CSS class."""

    text: str
    key: float | str | None = None
    kind: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells under `headers`; `kinds` are CSS classes of the columns."""

    headers: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    @property
    def kinds(self) -> list[str]:
        """Return the class of each column: that of its first cell."""
        return [cell.kind for cell in self.rows[0]] if self.rows else ["" for _ in self.headers]


def number(value: float | None, digits: int = 4) -> str:
    """Return a measured number: `digits` decimals where they tell something, else significant
    ones."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return "not finite"
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    return f"{value:.{digits}f}"


def plus_minus(mean: float | None, std: float | None) -> str:
    """Return `0.9812 ± 0.0021`, or the mean alone without a standard deviation."""
    return number(mean) + ("" if std is None else f" ± {number(std)}")


def mean_and_spread(mean: float, std: float | None) -> str:
    """Return `0.941 ± 0.012`: the standard deviation with two significant digits, the mean with as
    many decimals."""
    if not std or not math.isfinite(std) or not math.isfinite(mean):
        return number(mean)
    decimals = 1 - math.floor(math.log10(std))
    if not 0 <= decimals <= 6:
        return f"{mean:.4g} ± {std:.2g}"
    return f"{mean:,.{decimals}f} ± {std:,.{decimals}f}"


def measured(name: str, value: float | None) -> str:
    """Return the value of an objective or metric called `name`: counts whole, costs with four
    digits."""
    if value is None or name.startswith(("train_", "val_")) or not math.isfinite(value):
        return number(value)
    if name in ("parameters", "flops"):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def setting(value: Any) -> str:
    """Return a value of a configuration as a person writes it: true, 0.003, [32, 64], none."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(setting(one) for one in value) + "]"
    return str(value) if isinstance(value, str | int) else json.dumps(value, default=str)


def duration(seconds: float) -> str:
    """Return seconds as 8.4 s, 3 min 20 s, 2 h 05 min, 3 d 4 h."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


_UNITS = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}
_NUMBER = r"\d+(?:\.\d+)?"
_PARTS = r"\s*".join(rf"(?:({_NUMBER})\s*{unit})?" for unit in ("d", "h", "m(?:in)?", "s"))
DURATION_PATTERN = rf"^\s*({_NUMBER}|{_PARTS})\s*$"
LONGEST_S = 10_000 * 86_400
DURATION_RULE = "a time such as 90s, 30m, 1h30m, 2 h or a number of seconds, above 0, up to 10000d"


def parse_duration(value: str | float) -> float:
    """Return the seconds of a duration such as 90s, 30m, 1h30m, 2 h, 1 d or 45, which is a number
    of seconds; thousandths are the smallest. Raises ValueError for others, and for none at all."""
    text = value.strip() if isinstance(value, str) else f"{value:.3f}"
    text += "s" * bool(re.fullmatch(_NUMBER, text, re.ASCII))
    found = re.fullmatch(_PARTS, text, re.ASCII)
    parts = zip(found.groups("0"), _UNITS.values(), strict=True) if found else ()
    seconds = round(sum(float(count) * size for count, size in parts), 3)
    if not 0 < seconds <= LONGEST_S:
        raise ValueError(f"allowed: {DURATION_RULE}")
    return seconds


def exact_duration(seconds: float) -> str:
    """Return seconds, whole or thousandths, as `parse_duration` takes them: 45s, 1h30m, 0.5s."""
    parts, left = [], round(seconds * 1000)
    for unit, size in _UNITS.items():
        count, left = (left / 1000, 0) if unit == "s" else divmod(left, size * 1000)
        if count:
            parts.append(f"{count:.15g}{unit}")
    return "".join(parts) or "0s"


def rough_duration(seconds: float) -> str:
    """Return seconds as 0.4 s, 12 s, 3 min, 2.5 h."""
    if seconds < 0.1:
        return "under 0.1 s"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def approximately(seconds: float) -> str:
    """Return a duration as an estimate: about 3 min, under 0.1 s."""
    text = rough_duration(seconds)
    return text if text.startswith("under") else f"about {text}"


def file_size(size: float) -> str:
    """Return bytes as 12.3 MB, of 10^6 bytes; from B to GB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:,.1f} {unit}"
    return f"{size:.0f} B"


def plural(value: int, noun: str) -> str:
    """Return `1 trial`, `2 trials`, `1,000 classes`."""
    ending = "" if value == 1 else "es" if noun.endswith("s") else "s"
    return f"{value:,} {noun}{ending}"


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Return the last part of each dotted name, or as many as tell it from the others."""
    found: dict[str, str] = {}
    for name in names:
        parts = name.split(".")
        ends = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        others = [f".{one}" for one in names if one != name]
        found[name] = next(
            (end for end in ends if not any(one.endswith(f".{end}") for one in others)), name
        )
    return found


def ordinal(value: int) -> str:
    """Return `1st`, `2nd`, `3rd`, `11th`."""
    ending = "th" if value % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(value % 10)
    return f"{value}{ending or 'th'}"


def number_cell(value: float | None, digits: int = 4) -> Cell:
    """Return a cell with `number(value, digits)`."""
    key = value if value is not None and math.isfinite(value) else None
    return Cell(number(value, digits), key, "number")


def measured_cell(name: str, value: float | None) -> Cell:
    """Return a cell with `measured(name, value)`."""
    return Cell(measured(name, value), value, "number")


def setting_cell(value: Any) -> Cell:
    """Return a cell with `setting(value)`, sorted as a number where it is one."""
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    text = setting(value)
    return Cell(text, value if numeric else text, "number" if numeric else "")


def text_cell(text: str | None, kind: str = "") -> Cell:
    """Return a cell of text; empty for None."""
    return Cell(text or "", text or None, kind)


def settings_table(values: Iterable[tuple[str, Any]]) -> Table:
    """Return a table of the names and values of settings."""
    return Table(
        ("setting", "value"),
        [(text_cell(name, "name"), text_cell(setting(value))) for name, value in values],
    )


SPARKS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float]) -> str:
    """Draw a block for each value, from the lowest to the highest; a dot if it is not finite."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "·" * len(values)
    low, span = min(finite), max(finite) - min(finite)

    def block(value: float) -> str:
        if not math.isfinite(value):
            return "·"
        return SPARKS[round((value - low) / span * (len(SPARKS) - 1))] if span else SPARKS[0]

    return "".join(block(value) for value in values)
