"""Constraints on costs: how they are written, and trials that do not meet them."""

from __future__ import annotations

import math
import re
import threading
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import TrialState

from hpo.config.constraints import parse_constraints, unmet_reason
from hpo.config.strategies import StudyConfig
from hpo.config.study import StudyFile, difference, parse_study
from hpo.errors import ConfigError, InputError
from hpo.paths import Home
from hpo.search import study as studies
from hpo.search import trial as objective
from hpo.search.status import StudyStatus, read_status
from hpo.search.study import Study
from hpo.search.trial import TrialRunner
from hpo.storage import leases
from hpo.storage.database import Database
from hpo.storage.optuna import FencedStorage
from hpo.trained.dry_run import check
from hpo.trained.export import export
from hpo.workers.worker import Worker
from tests.harness.fakes import study_file

TRAIN = """epochs = 2
[train.data]
limit_train = 100
[train.runtime]
precision = "float32"
memory_format = "contiguous"
"""
SPACE = "model.cnn.filters = [[4], [64, 64]]\nseed = {low = 0, high = 1000}"
SMALL = 'constraints = {parameters = "<= 2e4"}'
"""Met by the first of the two networks."""


def constrained(study: str = SMALL, **options: Any) -> StudyFile:
    return study_file(**{"study": study, "train": TRAIN, "space": SPACE, "trials": 6, **options})


def bench_of(database: Database, home: Home, file: StudyFile) -> tuple[Study, TrialRunner]:
    study, _ = studies.create(database, file)
    storage = FencedStorage(database)
    view = study.optuna_study(storage)
    return study, TrialRunner(study, storage, view, home, torch.device("cpu"), threads=1)


def search(database: Database, home: Home, file: StudyFile) -> StudyStatus:
    study, runner = bench_of(database, home, file)
    Worker(study, runner.storage, runner, home=home).run(threading.Event())
    return read_status(database, file.name)


@pytest.mark.parametrize(
    ("text", "kept"),
    [("<=1e6", "<= 1e6"), (" >=  0.5 ", ">= 0.5"), ("<20", "< 20"), ("> 1_000", "> 1_000")],
)
def test_constraints_are_texts_of_an_operator_and_a_number(text: str, kept: str) -> None:
    config = StudyConfig.parse({"name": "x", "constraints": {"flops": text}})
    assert config.constraints == {"flops": kept}
    (one,) = config.limits
    assert str(one) == f"flops {kept}"


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"paramters": "<= 1"}, r"study.constraints.paramters: .*did you mean 'parameters'\?"),
        ({"val_top1": ">= 0.5"}, "study.constraints.val_top1: .*no metric; allowed: latency_ms"),
        *(
            ({"flops": bad}, f"study.constraints.flops: .*{re.escape('allowed: <=, <, >= or >')}")
            for bad in ("", "small", "<=", "1e6", "== 5", "<= ten", "<= 20ms", "=< 5", "<= -1",
                        "<= inf", "<= nan", "<= 1e999", "<= 1,000", "<= 1__0", "<= 1 2", "≤ 5",
                        5, 1e6, True, ["<= 1"], {"max": 3})
        ),
        ("<= 1e6", "study.constraints: .*a table"),
        (["<= 1e6"], "study.constraints: .*a table"),
    ],
)  # fmt: skip
def test_bad_constraints_are_refused_in_a_line(given: Any, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        StudyConfig.parse({"name": "x", "constraints": given}, prefix="study.")
    assert "\n" not in str(caught.value)


def test_constraints_are_part_of_the_definition_and_none_changes_none() -> None:
    file = constrained()
    assert StudyFile.from_definition(file.definition()).definition() == file.definition()
    plain = constrained("")
    assert "constraints" not in plain.definition()["study"]
    for empty in ("constraints = {}", 'constraints = "none"'):
        assert constrained(empty).definition() == plain.definition()
    changed = difference(plain.definition(), file.definition())
    assert changed == ['study.constraints.parameters: (not given) -> "<= 2e4"']
    one = parse_study(plain.text, overrides={"study.constraints.parameters": "<= 2e4"})
    assert one.definition() == file.definition()


def test_what_does_not_meet_its_bound_is_said() -> None:
    limits = parse_constraints({"parameters": "<= 1e6", "latency_ms": "< 20", "flops": "> 5"})
    assert unmet_reason(limits, {"parameters": 1e6, "latency_ms": 19.9}) is None
    assert unmet_reason(limits, {"parameters": 2278604.0}) == "parameters 2,278,604 is not <= 1e6"
    reason = unmet_reason(limits, {"latency_ms": 20.0, "flops": 5.0})
    assert reason == "latency_ms 20 is not < 20; flops 5 is not > 5"
    assert unmet_reason(limits, {"latency_ms": math.nan}) == "latency_ms nan is not < 20"
    reasons = ["parameters 2,278,604 is not <= 1e6", "parameters 1,500,000 is not <= 1e6; x"]
    assert limits[0].nearest_missed(reasons) == 1_500_000
    assert limits[1].nearest_missed(["latency_ms 20.25 is not < 20; after epoch 1"]) == 20.25
    assert limits[1].nearest_missed(reasons) is None


@pytest.mark.parametrize(
    ("constraint", "said"),
    [
        ('parameters = "<= 2e4"', r"model.cnn.filters = \[64, 64\] is infeasible in every network"),
        ('flops = "<= 1e5"', r"model.cnn.filters = \[64, 64\] is infeasible in every network"),
        ('parameters = "<= 10"', r"every network is infeasible: relax .*parameters = \"<= 10\" \("),
        ('parameters = "<= 1e9"', None),
        ('latency_ms = "<= 1e-9"', None),
    ],
)
def test_check_says_which_choices_never_meet_them(
    home: Home, constraint: str, said: str | None
) -> None:
    file = constrained(f"constraints = {{{constraint}}}", trials=2)
    notes = check(file, home=home, device="cpu", workers=1, threads=1).notes
    found = [one for one in notes if "infeasible" in one]
    assert len(found) == (0 if said is None else 1)
    assert said is None or re.match(said, found[0])


@pytest.mark.parametrize("several", [False, True])
def test_infeasible_trials_count_and_are_never_best(
    database: Database, home: Home, several: bool
) -> None:
    both = 'metrics = ["val_top1", "parameters"]\n' if several else ""
    status = search(database, home, constrained(both + SMALL, trials=8))
    assert status.finished == len(status.trials) == 8
    large = [t for t in status.trials if t.params["model.cnn.filters"] == [64, 64]]
    assert 0 < len(large) < 8
    assert large == [t for t in status.trials if t.state == "infeasible"]
    for trial in large:
        assert (trial.epochs, trial.value, trial.best_epoch, trial.values) == ((), None, None, {})
        assert re.fullmatch(r"parameters [\d,]+ is not <= 2e4", str(trial.reason))
    done = [t for t in status.trials if t not in large]
    assert all(t.state == "complete" and len(t.epochs) == 2 for t in done)
    assert status.best in done
    assert all(trial in done for trial in status.front())
    view = optuna.load_study(study_name="toy", storage=database.secret_url)
    best = view.best_trials[0] if several else view.best_trial
    assert best.number in {t.number for t in done}
    told = view.trials[large[0].number]
    assert told.state == TrialState.COMPLETE
    assert told.values == ([-math.inf, math.inf] if several else [-math.inf])
    assert told.user_attrs["outcome"] == "infeasible"
    assert export(database, "toy")[1]["trial"] in {t.number for t in done}
    with pytest.raises(InputError, match="ended as infeasible"):
        export(database, "toy", number=large[0].number)
    counts = status.to_dict()["trials"]
    assert (counts["infeasible"], counts["complete"]) == (len(large), len(done))


def test_a_feasible_trial_is_what_it_is_without_constraints(database: Database, home: Home) -> None:
    study = 'constraints = {parameters = "<= 1e9", flops = "<= 1e12", latency_ms = "<= 1e6"}'
    space = "seed = [3]"
    found = [
        search(database, home, constrained(text, name=name, trials=1, space=space)).trials[0]
        for name, text in (("with", study), ("without", ""))
    ]
    one, other = ([e.metrics["val_loss"] for e in trial.epochs] for trial in found)
    assert one == other


@pytest.mark.parametrize("cost", ["flops", "latency_ms"])
def test_all_infeasible_ends_the_study_and_says_what_to_relax(
    database: Database, home: Home, cost: str
) -> None:
    status = search(database, home, constrained(f'constraints = {{{cost} = "< 1e-3"}}', trials=3))
    assert (status.state, status.count("infeasible"), status.best) == ("finished", 3, None)
    why = str(status.no_best)
    assert "3 of 3 trials are infeasible" in why
    assert re.search(rf'{cost} = "< 1e-3" \(the nearest: [\d.,]+\)', why)


@pytest.mark.parametrize("cost", ["epoch_seconds", "peak_memory_mb"])
def test_costs_of_epochs_are_judged_after_the_first(
    database: Database, home: Home, cost: str
) -> None:
    status = search(database, home, constrained(f'constraints = {{{cost} = "> 1e9"}}', trials=2))
    for trial in status.trials:
        assert trial.state == "infeasible"
        assert len(trial.epochs) == 1
        assert re.fullmatch(rf"{cost} [\d.,e-]+ is not > 1e9; after epoch 1", str(trial.reason))
        assert trial.value is None
    view = optuna.load_study(study_name="toy", storage=database.secret_url)
    assert [trial.values for trial in view.trials] == [[-math.inf]] * 2
    assert not list(home.root.rglob("*.ckpt"))


def test_a_trial_of_one_epoch_is_judged_too(database: Database, home: Home) -> None:
    text = constrained('constraints = {epoch_seconds = "> 1e9"}', trials=1).text
    status = search(database, home, parse_study(text.replace("epochs = 2", "epochs = 1")))
    assert [trial.state for trial in status.trials] == ["infeasible"]


class Killed(BaseException):
    """The worker is gone, as after SIGKILL: nothing of it runs any more."""


@pytest.mark.parametrize("moment", ["claimed", "measured", "attributed"])
def test_a_worker_that_dies_leaves_the_budget_exact(
    database: Database, home: Home, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    space = "model.cnn.filters = [[64, 64]]"
    study, runner = bench_of(database, home, constrained(lease_s=1.0, trials=2, space=space))
    where = {"claimed": "_config", "measured": "_tell", "attributed": "Ending"}[moment]

    def die(*_args: Any, **_options: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        if moment == "attributed":
            patch.setattr(runner.optuna_study, "tell", die)
        else:
            patch.setattr(objective, where, die)
        with pytest.raises(Killed):
            Worker(study, runner.storage, runner, home=home).run(threading.Event())
    leases.release_worker(database, _holder(database, study), "killed")
    storage = FencedStorage(database)
    again = TrialRunner(study, storage, study.optuna_study(storage), home, runner.device, threads=1)
    Worker(study, storage, again, home=home).run(threading.Event())
    status = read_status(database, "toy")
    assert [trial.state for trial in status.trials] == ["infeasible"] * 2
    assert [len(trial.attempts) for trial in status.trials] == [2, 1]
    assert [one.outcome for one in status.trials[0].attempts] == ["lost", "infeasible"]


def _holder(database: Database, study: Study) -> str:
    (holder,) = leases.live_leases(database, study.uuid)
    return holder


def test_latency_is_not_measured_again_of_a_trial_that_has_epochs(
    database: Database, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another measurement would end what was feasible."""
    file = constrained('constraints = {latency_ms = "<= 1e6"}', trials=1, space="seed = [1]")
    study, runner = bench_of(database, home, file)
    finish = objective.TrialRun._finish_epoch

    def die(self: Any, result: Any) -> None:
        finish(self, result)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(objective.TrialRun, "_finish_epoch", die)
        with pytest.raises(Killed):
            Worker(study, runner.storage, runner, home=home).run(threading.Event())
    leases.release_worker(database, _holder(database, study), "killed")
    monkeypatch.setattr(objective, "network_costs", lambda *_a, **_o: {"latency_ms": 1e9})
    storage = FencedStorage(database)
    again = TrialRunner(study, storage, study.optuna_study(storage), home, runner.device, threads=1)
    Worker(study, storage, again, home=home).run(threading.Event())
    (trial,) = read_status(database, "toy").trials
    assert (trial.state, len(trial.epochs)) == ("complete", 2)
