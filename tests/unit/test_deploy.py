"""ONNX files and ensembles: what a run has beside its weights, from one look at the test set."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.torch
import torch
from sklearn.metrics import accuracy_score, log_loss
from torch import Tensor, nn

from hpo.cli.tables import networks_table, run_notes
from hpo.config.train import TrainConfig
from hpo.data import dataset
from hpo.errors import DataError, HpoError, InputError
from hpo.extras import install_command
from hpo.paths import Home
from hpo.reports.training import training_report
from hpo.trained.onnx_files import OnnxTargets
from hpo.trained.run import RunDir, TrainedRun, load_run
from hpo.training import evaluation, models
from hpo.training import onnx as onnx_files
from hpo.training.onnx import OnnxNetwork, difference, export, quantize
from hpo.training.tasks import TASKS
from tests.harness.trained import pictures, tiny_config, train_run

ALL = {"model.onnx": "float32", "model-int8-dynamic.onnx": "int8 dynamic"}
ALL["model-int8-static.onnx"] = "int8 static"
PLAIN = {"loss", "top1", "macro_precision", "macro_recall", "macro_f1", "balanced_accuracy"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def config(root: Path) -> TrainConfig:
    return tiny_config(root, {"epochs": 8, "model.cnn.filters": [8, 16]})


@pytest.fixture(scope="module")
def run(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """Two seeds with every file; the test set was opened twice."""
    folder = tmp_path_factory.mktemp("runs")
    opened = []
    with pytest.MonkeyPatch.context() as patched:
        real = dataset.open_test

        def counted(*args: Any) -> Any:
            opened.append(args)
            return real(*args)

        patched.setattr(dataset, "open_test", counted)
        found = train_run(
            config, folder / "run", Home(folder), seeds=2, onnx=True, quantize=["dynamic", "static"]
        )
    assert len(opened) == 2
    return found


@pytest.fixture
def sealed(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the test set must not be opened."""

    def refuse(*_: object) -> None:
        raise AssertionError("the test set was opened again")

    monkeypatch.setattr(dataset, "open_test", refuse)


def test_images(run: TrainedRun) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Normalised as the properties of the file say, by hand: (15, 3, 12, 12), and labels."""
    props = properties(run.seeds[0].files.root / "model.onnx")
    images = dataset.open_test(run.config.data, run.path.parent / "cache")
    assert images is not None
    # Kept at 16 x 12 or so: the centre of each.
    batch = []
    for i in range(len(images)):
        pixels = images.pixels(i)
        top, left = (round((side - 12) / 2) for side in pixels.shape[:2])
        batch.append(pixels[top : top + 12, left : left + 12])
    mean, std = (np.array(json.loads(props[name])) for name in ("mean", "std"))
    normal = (np.stack(batch) / 255 - mean) / std
    return normal.transpose(0, 3, 1, 2).astype(np.float32), images.labels


test_images.__test__ = False  # type: ignore[attr-defined]


def properties(path: Path) -> dict[str, str]:
    return {one.key: one.value for one in onnx.load(str(path)).metadata_props}


def small(classes: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(400, classes)
    ).eval()


# The files


def test_every_file_has_its_scores_size_and_latency(run: TrainedRun) -> None:
    for one in run.seeds:
        assert {entry["file"]: entry["precision"] for entry in one.onnx} == ALL
        for entry in one.onnx:
            assert set(entry["test"]) == PLAIN
            assert entry["bytes"] == (one.files.root / entry["file"]).stat().st_size
            assert entry["latency_ms"] > 0
            assert ("max_difference" in entry) == (entry["precision"] == "float32")
        exported = one.onnx[0]
        assert 0 <= exported["max_difference"] < onnx_files.TOLERANCE
        for score in PLAIN:
            assert exported["test"][score] == pytest.approx(one.metrics["test"][score], abs=1e-4)
        assert not [path for path in one.files.root.iterdir() if path.name.startswith(".")]
    top1 = [one.onnx[2]["test"]["top1"] for one in run.seeds]
    assert run.summary["onnx"]["model-int8-static.onnx"]["top1"]["mean"] == sum(top1) / 2


def test_int8_stands_in_the_files(run: TrainedRun) -> None:
    for name, operators in [
        ("model-int8-dynamic.onnx", {"MatMulInteger", "Conv"}),
        ("model-int8-static.onnx", {"QuantizeLinear", "DequantizeLinear"}),
    ]:
        path = run.seeds[0].files.root / name
        assert operators <= {node.op_type for node in onnx.load(str(path)).graph.node}
        assert properties(path)["quantization"] == f"int8 {name.split('-')[2].split('.')[0]}"


def test_the_properties_are_enough_to_use_the_file(run: TrainedRun) -> None:
    images, labels = test_images(run)
    one = run.seeds[1]
    path = one.files.root / "model.onnx"
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"images": images})
    assert accuracy_score(labels, logits.argmax(1)) == one.metrics["test"]["top1"]
    props = properties(path)
    assert json.loads(props["classes"]) == list(run.classes)
    assert props["input"].startswith("images: (batch, 3, 12, 12) float32, RGB")
    assert props["normalisation"] == "(pixel / 255 - mean) / std, by channel"
    assert str(Path(__file__).parents[2]).encode() not in path.read_bytes()


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_batches_of_any_size(run: TrainedRun, batch: int) -> None:
    for name in ALL:
        written = OnnxNetwork(run.seeds[0].files.root / name)
        assert written(torch.zeros(batch, 3, 12, 12)).shape == (batch, 3)


def test_another_network_is_told_apart(tmp_path: Path) -> None:
    network, images = small(), torch.randn(4, 3, 12, 12)
    export(network, tmp_path / "m.onnx", image_size=12, metadata={})
    written = OnnxNetwork(tmp_path / "m.onnx", threads=1)
    assert difference(network, written, images) < 1e-5
    for change in (0.1, float("nan")):
        with torch.no_grad():
            network[4].bias[0] += change
        with pytest.raises(HpoError, match=r"differ by (0\.1|nan) .* without --onnx"):
            difference(network, written, images)


class Deciding(nn.Module):
    """Its path depends on its input's values."""

    def forward(self, images: Tensor) -> Tensor:
        pooled = images.mean(dim=(2, 3))
        return pooled if images.sum() > 0 else -pooled


def test_what_cannot_be_exported_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be written as ONNX: ."):
        export(Deciding(), tmp_path / "m.onnx", image_size=12, metadata={})
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_quantise_is_told(tmp_path: Path) -> None:
    images = [torch.randn(2, 3, 12, 12)]
    convolving = nn.Sequential(nn.Conv2d(3, 3, 12), nn.Flatten()).eval()
    export(convolving, tmp_path / "c.onnx", image_size=12, metadata={})
    with pytest.raises(InputError, match=r"--quantize dynamic: .*or take static"):
        quantize(tmp_path / "c.onnx", tmp_path / "d.onnx", "dynamic", images)
    quantize(tmp_path / "c.onnx", tmp_path / "s.onnx", "static", images)
    export(nn.Sequential(nn.ReLU(), nn.Flatten()), tmp_path / "r.onnx", image_size=12, metadata={})
    with pytest.raises(InputError, match=r"--quantize static: .*leave it out$"):
        quantize(tmp_path / "r.onnx", tmp_path / "d.onnx", "static", images)


@pytest.mark.parametrize(
    "architecture", ["resnet18", pytest.param("squeezenet1_1", marks=pytest.mark.slow)]
)
def test_architectures_answer_as_torch_does(tmp_path: Path, architecture: str) -> None:
    settings = TrainConfig.parse({"model": {"architecture": architecture}}).model
    torch.manual_seed(0)
    network = models.build(settings, classes=3, image_size=32).eval()
    images = torch.randn(6, 3, 32, 32)
    export(network, tmp_path / "m.onnx", image_size=32, metadata={})
    quantize(tmp_path / "m.onnx", tmp_path / "q.onnx", "static", [images])
    with torch.no_grad():
        expected = network(images)
    exact, int8 = (OnnxNetwork(tmp_path / name)(images) for name in ("m.onnx", "q.onnx"))
    torch.testing.assert_close(exact, expected, rtol=1e-3, atol=1e-4)
    assert (int8 - expected).norm() < 0.2 * expected.norm()


# Bad values


@pytest.mark.parametrize("kind", ["", "int8", "Static"])
def test_unknown_kinds_are_refused(
    config: TrainConfig, tmp_path: Path, home: Home, kind: str
) -> None:
    with pytest.raises(InputError, match=f"--quantize {kind}: (allowed|did you mean).*static"):
        train_run(config, tmp_path / "run", home, quantize=[kind])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("asked", [{"onnx": True}, {"quantize": ["static"]}])
def test_a_missing_extra_is_one_clear_line(
    config: TrainConfig,
    tmp_path: Path,
    home: Home,
    asked: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(onnx_files, "PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(InputError) as caught:
        train_run(config, tmp_path / "run", home, **asked)
    assert str(caught.value) == f"ONNX needs no_such_package: {install_command('onnx')}"
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_made_is_told_before_the_training(
    config: TrainConfig, tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_files, "TOLERANCE", -1.0)
    with pytest.raises(HpoError, match="differ by"):
        train_run(config, tmp_path / "run", home, onnx=True)
    assert not RunDir(tmp_path / "run").exists


def test_a_retrieval_has_no_files(root: Path, tmp_path: Path, home: Home) -> None:
    config = tiny_config(root, {"task": "retrieval", "epochs": 1})
    with pytest.raises(InputError, match=r"retrieval.* has no ONNX files: leave --onnx"):
        train_run(config, tmp_path / "run", home, onnx=True)
    assert not (tmp_path / "run").exists()


def test_one_kind_twice_is_one_file() -> None:
    assert dict(OnnxTargets.of(TASKS["classification"], quantize=["static", "static"]).files) == {
        "model.onnx": "float32",
        "model-int8-static.onnx": "int8 static",
    }
    assert not OnnxTargets.of(TASKS["classification"]).files


# Resuming


@pytest.mark.usefixtures("sealed")
def test_a_finished_run_is_left_as_it_is(run: TrainedRun, config: TrainConfig) -> None:
    before = [one.files.metrics.read_bytes() for one in run.seeds]
    home = Home(run.path.parent)
    again = train_run(config, run.path, home, seeds=2, onnx=True, quantize=["static"])
    assert [one.files.metrics.read_bytes() for one in again.seeds] == before
    assert again == run == load_run(run.path)


def test_files_for_a_finished_seed_are_written_and_not_tested(
    config: TrainConfig, tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = config.model_copy(update={"epochs": 1})
    plain = train_run(short, tmp_path / "run", home)
    assert plain.seeds[0].onnx == []
    assert plain.summary["onnx"] == {}

    def refuse(*_: object) -> None:
        raise AssertionError("the test set was opened again")

    monkeypatch.setattr(dataset, "open_test", refuse)
    lines: list[str] = []
    late = train_run(short, tmp_path / "run", home, onnx=True, progress=lines.append)
    assert lines[-1] == "seed 0: new files are not tested, the test set was opened before"
    (entry,) = late.seeds[0].onnx
    assert (entry["file"], entry["test"]) == ("model.onnx", None)
    assert entry["max_difference"] < onnx_files.TOLERANCE
    assert set(late.summary["onnx"]["model.onnx"]) == {"bytes", "latency_ms"}
    assert late.seeds[0].metrics["test"] == plain.seeds[0].metrics["test"]
    assert "model.onnx" in training_report(late)
    assert networks_table(late).row_count == 1


# The ensemble


def test_the_ensemble_is_the_mean_of_probabilities(run: TrainedRun) -> None:
    images, labels = test_images(run)
    members = []
    for one in run.seeds:
        assert set(safetensors.torch.load_file(one.files.weights))
        session = onnxruntime.InferenceSession(str(one.files.root / "model.onnx"))
        members.append(
            torch.from_numpy(session.run(None, {"images": images})[0]).double().softmax(1)
        )
    mean = torch.stack(members).mean(0).numpy()
    found = run.summary["ensemble"]
    assert found["top1"] == accuracy_score(labels, mean.argmax(1))
    assert found["loss"] == pytest.approx(log_loss(labels, mean), abs=1e-5)
    assert sum(map(sum, found["confusion"])) == len(labels)


def test_the_ensemble_stands_beside_its_members(run: TrainedRun) -> None:
    assert json.loads(RunDir(run.path).summary.read_text())["ensemble"] == run.summary["ensemble"]
    rows = list(networks_table(run).columns[0].cells)
    assert [str(row) for row in rows] == ["seed 0", "seed 1", "ensemble of 2", *ALL]
    notes = " ".join(run_notes([run]))
    assert "mean of the seeds' probabilities" in notes
    assert "ONNX logits differ from torch's" in notes
    page = training_report(run)
    assert "<td>ensemble</td>" in re.sub(r" data-key=\"[^\"]*\"", "", page)
    assert "int8 static" in page


def test_stored_answers_are_those_of_the_test(run: TrainedRun) -> None:
    for one in run.seeds:
        stored = evaluation.load_logits(one.files.test_logits)
        assert stored.logits.shape == (15, 3)
        top1 = (stored.logits.argmax(1) == stored.labels).mean()
        assert top1 == one.metrics["test"]["top1"]
        assert stored.names[0].startswith("test/class0/")


def test_a_seed_later_joins_from_stored_answers(
    config: TrainConfig, tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = config.model_copy(update={"epochs": 1})
    first = train_run(short, tmp_path / "run", home)
    assert first.ensemble is None
    assert not RunDir(tmp_path / "run").ensemble.exists()
    opened: list[object] = []
    real = dataset.open_test
    monkeypatch.setattr(dataset, "open_test", lambda *a: (opened.append(a), real(*a))[1])
    both = train_run(short, tmp_path / "run", home, seeds=2)
    assert len(opened) == 1
    assert both.ensemble is not None
    assert both.ensemble["seeds"] == [0, 1]
    assert load_run(tmp_path / "run" / "seed-1").summary["ensemble"] is None
    # Without the answers of a seed there is none, and the run says why.
    RunDir(tmp_path / "run").seed(0).test_logits.unlink()
    lacking = train_run(short, tmp_path / "run", home, seeds=2)
    assert lacking.summary["ensemble"] is None
    assert lacking.notes[-1].startswith("No ensemble: there are no logits")
    assert [str(cell) for cell in networks_table(lacking).columns[0].cells] == ["seed 0", "seed 1"]
    RunDir(tmp_path / "run").seed(0).test_logits.write_bytes(b"PK no archive")
    with pytest.raises(DataError, match=r"test\.npz cannot be read: .*; remove it"):
        train_run(short, tmp_path / "run", home, seeds=2)


def test_other_test_images_make_no_ensemble(
    config: TrainConfig, tmp_path: Path, home: Home
) -> None:
    own = tiny_config(pictures(tmp_path), {"epochs": 1})
    assert own.data.root
    train_run(own, tmp_path / "run", home)
    next(Path(own.data.root).glob("test/class0/*")).unlink()
    changed = train_run(own, tmp_path / "run", home, seeds=2)
    assert changed.summary["ensemble"] is None
    assert changed.notes[-1] == "No ensemble: the test images changed from one seed to another."


def test_without_a_test_split(tmp_path: Path, home: Home) -> None:
    config = tiny_config(pictures(tmp_path, {"train": 8, "val": 4}), {"epochs": 2})
    run = train_run(config, tmp_path / "run", home, seeds=2, onnx=True, keep_validation=True)
    assert run.ensemble is None
    assert not run.seeds[0].files.test_logits.exists()
    assert [entry["test"] for entry in run.seeds[0].onnx] == [None]
    assert networks_table(run).row_count == 1
    text = training_report(run)
    assert f'data-key="{run.seeds[0].metrics["val"]["loss"]:.9g}"' in text
    assert "validation top1 ±" in text
    assert "n = 2" in text
    assert "results on the validation images" in text
    assert 'id="confusion"' not in text


def test_kept_validation_is_shown_beside_the_test(
    config: TrainConfig, tmp_path: Path, home: Home
) -> None:
    short = config.model_copy(update={"epochs": 1})
    run = train_run(short, tmp_path / "run", home, seeds=2, keep_validation=True)
    page = training_report(run)
    assert "validation top1" in page
    assert f'data-key="{run.seeds[0].metrics["val"]["loss"]:.9g}"' in page
    assert 'id="confusion"' in page


@pytest.mark.parametrize("members", [1, 3])
def test_certain_and_wrong_members_give_a_finite_loss(members: int) -> None:
    logits = np.array([[1e4, 0, 0], [0, 0, -1e4]], np.float32)
    found = evaluation.mean_evaluation([logits] * members, np.array([1, 0]))
    assert found.loss == pytest.approx((1e4 + np.log(2)) / 2)
    assert found.predictions.tolist() == [0, 0]
    assert found.top5 == 1.0
