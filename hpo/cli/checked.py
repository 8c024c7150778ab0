"""What `hpo storage check` says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpo.storage.checking import Checked, Counts
    from hpo.storage.findings import Finding


def told(checked: Checked, mended: Sequence[Finding], *, repair: bool) -> Iterator[str]:
    """The lines: what was mended, what is wrong, what only looks so, and the sum."""
    for one in mended:
        yield f"mended: {line(one)}"
        yield f"    {one.cure}"
    for one in checked.faults:
        yield line(one)
        if one.cure is None:
            yield f"    left to you: {one.left}"
        elif repair:
            yield "    left as it is: it has changed in this moment, check again"
        else:
            yield f"    --repair: {one.cure}"
    for one in checked.notes:
        yield f"no fault: {line(one)}"
    looked_at = counted(checked.counts) if checked.readable else "nothing else was looked at"
    yield f"{looked_at}: {verdict(checked, repair=repair)}"


def line(one: Finding) -> str:
    """`attempt without end: digits, trial 3, attempt 1: it is ...`."""
    return ": ".join(part for part in (one.kind, one.where, one.means) if part)


def counted(counts: Counts) -> str:
    """`3 studies, 120 trials, ...`."""
    ones = {"studies": "study"}
    return ", ".join(
        f"{count} {name if count != 1 else ones.get(name, name.removesuffix('s'))}"
        for name, count in asdict(counts).items()
    )


def verdict(checked: Checked, *, repair: bool) -> str:
    count = len(checked.faults)
    if not count:
        return "nothing wrong"
    mendable = sum(one.cure is not None for one in checked.faults)
    faults = "1 fault" if count == 1 else f"{count} faults"
    return faults if repair or not mendable else f"{faults}, --repair mends {mendable}"


def as_data(checked: Checked, mended: Sequence[Finding]) -> dict[str, Any]:
    """The same for `--json`."""
    return {
        "counts": asdict(checked.counts),
        "faults": [one.to_dict() for one in checked.faults],
        "notes": [one.to_dict() for one in checked.notes],
        "mended": [one.to_dict() for one in mended],
    }
