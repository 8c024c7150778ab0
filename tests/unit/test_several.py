"""Studies of several objectives: what they may be, values, pruning on the first, the front."""

from __future__ import annotations

import itertools
import math
import random
import threading
from collections.abc import Sequence
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import TrialState

from hpo.config.strategies import StudyConfig
from hpo.config.study import StudyFile, parse_study
from hpo.errors import ConfigError
from hpo.paths import Home
from hpo.search import study as studies
from hpo.search.sampling import FirstMetric, values_of
from hpo.search.status import StudyStatus, read_status
from hpo.search.study import Study
from hpo.search.trial import TrialRunner
from hpo.storage.database import Database
from hpo.storage.optuna import FencedStorage
from hpo.storage.records import Epoch, Ranking
from hpo.training.models import build
from hpo.training.profiling import latency_ms, multiply_adds, network_costs
from hpo.workers.worker import Worker
from tests.harness.fakes import study_file
from tests.harness.filled import Trial, fill

TINY = """epochs = 3
[train.data]
limit_train = 100
[train.runtime]
precision = "float32"
memory_format = "contiguous"
"""
METRICS = 'metrics = ["val_top1", "parameters", "flops", "latency_ms"]'
SPACE = (
    "optimizer.lr = {low = 1e-3, high = 1e-1, log = true}\nmodel.cnn.filters = [[4], [8], [4, 8]]"
)


def several(pruner: str = '"none"', sampler: str = "tpe", **options: Any) -> StudyFile:
    """A study file of several objectives; `options` as for `study_file`."""
    given = {"study": METRICS, "space": SPACE, "train": TINY, "sampler": sampler, **options}
    text = study_file(**given).text.replace('pruner = "none"', f"pruner = {pruner}")
    return parse_study(text)


def search(database: Database, home: Home, file: StudyFile) -> StudyStatus:
    study, _ = studies.create(database, file)
    storage = FencedStorage(database)
    runner = TrialRunner(
        study, storage, study.optuna_study(storage), home, torch.device("cpu"), threads=1
    )
    Worker(study, storage, runner, home=home).run(threading.Event())
    return read_status(database, study.row.name)


def test_the_first_metric_is_the_metric_and_the_definition_comes_back() -> None:
    file = several()
    assert file.objectives == ("val_top1", "parameters", "flops", "latency_ms")
    assert file.metric == "val_top1"
    again = StudyFile.from_definition(file.definition())
    assert again.definition() == file.definition()
    assert study_file().objectives == ("val_top1",)
    assert "metrics" not in study_file().definition()["study"]


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"metrics": ["val_top1"]}, "2 to 4 different ones"),
        ({"metrics": []}, "2 to 4 different ones"),
        ({"metrics": ["val_top1", "val_top1"]}, "2 to 4 different ones"),
        ({"metrics": ["latency_ms", "val_top1"]}, '"latency_ms": a metric of an epoch comes first'),
        ({"metrics": ["val_top1", "speed"]}, '"speed"'),
        ({"metrics": ["val_top1", "flops"], "metric": "val_loss"}, "give either metric or metrics"),
        ({"metrics": ["val_top1", "flops"], "sampler": "cmaes"}, "it knows one metric only"),
        ({"metrics": "val_top1"}, "metrics"),
    ],
)
def test_bad_metrics_are_refused(given: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        StudyConfig.parse({"name": "x", **given})


def test_a_search_stores_and_tells_all_values(database: Database, home: Home) -> None:
    status = search(database, home, several(trials=4))
    assert status.count("complete") == 4
    view = studies.load(database, "toy").optuna_study(FencedStorage(database))
    assert [d.name for d in view.directions] == ["MAXIMIZE", "MINIMIZE", "MINIMIZE", "MINIMIZE"]
    assert view.metric_names == list(status.file.objectives)
    for trial, told in zip(status.trials, view.trials, strict=True):
        assert list(trial.values.values()) == told.values
        assert trial.values["val_top1"] == trial.value
        config = status.file.config(trial.params)
        model = build(config.model, classes=10, image_size=config.data.image_size)
        assert trial.values["parameters"] == sum(p.numel() for p in model.parameters())
        assert trial.values["latency_ms"] > 0
        assert told.intermediate_values == {}
    assert {t.number for t in status.front()} == {t.number for t in view.best_trials}
    found = status.to_dict()
    assert found["metrics"]["latency_ms"] == "minimize"
    assert [one["number"] for one in found["front"]] == [t.number for t in status.front()]


PRUNERS = [
    '{name = "median", n_startup_trials = 2}',
    '{name = "percentile", percentile = 50.0, n_startup_trials = 2}',
    '{name = "asha", reduction_factor = 2}',
    '{name = "hyperband", reduction_factor = 2}',
    '{name = "threshold", lower = 0.5}',
    '{name = "patient", patience = 0, wrapped_pruner = {name = "threshold", lower = 0.5}}',
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pruner", "sampler"), list(zip(PRUNERS, itertools.cycle(["tpe", "nsga2"]), strict=False))
)
def test_every_pruner_judges_the_first_metric(
    database: Database, home: Home, pruner: str, sampler: str
) -> None:
    """A learning rate at which nothing is learned falls behind, and Optuna keeps no curve of it."""
    file = several(
        pruner, sampler, trials=8, study='metrics = ["val_top1", "parameters"]',
        train=TINY.replace("epochs = 3", "epochs = 6"),
        space="optimizer.lr = [1e-1, 1e-7]\nseed = {low = 0, high = 1000}",
    )  # fmt: skip
    status = search(database, home, file)
    assert status.finished == 8
    assert status.count("pruned") >= 1
    view = studies.load(database, "toy").optuna_study(FencedStorage(database))
    told = [t for t in view.trials if t.state == TrialState.PRUNED]
    assert len(told) == status.count("pruned")
    assert all(t.values is None and t.intermediate_values == {} for t in told)
    assert all(t.values == {} and t.epochs for t in status.trials if t.state == "pruned")


@pytest.mark.parametrize("sampler", ["random", "qmc", "gp", "grid"])
def test_other_samplers_search_several_objectives(
    database: Database, home: Home, sampler: str
) -> None:
    file = several(sampler=sampler, trials=3, study='metrics = ["val_loss", "flops"]',
                   space="model.cnn.filters = [[4], [8], [4, 8]]")  # fmt: skip
    assert search(database, home, file).count("complete") == 3


@pytest.mark.parametrize("pruner", PRUNERS[:2])
def test_the_view_decides_as_a_study_of_one_objective_does(
    tmp_path: Any, database: Database, pruner: str
) -> None:
    """The same curves, once with the metric alone and once as the first of two."""
    curves = [(0.5, 0.6), (0.4, 0.5), (0.3, 0.4), (0.45, 0.55), (0.1, 0.2)]
    text = study_file(trials=9).text.replace('pruner = "none"', f"pruner = {pruner}")
    one = fill(database, parse_study(text), [Trial("complete", c) for c in curves[:4]])
    pair = text.replace('name = "toy"', 'name = "pair"\nmetrics = ["val_top1", "flops"]')
    costly = [Trial("complete", c, costs=(1.0,)) for c in curves[:4]]
    two = fill(database, parse_study(pair), costly)
    verdicts = [_verdicts(database, study, curves[4:] + curves[:1]) for study in (one, two)]
    assert verdicts[0] == verdicts[1] == [True, False]


def _verdicts(database: Database, study: Study, curves: Sequence[tuple[float, ...]]) -> list[bool]:
    """Whether a running trial with each of `curves` would be pruned."""
    from hpo.storage import leases
    from hpo.storage.optuna import add_waiting

    storage = FencedStorage(database)
    view = study.optuna_study(storage)
    found = []
    for curve in curves:
        add_waiting(storage, study.row.study_id)
        taken = leases.claim(database, study.uuid, study.snapshot().free[-1], "w")
        assert taken is not None
        storage.set_trial_state_values(taken.lease.trial_id, TrialState.RUNNING)
        for epoch, value in enumerate(curve, 1):
            row = Epoch(epoch, taken.lease.k, 0.0, {"val_top1": value}, None)
            leases.record_epochs(database, taken.lease, [row], progress={})
        trial = optuna.trial.Trial(view, taken.lease.trial_id)
        if len(study.file.objectives) == 1:
            for epoch, value in enumerate(curve, 1):
                trial.report(value, epoch)
            found.append(trial.should_prune())
        else:
            found.append(
                FirstMetric(study.file, study.row, study.database, storage).falls_behind(
                    taken.lease.trial_id
                )
            )
    return found


def test_a_diverged_trial_is_never_on_the_front(database: Database, home: Home) -> None:
    train = TINY.replace("epochs = 3", "epochs = 8\noptimizer = {weight_decay = 10.0}")
    space = "optimizer.lr = [1e-3, 90.0]\n[[baseline]]\noptimizer.lr = 90.0\n"
    file = several(trials=2, train=train, space=space, study='metrics = ["val_top1", "flops"]')
    status = search(database, home, file)
    first, second = status.trials
    assert first.state == "diverged"
    assert first.values == {}
    assert status.front() == [second]
    view = optuna.load_study(study_name=file.name, storage=database.secret_url)
    assert [trial.number for trial in view.best_trials] == [1]
    assert view.trials[0].values == [-math.inf, math.inf]


def test_values_are_those_of_the_best_epoch_and_costs_of_all() -> None:
    rows = [
        Epoch(n, 1, 0.0, {"val_top1": top1, "val_loss": loss, "seconds": s,
                             "peak_memory_mb": mb}, None)
        for n, top1, loss, s, mb in ((1, 0.5, 0.9, 3.0, 10.0), (2, 0.7, 0.8, 1.0, 30.0),
                                     (3, 0.6, 0.7, 2.0, 20.0))
    ]  # fmt: skip
    names = ("val_top1", "val_loss", "epoch_seconds", "peak_memory_mb", "parameters")
    assert values_of(names, rows, rows[1], {"parameters": 5.0}) == (0.7, 0.8, 2.0, 30.0, 5.0)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ((0.9, 5.0), (0.8, 6.0), True),
        ((0.9, 5.0), (0.9, 6.0), True),
        ((0.9, 5.0), (0.9, 5.0), False),
        ((0.9, 7.0), (0.8, 6.0), False),
        ((0.7, 7.0), (0.8, 6.0), False),
    ],
)
def test_to_dominate_is_better_in_some_and_worse_in_none(
    one: tuple[float, float], other: tuple[float, float], expected: bool
) -> None:
    ranking = Ranking({"val_top1": "maximize", "latency_ms": "minimize"})
    assert ranking.beats(one, other) is expected


def test_the_front_is_what_no_trial_dominates(database: Database) -> None:
    draw = random.Random(0)
    trials = [
        Trial("complete", (draw.choice((0.1, 0.2, 0.3)),), costs=(draw.choice((1.0, 2.0, 3.0)),))
        for _ in range(30)
    ]
    fill(database, study_file(trials=30, study='metrics = ["val_top1", "flops"]'), trials)
    status = read_status(database, "toy")
    done = status.ranked()
    scores = [tuple(trial.values.values()) for trial in done]
    beats = status.ranking.beats
    expected = {
        trial.number
        for trial, mine in zip(done, scores, strict=True)
        if not any(beats(other, mine) for other in scores)
    }
    front = status.front()
    assert {trial.number for trial in front} == expected
    firsts = [trial.values["val_top1"] for trial in front]
    assert firsts == sorted(firsts, reverse=True)


@pytest.mark.parametrize(
    ("name", "published"), [("resnet18", 1.814e9), ("mobilenet_v2", 0.301e9), ("vit_b_32", 4.41e9)]
)
def test_multiply_adds_are_those_that_torchvision_publishes(name: str, published: float) -> None:
    from torchvision.models import get_model

    with torch.device("meta"):
        model = get_model(name).eval()
        found = multiply_adds(model, torch.empty(1, 3, 224, 224))
    assert found == pytest.approx(published, rel=0.01)


def test_costs_of_a_network_measured_alone() -> None:
    config = several().config({"optimizer.lr": 0.1, "model.cnn.filters": [4]})
    cpu = torch.device("cpu")
    found = network_costs(config, ("parameters", "val_top1"), classes=10, device=cpu)
    assert list(found) == ["parameters"]
    assert network_costs(config, ("val_top1",), classes=10, device=cpu) == {}
    assert latency_ms(torch.nn.Flatten(), torch.zeros(1, 3, 8, 8), "float32") > 0
