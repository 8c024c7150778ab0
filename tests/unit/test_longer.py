"""More epochs for a study that exists: complete trials go on, and end as if they had had so many
from their start."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
import torch
from optuna.trial import TrialState

from hpo.api.creation import open_study
from hpo.config.study import StudyFile
from hpo.config.train import ScheduleConfig, TrainConfig
from hpo.doctor.scan import check_database
from hpo.errors import Conflict, HpoError, InputError, LimitsRaised
from hpo.paths import Home
from hpo.search import study as studies
from hpo.search import trial as objective
from hpo.search import verification
from hpo.search.promotion import rungs_of
from hpo.search.sampling import make_pruner
from hpo.search.status import read_status
from hpo.search.study import Study
from hpo.search.trial import TrialRunner
from hpo.storage import leases, records, tables
from hpo.storage import studies as rows
from hpo.storage.database import Database
from hpo.storage.optuna import NOTE_PART, FencedStorage, add_waiting
from hpo.storage.records import Outcome, Trial
from hpo.training.optim import learning_rates
from hpo.workers.worker import Worker
from tests.harness import filled
from tests.harness.commands import Hpo, calls
from tests.harness.fakes import study_file
from tests.harness.filled import fill
from tests.harness.searches import TINY, search

CONSTANT = 'epochs = {}\nschedule.name = "constant"'
SPACE = "optimizer.lr = {low = 3e-3, high = 3e-2, log = true}"
PROMOTE = "scheduler = {name = 'promote', first_epochs = 1, reduction_factor = 3, finish = 2}"


def small(epochs: int, study: str = "", *, trials: int = 3, name: str = "toy") -> StudyFile:
    train = TINY.replace("epochs = 3", f"{CONSTANT.format(epochs)}\ndata.limit_train = 200")
    return study_file(name=name, trials=trials, study=study, train=train, space=SPACE)


def curve(trial: Trial) -> list[float]:
    return [one.metrics["val_loss"] for one in trial.epochs]


def work(study: Study, home: Home) -> str:
    """Let one worker run the study, by what it knows of it, to its end."""
    storage = FencedStorage(study.database)
    view = study.optuna_study(storage)
    runner = TrialRunner(study, storage, view, home, torch.device("cpu"), threads=1)
    return Worker(study, storage, runner, home=home).run(threading.Event())


# What depends on the number of epochs


def test_rates_are_those_of_a_longer_training_where_nothing_ties_them() -> None:
    losses = [{"val_loss": loss} for loss in (1.0, 0.9, 0.95)]

    def rates(name: str, epochs: int) -> tuple[list[list[float]], str | None]:
        given = {"name": name, "patience": 0, "step_size": 2, "warmup_epochs": 1.0}
        given |= {"rates": [0.1] * 7} if name == "replay" else {}
        config = TrainConfig.parse({"epochs": epochs, "schedule": given})
        found = [learning_rates(config, epoch=one, steps=5, history=losses[: one - 1])
                 for one in (1, 2, 3)]  # fmt: skip
        return found, config.tied_to_length

    names = ScheduleConfig.model_fields["name"].annotation.__args__  # type: ignore[union-attr]
    tied = {name: rates(name, 3)[1] is not None for name in names}
    assert tied == {name: rates(name, 3)[0] != rates(name, 7)[0] for name in names}
    assert tied["cosine"]
    assert not tied["constant"]


def test_rungs_and_brackets_stay_where_they_were() -> None:
    def longer(file: StudyFile) -> StudyFile:
        definition = file.definition()
        train = {**definition["train"], "epochs": 30}
        return StudyFile.from_definition({**definition, "train": train, "began_with": 9})

    began = study_file(train=CONSTANT.format(9), study="scheduler = 'promote'")
    assert rungs_of(began).epochs == (1, 4)
    assert rungs_of(longer(began)).epochs == (1, 4, 16)
    again = StudyFile.from_definition(longer(began).definition())
    assert (again.planned_epochs, again.max_epochs) == (9, 30)
    pruner = make_pruner(longer(study_file(train=CONSTANT.format(9), pruner="hyperband")))
    assert isinstance(pruner, optuna.pruners.HyperbandPruner)
    assert pruner._max_resource == 9


# Trials that go on


@pytest.fixture
def ended(database: Database, home: Home) -> Study:
    """A study of three complete trials of two epochs; the checkpoint of the best is kept."""
    return search(database, home, small(2, "keep_checkpoints = 1"))


def require_as_from_the_start(database: Database, home: Home, epochs: int) -> None:
    """Trials have the curves of a study that had so many epochs at once, and Optuna the values."""
    search(database, home, small(epochs, name="whole"))
    whole = {one.number: one for one in read_status(database, "whole").trials}
    status = read_status(database, "toy")
    assert (status.state, status.count("complete")) == ("finished", 3)
    theirs = studies.load(database, "toy").optuna_study(FencedStorage(database)).trials
    for trial, other in zip(status.trials, theirs, strict=True):
        assert (trial.params, curve(trial)) == (whole[trial.number].params,
                                                curve(whole[trial.number]))  # fmt: skip
        assert (other.state, other.value) == (TrialState.COMPLETE, trial.value)
        assert trial.attempts[-1].value == trial.value
    assert check_database(database).faults == []


def test_a_continued_trial_is_what_it_had_been_with_more_epochs(
    ended: Study, database: Database, home: Home
) -> None:
    before = read_status(database, "toy")
    studies.extend(ended, epochs=4)
    between = read_status(database, "toy")
    assert (between.state, between.count("interrupted"), between.best) == ("waiting", 3, None)
    assert [curve(one) for one in between.trials] == [curve(one) for one in before.trials]
    for epochs in (2, 4):  # the file as it was, and as it is
        assert not open_study(database, small(epochs, "keep_checkpoints = 1"), None).is_new
    work(studies.load(database, "toy"), home)
    require_as_from_the_start(database, home, 4)
    best = before.ranked()[0].number
    spans = {one.number: (one.attempts[-1].first_epoch, one.attempts[-1].epoch)
             for one in read_status(database, "toy").trials}  # fmt: skip
    assert spans == {n: (3, 4) if n == best else (1, 4) for n in range(3)}


def test_a_worker_that_dies_over_a_continued_trial_costs_an_epoch(
    ended: Study, database: Database, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = read_status(database, "toy").ranked()[0].number
    original = objective.leases.record_epochs
    recorded: list[tuple[int, int]] = []

    def die_once(*args: Any, **kwargs: Any) -> Any:
        recorded.append((args[1].number, args[2][-1].epoch))
        if recorded.count((best, 4)) == 1 and recorded[-1] == (best, 4):
            raise OSError("killed before it was recorded")
        return original(*args, **kwargs)

    monkeypatch.setattr(objective.leases, "record_epochs", die_once)
    studies.extend(ended, epochs=5)
    with pytest.raises(OSError, match="killed"):
        work(studies.load(database, "toy"), home)
    work(studies.load(database, "toy"), home)
    assert [epoch for number, epoch in recorded if number == best] == [3, 4, 4, 5]
    require_as_from_the_start(database, home, 5)


def test_under_promote_they_go_on_to_the_next_rung(database: Database, home: Home) -> None:
    study = search(database, home, small(2, PROMOTE, trials=4))
    before = read_status(database, "toy")
    studies.extend(study, epochs=5)
    between = read_status(database, "toy")
    assert between.count("paused") == 4
    assert [rung.epoch for rung in between.count_rungs()] == [1, 3]
    work(studies.load(database, "toy"), home)
    search(database, home, small(5, name="whole", trials=4))
    whole = {one.number: one for one in read_status(database, "whole").trials}
    after = read_status(database, "toy")
    assert (after.state, after.finished) == ("finished", 4)
    assert after.count("complete") >= 2
    for trial in after.trials:
        assert curve(trial) == curve(whole[trial.number])[: len(trial.epochs)]
        went_on = before.trials[trial.number].state == "complete"
        assert len(trial.epochs) in ((3, 5) if went_on else (1, 3, 5))
    assert check_database(database).faults == []


def test_a_worker_of_fewer_epochs_hands_back_and_ends(
    ended: Study, database: Database, home: Home
) -> None:
    studies.extend(ended, epochs=4)
    assert work(ended, home) == "the study has more epochs since this worker started"
    status = read_status(database, "toy")
    assert (status.count("complete"), status.count("interrupted")) == (0, 3)
    assert status.trials[0].attempts[-1].outcome == Outcome.HANDED_BACK


def test_a_worker_of_fewer_epochs_calls_no_budget_spent(database: Database) -> None:
    study = filled_study(database, CONSTANT.format(3), study="max_full_trainings = 2")
    studies.extend(study, epochs=6)
    snapshot = study.snapshot()
    assert snapshot.full_trainings == 2
    assert study.rule(snapshot) is None
    assert studies.load(database, "toy").snapshot().full_trainings == 1


# What is refused, and what is told


def filled_study(database: Database, train: str, **fields: Any) -> Study:
    trials = [filled.Trial("complete", (0.5, 0.6, 0.7)), filled.Trial("complete", (0.4, 0.3)),
              filled.Trial("pruned", (0.1,))]  # fmt: skip
    return fill(database, study_file(trials=4, train=train, **fields), trials)


def hold(study: Study) -> None:
    add_waiting(FencedStorage(study.database), study.row.study_id)
    leases.claim(study.database, study.uuid, study.snapshot().free[0], "w9")


def verify(study: Study) -> None:
    verification.prepare(study.database, "toy", 1, 2, Home.default(), force=True)


def nothing(study: Study) -> None:
    """Prepare nothing."""


PHASES = "phases = [{epochs = 1}, {epochs = 2}]"
SEARCHED = "epochs = {low = 1, high = 3}"


@pytest.mark.parametrize(
    ("epochs", "study", "before", "message"),
    [
        (3, {}, nothing, "--epochs 3: study 'toy' has 3 already; give more"),
        (99_999, {}, nothing, "--epochs 99999: "),
        (6, {"train": "epochs = 3"}, nothing, 'schedule.name = "cosine" runs over all epochs, .* '
         "--set epochs=6 --set study.name=toy-6 --learn-from toy"),
        (6, {"train": PHASES}, nothing, "the phases say how many"),
        (6, {"train": 'schedule.name = "constant"', "space": SEARCHED}, nothing, "is searched"),
        (6, {"sampler": "nsga2"}, nothing, "nsga2 goes on from generations"),
        (6, {"study": "target = 0.6"}, nothing, "would stop at once: the target 0.6 was"),
        (6, {}, hold, "being worked on by w9, .*: hpo stop toy first"),
        (6, {}, verify, "'toy.verify' verified 'toy' as it is: hpo delete toy.verify first"),
    ],
)  # fmt: skip
def test_a_refusal_says_why_and_changes_nothing(
    database: Database, epochs: int, study: dict[str, str], before: Callable[[Study], None],
    message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    made = filled_study(database, **({"train": CONSTANT.format(3)} | study))
    before(made)
    stands = records.get_study(database, "toy"), read_status(database, "toy").trials
    with pytest.raises(HpoError, match=message):
        studies.extend(studies.load(database, "toy"), epochs=epochs)
    assert (records.get_study(database, "toy"), read_status(database, "toy").trials) == stands


def test_a_kill_between_two_writes_leaves_the_study_as_it_was(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = filled_study(database, CONSTANT.format(3), study=PROMOTE)
    before = records.get_study(database, "toy"), read_status(database, "toy").trials
    original = rows._reopen

    def killed(*args: Any, **values: Any) -> None:
        original(*args, **values)
        if args[2] == Outcome.PRUNED:
            raise KeyboardInterrupt

    monkeypatch.setattr(rows, "_reopen", killed)
    with pytest.raises(KeyboardInterrupt):
        studies.extend(study, epochs=6)
    assert (records.get_study(database, "toy"), read_status(database, "toy").trials) == before


@pytest.mark.databases
def test_what_ended_before_its_last_epoch_stays_as_it_is(database: Database) -> None:
    study = filled_study(database, CONSTANT.format(3))
    hold(study)
    with database.write() as c:
        c.execute(
            sa.update(tables.attempts).where(tables.attempts.c.worker == "w9").values(until=0)
        )
    studies.extend(study, epochs=6)
    status = read_status(database, "toy")
    states = ["interrupted", "complete", "pruned", "waiting"]
    assert [one.state for one in status.trials] == states
    assert status.trials[0].reason == "complete after epoch 3, the last one then"
    assert status.trials[3].attempts[0].outcome == Outcome.LOST  # its worker is dead
    assert status.file.max_epochs == 6


@pytest.mark.databases
def test_a_worker_that_takes_a_dead_one_s_trial_meanwhile_has_it(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither waits for what the other has locked: a deadlock would end one of them."""
    study = filled_study(database, CONSTANT.format(3))
    hold(study)
    with database.write() as c:
        c.execute(
            sa.update(tables.attempts).where(tables.attempts.c.worker == "w9").values(until=0)
        )
    refused: list[str] = []

    def extend() -> None:
        with pytest.raises(Conflict) as caught:
            studies.extend(studies.load(database, "toy"), epochs=6)
        refused.append(str(caught.value))

    original, other = leases._open_attempt, threading.Thread(target=extend)

    def slow(*args: Any) -> None:
        other.start()
        time.sleep(0.5)  # it has come to a lock
        original(*args)

    monkeypatch.setattr(leases, "_open_attempt", slow)
    free, seen = study.snapshot().free[0], leases.ContactWindow(0.0, time.time())
    assert leases.claim(database, study.uuid, free, "w10", seen) is not None
    other.join()
    assert "being worked on by w10" in refused[0]
    assert read_status(database, "toy").file.max_epochs == 3


def test_the_command_says_how_they_go_on(
    database: Database, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = filled_study(database, CONSTANT.format(3), study=PROMOTE)
    hpo: Hpo = calls(monkeypatch, capsys)
    code, out, _ = hpo("extend", "toy", "--epochs", "+7", "--storage", database.secret_url)
    assert code == 0
    assert "1 complete trial goes on to epoch 10: from the checkpoint where one was kept" in out
    notes = FencedStorage(database).get_study_system_attrs(study.row.study_id)
    assert "first rung after epoch 1, then 3, 9 of 10" in notes[NOTE_PART.format(0)]


def test_more_epochs_in_the_file_extend_it(database: Database) -> None:
    filled_study(database, CONSTANT.format(3))
    more = study_file(trials=4, train=CONSTANT.format(6))
    with pytest.raises(LimitsRaised, match=r"train.epochs: 3 -> 6\n.* hpo extend toy --epochs 6"):
        open_study(database, more, None)
    with pytest.raises(Conflict, match="--epochs 2: study 'toy' has 3 already"):
        open_study(database, study_file(trials=4, train=CONSTANT.format(2)), None)
    studies.extend(studies.load(database, "toy"), epochs=6)
    assert not open_study(database, more, None).is_new
    with pytest.raises(InputError, match="--epochs 6: study 'toy' has 6 already"):
        studies.extend(studies.load(database, "toy"), epochs=6)
