"""A new study with another space takes the trials of an earlier one over."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from hpo.api.creation import Learning, open_study
from hpo.api.study import Study
from hpo.config.study import StudyFile
from hpo.doctor.scan import check_database
from hpo.errors import Conflict, InputError, NotFound
from hpo.search import fingerprints, scheduling
from hpo.search import study as studies
from hpo.search.status import read_status
from hpo.search.takeover import counterpart, take_over
from hpo.storage import records
from hpo.storage import studies as rows
from hpo.storage.database import Database, connect
from hpo.storage.optuna import FencedStorage
from hpo.trained.export import export
from tests.harness.filled import Trial, fill

LR = {"low": 1e-3, "high": 0.1, "log": True}
WIDE = {"optimizer.lr": {**LR, "high": 1.0}, "optimizer.name": ["sgd", "adamw"],
        "label_smoothing": [0.0, 0.1]}  # fmt: skip
TRIALS = [
    Trial("complete", (0.7, 0.8)),
    Trial("complete", (0.6, 0.9)),
    Trial("pruned", (0.3,), "median pruned it"),
    Trial("failed", (), "out of memory"),
    Trial("paused", (0.4,), "5th of 5 after epoch 1"),
    Trial("diverged", (0.2, float("nan"))),
]


def study(
    name: str = "new",
    space: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None,
    baselines: list[dict[str, Any]] | None = None,
    **fields: Any,
) -> StudyFile:
    return StudyFile.from_dict(
        {
            "study": {"name": name, "trials": 5, "sampler": "tpe", "pruner": "none", **fields},
            "train": {"data.dataset": "digits", "epochs": 2, **(train or {})},
            "space": WIDE if space is None else space,
            "baseline": baselines or [],
        }
    )


SGD = {"optimizer.name": "sgd"}
ADAMW = {"optimizer.lr": 0.05, "optimizer.name": "adamw"}
OLD = study("old", {"optimizer.lr": LR}, SGD, trials=6, defaults=False)
FROM_OLD = Learning(taken="old")


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Database:
    monkeypatch.chdir(tmp_path)
    found = connect(f"sqlite:///{tmp_path / 'x.db'}")
    earlier = fill(found, OLD, TRIALS)
    records.resolve_once(found, earlier.uuid, "data digits/0.15", "f00d")
    return found


@pytest.mark.parametrize(
    ("new", "expected"),
    [
        (study(), {"optimizer.lr": 0.05, "optimizer.name": "sgd", "label_smoothing": 0.0}),
        (study(space={"optimizer.lr": LR}, train=SGD), {"optimizer.lr": 0.05}),
        (study(space={"batch_size": [32, 128]}, train=ADAMW), "optimizer.name"),
        (study(train={"epochs": 3}), r"epochs: 2 -> 3"),
        (study(train={"data.split_seed": 3}), r"data.split_seed: 0 -> 3"),
        (study(space={**WIDE, "optimizer.lr": {**LR, "high": 0.01}}), "optimizer.lr: not in"),
        (study(space={**WIDE, "optimizer.name": ["adamw", "rmsprop"]}), "optimizer.name: not"),
        (study(space={"optimizer.lr": LR, "model.weights": ["none", "DEFAULT"]},
               train={**SGD, "model.architecture": "resnet18"}), "model.arch.*"),
    ],
)  # fmt: skip
def test_which_trials_have_a_place(new: StudyFile, expected: dict[str, Any] | str) -> None:
    found = counterpart(new, OLD, {"optimizer.lr": 0.05})
    if isinstance(expected, str):
        assert isinstance(found, str)
        assert re.match(expected, found), found
    else:
        assert found == expected


def test_a_choice_of_nothing_takes_what_had_nothing() -> None:
    network = {"optimizer.name": "sgd", "model.architecture": "resnet18"}
    earlier = study("old", {"optimizer.lr": LR}, network)
    new = study(space={"optimizer.lr": LR, "model.weights": ["none", "DEFAULT"]}, train=network)
    values = counterpart(new, earlier, {"optimizer.lr": 0.05})
    assert values == {"optimizer.lr": 0.05, "model.weights": "none"}


@pytest.mark.parametrize(
    ("new", "why"),
    [
        (study(metric="val_loss"), "it optimizes val_top1, not val_loss"),
        (study("old"), "it is the study itself"),
        (study(space={"batch_size": [32, 64]}, sampler="grid", trials=2), "under grid"),
        (study(constraints={"parameters": "<= 1e6"}), "it requires none, not parameters <= 1e6"),
        (study(train={"epochs": 3}), r"(?s)none of its 5 finished trials .* epochs: 2 -> 3 \(5 tr"),
    ],
)
def test_what_does_not_compare_is_refused(database: Database, new: StudyFile, why: str) -> None:
    with pytest.raises(InputError, match=why):
        take_over(new, "old", database)
    with pytest.raises(NotFound, match="did you mean 'old'"):
        take_over(study(), "odl", database)


def test_other_code_is_refused_or_recorded(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = studies.load(database, "old")
    fingerprints.agree_on_code(database, old.uuid, OLD, worker="w", force=False)
    monkeypatch.setattr(fingerprints, "_sources_digest", lambda: "other")
    with pytest.raises(Conflict, match=r"--from old: the code here .* hpo sources .* -> other"):
        open_study(database, study(), None, FROM_OLD)
    with pytest.raises(NotFound):
        studies.load(database, "new")
    open_study(database, study(), None, Learning(taken="old", force=True))
    assert [one.what for one in read_status(database, "new").forced] == ["code"]


def test_trials_that_are_taken_over_are_seen_and_cost_no_budget(database: Database) -> None:
    file = study(baselines=[{"label_smoothing": 0.0}, {"label_smoothing": 0.1}])
    opened = open_study(database, file, None, FROM_OLD)
    assert (opened.is_new, opened.left) == (True, 0)
    status = read_status(database, "new")
    assert [one.state for one in status.trials] == ["complete"] * 2 + ["pruned"] * 2 + ["diverged"]
    assert [one.origin for one in status.trials][3:] == ["from old, trial 4", "from old, trial 5"]
    assert [len(one.epochs) for one in status.trials] == [2, 2, 1, 1, 2]
    assert (status.finished, status.budget, status.finished_of) == (0, 5, "0/5 trials")
    assert status.best is not None
    assert (status.best.number, status.best.value) == (1, 0.9)
    assert status.best.params["label_smoothing"] == 0.0
    spent = status.spending
    assert (spent.spent_epochs, spent.active_s, status.state) == (0, 0.0, "waiting")
    snapshot = opened.study.snapshot(whole=True)
    assert (snapshot.spent_epochs, snapshot.since_best, snapshot.best) == (0, 0, 0.9)
    assert records.read_resolved(database, opened.study.uuid, "data ")
    assert scheduling.plan_of(file, 5, None, 0).values == {}  # as the file is, without a study
    assert scheduling.plan_of(status.file, 5, None, 0).values == {"label_smoothing": 0.1}
    config, provenance = export(database, "new")
    assert (config.optimizer.name, provenance["origin"]) == ("sgd", "from old, trial 1")
    assert export(database, "old")[0] == config
    assert not check_database(database).findings

    again = open_study(database, file, None, FROM_OLD)
    assert (again.is_new, len(read_status(database, "new").trials)) == (False, 5)


@pytest.mark.usefixtures("far_east")
def test_times_are_taken_over(database: Database) -> None:
    open_study(database, study(), None, FROM_OLD)
    storage = FencedStorage(database)
    old, new = (
        storage.get_all_trials(records.get_study(database, name).study_id)
        for name in ("old", "new")
    )
    seen = [old[number] for number in (0, 1, 2, 4, 5)]
    assert [one.datetime_start for one in new] == [one.datetime_start for one in seen]
    assert all(one.duration and 0 <= one.duration.total_seconds() < 60 for one in new)


def test_what_was_pruned_there_is_not_trained_here_once_the_study_is_extended(
    database: Database,
) -> None:
    fields: dict[str, Any] = {"scheduler": {"name": "promote", "first_epochs": 1}}
    file = StudyFile.from_dict(
        {"study": {"name": "new", "trials": 5, **fields},
         "train": {"data.dataset": "digits", "epochs": 2}, "space": WIDE}
    )  # fmt: skip
    found = open_study(database, file, None, FROM_OLD).study
    Study("new", database).extend(trials=6)
    assert not found.snapshot().paused
    assert [one.reached for one in read_status(database, "new").count_rungs()] == [4]


@pytest.mark.parametrize("after", [0, 2, 4])
def test_killed_between_two_writes_it_begins_anew(
    database: Database, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    class Killed(BaseException):
        pass

    written, insert = [], rows._insert_attempt

    def dying(*args: Any) -> None:
        if len(written) == after:
            raise Killed
        written.append(args)
        insert(*args)

    with monkeypatch.context() as patch:
        patch.setattr(rows, "_insert_attempt", dying)
        with pytest.raises(Killed):
            open_study(database, study(), None, FROM_OLD)
    with pytest.raises(NotFound):
        studies.load(database, "new")
    open_study(database, study(), None, FROM_OLD)
    assert [one.origin[-1] for one in read_status(database, "new").trials] == list("01245")
    assert not check_database(database).findings
