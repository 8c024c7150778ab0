"""Fingerprints of the code and the images that all workers of a study must share.

The code fingerprint covers everything that decides a result given the same configuration and
images: the modules of `hpo.training`, `hpo.data` and `hpo.config` that compute, the versions of
torch, torchvision and, where it is used, timm (major.minor, as patch releases should not change
results), and the user's own modules that the study names as its loss, architecture or metric, but
not their imports. A module counts by its syntax tree, without comments, docstrings and layout: a
reworded comment stops no running study. A user's data set counts by its images, which have a
fingerprint of their own. Devices do not count: a study may run on GPUs of many kinds.

Imports no torch.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import hpo
from hpo.config.data import DataConfig
from hpo.config.study import StudyFile
from hpo.data import user_code
from hpo.data.report import DataReport
from hpo.errors import ConfigError, Conflict
from hpo.io import short_hash
from hpo.storage import records
from hpo.storage.database import Database
from hpo.training.timm_names import refuse_missing

FLOORS = ("config", "data", "training")
TELLING = (
    "config/remarks",
    "config/schema",
    "config/template",
    "data/report",
    "data/thumbnails",
    "training/onnx",
)
"""Modules of those that only report, measure or convert."""
LIBRARIES = ("torch", "torchvision")
DECISIVE = (
    "loss",
    "model.architecture",
    "schedule.metric",
    "early_stopping.metric",
    "study.metric",
)
"""Fields whose user functions decide results; the source of `data.dataset` is recorded but does not
count."""
LONGEST_SOURCE = 500_000
"""Size in bytes above which the source of a user's module is not recorded."""


@dataclass(frozen=True)
class Code:
    """The code that one process runs."""

    parts: Mapping[str, str]
    """Everything that counts: {"hpo sources": digest, "torch": "2.15", "own nets": digest, ...}."""
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Source of the user's modules, by module name."""

    @property
    def fingerprint(self) -> str:
        """Fingerprint of 16 hex digits."""
        return short_hash(sorted(self.parts.items()))[:16]

    def __str__(self) -> str:
        """Return the fingerprint and its parts in words."""
        parts = ", ".join(f"{name} {value}" for name, value in self.parts.items())
        return f"{self.fingerprint}: {parts}"

    def differences(self, other: Code) -> list[str]:
        """Return what differs from `other`, one short string per part: `torch 2.14 -> 2.15`."""
        names = sorted(self.parts.keys() | other.parts.keys())
        return [
            f"{name} {other.parts.get(name, '(none)')} -> {self.parts.get(name, '(none)')}"
            for name in names
            if self.parts.get(name) != other.parts.get(name)
        ]


def require_modules(file: StudyFile) -> None:
    """Raise ConfigError if a module of the user's that `file` names cannot be found, or timm, where
    it is used, is not installed. Reads none of hpo's own modules, which takes long."""
    _require_timm(wanted=file.uses_timm)
    for name in file.user_modules(*DECISIVE, "data.dataset"):
        _file_of(name)


def _require_timm(*, wanted: bool) -> None:
    if wanted and find_spec("timm") is None:
        refuse_missing("timm:")


def code_of(file: StudyFile) -> Code:
    """Return the code that would run the trials of `file` in this process. Raises ConfigError if a
    module of the user's cannot be found."""
    parts = code_parts(file.user_modules(*DECISIVE), timm=file.uses_timm)
    files = {one: _file_of(one) for one in file.user_modules(*DECISIVE, "data.dataset")}
    return Code(parts, {name: text for name, path in files.items() if (text := _text(path))})


def code_parts(own: Sequence[str], *, timm: bool = False) -> dict[str, str]:
    """Return the parts of a `Code` that names these modules of the user's, and with `timm` may
    train its networks. Raises ConfigError if one cannot be found, or timm is not installed."""
    _require_timm(wanted=timm)
    parts = {"hpo sources": _sources_digest()}
    counted = (*LIBRARIES, "timm") if timm else LIBRARIES
    parts |= {name: ".".join(version(name).split(".")[:2]) for name in counted}
    return parts | {f"own {one}": _digest(_file_of(one)) for one in own}


@cache
def _sources_digest() -> str:
    """Return the digest of hpo's own modules, by their names and syntax trees."""
    root = Path(hpo.__file__).parent
    hasher = hashlib.blake2b(digest_size=6)
    for floor in FLOORS:
        for path in sorted((root / floor).rglob("*.py")):
            name = path.relative_to(root).with_suffix("").as_posix()
            if name not in TELLING:
                hasher.update(f"{name} {syntax_digest(path.read_bytes())} ".encode())
    return hasher.hexdigest()


def syntax_digest(source: bytes) -> str:
    """Return 12 hex digits of what the Python module `source` computes: its syntax tree without
    comments, docstrings and layout; of its bytes where it does not parse."""
    hasher = hashlib.blake2b(digest_size=6)
    try:
        hasher.update(_plain(ast.parse(source)).encode("utf-8", "surrogatepass"))
    except (SyntaxError, ValueError):
        hasher.update(source)
    return hasher.hexdigest()


def _plain(node: object) -> str:
    """Spell out a syntax tree, the same under every version of Python: what is empty or None is
    left out, since newer versions know more fields."""
    if isinstance(node, list):
        return f"[{' '.join(_plain(one) for one in node if not _is_text(one))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    if isinstance(node, ast.JoinedStr):  # Python 3.12.1 ends some with an empty string
        node.values = [one for one in node.values if getattr(one, "value", None) != ""]
    fields = [
        f"{name}={_plain(value)}"
        for name, value in ast.iter_fields(node)
        if value is not None and value != [] and name not in ("kind", "type_comment")
    ]
    return f"{type(node).__name__}({' '.join(fields)})"


def _is_text(node: object) -> bool:
    """Return whether a statement is a string alone: a docstring, also of a field."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _file_of(module: str) -> Path | None:
    try:
        return user_code.module_file(module)
    except Exception as error:  # finding a.b imports a, which may raise anything
        raise ConfigError(
            f"your module {module!r} cannot be found ({error}); it is "
            f"{user_code.search_hint()}: put it there, as on the host where the study began"
        ) from error


def _digest(path: Path | None) -> str:
    if path is None:
        return "built in"
    return syntax_digest(path.read_bytes())


def _text(path: Path | None) -> str | None:
    if path is None or path.suffix != ".py" or path.stat().st_size > LONGEST_SOURCE:
        return None
    return path.read_text(encoding="utf-8", errors="replace")


CODE, IMAGES, OWN, FORCED, REPORT = "code", "data ", "own ", "forced ", "report"
"""Keys, or how they begin, among what is resolved once for a study."""
SETTINGS = ("dataset", "val_fraction", "test_fraction", "split_seed", "limit_train")
LATER = ("folds", "group_by", "near_duplicates", "orientation", "background")
"""Fields of `data` that decide which images there are, in which part, and how they are seen."""


@dataclass(frozen=True)
class Override:
    """A worker that was made to work with other code or images than its study began with."""

    worker: str
    what: str
    """code, or images."""
    here: str
    """Its fingerprint."""
    study: str
    """The study's."""
    differs: tuple[str, ...] = ()
    """What is known of the difference, in words."""

    def __str__(self) -> str:
        differs = f": {'; '.join(self.differs)}" if self.differs else ""
        return f"other {self.what} ({self.here} instead of {self.study}{differs})"


def require_code(database: Database, uuid: str, file: StudyFile) -> None:
    """Raise Conflict where the code here is not that with which the study began, if it has begun;
    ConfigError where a module of the user's own is not here. Changes nothing."""
    code, found = code_of(file), records.read_resolved(database, uuid, CODE).get(CODE)
    conflict = None if found is None else _difference(code, found)
    if conflict is not None:
        raise Conflict(_refusal(conflict))


def compare_code(database: Database, uuid: str, file: StudyFile) -> Override | None:
    """Return how the code here that would run `file` differs from that of study `uuid`, in the
    parts that both have; None where it does not, or the study has not begun."""
    code, found = code_of(file), records.read_resolved(database, uuid, CODE).get(CODE)
    if found is None:
        return None
    shared = {name: part for name, part in code.parts.items() if name in found}
    return _difference(Code(shared), {name: found[name] for name in shared})


def agree_on_code(
    database: Database, uuid: str, file: StudyFile, *, worker: str, force: bool
) -> None:
    """Raise Conflict where the code here is not that with which the study began; with `force` write
    that down instead. The first worker keeps the sources of own modules with the study."""
    code = code_of(file)
    found = records.resolve_once(database, uuid, CODE, dict(code.parts))
    for name, text in code.sources.items():
        records.resolve_once(database, uuid, f"{OWN}{name}", text)
    conflict = _difference(code, found)
    if conflict is not None:
        _settle(database, uuid, conflict, worker=worker, force=force)


def agree_on_images(
    database: Database,
    uuid: str,
    data: DataConfig,
    fingerprint: str,
    explain: Callable[[str], Sequence[str]],
    *,
    worker: str,
    force: bool,
) -> None:
    """Raise Conflict where the images here are not those with which the study began under the same
    settings of `data`; with `force` write that down instead. `explain` says what differs from the
    images of a fingerprint."""
    settings = data.model_dump(include=set(SETTINGS))
    # Later ones count where they are not at their defaults: older studies know theirs again.
    later = data.model_dump(include=set(LATER), exclude_defaults=True)
    named = [f"{name}={later[name]}" for name in LATER if name in later]
    key = "/".join([*(str(settings[name]) for name in SETTINGS), *named])
    found = str(records.resolve_once(database, uuid, f"{IMAGES}{key}", fingerprint))
    if found != fingerprint:
        differs = explain(found) or [f"data set {data.title}; which images is not known here"]
        conflict = Override(worker, "images", fingerprint, found, tuple(differs))
        _settle(database, uuid, conflict, worker=worker, force=force)


def _difference(code: Code, stored: dict[str, str]) -> Override | None:
    began = Code(stored)
    if code == began:
        return None
    return Override("", "code", code.fingerprint, began.fingerprint, tuple(code.differences(began)))


def _settle(database: Database, uuid: str, conflict: Override, *, worker: str, force: bool) -> None:
    """Raise Conflict; or write down that `worker` was forced."""
    if not force:
        raise Conflict(_refusal(conflict))
    told = asdict(conflict) | {"worker": worker}
    records.resolve_once(database, uuid, f"{FORCED}{worker} {conflict.what}", told)


def _refusal(conflict: Override) -> str:
    several = conflict.what == "images"
    lines = "".join(f"\n  {one}" for one in conflict.differs)
    return (
        f"the {conflict.what} here (fingerprint {conflict.here}) {'are' if several else 'is'} not "
        f"what the study began with ({conflict.study}), so its results could not be compared:"
        f"{lines}\nRestore {'them' if several else 'it'}, or start a study of another name; with "
        "--force this worker joins nevertheless, which is recorded"
    )


def keep_report(database: Database, uuid: str, report: DataReport) -> None:
    """Write down what the data were like when the study began."""
    records.resolve_once(database, uuid, REPORT, report.to_dict())


def read_report(database: Database, uuid: str) -> DataReport | None:
    """Return what the data were like when the study began; None where nobody looked then."""
    found = records.read_resolved(database, uuid, REPORT).get(REPORT)
    return None if found is None else DataReport.from_dict(found)


def read_overrides(database: Database, uuid: str) -> tuple[Override, ...]:
    """Return all workers that were forced."""
    found = records.read_resolved(database, uuid, FORCED)
    return tuple(Override(**one | {"differs": tuple(one["differs"])}) for one in found.values())


def read_code(database: Database, uuid: str) -> Code | None:
    """Return the code with which the study began, with the texts of own modules as its first worker
    had them; None before that."""
    found = records.read_resolved(database, uuid, CODE).get(CODE)
    sources = records.read_resolved(database, uuid, OWN)
    texts = {key.removeprefix(OWN): str(text) for key, text in sorted(sources.items())}
    return None if found is None else Code(found, texts)
