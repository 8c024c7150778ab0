"""Verification: which trainings there are, each once, and what is made of them."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from hpo.config.study import load_config
from hpo.errors import Conflict, InputError, NotFound
from hpo.paths import Home
from hpo.search import study as studies
from hpo.search import verification
from hpo.search.status import (
    StudyStatus,
    find_verification,
    read_status,
    verification_name,
)
from hpo.search.verification import Candidate, Verification, identity, prepare
from hpo.storage import records
from hpo.storage.database import Database
from hpo.storage.optuna import FencedStorage
from hpo.trained import export as exports
from hpo.workers.worker import Worker
from tests.harness.fakes import InstantTrials, study_file
from tests.harness.filled import Trial, fill

Value = Callable[[Mapping[str, Any]], float]


def work(database: Database, home: Home, name: str, value: Value) -> StudyStatus:
    """Run the trials of a study, with values of the parameters."""
    study, storage = studies.load(database, name), FencedStorage(database)
    trials = InstantTrials(study, storage, value=value)
    Worker(study, storage, trials, home=home).run(threading.Event())
    return read_status(database, name)


def rate(params: Mapping[str, Any]) -> float:
    """The learning rate: better or worse, whatever the seed."""
    return float(params["optimizer.lr"])


def luck(params: Mapping[str, Any]) -> float:
    """What the seed decides far more than the learning rate."""
    return float(params["optimizer.lr"]) + 0.3 * (params["seed"] % 3)


@pytest.fixture
def parent(database: Database, home: Home) -> StudyStatus:
    studies.create(database, study_file(train="epochs = 3\nseed = 1"))
    return work(database, home, "toy", rate)


def trained(status: StudyStatus) -> list[tuple[str, int]]:
    """Configuration and seed of each trial."""
    return [(identity(trial.params), trial.params["seed"]) for trial in status.trials]


def test_each_of_the_best_is_trained_once_with_each_other_seed(
    parent: StudyStatus, database: Database, home: Home
) -> None:
    before = prepare(database, "toy", 3, 2, home)
    assert (before.row.name, before.budget, before.finished) == ("toy.verify", 6, 0)
    assert (before.file.study.pruner.name, before.file.study.scheduler) == ("none", None)
    child = work(database, home, "toy.verify", rate)
    best = [identity(trial.params) for trial in parent.ranked()[:3]]
    assert sorted(trained(child)) == sorted((one, seed) for one in best for seed in (0, 2))
    assert child.state == "finished"
    again = prepare(database, "toy", 2, 2, home)
    assert (again.state, again.finished) == ("finished", 6)


def test_a_larger_one_trains_only_what_is_new(
    parent: StudyStatus, database: Database, home: Home
) -> None:
    prepare(database, "toy", 2, 2, home)
    work(database, home, "toy.verify", rate)
    assert prepare(database, "toy", 2, 4, home).budget == 8
    assert prepare(database, "toy", 3, 4, home).budget == 12
    child = work(database, home, "toy.verify", rate)
    assert len(child.trials) == len(set(trained(child))) == 12
    assert {seed for _, seed in trained(child)} == {0, 2, 3, 4}


def test_before_its_trainings_are_written_down_no_worker_takes_one(
    parent: StudyStatus, database: Database, home: Home
) -> None:
    """As after a crash between the two."""
    file = verification.StudyFile.from_definition(verification.definition_of(parent))
    studies.create(database, file, trials=0)
    assert not work(database, home, "toy.verify", rate).trials
    assert prepare(database, "toy", 2, 2, home).budget == 4


def test_what_failed_is_missing_again(parent: StudyStatus, database: Database, home: Home) -> None:
    wanted = [{"optimizer.lr": 0.1, "seed": seed} for seed in (0, 2)]
    ended = [Trial("failed", (), "out of memory"), Trial("complete", (0.5,))]
    child = fill(database, study_file(name="child"), ended)
    taken = list(zip(wanted, (0, 1), strict=True))
    status = read_status(database, child.row.name)
    assert verification.missing(status, taken, wanted) == wanted[:1]
    assert verification.missing(status, [*taken, (wanted[0], None)], wanted) == []


def test_it_computes_as_the_search_did(parent: StudyStatus, database: Database, home: Home) -> None:
    records.resolve_once(database, parent.row.uuid, "code", {"torch": "9.9"})
    told = {"worker": "w", "what": "code", "here": "a", "study": "b", "differs": []}
    records.resolve_once(database, parent.row.uuid, "forced w code", told)
    with pytest.raises(Conflict, match="the code here"):
        prepare(database, "toy", 2, 2, home)
    assert find_verification(database, parent.row) is None
    child = prepare(database, "toy", 2, 2, home, force=True)
    assert records.read_resolved(database, child.row.uuid) == {"code": {"torch": "9.9"}}
    work(database, home, "toy.verify", rate)
    assert prepare(database, "toy", 2, 2, home).state == "finished"  # nothing is to be trained


def test_studies_that_cannot_be_verified(database: Database, home: Home) -> None:
    studies.create(database, study_file(trials=2))
    with pytest.raises(NotFound, match="'toy' has no complete trial"):
        prepare(database, "toy", 5, 3, home)
    for top, seeds, said in ((0, 3, "--top 0: at least 1"), (5, 1, "--seeds 1: allowed: 2 to")):
        with pytest.raises(InputError, match=said):
            prepare(database, "toy", top, seeds, home)
    studies.create(database, study_file(name="seeds", space="seed = [0, 1, 2]"))
    with pytest.raises(InputError, match="'seeds' searches seed"):
        prepare(database, "seeds", 5, 3, home)
    work(database, home, "toy", rate)
    studies.create(database, study_file(name="toy.verify"))
    with pytest.raises(Conflict, match=r"that does not verify this 'toy': hpo delete toy\.verify"):
        prepare(database, "toy", 5, 3, home)


def test_a_verification_is_not_steered_as_a_search(
    parent: StudyStatus, database: Database, home: Home
) -> None:
    prepare(database, "toy", 2, 2, home)
    child = studies.load(database, "toy.verify")
    for steer in (
        lambda: studies.extend(child, trials=9),
        lambda: studies.enqueue(child, {"optimizer.lr": 0.01}),
        lambda: prepare(database, "toy.verify", 2, 2, home),
        lambda: exports.export(database, "toy.verify"),
    ):
        with pytest.raises(InputError, match=r"'toy\.verify' verifies 'toy'"):
            steer()


# What is made of them


def candidate(trial: int, *values: float, searched: float = 0.9, **more: Any) -> Candidate:
    return Candidate(trial, searched, {}, dict(enumerate(values, 1)), **more)


def found(*candidates: Candidate) -> Verification:
    return Verification(
        "toy", "toy.verify", "val_top1", True, own_seed=0, searched=20, unverified=None,
        candidates=candidates,
    )  # fmt: skip


def test_a_winner_is_better_beyond_chance() -> None:
    clear = found(candidate(4, 0.91, 0.92, 0.9), candidate(2, 0.7, 0.71, 0.69))
    assert clear.winner is clear.candidates[0]
    assert clear.tied == ()
    assert clear.verdict == "winner: trial 4, better than the others beyond chance (95 %)"
    assert clear.regression == pytest.approx((-0.01 + 0.2) / 2)


def test_a_tie_is_named() -> None:
    close = found(
        candidate(4, 0.91, 0.92, 0.9), candidate(2, 0.9, 0.92, 0.91), candidate(7, 0.1, 0.11, 0.09)
    )
    assert [one.trial for one in close.tied] == [2]
    said = "not distinguishable: trial 4, which has the best mean, and trial 2"
    assert (close.winner, close.verdict) == (close.candidates[0], said)


def test_without_all_trainings_there_is_no_winner() -> None:
    open_ = found(candidate(4, 0.9, 0.91), candidate(2, 0.5, pending=2))
    assert (open_.winner, open_.tied) == (None, ())
    assert open_.verdict == "not finished: 2 trainings to go"
    spoilt = found(candidate(4, 0.9, failed=3))
    assert spoilt.winner is None
    assert "3 trainings failed: hpo verify toy retries" in spoilt.remarks()[-1]
    lucky = found(candidate(2, 0.5, 0.51), candidate(4, 0.99, diverged=(2,)))
    assert lucky.verdict.startswith("winner: trial 2")


def test_the_ranking_is_by_means_over_other_seeds(
    parent: StudyStatus, database: Database, home: Home
) -> None:
    prepare(database, "toy", 3, 3, home)
    work(database, home, "toy.verify", luck)
    result = verification.read(database, "toy")
    assert result is not None
    assert (result.own_seed, result.pending, result.unverified) == (1, 0, None)
    ranked = parent.ranked()[:3]
    assert [one.trial for one in result.candidates] == [trial.number for trial in ranked]
    for one, trial in zip(result.candidates, ranked, strict=True):
        assert one.searched == trial.value
        # Seeds 0, 2 and 3: luck of 0, 0.6 and 0.
        assert one.mean == pytest.approx(rate(trial.params) + 0.2)
    assert len(result.tied) == 2
    assert json.loads(json.dumps(result.to_dict()))["winner"] == ranked[0].number


def test_export_takes_the_winner(
    parent: StudyStatus, database: Database, home: Home, tmp_path: Path
) -> None:
    best, second = (trial.number for trial in parent.ranked()[:2])
    assert exports.export(database, "toy")[1]["trial"] == best
    prepare(database, "toy", 2, 2, home)
    assert exports.export(database, "toy")[1]["trial"] == best  # not yet
    good = parent.trials[second].params["optimizer.lr"]
    work(database, home, "toy.verify", lambda p: 0.5 + 0.01 * p["seed"] * (rate(p) == good))
    config, provenance = exports.export(database, "toy")
    assert (provenance["trial"], config.optimizer.lr, config.seed) == (second, good, 1)
    exports.write_export(tmp_path / "best.toml", config, provenance)
    text = (tmp_path / "best.toml").read_text()
    assert "# Verified with 2 other seeds: mean val_top1 = 0.5100 ± " in text
    assert f"not distinguishable from trial {best}" in text
    assert load_config(tmp_path / "best.toml")[1]["verified"]["seeds"] == [0, 2]
    chosen = exports.export(database, "toy", number=best)[1]
    assert (chosen["trial"], chosen["verified"]["mean"]) == (best, 0.5)


def test_of_a_study_made_again_the_old_verification_is_none(
    parent: StudyStatus, database: Database, home: Home
) -> None:
    prepare(database, "toy", 2, 2, home)
    studies.delete(studies.load(database, "toy"), home)
    studies.create(database, study_file())
    work(database, home, "toy", rate)
    assert verification.read(database, "toy") is None
    with pytest.raises(Conflict, match=r"hpo delete toy\.verify"):
        prepare(database, "toy", 2, 2, home)


def test_names_of_any_length() -> None:
    assert verification_name("digits") == "digits.verify"
    assert len(verification_name("n" * 64)) == 64
