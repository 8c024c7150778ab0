"""Search goals other than accuracy: values, names, refusals, and whole searches by them."""

import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, f1_score, recall_score, roc_auc_score

from hpo.api.creation import open_study
from hpo.config.metrics import direction, metric_name, user_function
from hpo.config.study import StudyFile, parse_study
from hpo.config.train import TrainConfig
from hpo.errors import ConfigError
from hpo.paths import Home
from hpo.search.fingerprints import code_of
from hpo.search.status import StudyStatus, read_status
from hpo.storage.database import connect
from hpo.trained.run import absent_classes
from hpo.training.evaluation import EvalAccumulator, Evaluation, full_scores, measure
from hpo.training.metrics import (
    classification_report,
    confusion_matrix,
    macro_auc,
    require_supported,
)
from tests.harness.commands import Hpo, calls

NAMES = ("red one", "grün.x", "[b]lue")
GOALS = """
def brier(probabilities, labels):
    assert probabilities.dtype.name == "float32" and labels.dtype.name == "int64"
    probabilities[range(len(labels)), labels] -= 1
    return (probabilities**2).sum(axis=1).mean()
def nothing(probabilities, labels): return float("nan")
def broken(probabilities, labels): raise KeyError("cat")
def many(probabilities, labels): return probabilities[0]
"""


# Values


def cases() -> list[tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """Probabilities and labels: classes without images, without answers, and equal scores."""
    rng, found = np.random.default_rng(0), []
    for _ in range(40):
        classes, images = int(rng.integers(2, 9)), int(rng.integers(2, 40))
        logits = rng.normal(size=(images, classes)).round(int(rng.integers(0, 3)))
        probabilities = torch.from_numpy(logits).float().softmax(dim=1).numpy()
        found.append((probabilities, rng.integers(0, rng.integers(1, classes + 1), images)))
    return found


@pytest.mark.parametrize("case", cases())
def test_values_equal_scikit_learns(case: tuple[NDArray[np.float32], NDArray[np.int64]]) -> None:
    probabilities, labels = case
    classes, predictions = probabilities.shape[1], probabilities.argmax(axis=1)
    found = classification_report(confusion_matrix(labels, predictions, classes))
    f1 = f1_score(labels, predictions, average="macro", zero_division=0)
    assert found.macro_f1 == pytest.approx(f1)
    seen = np.unique(labels)
    recalls = recall_score(labels, predictions, labels=seen, average="macro", zero_division=0)
    assert found.balanced_accuracy == pytest.approx(recalls)
    if set(predictions) <= set(labels):  # else scikit-learn warns, of the same value
        balanced = balanced_accuracy_score(labels, predictions)
        assert found.balanced_accuracy == pytest.approx(balanced)
    if len(seen) > 1:
        areas = [roc_auc_score(labels == one, probabilities[:, one]) for one in seen]
        assert macro_auc(probabilities, labels) == pytest.approx(np.mean(areas))
    if len(seen) == classes > 2:
        whole = roc_auc_score(labels, probabilities, multi_class="ovr", average="macro")
        assert macro_auc(probabilities, labels) == pytest.approx(whole)


def test_the_area_of_two_classes_is_scikit_learns() -> None:
    probabilities, labels = (
        np.float32([[0.75, 0.25], [0.25, 0.75], [0.5, 0.5]]),
        np.int64([0, 1, 0]),
    )
    expected = roc_auc_score(labels, probabilities[:, 1])
    assert macro_auc(probabilities, labels) == expected == 1.0
    assert math.isnan(macro_auc(probabilities, np.int64([0, 0, 0])))


def test_a_class_that_is_only_predicted_counts_and_one_in_neither_does_not() -> None:
    found = classification_report(confusion_matrix(np.array([0, 1]), np.array([0, 2]), 4))
    assert found.macro_f1 == pytest.approx(1 / 3)
    assert found.balanced_accuracy == 0.5


def judged(logits: torch.Tensor, labels: torch.Tensor) -> Evaluation:
    judge = EvalAccumulator(logits.shape[1], torch.device("cpu"), probabilities=True)
    judge.add(logits, labels)
    return judge.result()


def test_an_epoch_has_cheap_ones_always_and_the_others_where_asked() -> None:
    found = judged(torch.eye(3)[[0, 1, 1, 2]], torch.tensor([0, 1, 2, 2]))
    always = {"val_loss", "val_top1", "val_macro_f1", "val_balanced_accuracy"}
    assert measure(found, (), NAMES).keys() == always
    values = measure(found, ("val_macro_auc", "val_recall:[b]lue"), NAMES)
    assert values["val_recall:[b]lue"] == 0.5
    assert values["val_balanced_accuracy"] == pytest.approx(2.5 / 3)
    assert values.keys() == always | {"val_macro_auc", "val_recall:[b]lue"}


def test_a_network_that_diverged_has_no_area_and_calls_no_function() -> None:
    found = judged(torch.full((2, 2), math.nan), torch.tensor([0, 1]))
    values = measure(found, ("val_macro_auc", "no_module:f"), ("a", "b"))
    assert math.isnan(values["val_macro_auc"])
    assert math.isnan(values["no_module:f"])


def test_top5_is_measured_of_more_than_five_classes() -> None:
    for classes, there in ((5, False), (6, True)):
        found = judged(torch.eye(classes), torch.arange(classes))
        assert ("val_top5" in measure(found, (), ())) is there


# Names


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("val_macro_f1", "maximize"),
        ("val_loss", "minimize"),
        ("val_recall:my_loss", "maximize"),
        ("val_recall:x:minimize", "maximize"),
        ("goals:score", "maximize"),
        ("goals:score:minimize", "minimize"),
        ("goals:my_loss", "minimize"),
        ("goals:my_loss:maximize", "maximize"),
    ],
)
def test_a_name_tells_its_direction(name: str, way: str) -> None:
    assert metric_name(name) == name
    assert direction(name) == way


def test_a_class_is_no_function() -> None:
    assert user_function("val_recall:cat") is None
    assert user_function("pack.goals:score:minimize") == "pack.goals:score"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("val_acc", "did you mean 'val_top1'?"),
        ("accuracy", "did you mean 'val_top1'?"),
        ("test_accuracy", "did you mean 'val_top1'?"),
        ("train_acc", "did you mean 'train_top1'?"),
        ("F1 Score", "did you mean 'val_macro_f1' (of a retrieval 'val_f1')?"),
        ("ROC-AUC", "did you mean 'val_macro_auc'?"),
        ("val_auc", "did you mean 'val_macro_auc'?"),
        ("balanced accuracy", "did you mean 'val_balanced_accuracy'"),
        ("loss", "did you mean 'val_loss'?"),
        ("recall", "did you mean 'val_recall:CLASS'"),
        ("val_f1:cat", "of a single class there is its recall alone, val_recall:CLASS"),
        ("val_recall:", "name a class behind it"),
        ("goals:", "module:function"),
        ("nonsense", "allowed: val_top1, val_top5"),
    ],
)
def test_other_names_are_refused_with_the_right_one(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(hint)):
        metric_name(name)


def study(metric: str = '"val_top1"', train: str = "") -> StudyFile:
    text = f"[study]\nname = 's'\nmetric = {metric}\n[train]\n{train}\n[space]\n"
    return parse_study(text + "optimizer.lr = [0.1, 0.01]\n")


def test_each_task_names_its_own() -> None:
    with pytest.raises(ConfigError, match="did you mean 'val_macro_f1'"):
        study('"val_f1"')
    for metric in ("val_macro_f1", "val_macro_auc", "val_recall:cat", "goals:score"):
        with pytest.raises(ConfigError, match="task = 'retrieval' does not give it") as error:
            study(f'"{metric}"', 'task = "retrieval"')
        assert "val_precision_at_5" in str(error.value)
    with pytest.raises(ConfigError, match="did you mean 'val_f1'"):
        study('"val_macro_f1"', 'task = "retrieval"')


def test_a_training_may_watch_them() -> None:
    watched = {"patience": 2, "metric": "val_recall:cat"}
    assert TrainConfig.parse({"early_stopping": watched}).early_stopping.metric == "val_recall:cat"
    with pytest.raises(ConfigError, match="did you mean 'val_macro_f1'"):
        TrainConfig.parse({"early_stopping": {"patience": 2, "metric": "val_f1"}})


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("val_top5", "of 3 classes the right one is always in the top five; use val_top1"),
        ("val_recall:red", "no class is called 'red'; there are red one, grün.x, [b]lue"),
        ("val_recall:grün.x", "no validation image belongs to this class"),
    ],
)
def test_what_the_images_cannot_measure_is_refused(metric: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        require_supported([metric], dict(zip(NAMES, (4, 0, 2), strict=True)))
    assert message in str(error.value)


def test_an_area_needs_two_classes() -> None:
    with pytest.raises(ConfigError, match="two classes"):
        require_supported(["val_macro_auc"], {"a": 3, "b": 0})


def test_unicode_forms_of_a_class_are_alike() -> None:
    composed, decomposed = "val_recall:gr\u00fcn.x", "val_recall:gru\u0308n.x"
    for metric in (composed, decomposed):
        require_supported([metric], dict.fromkeys(NAMES, 1))
        with pytest.raises(ConfigError):
            require_supported([metric], {"other": 1, "class": 1})


# Searches


@pytest.fixture
def hpo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Hpo]:
    monkeypatch.setenv("HPO_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    yield calls(monkeypatch, capsys)
    sys.path[:] = before
    sys.modules.pop("own_goals", None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """20, 10 and 6 noisy images of three classes, a file `s.toml` that searches them, own goals."""
    rng, root = np.random.default_rng(0), tmp_path / "images"
    for place, (name, count) in enumerate(zip(NAMES, (20, 10, 6), strict=True)):
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.normal(100, 60, (8, 8, 3)) + 60 * np.eye(3)[place]
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.save(root / name / f"{number}.png")
    (tmp_path / "own_goals.py").write_text(GOALS)
    text = f'''[study]
name = "s"
trials = 3
[train]
epochs = 2
batch_size = 8
data = {{dataset = "folder", root = "{root}", image_size = 8, val_fraction = 0.3}}
[space]
optimizer.lr = {{low = 1e-3, high = 1e-1, log = true}}
'''
    (tmp_path / "s.toml").write_text(text)
    return tmp_path


def searched(hpo: Hpo, overrides: dict[str, object]) -> StudyStatus:
    """The study of `s.toml` after a worker's search in this process."""
    database = connect(Home.default().storage)
    open_study(database, StudyFile.load(Path("s.toml"), overrides), None)
    hpo("worker", "s", "--device", "cpu", "--threads", 1)
    return read_status(database, "s")


@pytest.mark.parametrize(
    "metric",
    [
        "val_macro_f1",
        "val_balanced_accuracy",
        "val_macro_auc",
        "val_recall:[b]lue",
        "own_goals:brier:minimize",
    ],
)
def test_a_search_by_each(hpo: Hpo, folder: Path, metric: str) -> None:
    status = searched(hpo, {"study.metric": metric})
    values = [row.metrics[metric] for trial in status.trials for row in trial.epochs]
    best = min(values) if metric.endswith("minimize") else max(values)
    assert len(values) == 6
    assert status.best is not None
    assert status.best.value == best
    assert all("val_macro_f1" in row.metrics for trial in status.trials for row in trial.epochs)
    assert metric in hpo("status", "s")[1]
    assert metric in hpo("trials", "s")[1]
    assert metric in hpo("trial", "s", 0)[1]
    assert hpo("report", "s")[0] == 0
    assert hpo("export", "s", "-o", "best.toml")[0] == 0
    trained = hpo("train", "best.toml", "--seeds", 1, "-o", "run", "--keep-validation")
    assert trained[0] == 0, trained
    kept = json.loads(Path("run/seed-0/metrics.json").read_text())["val"]
    assert metric.removeprefix("val_") in kept


def test_several_of_them_at_once(hpo: Hpo, folder: Path) -> None:
    names = ["val_macro_f1", "val_recall:grün.x", "own_goals:brier:minimize", "parameters"]
    status = searched(hpo, {"study.metrics": names})
    assert [list(trial.values) for trial in status.trials] == [names] * 3
    assert status.front


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("nothing", "'own_goals:nothing' returned nan, not a finite number"),
        ("broken", "'own_goals:broken' raised KeyError: 'cat'"),
        ("many", "'own_goals:many' returned ndarray, not one number"),
        ("missing", "'own_goals:missing' cannot be imported"),
    ],
)
def test_a_function_that_fails_fails_the_trial_by_name(
    hpo: Hpo, folder: Path, function: str, reason: str
) -> None:
    status = searched(hpo, {"study.metric": f"own_goals:{function}"})
    assert [trial.state for trial in status.trials[:3]] == ["failed"] * 3
    assert reason in str(status.trials[0].reason)


def test_a_function_belongs_to_the_code_of_its_study(hpo: Hpo, folder: Path) -> None:
    overrides = {"study.metrics": ["val_top1", "own_goals:brier"]}
    first = code_of(StudyFile.load(Path("s.toml"), overrides))
    assert first.sources == {"own_goals": GOALS}
    (folder / "own_goals.py").write_text(GOALS + "OTHER = 1\n")
    assert code_of(StudyFile.load(Path("s.toml"), overrides)).fingerprint != first.fingerprint
    watched = {"early_stopping.patience": 1, "early_stopping.metric": "own_goals:brier"}
    assert code_of(StudyFile.load(Path("s.toml"), watched)).sources.keys() == {"own_goals"}


@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize(
    "given",
    [
        ['study.metric="val_top5"'],
        ['study.metrics=["val_top1", "val_top5"]'],
        ['study.metric="val_recall:red"'],
        ["early_stopping.patience=1", 'early_stopping.metric="val_recall:red"'],
    ],
)
def test_what_cannot_be_measured_creates_nothing(
    hpo: Hpo, folder: Path, command: str, given: list[str]
) -> None:
    code, _, told = hpo(command, "s.toml", *(part for one in given for part in ("--set", one)))
    assert code == 2
    assert "metric: 'val_" in told
    assert not (folder / "home" / "hpo.db").exists()


def test_a_test_folder_without_a_class_is_scored_by_those_that_occur() -> None:
    confusion = confusion_matrix(np.array([0, 0, 1]), np.array([0, 0, 1]), 3)
    found = Evaluation(0.0, 1.0, 1.0, np.array([0, 0, 1]), np.array([0, 0, 1]), 3)
    assert (found.confusion == confusion).all()
    told = full_scores(found, NAMES)
    assert (told["macro_precision"], told["macro_recall"], told["macro_f1"]) == (1.0, 1.0, 1.0)
    assert absent_classes(told) == (
        "1 class has no images here: [b]lue. Macro scores are means over the classes with images "
        "or answers."
    )
    assert "top5" not in told
