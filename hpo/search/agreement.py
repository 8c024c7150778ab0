"""What all workers of a study must have in common: the images and the code.

The first worker writes down what it has; whoever has something else is refused, naming both
fingerprints, unless it is forced: then that is written down too, and shown wherever its trials are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from hpo.definition.data import DataConfig
from hpo.definition.studyfile import StudyFile
from hpo.engine.code import Code, code_of
from hpo.engine.data_report import DataReport
from hpo.errors import Conflict
from hpo.storage import records
from hpo.storage.db import Database

CODE, IMAGES, OWN, FORCED, REPORT = "code", "data ", "own ", "forced ", "report"
"""Keys, or how they begin, among what is resolved once for a study."""
SETTINGS = ("dataset", "val_fraction", "test_fraction", "split_seed", "limit_train")
LATER = ("folds", "group_by", "near_duplicates", "orientation", "background")
"""Fields of `data` that decide which images there are, in which part, and how they are seen."""


@dataclass(frozen=True)
class Forced:
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
        conflict = Forced(worker, "images", fingerprint, found, tuple(differs))
        _settle(database, uuid, conflict, worker=worker, force=force)


def _difference(code: Code, stored: dict[str, str]) -> Forced | None:
    began = Code(stored)
    if code == began:
        return None
    return Forced("", "code", code.fingerprint, began.fingerprint, tuple(code.differences(began)))


def _settle(database: Database, uuid: str, conflict: Forced, *, worker: str, force: bool) -> None:
    """Raise Conflict; or write down that `worker` was forced."""
    if not force:
        raise Conflict(_refusal(conflict))
    told = asdict(conflict) | {"worker": worker}
    records.resolve_once(database, uuid, f"{FORCED}{worker} {conflict.what}", told)


def _refusal(conflict: Forced) -> str:
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


def read_forced(database: Database, uuid: str) -> tuple[Forced, ...]:
    """All workers that were forced."""
    found = records.read_resolved(database, uuid, FORCED)
    return tuple(Forced(**one | {"differs": tuple(one["differs"])}) for one in found.values())


def read_code(database: Database, uuid: str) -> Code | None:
    """The code with which the study began, with the texts of own modules as its first worker had
    them; None before that."""
    found = records.read_resolved(database, uuid, CODE).get(CODE)
    sources = records.read_resolved(database, uuid, OWN)
    texts = {key.removeprefix(OWN): str(text) for key, text in sorted(sources.items())}
    return None if found is None else Code(found, texts)
