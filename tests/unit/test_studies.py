"""Every study that we ship: loads, checks, and runs a trial, shrunk, on data of the real format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from hpo.config.study import StudyFile
from hpo.paths import Home
from hpo.search.status import read_status
from hpo.storage.database import Database
from hpo.trained.dry_run import check
from tests.harness.formats import make_cars, make_set, unchecked
from tests.harness.images import make_folder
from tests.harness.searches import search

FOLDER = Path(__file__).parents[2] / "studies"
STUDIES = sorted(path.stem for path in FOLDER.glob("*.toml"))
TABLE = (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for weights of the form of torchvision's downloads."""
    return tmp_path_factory.mktemp("weights")


def weights_of(folder: Path, architecture: str) -> Path:
    """A state dict with ImageNet's thousand classes, as a download would bring it."""
    path = folder / f"{architecture}.pth"
    if not path.exists():
        torch.manual_seed(0)
        torch.save(torchvision.models.get_model(architecture).state_dict(), path)
    return path


def make_data(name: str, root: Path) -> None:
    if name == "stanford_cars":
        make_cars(root)
    elif name == "folder":
        make_folder(root, count=12, classes=3, size=(72, 64))
    elif name != "digits":
        make_set(name, root)


def shrunk(name: str, root: Path, weights: Path) -> StudyFile:
    """The study `name` with one small trial, on data made under `root`."""
    whole = StudyFile.load(FOLDER / f"{name}.toml")
    config = whole.config(whole.space.corners()[0])
    kind = config.data.dataset
    small: dict[str, Any] = {"study.trials": 1, "study.pruner": "none", "data.loader_workers": 0}
    small |= {"runtime.precision": "float32", "runtime.memory_format": "contiguous"}
    if "batch_size" not in whole.space:
        small["batch_size"] = 8
    if kind != "digits":
        make_data(kind, root)
        small |= {"data.root": str(root)}
    if config.data.image_size > 32:
        small |= {"data.image_size": 64, "data.resize_size": 64}
    if config.phases:
        small |= {f"phases.{i}.epochs": 1 for i in range(len(config.phases))}
    else:
        small |= {"epochs": 1}
    architecture = config.model.architecture
    if architecture == "resnet50":
        architecture = "resnet18"
    if architecture != "small_cnn":
        small |= {"model.architecture": architecture}
    if config.model.weights:
        small |= {"model.weights": str(weights_of(weights, architecture))}
    if config.task == "retrieval":
        small |= {"retrieval.pca": 2}
    return StudyFile.load(FOLDER / f"{name}.toml", small)


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_a_study_runs_on_data_of_the_real_format(
    name: str,
    tmp_path: Path,
    weights: Path,
    database: Database,
    home: Home,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unchecked(monkeypatch)
    file = shrunk(name, tmp_path / "data", weights)
    found = str(check(file, home=home, device="cpu", workers=1, threads=1))
    assert "nothing was written" in found or "train:" in found
    search(database, home, file)
    status = read_status(database, file.name)
    assert [trial.state for trial in status.trials] == ["complete"]
    assert status.trials[0].value is not None


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_has_its_row_in_the_table(name: str) -> None:
    assert f"hpo run studies/{name}.toml" in TABLE


@pytest.mark.parametrize("name", [name for name in STUDIES if name.startswith("report")])
def test_a_reproduction_prunes_nothing_and_begins_with_the_report_s_choice(name: str) -> None:
    file = StudyFile.load(FOLDER / f"{name}.toml")
    assert file.study.pruner.name == "none"
    assert file.baselines
