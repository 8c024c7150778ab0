"""Databases and run directories of earlier versions open, and their studies go on.

Each archive in `tests/data` is named after the commit whose code made it. In it: `runs/` (HPO_HOME
with hpo.db: a search of three trials on digits), `best.toml` (`hpo export`), `run/` (`hpo train`).
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from tests.harness.commands import Hpo, calls

DATA = Path(__file__).parents[1] / "data"
VALUES = ["0.5130", "0.3792", "0.5836"]
"""val_top1 of the trials."""
TOP1 = 0.8810
"""Of the trained run, on the test split."""


@pytest.fixture(params=sorted(path.name.partition(".")[0] for path in DATA.glob("*.tar.xz")))
def old(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with everything that the old version left in it."""
    with tarfile.open(DATA / f"{request.param}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def hpo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Hpo:
    call = calls(monkeypatch, capsys)

    def succeed(*args: object) -> tuple[int, str, str]:
        code, out, err = call(*args)
        assert code == 0, err
        return code, out, err

    return succeed


@pytest.mark.usefixtures("old")
def test_a_database_is_read(hpo: Hpo) -> None:
    hpo("storage", "upgrade")
    assert "finished     3/3  val_top1  0.5836" in hpo("list")[1]
    assert "best val_top1 0.5836 (trial 2)" in hpo("status", "old")[1]
    trials = sorted(hpo("trials", "old", "--wide")[1].splitlines()[1:4])
    assert [line.split()[:4] for line in trials] == [
        [str(number), "complete", "2", value] for number, value in enumerate(VALUES)
    ]
    trial = hpo("trial", "old", 2)[1]
    assert "code " in trial
    assert "0.4944" in trial
    assert "trial 2: complete 0.5836" in hpo("logs", "old")[1]
    assert "no faults" in hpo("storage", "check", "--files")[1]
    hpo("report", "old", "-o", "report.html")
    assert "0.5836" in Path("report.html").read_text(encoding="utf-8")


def test_a_study_goes_on(old: Path, hpo: Hpo) -> None:
    hpo("storage", "upgrade")
    hpo("export", "old", "-o", "exported.toml")
    lines = (old / "exported.toml").read_text(encoding="utf-8").splitlines()
    # Later versions know more fields; those that were there are as they were.
    before = (old / "best.toml").read_text(encoding="utf-8").splitlines()
    assert {line for line in before if not line.startswith("exported_at")} <= set(lines)
    hpo("extend", "old", "--trials", 4)
    hpo("worker", "old", "--force")
    assert "4/4  val_top1" in hpo("list")[1]
    trials = sorted(hpo("trials", "old", "--wide")[1].splitlines()[1:5])
    assert [line.split()[3] for line in trials[:3]] == VALUES
    assert trials[3].split()[:3] == ["3", "complete", "2"]
    assert "no faults" in hpo("storage", "check", "--files")[1]


def test_a_trained_run_opens(old: Path, hpo: Hpo) -> None:
    assert f"top1               {TOP1:.4f}" in hpo("evaluate", "run")[1]
    hpo("storage", "upgrade")
    compared = hpo("compare", "old", "run", "-o", "compared.html")[1]
    assert "0.5836" in compared
    assert f"{TOP1:.4f}" in compared
    pixels = (load_digits().images[:10] * (255 / 16)).astype(np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(old / f"{number}.png")
    files = [old / f"{number}.png" for number in range(10)]
    predicted = json.loads(hpo("predict", "run", *files, "--json", "--top", 1)[1])
    assert [Path(image["image"]).name for image in predicted] == [file.name for file in files]


def test_training_again_gives_the_same_scores(old: Path, hpo: Hpo) -> None:
    hpo("train", "best.toml", "-o", "again")
    before, after = (
        json.loads((old / run / "summary.json").read_text(encoding="utf-8"))["test"]
        for run in ("run", "again")
    )
    for score, values in before.items():
        # Another processor sums in another order.
        assert after[score]["mean"] == pytest.approx(values["mean"], abs=0.02)
