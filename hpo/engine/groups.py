"""Which images a split must not part: those of one group, and those of the same content."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath

from hpo.definition.data import REGEX, DataConfig
from hpo.engine.folders import Listing
from hpo.engine.split import Parts
from hpo.errors import DataError

SHOWN = 3
"""Examples in a message."""


def name_groups(config: DataConfig, listing: Listing) -> dict[str, str]:
    """{name of an image: its group} by `data.group_by`; empty without.

    Raises DataError where images have no group.
    """
    if config.group_by is None:
        return {}
    found = {
        name: _group(config, name, part == "all")
        for part, items in listing.parts.items()
        for name, _ in items
    }
    without = [name for name, group in found.items() if not group]
    if without:
        examples = ", ".join(sorted(without)[:SHOWN])
        advice = (
            "every image must lie in a folder of its group"
            if config.group_by == "folder"
            else "correct the pattern; with |.* at its end what it does not match stands alone"
        )
        raise DataError(
            f"{config.title}: data.group_by = {config.group_by!r} finds no group for "
            f"{len(without)} of {len(found)} images ({examples}): {advice}"
        )
    return found


def _group(config: DataConfig, name: str, whole: bool) -> str:
    """The group of the image at the path `name` below the root; empty where it has none. `whole`:
    its first folder is its class, not a part."""
    assert config.group_by is not None
    if config.group_by == "folder":
        *folders, _ = PurePosixPath(name).parts
        if config.dataset != "folder":
            return "/".join(folders)
        inside = folders[1 if whole else 2 :]
        return inside[0] if inside else ""
    match = re.search(config.group_by.removeprefix(REGEX), name)
    if match is None:
        return ""
    return next((one for one in match.groups() if one is not None), match[0])


def merge_groups(parts: Parts, relations: Sequence[Mapping[str, str]]) -> Parts:
    """The items of `parts` with `Item.group` set: the same for all that are connected by the same
    content or by the same group in one of `relations`, {name: group}. Unchanged where these are
    empty."""
    if not any(relations):
        return parts
    above: dict[str, str] = {}
    for items in parts.values():
        for item in items:
            for number, groups in enumerate(relations):
                if item.name in groups:
                    _unite(above, item.digest, f"{number} {groups[item.name]}")
    return {
        part: [replace(item, group=_top(above, item.digest)) for item in items]
        for part, items in parts.items()
    }


def _unite(above: dict[str, str], one: str, other: str) -> None:
    above[_top(above, one)] = _top(above, other)


def _top(above: dict[str, str], one: str) -> str:
    """The representative of the set of `one`, with the way there halved (union-find)."""
    while (up := above.get(one, one)) != one:
        above[one] = above.get(up, up)
        one = above[one]
    return one


def shared_group_warnings(parts: Parts, groups: Mapping[str, str]) -> Iterable[str]:
    """Warnings about groups that stand on two sides of parts that were given."""
    here = {
        part: {groups[item.name] for item in items if item.name in groups}
        for part, items in parts.items()
    }
    for part, of in (("val", "train"), ("test", "train"), ("test", "val")):
        both = sorted(here.get(part, set()) & here.get(of, set()))
        if both:
            more = ", ..." if len(both) > SHOWN else ""
            yield (
                f"{len(both)} groups of {part} are also in {of} ({', '.join(both[:SHOWN])}{more}): "
                f"{part} does not tell how well others are recognised"
            )


def near_duplicate_warnings(parts: Parts, near: Mapping[str, str]) -> Iterable[str]:
    """What there is to tell of near-duplicates, `near` ({name: group}): how many there are, and
    which stand on two sides of parts that were given; identical files apart."""
    if near:
        yield f"{len(near)} images are near-duplicates, in {len({*near.values()})} groups"
    for part, of in (("val", "train"), ("test", "train"), ("test", "val")):
        there = {near[item.name] for item in parts.get(of, ()) if item.name in near}
        same = {item.digest for item in parts.get(of, ())}
        names = [
            item.name
            for item in parts.get(part, ())
            if near.get(item.name) in there and item.digest not in same
        ]
        if names:
            shown = ", ".join(sorted(names)[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
            yield f"{len(names)} images of {part} are near-duplicates of images of {of} ({shown})"


def imbalance_warnings(parts: Parts, shares: Mapping[str, float]) -> Iterable[str]:
    """Warnings about parts that groups leave far from their share of the images; `shares` as for
    `split.deal`."""
    if not any(item.group for part in shares for item in parts[part]):
        return
    total = sum(len(parts[part]) for part in shares)
    largest = Counter(item.key for part in shares for item in parts[part]).most_common(1)[0][1]
    for part, share in shares.items():
        off = len(parts[part]) - share * total
        if abs(off) > max(1.0, share * total / 4):
            yield (
                f"{part} has {len(parts[part])} of {total} images, {round(share * total)} were "
                f"asked for: groups stay undivided, and the largest has {largest}"
            )
