"""Splits: which part an image belongs to, by a hash of its content, its group and a seed.

Identical files, and images of a group, are in one part. Names and the order of files decide
nothing; contents that are added or removed may move others.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath

from hpo.config.data import REGEX, DataConfig
from hpo.data.folders import Listing
from hpo.errors import DataError, DiskFull
from hpo.io import atomic_write, short_hash


@dataclass(frozen=True)
class Item:
    """An image before it is decoded."""

    name: str
    label: int
    digest: str
    group: str = ""
    """Group that a split must not divide; empty: only files with the same content stay together."""

    @property
    def key(self) -> str:
        """Equal for items that stay together."""
        return self.group or self.digest


Parts = dict[str, list[Item]]


def split(items: Sequence[Item], fractions: Mapping[str, float], seed: int) -> Parts:
    """Return {"train": rest, part: its fraction of every class...}, by a hash of content and
    `seed`.

    Identical files share a part, even if they are in two classes: they count for the first. A part
    gets the rounded fraction of a class, but at least 1 as long as the class has enough images.
    """
    groups: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        groups[item.digest].append(item)
    classes: dict[int, list[str]] = defaultdict(list)
    for digest, group in groups.items():
        classes[min(item.label for item in group)].append(digest)
    chosen: dict[str, str] = {}
    for digests in classes.values():
        order = _ranked(digests, "split", seed)
        count = sum(len(groups[digest]) for digest in order)
        for place, (part, fraction) in enumerate(fractions.items()):
            rest = [digest for digest in order if digest not in chosen]
            sizes = [len(groups[digest]) for digest in rest]
            quota, others = max(1, round(count * fraction)), len(fractions) - place
            for position in _fill(sizes, quota, others):
                chosen[rest[position]] = part
    parts: Parts = {part: [] for part in ("train", *fractions)}
    for item in items:
        parts[chosen.get(item.digest, "train")].append(item)
    return parts


def _fill(sizes: Sequence[int], quota: int, others: int) -> list[int]:
    """Return indices of groups that together have at most `quota` images, or of the smallest group
    if none is that small; never all of them, and of enough groups no more than leave one to each of
    `others` parts."""
    taken: list[int] = []
    left = quota
    for position, size in enumerate(sizes):
        if size <= left and len(taken) + others < len(sizes):
            taken.append(position)
            left -= size
    if not taken and len(sizes) > 1:
        taken.append(sizes.index(min(sizes)))
    return taken


def _ranked(digests: Iterable[str], purpose: str, seed: int) -> list[str]:
    return sorted(digests, key=lambda digest: short_hash([purpose, seed, digest]))


ORDERS = 50
"""Orders that `split_groups` tries until every class is in every part."""


def split_groups(items: Sequence[Item], shares: Mapping[str, float], seed: int) -> Parts:
    """Return {part: its share of every class} without dividing groups, in an order that depends on
    the contents of the groups and `seed` alone. `shares` add up to 1.

    Every part gets every class with a group for each part, provided one of ORDERS orders achieves
    it: groups may contain several classes.
    """
    groups: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        groups[item.key].append(item)
    counts = {key: sorted(Counter(one.label for one in group).items())
              for key, group in groups.items()}  # fmt: skip
    contents = {key: sorted({item.digest for item in group}) for key, group in groups.items()}
    several = Counter(label for count in counts.values() for label, _ in count)
    everywhere = {(part, label) for part in shares for label, n in several.items()
                  if n >= len(shares)}  # fmt: skip
    assignments: list[dict[str, str]] = []
    for order in range(ORDERS):
        about = ["deal", seed, *([order] if order else [])]
        ranks = {key: short_hash([*about, content]) for key, content in contents.items()}
        ranked = sorted(counts, key=ranks.__getitem__)
        assignments.append(_dealt([(key, counts[key]) for key in ranked], shares))
        there = {(part, label) for key, part in assignments[-1].items() for label, _ in counts[key]}
        if everywhere <= there:
            break
    chosen = assignments[-1] if everywhere <= there else assignments[0]
    parts: Parts = {part: [] for part in shares}
    for item in items:
        parts[chosen[item.key]].append(item)
    return parts


Count = list[tuple[int, int]]
"""Class and number of images of a group."""


def _dealt(groups: Sequence[tuple[str, Count]], shares: Mapping[str, float]) -> dict[str, str]:
    """Return {group key: part}, assigning `groups` one after another.

    Each goes to the part where it leaves the least deviation (chi-square) of the images of its
    classes from what every part should have of them, at least 1; if a class has only as many groups
    left as there are parts without it, to one of those.
    """
    left, totals = Counter[int](), Counter[int]()
    for _, group in groups:
        left.update(label for label, _ in group)
        totals.update(dict(group))
    wanted = {
        part: {label: max(1.0, share * count) for label, count in totals.items()}
        for part, share in shares.items()
    }
    have: dict[str, Counter[int]] = {part: Counter() for part in shares}
    sizes = Counter(dict.fromkeys(shares, 0))

    def deviation(group: Count, part: str) -> tuple[float, int]:
        mine, due = have[part], wanted[part]
        pairs = ((n, mine[label] - due[label], due[label]) for label, n in group)
        return sum(n * (2 * over + n) / due for n, over, due in pairs), sizes[part]

    chosen: dict[str, str] = {}
    for key, group in groups:
        allowed = _lacking([label for label, _ in group], have, left)
        part = min(allowed, key=partial(deviation, group))
        chosen[key] = part
        have[part].update(dict(group))
        sizes[part] += sum(n for _, n in group)
        left.subtract(label for label, _ in group)
    return chosen


def _lacking(
    labels: Sequence[int], have: Mapping[str, Counter[int]], left: Mapping[int, int]
) -> Sequence[str]:
    """Return the parts that may get a group of these `labels`: those without a class of which too
    few groups are left."""
    allowed = list(have)
    for label in sorted(labels, key=lambda label: (left[label], label)):
        lacking = [part for part in have if not have[part][label]]
        if left[label] <= len(lacking):
            allowed = [part for part in allowed if part in lacking] or allowed
    return allowed


def make_folds(items: Sequence[Item], folds: int, seed: int) -> list[list[Item]]:
    """Return the items of each fold, assigned by `split_groups`."""
    parts = split_groups(items, {str(number): 1 / folds for number in range(folds)}, seed)
    return list(parts.values())


def limit_items(items: Sequence[Item], limit: int, seed: int) -> list[Item]:
    """Return `limit` of the items in their order: every class in proportion (largest remainders),
    at least 1, chosen by a hash of content and `seed`. `limit` is at least the number of
    classes."""
    total, counts = len(items), Counter(item.label for item in items)
    if limit >= total:
        return list(items)
    shares = {label: max(1.0, limit * n / total) for label, n in counts.items()}
    quotas = {label: int(share) for label, share in shares.items()}
    by_rest = sorted(shares, key=lambda label: (quotas[label] - shares[label], label))
    for label in by_rest[: max(0, limit - sum(quotas.values()))]:
        quotas[label] += 1
    while sum(quotas.values()) > limit:  # where the rule of 1 gave too many
        quotas[max(quotas, key=lambda label: (quotas[label], -label))] -= 1
    return _first(items, quotas, seed)


def _first(items: Sequence[Item], quotas: Mapping[int, int], seed: int) -> list[Item]:
    """Return the first items of each class in the order of a seeded hash, in the given order."""
    order = sorted(items, key=lambda item: (short_hash(["limit", seed, item.digest]), item.name))
    left, kept = dict(quotas), set()
    for item in order:
        if left[item.label]:
            left[item.label] -= 1
            kept.add(item.name)
    return [item for item in items if item.name in kept]


def duplicate_warnings(parts: Parts) -> list[str]:
    """Return warnings about identical files in two parts, or in two classes; empty digests are
    unknown."""
    warnings = []
    digests = {part: {item.digest for item in items} - {""} for part, items in parts.items()}
    for part, of in (("val", "train"), ("test", "train"), ("test", "val")):
        count = sum(item.digest in digests[of] for item in parts.get(part, ()))
        if count:
            what = f"1 file of {part} is" if count == 1 else f"{count:,} files of {part} are"
            warnings.append(f"{what} identical to files of {of}")
    labels: dict[str, set[int]] = defaultdict(set)
    for item in (item for items in parts.values() for item in items if item.digest):
        labels[item.digest].add(item.label)
    if count := sum(len(one) > 1 for one in labels.values()):
        what = "1 file is" if count == 1 else f"{count:,} files are"
        warnings.append(f"{what} in more than one class with identical content")
    return warnings


SHOWN = 3
"""Examples in a message."""


def name_groups(config: DataConfig, listing: Listing) -> dict[str, str]:
    """Return {image name: group} according to `data.group_by`; empty if that is not set.

    Raises DataError if images have no group.
    """
    if config.group_by is None:
        return {}
    groups = {
        name: _group(config, name, part == "all")
        for part, items in listing.parts.items()
        for name, _ in items
    }
    without = [name for name, group in groups.items() if not group]
    if without:
        examples = ", ".join(sorted(without)[:SHOWN])
        advice = (
            "every image must lie in a folder of its group"
            if config.group_by == "folder"
            else "correct the pattern; append |.* to give every image that it does not match a "
            "group of its own"
        )
        raise DataError(
            f"{config.title}: data.group_by = {config.group_by!r} finds no group for "
            f"{len(without)} of {len(groups)} images ({examples}): {advice}"
        )
    return groups


def _group(config: DataConfig, name: str, whole: bool) -> str:
    """Return the group of the image at the path `name` below the root; empty if it has none. With
    `whole`, its first folder is its class rather than a part."""
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
    """Return the items of `parts` with `Item.group` set: equal for all items that are connected by
    the same content or by the same group in one of `relations`, {name: group}. Unchanged if these
    are empty."""
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
    """Return the representative of the set of `one` (union-find with path halving)."""
    while (up := above.get(one, one)) != one:
        above[one] = above.get(up, up)
        one = above[one]
    return one


def shared_group_warnings(parts: Parts, groups: Mapping[str, str]) -> Iterable[str]:
    """Yield warnings about groups that are in two of the given parts."""
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
                f"{part} does not measure performance on new groups"
            )


def near_duplicate_warnings(parts: Parts, near: Mapping[str, str]) -> Iterable[str]:
    """Yield warnings about near-duplicates, `near` ({name: group}): their number, and which are in
    two of the given parts. Identical files are not counted."""
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
    """Yield warnings about parts whose size is far from their share of the images because groups
    are not divided; `shares` as for `split_groups`."""
    if not any(item.group for part in shares for item in parts[part]):
        return
    total = sum(len(parts[part]) for part in shares)
    largest = Counter(item.key for part in shares for item in parts[part]).most_common(1)[0][1]
    for part, share in shares.items():
        off = len(parts[part]) - share * total
        if abs(off) > max(1.0, share * total / 4):
            yield (
                f"{part} has {len(parts[part])} of {total} images, {round(share * total)} were "
                f"asked for: groups are not divided, and the largest has {largest}"
            )


SHOWN_IMAGES = 5
"""Names in a line."""

Entries = dict[str, list[str]]
"""{name: [part, class, digest of the content]}."""


def save_listing(
    cache: Path, fingerprint: str, classes: Sequence[str], parts: Mapping[str, Sequence[Item]]
) -> None:
    """Write the images of `fingerprint` below `cache`, unless they are there or the disk is
    full."""
    file = _listing_file(cache, fingerprint)
    if file.exists():
        return
    entries = {
        item.name: [part, classes[item.label], item.digest]
        for part in ("train", "val")
        for item in parts[part]
    }
    with suppress(DiskFull):  # it only serves a message
        atomic_write(file, lambda sink: sink.write(json.dumps(entries).encode()))


def listing_differences(cache: Path, began: str, here: str) -> list[str]:
    """Return one line, with names, for each kind of difference between the images of two
    fingerprints; empty if one of them was not seen on this host."""
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
        lines.append(
            _difference_line(moved, "in another part, because the split depends on all contents")
        )
    return lines or ["the same files, decoded differently (data.orientation, data.background)"]


def _difference_line(names: Iterable[str], what: str) -> str:
    ordered = sorted(names)
    more = ", ..." if len(ordered) > SHOWN_IMAGES else ""
    count = f"{len(ordered):,} image{'' if len(ordered) == 1 else 's'}"
    return f"{count} {what}: {', '.join(ordered[:SHOWN_IMAGES])}{more}"


def _listing_file(cache: Path, fingerprint: str) -> Path:
    return cache / "listings" / f"{fingerprint}.json"


def _read_listing(cache: Path, fingerprint: str) -> Entries | None:
    try:
        entries: Entries = json.loads(_listing_file(cache, fingerprint).read_bytes())
    except (OSError, ValueError):
        return None
    return entries
