"""A run trained once more: bit for bit, or with what explains the difference."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner, Result

import hpo
from hpo.cli.main import app
from hpo.errors import Conflict, DataError
from hpo.paths import Home
from hpo.trained.reproduce import compare_runs, reproduce
from hpo.trained.run import TrainedRun, load_run
from hpo.training.checkpoint import save_weights
from tests.harness.trained import pictures, tiny_config, train_run

DIGITS = {
    "epochs": 2,
    "batch_size": 64,
    "data": {"dataset": "digits", "limit_train": 200},
    "model": {"cnn": {"filters": [4]}},
}


def told(*args: str) -> Result:
    return CliRunner().invoke(app, args, env={"COLUMNS": "200"})


def test_a_run_on_digits_is_reproduced_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its precision, layout and threads chosen by timing, and two seeds."""
    monkeypatch.setenv("HPO_HOME", str(tmp_path))
    run = hpo.train(DIGITS, out=tmp_path / "run", seeds=2, device="cpu", progress=None)
    assert run.config.runtime.precision != "auto"
    found = told("reproduce", str(run.path))
    assert found.exit_code == 0, found.output
    assert "reproduced: bit for bit" in found.stdout
    assert "seed 1: all " in found.stdout
    again = load_run(tmp_path / "run.again")
    for one, other in zip(run.loaded.seeds, again.seeds, strict=True):
        weights = safetensors.torch.load_file(other.files.weights)
        for name, tensor in safetensors.torch.load_file(one.files.weights).items():
            assert torch.equal(tensor, weights[name])
        assert one.files.test_logits.read_bytes() == other.files.test_logits.read_bytes()
    assert again.config == run.config
    with pytest.raises(Conflict, match=r"run\.again holds a finished training; remove it"):
        reproduce(run.path, home=Home(tmp_path), device="cpu")


def altered(run: TrainedRun, **environment: str) -> TrainedRun:
    """Change one weight of the first seed, and what the run recorded of its environment."""
    file = run.seeds[0].files.weights
    state = safetensors.torch.load_file(file)
    first = next(one for one in state.values() if one.is_floating_point())
    first.view(-1)[0] += 0.5
    save_weights(file, state, {})
    recorded = run.metadata.environment | environment
    replace(run.metadata, environment=recorded).write(run.files.about)
    return load_run(run.path)


def test_other_bits_without_a_reason_are_no_reproduction(
    trained_run: TrainedRun, run_copy: TrainedRun
) -> None:
    same = compare_runs(trained_run, run_copy)
    assert (same.exact, same.reproduced, same.changed) == (True, True, {})
    other = compare_runs(altered(run_copy), trained_run)
    assert [one.differing for one in other.seeds] == [1, 0]
    assert other.seeds[0].largest == pytest.approx(0.5, rel=1e-3)
    assert not other.reproduced
    assert "nothing that decides them changed" in other.verdict


def test_another_torch_explains_other_bits_but_other_code_does_not(
    trained_run: TrainedRun, run_copy: TrainedRun
) -> None:
    older = compare_runs(altered(run_copy, torch="1.0"), trained_run)
    assert older.reproduced
    assert not older.exact
    assert older.verdict.startswith("reproduced within the noise of 15 images")
    assert "torch 1.0 -> " in older.verdict
    seeds = tuple(replace(one, before=1.0, now=0.0) for one in older.seeds)
    far = replace(older, seeds=seeds)
    assert not far.reproduced
    assert "more than 15 images explain" in far.verdict
    code = {"code hpo sources": "0"}
    current = {"torch": trained_run.metadata.environment["torch"]}
    coded = compare_runs(altered(run_copy, **code, **current), trained_run)
    assert not coded.reproduced
    assert "the code changed" in coded.verdict


def test_a_run_of_an_earlier_version_recorded_no_versions(
    trained_run: TrainedRun, run_copy: TrainedRun
) -> None:
    about: dict[str, Any] = json.loads(run_copy.files.about.read_text())
    del about["environment"]
    run_copy.files.about.write_text(json.dumps(about))
    old = compare_runs(load_run(run_copy.path), trained_run)
    assert (old.exact, old.changed) == (True, {})
    assert "recorded no versions" in " ".join(old.reasons)


def test_other_images_are_refused_before_anything_is_trained(tmp_path: Path, home: Home) -> None:
    root = pictures(tmp_path)
    run = train_run(tiny_config(root, {"epochs": 1}), tmp_path / "run", home)
    shutil.copy(root / "test/class0/0000.png", root / "train/class0/new.png")
    with pytest.raises(DataError, match="not the images of the run"):
        reproduce(run.path, home=home)
    assert not (tmp_path / "run.again").exists()


def test_it_can_be_told_as_json(
    run_copy: TrainedRun, trained_run: TrainedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = trained_run.path.parent
    monkeypatch.setenv("HPO_HOME", str(home))
    found = told("reproduce", str(altered(run_copy).path / "seed-0"), "--json")
    assert found.exit_code == 1, found.output
    answer = json.loads(found.stdout)
    assert (answer["reproduced"], answer["exact"], answer["reasons"]) == (False, False, [])
    assert [one["differing"] for one in answer["seeds"]] == [1]
