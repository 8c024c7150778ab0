"""Data sets: which images there are, which part each belongs to, and the functions that open them.

`open_data` opens training and validation images; `open_test` is the only way to the test split. If
the folders do not say which part an image belongs to, a hash of its content and `data.split_seed`
decides, class by class, and identical files stay together.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hpo.config.base import is_function_name
from hpo.config.data import FOLDERS, DataConfig
from hpo.control import ProgressCallback, no_progress
from hpo.data.cache import (
    ImageCache,
    Index,
    inspect_images,
    inspection_file,
    mean_std,
    try_read,
)
from hpo.data.csv_labels import CsvSource
from hpo.data.duplicates import find_near_duplicates
from hpo.data.folders import Listing
from hpo.data.images import REFUSED, ImageInfo, Images, Pixels, Sizing, concat, decode
from hpo.data.report import DataReport, unreadable_error
from hpo.data.sources import (
    DatasetSource,
    DigitsReader,
    DigitsSource,
    FolderReader,
    FolderSource,
    UserSource,
)
from hpo.data.split import (
    Item,
    Parts,
    duplicate_warnings,
    imbalance_warnings,
    limit_items,
    make_folds,
    merge_groups,
    name_groups,
    near_duplicate_warnings,
    save_listing,
    shared_group_warnings,
    split,
    split_groups,
)
from hpo.data.stanford_cars import StanfordCarsSource
from hpo.data.torchvision import TorchvisionSource
from hpo.errors import DataError, DiskFull
from hpo.io import short_hash

__all__ = [
    "Data",
    "DigitsReader",
    "FolderReader",
    "Images",
    "concat",
    "describe",
    "examine_data",
    "open_data",
    "open_test",
]

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet's training images, as used by torchvision's weights."""


Opened = tuple[list[Item], Index]
"""Images, and what is known of their files."""


@dataclass(frozen=True)
class Fold:
    """Training and validation images of one network of a cross-validation."""

    train: Images
    val: Images
    mean: tuple[float, ...]
    """Mean of `train`, as in `Data`."""
    std: tuple[float, ...]


@dataclass(frozen=True)
class Data:
    """Everything that a search may see: training and validation images."""

    classes: tuple[str, ...]
    train: Images
    val: Images
    mean: tuple[float, ...]
    """Mean of red, green and blue in 0..1: of all training images, or ImageNet's."""
    std: tuple[float, ...]
    fingerprint: str
    """Digest of the contents of the training and validation images, and of their classes."""
    unreadable: tuple[str, ...]
    """Names of files that were left out, each with the reason."""
    has_test: bool
    """Whether there is a test split. A user's data set is only asked for it when it is opened, and
    may then have none."""
    warnings: tuple[str, ...]
    folds: tuple[Fold, ...] = ()
    """Folds of a cross-validation; `train`, `val`, `mean` and `std` are then those of the first
    one."""


def open_data(
    config: DataConfig, cache: Path, tick: ProgressCallback = no_progress, *, folded: bool = False
) -> Data:
    """Open the training and validation images, decoding them into `cache` if necessary, with
    progress reported to `tick`; with `folded`, in the folds of `data.folds` if that is set.

    Raises DataError for a folder that cannot be used and for unreadable images (left out with
    `data.skip_unreadable`), DiskFull. No test image is decoded, except for its hash if
    `data.near_duplicates` is set.
    """
    source = _open_source(config, download=config.download)
    source.tick = tick
    assigned = _parts(config, source, cache, test=False)
    classes, parts = assigned.listing.classes, assigned.parts
    if folded and assigned.folds:
        folds, opened = _open_folds(config, source, cache, assigned)
    else:
        one, opened = _open_parts(config, source, cache, classes, parts)
        folds = [one]
    fingerprint = _fingerprint(classes, assigned, _treatments(opened, config.background))
    save_listing(cache, fingerprint, classes, parts)
    return Data(
        classes=classes,
        train=folds[0].train,
        val=folds[0].val,
        mean=folds[0].mean,
        std=folds[0].std,
        fingerprint=fingerprint,
        unreadable=tuple(line for one in opened for line in _named(*one)),
        has_test=assigned.listing.sealed or "test" in parts,
        warnings=tuple(assigned.warnings),
        folds=tuple(folds) if folded and assigned.folds else (),
    )


def open_test(config: DataConfig, cache: Path) -> Images | None:
    """Open the test images, decoded into a file of their own; return None if there is no test
    split.

    Only retraining and evaluation may call this. Raises as `open_data` does.
    """
    source = _open_source(config, download=config.download)
    parts = _parts(config, source, cache, test=True).parts
    if "test" not in parts:
        return None
    images, _ = _open(config, source, cache, parts["test"])
    if not len(images):
        raise DataError(f"{config.title}: none of the test images can be read")
    return images


class DecodedImages(Images):
    """A few images in memory, and the seconds that it took to decode each."""

    def __init__(self, decoded: Sequence[Pixels], labels: Sequence[int], decode_s: float) -> None:
        self.decoded, self.decode_s = decoded, decode_s
        self.labels = np.asarray(labels)
        self.names = tuple(map(str, range(len(decoded))))
        self.sizes = np.asarray([one.shape[:2] for one in decoded])

    def pixels(self, i: int) -> Pixels:
        """Return image `i`, (H, W, 3)."""
        return self.decoded[i]

    def stacked(self) -> Pixels:
        """Return all images as one array, (N, S, S, 3). Raises ValueError unless `uniform`."""
        return np.stack(self.decoded)


def sample_training_images(config: DataConfig, most: int) -> DecodedImages:
    """Decode up to `most` training images, evenly from all; nothing is written. Raises DataError
    for data that cannot be used; what cannot be read is left out."""
    source = _open_source(config, download=False)
    assigned = _parts(config, source, None, test=False)
    items = _training(config, assigned.folds) if assigned.folds else assigned.parts["train"]
    chosen, sizing = items[:: max(1, len(items) // most)][:most], Sizing.of(config)
    began = time.perf_counter()
    found = [(try_read(decode, source.reader, one.name, sizing), one.label) for one in chosen]
    read = [(np.asarray(one), label) for one, label in found if not isinstance(one, str)]
    each = (time.perf_counter() - began) / max(1, len(chosen))
    return DecodedImages([one for one, _ in read], [label for _, label in read], each)


def examine_data(
    config: DataConfig,
    cache: Path,
    *,
    download: bool = False,
    remember: bool = True,
    fill: bool = False,
    looked: int | None = None,
    tick: ProgressCallback = no_progress,
) -> DataReport:
    """Return a report on every part, test included, after decoding every file: it contains names
    and reasons, no pixels. Results are remembered in `cache` by content; without `remember` nothing
    is written. With `fill` training and validation images are decoded into `cache`, as `open_data`
    will want them in all folds. If there are more than `looked` images, none is decoded.

    Raises DataError for data that cannot be used, and for unreadable files unless
    `data.skip_unreadable`.
    """
    source = _open_source(config, download=download and config.download)
    source.tick = tick
    assigned = _parts(config, source, cache if remember else None, test=True, digested=True)
    items = [item for part in ("train", "val", "test") for item in assigned.parts.get(part, ())]
    seen = _filled(config, source, cache, assigned) if fill else {}
    todo = [item for item in items if item.name not in seen]
    seen |= inspect_images(
        source.reader,
        {item.name: item.digest + source.variant(item.name) for item in todo}
        if looked is None or len(items) <= looked
        else {},
        config.max_pixels,
        inspection_file(
            cache, config.dataset, str(Path(config.folder).absolute()), config.crop_to_box
        ),
        remember=remember,
        tick=tick,
    )
    reasons = _refused(config, seen)
    forms = [one.form for one in seen.values() if not isinstance(one, str)]
    listed = assigned.listing.parts.keys()
    made = assigned.parts.keys() - listed
    report = DataReport(
        title=config.title,
        parts=_counted(config, assigned),
        left_out=assigned.listing.left_out,
        unreadable=tuple(f"{item.name} ({reasons[item.name]})" for item in items
                         if item.name in reasons),
        modes=dict(Counter(form.mode for form in forms)),
        turned=sum(form.orientation != 1 for form in forms),
        transparent=sum(form.transparent for form in forms),
        orientation=config.orientation,
        background=config.background,
        warnings=tuple(assigned.warnings),
        test_from_train=config.test_fraction if "test" in made and "train" in listed else 0.0,
        test_possible=config.dataset in FOLDERS and "train" in listed,
    )  # fmt: skip
    report.require_readable(skip=config.skip_unreadable)
    _require_some(config, assigned, reasons.keys())
    return report


def _filled(
    config: DataConfig, source: DatasetSource, cache: Path, assigned: _Parts
) -> dict[str, ImageInfo | str]:
    """Decode training and validation images into `cache`, and return what `inspect_images` would of
    them; nothing of those that do not fit the disk."""
    parts = assigned.folds or [assigned.parts["train"], assigned.parts["val"]]
    seen: dict[str, ImageInfo | str] = {}
    if config.orientation != "exif":
        return seen  # the cache does not know how such images were stored
    with suppress(DiskFull):
        for items in parts:
            _, index = _cached(config, source, cache, items)
            sizes = index.sizes.tolist()
            for i, form, (height, width) in zip(index.good, index.forms, sizes, strict=True):
                seen[items[i].name] = ImageInfo(form, width, height)
            seen |= {items[i].name: reason for i, reason in index.bad.items()}
    return seen


def _refused(config: DataConfig, seen: Mapping[str, ImageInfo | str]) -> dict[str, str]:
    """Return why images cannot be used, by name: unreadable, or too small or large to be sized."""
    sizing = Sizing.of(config)
    return {
        name: reason
        for name, one in seen.items()
        if (reason := one if isinstance(one, str) else sizing.refuse(one.width, one.height))
    }


def _require_some(config: DataConfig, assigned: _Parts, unreadable: Collection[str]) -> None:
    """Raise DataError if no readable training image of a class is left, or none of a part."""
    for part, items in assigned.parts.items():
        left = {item.label for item in items if item.name not in unreadable}
        for label in sorted({item.label for item in items} - left):
            if part == "train" or not left:
                name = assigned.listing.classes[label]
                what = f"class {name!r}: none of its {part}" if left else f"none of the {part}"
                raise DataError(f"{config.title}: {what} images can be read")


def describe(config: DataConfig, *, download: bool = False) -> dict[str, dict[str, int]]:
    """Return the number of images per part and class, test included, of the first fold in a
    cross-validation. Nothing is decoded or written, unless `download` and `data.download` bring a
    missing data set."""
    source = _open_source(config, download=download and config.download)
    return _counted(config, _parts(config, source, None, test=True))


def _counted(config: DataConfig, assigned: _Parts) -> dict[str, dict[str, int]]:
    parts, classes = assigned.parts, assigned.listing.classes
    if assigned.folds:
        first, *others = assigned.folds
        parts = parts | {"train": _training(config, others), "val": first}
    ordered = [part for part in ("train", "val", "test") if part in parts]
    counts = {part: Counter(item.label for item in parts[part]) for part in ordered}
    return {
        part: {name: count[label] for label, name in enumerate(classes)}
        for part, count in counts.items()
    }


def _open_source(config: DataConfig, *, download: bool) -> DatasetSource:
    root = Path(config.folder)
    if config.dataset == "digits":
        return DigitsSource()
    if config.dataset == "folder":
        return FolderSource(root, grouped=config.group_by is not None)
    if config.dataset == "csv":
        assert config.labels is not None
        return CsvSource(Path(config.labels), root, skip_missing=config.skip_unreadable)
    if config.dataset == "stanford_cars":
        return StanfordCarsSource(root, crop=config.crop_to_box, max_pixels=config.max_pixels)
    if is_function_name(config.dataset):
        return UserSource(config.dataset, root, max_pixels=config.max_pixels)
    return TorchvisionSource(config.dataset, root, download=download)


def _open_parts(
    config: DataConfig, source: DatasetSource, cache: Path, classes: tuple[str, ...], parts: Parts
) -> tuple[Fold, list[Opened]]:
    """Return the training and validation images as split, and what is known of their files."""
    train, seen = _open(config, source, cache, parts["train"])
    val, seen_val = _open(config, source, cache, parts["val"])
    _check_labels(classes, parts["train"], train, "train")
    if not len(val):
        raise DataError(f"{config.title}: none of the validation images can be read")
    opened = [(parts["train"], seen), (parts["val"], seen_val)]
    return Fold(train, val, *_normalization(config, [seen])), opened


def _open_folds(
    config: DataConfig, source: DatasetSource, cache: Path, assigned: _Parts
) -> tuple[list[Fold], list[Opened]]:
    """Return each fold, and what is known of its files. An image is decoded once, whatever its role
    in each fold."""
    opened = [_open(config, source, cache, items) for items in assigned.folds]
    folds = []
    for number, (val, _) in enumerate(opened):
        rest = [one for i, one in enumerate(opened) if i != number]
        items = [items for i, items in enumerate(assigned.folds) if i != number]
        if config.limit_train is not None:
            rest = [_open(config, source, cache, _training(config, items))]
        train, seen = concat(*(images for images, _ in rest)), [index for _, index in rest]
        _check_labels(assigned.listing.classes, _training(config, items), train, "train")
        _check_labels(assigned.listing.classes, assigned.folds[number], val, f"fold {number}")
        folds.append(Fold(train, val, *_normalization(config, seen)))
    return folds, [(items, seen) for items, (_, seen) in zip(assigned.folds, opened, strict=True)]


def _training(config: DataConfig, folds: Sequence[Sequence[Item]]) -> list[Item]:
    """Return the training items of the network that is validated on none of `folds`."""
    items = [item for items in folds for item in items]
    limit = config.limit_train
    return items if limit is None else limit_items(_in_order(items), limit, config.split_seed)


def _normalization(
    config: DataConfig, seen: Sequence[Index]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return mean_std(*seen) if config.normalize == "dataset" else IMAGENET


def _open(
    config: DataConfig, source: DatasetSource, cache: Path, items: list[Item]
) -> tuple[Images, Index]:
    images, index = _cached(config, source, cache, items)
    if index.bad and not config.skip_unreadable:
        raise unreadable_error(config.title, _named(items, index))
    images.files = tuple(items[i].digest for i in index.good)
    return images, index


def _cached(
    config: DataConfig, source: DatasetSource, cache: Path, items: Sequence[Item]
) -> tuple[Images, Index]:
    return ImageCache(cache, config.cache_limit_gb * 1e9, source.tick).open(
        source.reader,
        [item.name for item in items],
        [item.label for item in items],
        [item.digest + source.variant(item.name) for item in items],
        Sizing.of(config),
    )


def _named(items: Sequence[Item], index: Index) -> list[str]:
    return [f"{items[i].name} ({reason})" for i, reason in index.bad.items()]


def _check_labels(
    classes: tuple[str, ...], items: Sequence[Item], images: Images, part: str
) -> None:
    left = set(images.labels.tolist())
    for label in sorted({item.label for item in items} - left):
        raise DataError(f"class {classes[label]!r}: none of its {part} images can be read")


# Parts


@dataclass(frozen=True)
class _Parts:
    """The part of every image, in an order that depends on contents alone."""

    listing: Listing
    parts: Parts
    folds: list[list[Item]]
    """The folds of a cross-validation: all training and validation images, without
    `data.limit_train`; empty without `data.folds`."""
    warnings: list[str]


def _parts(
    config: DataConfig,
    source: DatasetSource,
    cache: Path | None,
    *,
    test: bool,
    digested: bool = False,
) -> _Parts:
    """Assign every image to a part. With `digested`, contents are compared even if they decide no
    image's part."""
    listing = source.listing(test=test)
    names = [name for items in listing.parts.values() for name, _ in items]
    near = config.near_duplicates is not None
    if cache or digested or _shares(config, listing.parts) or config.limit_train or near:
        digests = source.digests(names, cache)
    else:
        digests = dict.fromkeys(names, "")  # only counted
    given = {
        part: _in_order([Item(name, label, digests[name]) for name, label in items])
        for part, items in listing.parts.items()
    }
    given, group_warnings = _grouped(config, source, listing, given, cache)
    parts = _completed(config, given)
    for part in parts.keys() - given.keys() | {"train"}:
        _check_split(config, listing.classes, part, parts)
    folds = _folds(config, listing, parts) if config.folds else []
    group_warnings += imbalance_warnings(parts, _shares(config, given))
    numbered = {f"fold {number}": items for number, items in enumerate(folds)}
    group_warnings += imbalance_warnings(numbered, dict.fromkeys(numbered, 1 / max(1, len(folds))))
    if config.limit_train is not None:
        if config.limit_train < len(listing.classes):
            raise DataError(
                f"data.limit_train = {config.limit_train}: at least {len(listing.classes)}, one "
                "image for each class"
            )
        parts["train"] = limit_items(parts["train"], config.limit_train, config.split_seed)
    warnings = [*listing.warnings, *duplicate_warnings(parts), *group_warnings]
    return _Parts(listing, parts, folds, warnings)


def _grouped(
    config: DataConfig, source: DatasetSource, listing: Listing, given: Parts, cache: Path | None
) -> tuple[Parts, list[str]]:
    """Return the given parts with `Item.group` set, and warnings about groups across them."""
    groups = name_groups(config, listing)
    near: dict[str, str] = {}
    if config.near_duplicates is not None:
        items = [item for items in given.values() for item in items]
        near = find_near_duplicates(
            source.reader,
            {item.name: item.digest + source.variant(item.name) for item in items},
            config.near_duplicates,
            sizing=Sizing.of(config),
            cache=cache,
            tick=source.tick,
        )
    warnings = [
        *shared_group_warnings(given, groups),
        *shared_group_warnings(given, listing.groups),
        *near_duplicate_warnings(given, near),
    ]
    return merge_groups(given, [groups, listing.groups, near]), warnings


def _in_order(items: Sequence[Item]) -> list[Item]:
    return sorted(items, key=lambda item: (item.label, item.digest, item.name))


def _folds(config: DataConfig, listing: Listing, parts: Parts) -> list[list[Item]]:
    """Divide the training and validation images together into `data.folds`."""
    assert config.folds is not None
    where = f"{config.title}: data.folds = {config.folds}"
    if "val" in listing.parts:
        raise DataError(
            f"{where} divides the training images, but this data set has a validation part (val) "
            "of its own: move its images to train, or leave out data.folds"
        )
    pool = _in_order([*parts["train"], *parts["val"]])
    keys = {
        label: {item.key for item in pool if item.label == label}
        for label in range(len(listing.classes))
    }
    for label, name in enumerate(listing.classes):
        if len(keys[label]) < config.folds:
            raise DataError(
                f"{where}: class {name!r} has {len(keys[label])} different images or groups of "
                "images, and each fold needs one: add images, or choose fewer folds"
            )
    folds = make_folds(pool, config.folds, config.split_seed)
    for number, items in enumerate(folds):
        for label in sorted(keys.keys() - {item.label for item in items}):
            raise DataError(
                f"{where}: class {listing.classes[label]!r} would be missing in fold {number}, "
                "because its images are in groups with those of other classes: choose fewer folds, "
                "or another data.split_seed"
            )
    return folds


def _shares(config: DataConfig, given: Container[str]) -> dict[str, float]:
    """Return the parts that we split off, with their fractions: of everything, or of the training
    images; empty if all parts are given."""
    made = {} if "val" in given else {"val": config.val_fraction}
    if "all" in given or ("test" not in given and config.test_from_train):
        made |= {"test": config.test_fraction} if config.test_fraction else {}
    return {"train": 1 - sum(made.values()), **made} if made else {}


def _completed(config: DataConfig, given: Parts) -> Parts:
    """Return all parts, after splitting what the data set leaves open."""
    shares = _shares(config, given)
    if not shares:
        return dict(given)
    open_ = given["all"] if "all" in given else given["train"]
    if any(item.group for item in open_):
        made = split_groups(open_, shares, config.split_seed)
    else:
        fractions = {part: share for part, share in shares.items() if part != "train"}
        made = split(open_, fractions, config.split_seed)
    return {part: items for part, items in given.items() if part != "all"} | made


def _check_split(config: DataConfig, classes: tuple[str, ...], part: str, parts: Parts) -> None:
    """Raise DataError unless every class occurs in a part that we split off."""
    have = {item.label for item in parts[part]}
    for label, name in enumerate(classes):
        if label not in have:
            own = [item for items in parts.values() for item in items if item.label == label]
            grouped = any(item.group for item in own)
            count = len({item.key for item in own})
            few = f"groups of images ({count})" if grouped else f"different images ({count})"
            without = ", or set data.test_fraction = 0" if count > 1 else ""
            raise DataError(
                f"{config.title}: class {name!r} has too few {few} to leave one for "
                f"{part}: 1 for each of train, val and test is needed; add images, leave the "
                f"class out{without}"
            )


def _treatments(opened: Iterable[Opened], background: str) -> dict[str, str]:
    """Return {name: conversions of its pixels beyond the usual}, without the images that had
    none."""
    treatments: dict[str, str] = {}
    for items, index in opened:
        forms = zip(index.good.tolist(), index.forms, strict=True)
        treatments |= {items[i].name: form.treatment(background) for i, form in forms}
        treatments |= {items[i].name: "refused" for i, why in index.bad.items() if REFUSED in why}
    return {name: done for name, done in treatments.items() if done}


def _fingerprint(classes: tuple[str, ...], assigned: _Parts, treatments: Mapping[str, str]) -> str:
    """Return the digest of contents, labels and parts. A file whose pixels depend on settings
    counts together with its conversions, so that other files keep the fingerprint that they had
    before there were such settings."""

    def facts(items: Sequence[Item]) -> list[tuple[int, str]]:
        return sorted((item.label, item.digest + treatments.get(item.name, "")) for item in items)

    seen = {part: facts(assigned.parts[part]) for part in ("train", "val")}
    folds = [[facts(items) for items in assigned.folds]] if assigned.folds else []
    return short_hash([classes, seen, *folds])[:16]
