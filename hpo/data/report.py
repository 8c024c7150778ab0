"""The report on a data set: its parts, classes and files, and anything unusual about them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from hpo.errors import DataError

SHOWN = 10
"""Files, or classes, named in a list."""


@dataclass(frozen=True)
class DataReport:
    """A data set in numbers and names, without any pixels; `lines` is the text shown to users."""

    title: str
    parts: dict[str, dict[str, int]]
    """{part: {class: images}}, of the first fold in a cross-validation; unreadable files
    included."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Files that are ignored, by extension."""
    unreadable: tuple[str, ...] = ()
    """Names of unreadable files, each with the reason."""
    modes: dict[str, int] = field(default_factory=dict)
    """Number of images by Pillow's name of their pixel format; empty if none was opened."""
    turned: int = 0
    """Images with an EXIF orientation other than upright."""
    transparent: int = 0
    """Images that are not fully opaque."""
    orientation: str = "exif"
    background: str = "white"
    warnings: tuple[str, ...] = ()
    """Duplicates between parts, merged folders and the like."""
    test_from_train: float = 0.0
    """Part of train/ that became the test split, because there is no test/."""
    test_possible: bool = False
    """Whether train/ could be split so."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in the order of their labels."""
        return tuple(self.parts["train"])

    @property
    def missing(self) -> list[str]:
        """One line for each part that lacks some of the classes."""
        lines = []
        for part, counts in self.parts.items():
            if absent := [name for name, count in counts.items() if not count]:
                more = f" and {len(absent) - SHOWN} more classes" * (len(absent) > SHOWN)
                pronoun = "it is" if len(absent) == 1 else "they are"
                lines.append(
                    f"{part} has no images of {', '.join(absent[:SHOWN])}{more}: {pronoun} not "
                    "measured there"
                )
        return lines

    def lines(self) -> list[str]:
        """Return the report as it is shown everywhere, one fact a line."""
        return [
            *(f"{part}: {_counts(count)}" for part, count in self.parts.items()),
            *self._on_test(),
            *self.oddities(),
        ]

    def _on_test(self) -> Iterator[str]:
        """Yield where the test split comes from, or how to have one."""
        if self.test_from_train:
            yield (
                f"there is no test/: {self.test_from_train:.0%} of train/ are kept for the test "
                "(data.test_fraction = 0: none)"
            )
        if "test" not in self.parts:
            yield f"no test split: results can only be validated. {self.remedy}"

    @property
    def remedy(self) -> str:
        """What gives data without a test split one."""
        if not self.test_possible:
            return "Add a test part, or set data.test_fraction"
        return "Add test/, or split one off train/: data.test_from_train = true"

    def oddities(self) -> Iterator[str]:
        """Yield the lines after the counts: anything unusual that a user should know."""
        yield from self.missing
        if self.unreadable:
            yield f"{unreadable_summary(self.unreadable)}, left out:"
            yield from first_lines(self.unreadable)
        if self.left_out:
            from hpo.data.folders import left_out_summary  # looks at a study need none of it

            yield left_out_summary(self.left_out)
        deep = any(mode.startswith("I") for mode in self.modes)
        if len(self.modes) > 1 or deep:
            each = sorted(self.modes.items(), key=lambda one: (-one[1], one[0]))
            scaled = "; 16 bits are scaled to 8" if deep else ""
            yield f"pixel formats: {', '.join(f'{mode} {n}' for mode, n in each)}{scaled}"
        if self.turned:
            what = "turned upright" if self.orientation == "exif" else "used as they are stored"
            yield (
                f"{_images(self.turned)} with an EXIF orientation: {what} "
                f'(data.orientation = "{self.orientation}")'
            )
        if self.transparent:
            hidden = self.background == "ignore"
            what = "hidden colours are used" if hidden else f"shown on {self.background}"
            yield (
                f"{_images(self.transparent)} partly transparent: {what} (data.background = "
                f'"{self.background}")'
            )
        yield from self.warnings

    def require_readable(self, *, skip: bool) -> None:
        """Raise DataError naming the unreadable files, unless `skip`."""
        if self.unreadable and not skip:
            raise unreadable_error(self.title, self.unreadable)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a JSON-serialisable dictionary."""
        return asdict(self)

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> DataReport:
        """Return the report that `to_dict` wrote, also after a round trip through JSON."""
        tuples = {name: tuple(found[name]) for name in ("unreadable", "warnings")}
        return cls(**{**found, **tuples})


def unreadable_error(title: str, unreadable: Sequence[str]) -> DataError:
    """Return the error that names the unreadable files, each with the reason."""
    lines = "".join(f"\n{line}" for line in first_lines(unreadable))
    return DataError(
        f"{title}: {unreadable_summary(unreadable)}; repair or remove them, or set "
        f"data.skip_unreadable = true:{lines}"
    )


def unreadable_summary(unreadable: Sequence[str]) -> str:
    """Return the number of unreadable files in words."""
    return f"{len(unreadable)} file{'s' * (len(unreadable) != 1)} cannot be read as images"


def first_lines(names: Sequence[str]) -> list[str]:
    """Return the first of `names`, one a line, and the number of the others."""
    more = [f"  and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return [*(f"  {name}" for name in names[:SHOWN]), *more]


def _images(count: int) -> str:
    return f"{count} image{'s' * (count != 1)}"


def _counts(of_class: Mapping[str, int]) -> str:
    each = [f"{name} {count}" for name, count in of_class.items()]
    more = f", ... ({len(each)} classes)" if len(each) > SHOWN else ""
    return f"{_images(sum(of_class.values()))} ({', '.join(each[:SHOWN])}{more})"
