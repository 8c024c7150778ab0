"""The images that a data fingerprint stands for, remembered on each host: to say which of them have
changed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from hpo.engine.split import Item
from hpo.errors import DiskFull
from hpo.files import write_whole

SHOWN = 5
"""Names in a line."""

Entries = dict[str, list[str]]
"""{name: [part, class, digest of the content]}."""


def save_listing(
    cache: Path, fingerprint: str, classes: Sequence[str], parts: Mapping[str, Sequence[Item]]
) -> None:
    """Keep the images of `fingerprint` under `cache`, unless they are there or the disk is full."""
    file = _listing_file(cache, fingerprint)
    if file.exists():
        return
    entries = {
        item.name: [part, classes[item.label], item.digest]
        for part in ("train", "val")
        for item in parts[part]
    }
    with suppress(DiskFull):  # it only serves a message
        write_whole(file, lambda sink: sink.write(json.dumps(entries).encode()))


def listing_differences(cache: Path, began: str, here: str) -> list[str]:
    """Return a line for each kind of difference between the images of two fingerprints, with names;
    none where one of them was not seen on this host."""
    before, now = _read_listing(cache, began), _read_listing(cache, here)
    if before is None or now is None:
        return []
    both = before.keys() & now.keys()
    changed = {
        "added": now.keys() - before.keys(),
        "gone": before.keys() - now.keys(),
        "of other content": {name for name in both if before[name][2] != now[name][2]},
        "in another class": {name for name in both if before[name][1] != now[name][1]},
    }
    known = set().union(*changed.values())
    moved = {name for name in both - known if before[name][0] != now[name][0]}
    lines = [_difference_line(names, what) for what, names in changed.items() if names]
    if moved:
        lines.append(_difference_line(moved, "in another part, since the split is by all contents"))
    return lines or ["the same files, decoded otherwise (data.orientation, data.background)"]


def _difference_line(names: Iterable[str], what: str) -> str:
    ordered = sorted(names)
    more = ", ..." if len(ordered) > SHOWN else ""
    count = f"{len(ordered):,} image{'' if len(ordered) == 1 else 's'}"
    return f"{count} {what}: {', '.join(ordered[:SHOWN])}{more}"


def _listing_file(cache: Path, fingerprint: str) -> Path:
    return cache / "listings" / f"{fingerprint}.json"


def _read_listing(cache: Path, fingerprint: str) -> Entries | None:
    try:
        found: Entries = json.loads(_listing_file(cache, fingerprint).read_bytes())
    except (OSError, ValueError):
        return None
    return found
