"""Image data sets labelled by a CSV file with the columns file, label, and optionally split and
group; or by the files metadata.csv of a folder, as Hugging Face's image folders have them."""

from __future__ import annotations

import codecs
import csv
import io
import ntpath
import os
import posixpath
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hpo.config.starter import FolderSummary
from hpo.config.template import median_side
from hpo.data.cache import file_digests
from hpo.data.folders import Listing, parse_part
from hpo.data.sources import DatasetSource, FolderReader
from hpo.errors import DataError
from hpo.formatting import plural

COLUMNS = ("file", "label", "split", "group")
NEEDED = COLUMNS[:2]
ALIASES = {
    "file": ("filename", "file_path", "filepath", "image", "image_path", "img", "path"),
    "label": ("class", "class_name", "category", "target"),
}
"""Other names of the two columns that are needed, where no column has their own."""
METADATA = "metadata.csv"
"""The file that labels the images of its folder."""
DELIMITERS = ",;\t"
SHOWN = 5
"""Lines that are named for each kind of error."""


@dataclass(frozen=True)
class Row:
    """An image as listed in the file."""

    line: int
    """Line number from 1; usually the header is line 1."""
    file: str
    """Path below the root, with / between folders."""
    label: str
    split: str
    """train, val, test, or empty."""
    group: str


class CsvSource(DatasetSource):
    """The images that the CSV file `labels`, or the metadata.csv of that folder, list below
    `root`."""

    def __init__(self, labels: Path, root: Path, *, skip_missing: bool = False) -> None:
        self.labels, self.root, self.skip_missing = labels, root, skip_missing
        self.reader = FolderReader(root)

    def listing(self, *, test: bool) -> Listing:
        """Return names and labels by part (see `list_csv`)."""
        return list_csv(self.labels, self.root, skip_missing=self.skip_missing)

    def digests(self, names: Sequence[str], cache: Path | None) -> dict[str, str]:
        """Return the content digest of each file."""
        return file_digests(self.root, names, cache, self.tick)


def list_csv(labels: Path, root: Path, *, skip_missing: bool = False) -> Listing:
    """Return the images that the CSV file `labels` lists, by split: "all" if no row has a split,
    otherwise rows without one belong to train. Of a folder, its metadata.csv (`metadata_rows`).
    With `skip_missing`, missing files are left out.

    Classes are sorted by name, or numerically if all are numbers. Raises DataError, naming the
    lines at fault, if the file cannot be used.
    """
    listed = metadata_rows(labels) if labels.is_dir() else read_rows(labels)
    rows, warnings = _existing_rows(listed, labels, root, skip_missing)
    rows, twice = _unique_rows(rows, labels)
    parts: dict[str, list[Row]] = defaultdict(list)
    divided = any(row.split for row in rows)
    for row in rows:
        parts[(row.split or "train") if divided else "all"].append(row)
    open_ = sum(not row.split for row in parts.get("train", ())) if divided else 0
    if open_:
        warnings.append(
            f"{plural(open_, 'row')} of {labels.name} without a split: assigned to train"
        )
    first = "train" if divided else "all"
    if first not in parts:
        raise DataError(
            f"{labels}: no row belongs to train; training uses rows of train or without a split"
        )
    classes = _ordered({row.label for row in parts[first]})
    if len(classes) < 2:
        raise DataError(
            f"{labels}: only one class among the training rows, {classes[0]!r}; at least two "
            "are needed"
        )
    place = {name: label for label, name in enumerate(classes)}
    for part in parts.keys() - {first}:
        unknown = [(row.line, row.label) for row in parts[part] if row.label not in place]
        if unknown:
            raise DataError(
                f"{labels}: labels of {part} that do not occur in train: {_lines(unknown)}; a "
                "model cannot learn them"
            )
    return Listing(
        classes,
        {part: [(row.file, place[row.label]) for row in parts[part]]
         for part in ("train", "all", "val", "test") if part in parts},
        [*warnings, *twice],
        groups={row.file: row.group for row in rows if row.group},
    )  # fmt: skip


def summarize_csv(labels: Path) -> FolderSummary:
    """Return the facts about the images of `labels` that a starter study file needs. Raises as
    `list_csv`."""
    root = labels if labels.is_dir() else labels.parent
    listing = list_csv(labels, root)
    first = listing.parts.get("train") or listing.parts["all"]
    files = [root / name for name, _ in first]
    parts = () if "all" in listing.parts else tuple(listing.parts)
    return FolderSummary(len(listing.classes), len(files), median_side(files), parts, listed=True)


def metadata_files(folder: Path) -> list[Path]:
    """Return the metadata.csv of `folder`, or else those of its folders train, validation, test."""
    inside = [folder / METADATA]
    if not inside[0].is_file():
        parts = sorted(one for one in folder.iterdir() if one.is_dir() and parse_part(one.name))
        inside = [one / METADATA for one in parts]
    return [path for path in inside if path.is_file()]


def has_metadata(folder: Path) -> bool:
    """Return whether the images of `folder` are labelled by metadata.csv: one that is there names
    the columns file and label. Raises DataError for one that cannot be read."""
    return any(_names_needed(path) for path in metadata_files(folder))


def _names_needed(labels: Path) -> bool:
    try:
        return {*NEEDED} <= {*_columns(labels, _text(labels))[1]}
    except csv.Error as error:
        raise DataError(f"{labels}: not a CSV file: {error}") from error


def metadata_rows(folder: Path) -> list[Row]:
    """Return the rows of all metadata.csv of `folder`, with paths below it. The first folder of an
    image's path is its split where its row names none: train/, validation/, test/ or alike. Raises
    DataError as `read_rows`, and if there is no metadata.csv."""
    files = metadata_files(folder)
    if not files:
        raise DataError(
            f"{folder}: no {METADATA} in it or in its train/; set data.labels to the CSV file"
        )
    rows = []
    for path in files:
        below = path.parent.relative_to(folder).as_posix()
        for row in read_rows(path):
            file = posixpath.normpath(f"{below}/{row.file}")
            top = file.split("/")[0] if "/" in file else ""
            rows.append(replace(row, file=file, split=row.split or parse_part(top) or ""))
    return rows


def csv_test_rows(labels: Path, *, skip_missing: bool = False) -> list[Row]:
    """Return the rows of the test split, or all rows if none has a split; paths are below the
    folder of the file. Raises DataError as `list_csv`, and if there are splits but no test rows."""
    rows, _ = _existing_rows(read_rows(labels), labels, labels.parent, skip_missing)
    rows, _ = _unique_rows(rows, labels)
    wanted = [row for row in rows if row.split == "test"]
    if wanted or any(row.split for row in rows):
        rows = wanted
    if not rows:
        raise DataError(
            f"{labels}: no row belongs to test; remove the column split to test all of them"
        )
    return rows


def read_rows(labels: Path) -> list[Row]:
    """Return the rows of the CSV file `labels`, in order. Raises DataError, naming the lines at
    fault, if the file cannot be read, columns are missing, or rows are empty or invalid."""
    text = _text(labels)
    try:
        delimiter, header = _header(labels, text)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        next(reader)
        listed = [(reader.line_num, cells) for cells in reader if any(map(str.strip, cells))]
    except csv.Error as error:
        raise DataError(f"{labels}: not a CSV file: {error}") from error
    if not listed:
        raise DataError(f"{labels}: no rows below the header; one for each image is needed")
    wrong = [(line, f"{len(cells)} values") for line, cells in listed if len(cells) != len(header)]
    if wrong:
        raise DataError(
            f"{labels}: rows without the {len(header)} values of the header: "
            f'{_lines(wrong)}; a value with {delimiter!r} in it needs double quotes: "a,b"'
        )
    rows = []
    for line, cells in listed:
        one = {name: cells[at].strip() for name, at in header.items() if name in COLUMNS}
        rows.append(Row(line, one["file"], unicodedata.normalize("NFC", one["label"]),
                        one.get("split", ""), one.get("group", "")))  # fmt: skip
    return list(_validated_rows(labels, rows))


def _text(labels: Path) -> str:
    """Return the content of the file: UTF-8, or UTF-16 with a byte order mark."""
    try:
        data = labels.read_bytes()
    except OSError as error:
        raise DataError(
            f"{labels}: {error.strerror}; set data.labels to the CSV file with the columns file "
            "and label"
        ) from error
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if wide else "utf-8-sig")
        wrong = text.find("\0")
    except UnicodeDecodeError as error:
        text, wrong = data[: error.start].decode("latin-1"), error.start
    if wrong >= 0:
        line = text[:wrong].count("\n") + 1
        raise DataError(
            f"{labels}: neither UTF-8 nor UTF-16 with a byte order mark (line {line}); save it as "
            "UTF-8"
        )
    return text


def _header(labels: Path, text: str) -> tuple[str, dict[str, int]]:
    """Return the delimiter and {column: index}. Raises DataError without the columns file and
    label, and where two columns may be one of them."""
    delimiter, columns = _columns(labels, text)
    if not {*NEEDED} <= {*columns}:
        have = ", ".join(filter(None, columns[:8])) or "none"
        raise DataError(
            f"{labels}: the first line must name the columns file and label (and may name split "
            f"and group), separated by commas, semicolons or tabs; it has {have}"
        )
    for name in COLUMNS:
        if columns.count(name) > 1:
            raise DataError(f"{labels}: {columns.count(name)} columns are called {name}; keep one")
    # Others may have the same name, or none; they only count.
    return delimiter, {name if name in COLUMNS else f" {at}": at for at, name in enumerate(columns)}


def _columns(labels: Path, text: str) -> tuple[str, list[str]]:
    """Return the delimiter, and the names of the columns in lower case, for the delimiter that
    yields the columns file and label. Raises DataError where two columns may be one of these."""
    columns_of: dict[str, list[str]] = {}
    for delimiter in DELIMITERS:
        cells = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), [])
        columns_of[delimiter] = [_column(cell) for cell in cells]

    def fitness(delimiter: str) -> tuple[int, int]:
        names = {*columns_of[delimiter]}
        needed = sum(not names.isdisjoint((name, *ALIASES[name])) for name in NEEDED)
        return needed, len(columns_of[delimiter])

    delimiter = max(columns_of, key=fitness)
    return delimiter, _renamed(labels, columns_of[delimiter])


def _column(cell: str) -> str:
    name = cell.strip().lower()
    return "file" if name == "file_name" else name


def _renamed(labels: Path, columns: list[str]) -> list[str]:
    """Return the columns with file and label for their other names, where no column has theirs."""
    for name, others in ALIASES.items():
        alike = [one for one in columns if one in others]
        if name in columns or not alike:
            continue
        if len(alike) > 1:
            raise DataError(
                f"{labels}: {' and '.join(alike)} may each be the column {name}; "
                f"call the one that is {name}"
            )
        columns = [name if one == alike[0] else one for one in columns]
    return columns


def _validated_rows(labels: Path, rows: Sequence[Row]) -> Iterator[Row]:
    """Yield each row with its path and split normalised. Raises DataError listing everything that
    is wrong."""
    wrong: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for row in rows:
        split = parse_part(row.split) or ""
        path = posixpath.normpath(row.file.replace("\\", "/"))
        if not row.file:
            wrong["no file"].append((row.line, ""))
        elif posixpath.isabs(path) or ntpath.splitdrive(row.file)[0]:
            wrong["an absolute path instead of one below the root"].append((row.line, row.file))
        elif path.split("/")[0] == "..":
            wrong["a path that leaves the root"].append((row.line, row.file))
        elif not row.label:
            wrong["no label"].append((row.line, row.file))
        elif row.split and not split:
            wrong["an unknown split (allowed: train, val, test, or nothing)"].append(
                (row.line, row.split)
            )
        else:
            yield Row(row.line, path, row.label, split, row.group)
    if wrong:
        lines = "".join(
            f"\n  {what}: {_lines(lines_at_fault)}" for what, lines_at_fault in wrong.items()
        )
        count = sum(map(len, wrong.values()))
        raise DataError(f"{labels}: {plural(count, 'row')} cannot be used:{lines}")


def _existing_rows(
    rows: Sequence[Row], labels: Path, root: Path, skip_missing: bool
) -> tuple[list[Row], list[str]]:
    """Return the rows whose file exists, and a warning about the others."""
    there, missing = [], []
    for row in rows:
        name = _on_disk(root, row.file)
        if name is None:
            missing.append(row)
        else:
            there.append(replace(row, file=name))
    if not missing:
        return there, []
    named = _lines([(row.line, row.file) for row in missing])
    if len(missing) == len(rows):
        raise DataError(
            f"{labels}: none of its {len(rows)} files exists: {named}; paths are below {root}, "
            "which data.root changes"
        )
    if not skip_missing:
        raise DataError(
            f"{labels}: {plural(len(missing), 'file')} missing in {root}: {named}; add them, "
            "remove their rows, or set data.skip_unreadable = true"
        )
    warning = f"{plural(len(missing), 'file')} of {labels.name} missing, left out: {named}"
    return there, [warning]


def _on_disk(root: Path, name: str) -> str | None:
    """Return the file `name` as it is spelled on disk, possibly in another Unicode normalisation;
    None if it is missing."""
    forms = name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)
    return next((one for one in forms if os.path.isfile(root / one)), None)  # noqa: PTH113


def _unique_rows(rows: Sequence[Row], labels: Path) -> tuple[list[Row], list[str]]:
    """Return each file once, and a warning about repeated rows. Raises DataError if a file is
    listed with different values."""
    first: dict[str, Row] = {}
    twice: list[tuple[int, str]] = []
    against: list[tuple[int, str]] = []
    for row in rows:
        known = first.setdefault(row.file, row)
        if known is row:
            continue
        same = (known.label, known.split, known.group) == (row.label, row.split, row.group)
        (twice if same else against).append((row.line, f"{row.file}, as in line {known.line}"))
    if against:
        raise DataError(
            f"{labels}: the label, split or group of a file contradicts an earlier row: "
            f"{_lines(against)}; keep one of them"
        )
    if not twice:
        return list(rows), []
    warning = f"{plural(len(twice), 'row')} of {labels.name} repeating a file: {_lines(twice)}"
    return list(first.values()), [warning]


def _lines(numbered: Sequence[tuple[int, str]]) -> str:
    shown = [f"line {line}" + (f" ({what})" if what else "") for line, what in numbered[:SHOWN]]
    more = f" and {len(numbered) - SHOWN} more" if len(numbered) > SHOWN else ""
    return ", ".join(shown) + more


def _ordered(labels: set[str]) -> tuple[str, ...]:
    if all(re.fullmatch(r"[+-]?[0-9]{1,18}", label) for label in labels):
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    return tuple(sorted(labels))
