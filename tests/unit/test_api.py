"""The public interface: `import hpo`, and the examples in its docstrings."""

from __future__ import annotations

import doctest
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

import hpo
from hpo.api.study import interruptible
from hpo.errors import Conflict, HpoError, InputError, Interrupted, NotFound
from tests.harness.filled import Trial, fill
from tests.harness.images import make_folder
from tests.unit.test_imports import HEAVY, loaded_by

ROOT = Path(__file__).parents[2]


def examples() -> Iterator[Any]:
    """Every doctest in the docstrings of the public classes, their methods, and functions."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    for name in hpo.__all__:
        found = getattr(hpo, name)
        if not isinstance(found, str):
            for test in finder.find(found, name, module=False, globs={}):
                if test.examples:
                    yield pytest.param(test, id=test.name)


@pytest.mark.parametrize("example", list(examples()))
def test_an_example_of_a_docstring_runs(
    example: doctest.DocTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "studies").symlink_to(ROOT / "studies")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HPO_STORAGE", raising=False)
    monkeypatch.setenv("HPO_HOME", str(tmp_path / "hpo_runs"))
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    said: list[str] = []
    result = runner.run(example, out=said.append)
    assert not result.failed, "".join(said)


def test_names_are_imported_when_they_are_asked_for(tmp_path: Path) -> None:
    assert not loaded_by("import hpo; hpo.__version__; dir(hpo)", tmp_path) & set(HEAVY)
    asked = "from hpo import Space, Study, StudyFile, TrainConfig, load_study, train"
    assert "torch" not in loaded_by(asked, tmp_path)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Studdy'"):
        _ = hpo.Studdy  # type: ignore[attr-defined]
    assert set(hpo.__all__) <= set(dir(hpo))


@pytest.mark.parametrize("option", ["quantize", "log"])
def test_a_name_alone_is_not_its_letters(tmp_path: Path, option: str) -> None:
    with pytest.raises(InputError, match="nonesuch"):
        hpo.train({"data": {"dataset": "digits"}}, out=tmp_path / "run", **{option: "nonesuch"})


TINY: dict[str, Any] = {
    "study": {"name": "tiny", "trials": 3, "sampler": "random"},
    "train": {"epochs": 3, "batch_size": 64, "data.dataset": "digits", "model.cnn.filters": [4]},
    "space": {"optimizer.lr": {"low": 0.01, "high": 0.1, "log": True}},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a run directory of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HPO_STORAGE", raising=False)
    monkeypatch.setenv("HPO_HOME", str(tmp_path / "hpo_runs"))
    return tmp_path


def walk() -> str:
    """The code of docs/python.md."""
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    return "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))


@pytest.mark.slow
def test_the_walk_of_the_page_runs_as_a_script(folder: Path) -> None:
    """Without a main guard, its output not a terminal."""
    (folder / "walk.py").write_text(walk())
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "walk.py"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert "walk is finished: best trial" in done.stdout
    assert (folder / "walk-model" / "report.html").is_file()


STREAMED = """
import hpo

config = {"epochs": 1, "batch_size": 12, "model": {"cnn": {"filters": [4]}},
          "data": {"dataset": "folder", "root": "images", "image_size": 12, "cache_limit_gb": 0}}
hpo.train(config, out="model", device="cpu")
"""


@pytest.mark.slow
def test_processes_that_decode_do_not_run_the_script_again(folder: Path) -> None:
    make_folder(folder / "images", {"train": 4, "val": 2, "test": 3}, size=(20, 16))
    (folder / "streamed.py").write_text(STREAMED)
    done = subprocess.run(
        [sys.executable, "streamed.py"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 1/1") == 1


@pytest.mark.slow
def test_the_walk_is_typed(folder: Path) -> None:
    """Only the walk's own errors count, as with an installed package."""
    (folder / "walk.py").write_text(walk())
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "walk.py"],
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


@pytest.mark.process
def test_ctrl_c_hands_trials_back_and_the_same_call_goes_on(folder: Path) -> None:
    study = hpo.Study.create({**TINY, "train": {**TINY["train"], "epochs": 300}})
    lines: list[str] = []

    def interrupt() -> None:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and not any(one.epochs for one in study.trials):
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt, match="handed back"):
        study.run(workers=1, device="cpu", progress=lines.append)
    thread.join()
    status = study.status()
    assert [one.state for one in status.trials if one.attempts] == ["interrupted"]
    assert not status.live_workers
    assert any(one.startswith("tiny: 0/3 trials; 1 worker on cpu") for one in lines)
    assert lines[-1].startswith("stopping: running trials are handed back")


def signalled(*numbers: int) -> None:
    """Send this process signals while a search runs."""
    with interruptible("tiny") as stop:
        for number in numbers:
            os.kill(os.getpid(), number)
            assert stop.wait(60)


def test_sigterm_hands_trials_back_too() -> None:
    with pytest.raises(Interrupted, match="of tiny were handed back"):
        signalled(signal.SIGTERM)


def test_a_second_ctrl_c_raises_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as end:
        signalled(signal.SIGINT, signal.SIGINT)
    assert not str(end.value)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_study_is_opened_extended_and_stopped(folder: Path) -> None:
    study = hpo.Study.create(TINY)
    assert hpo.load_study("tiny").file == study.file
    hpo.Study.create({**TINY, "study": {**TINY["study"], "trials": 2}})  # nothing was trained
    assert study.status().row.trials == 2
    study.enqueue({"optimizer.lr": 0.05})
    with pytest.raises(Conflict, match=r"study\.trials: 2 -> 4"):
        hpo.Study.create({**TINY, "study": {**TINY["study"], "trials": 4}})
    study.extend(trials=4)
    study.stop()
    assert (study.status().row.trials, study.status().state) == (4, "stopped")
    study.resume()
    assert study.trials == ()
    with pytest.raises(NotFound, match="no complete trial yet"):
        _ = study.best_trial
    study.delete()
    with pytest.raises(NotFound):
        hpo.load_study("tiny")


def test_workers_that_cannot_work_raise(folder: Path) -> None:
    study = hpo.Study.create(TINY)
    with pytest.raises(InputError, match="workers 0"):
        study.run(workers=0)
    with pytest.raises(HpoError, match="cuda:7"):
        study.run(device="cuda:7")


def test_trials_as_a_frame(folder: Path) -> None:
    pandas = pytest.importorskip("pandas")
    file = hpo.StudyFile.from_dict(TINY)
    study = hpo.Study.create(file)
    fill(study.database, file, [Trial("complete", (0.5, 0.75)), Trial("pruned", (0.25,))])
    frame = study.trials_dataframe()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame["state"]) == ["complete", "pruned"]
    assert list(frame["val_top1"]) == [0.75, 0.25]
    assert frame["optimizer.lr"].between(0.01, 0.1).all()


def test_without_pandas_one_command_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InputError, match=r"install .*pandas"):
        hpo.Study.create(TINY).trials_dataframe()


@pytest.fixture
def model(folder: Path) -> hpo.TrainedModel:
    """A model of small images in folders, trained for a moment."""
    root = make_folder(folder / "images", {"train": 4, "val": 2, "test": 3}, size=(20, 16))
    return hpo.train(
        {"epochs": 1, "batch_size": 12, "data": {"dataset": "folder", "root": str(root),
         "image_size": 12}, "model": {"cnn": {"filters": [4]}}},
        out="model", device="cpu", progress=None,
    )  # fmt: skip


def test_paths_images_and_arrays_are_predicted_alike(model: hpo.TrainedModel) -> None:
    paths = sorted(Path("images/test").rglob("*.*"))
    images = [PIL.Image.open(path) for path in paths]
    by_path = model.predict(paths, k=3)
    assert [one.rows for one in model.predict(images, k=3)] == [one.rows for one in by_path]
    arrays = [np.asarray(one) for one in images]
    assert [one.rows for one in model.predict(arrays, k=3)] == [one.rows for one in by_path]
    trained = PIL.Image.open(next(Path("images/train").rglob("*.*")))
    seen, missing, text = model.predict([trained, "nothing.png", str(paths[0])])
    assert (seen.path, seen.trained_on) == (Path("image 0"), True)
    assert missing.error == "No such file or directory"
    assert text.path == paths[0]
    assert images[0].getpixel((0, 0)) is not None  # it stays open
    assert repr(model) == f"TrainedModel({str(model.path)!r}, seeds=[0], device='cpu')"
    assert model.evaluate().images == len(paths)


def test_an_array_that_is_no_image_is_refused(model: hpo.TrainedModel) -> None:
    for array in (np.zeros((3, 8, 8), "uint8"), np.zeros((8, 8)), np.zeros(8, "uint8")):
        with pytest.raises(InputError, match="an image of"):
            model.predict([array])


def test_nearest_images_of_a_retrieval(folder: Path) -> None:
    root = make_folder(folder / "images", {"train": 4, "val": 2, "test": 3}, size=(20, 16))
    config = {"task": "retrieval", "epochs": 1, "batch_size": 12,
              "data": {"dataset": "folder", "root": str(root), "image_size": 12},
              "model": {"cnn": {"filters": [4]}}}  # fmt: skip
    model = hpo.train(config, out="model", device="cpu", progress=None)
    path = next((root / "test").rglob("*.*"))
    by_path, by_image = model.predict([path, PIL.Image.open(path)], k=2)
    assert len(by_path.rows) == 2
    assert by_path.rows == by_image.rows
