"""load.py beside the weights: the same network from torch and torchvision alone."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from torch import nn

from hpo.config.train import TrainConfig
from hpo.paths import Home
from hpo.trained.inference import TrainedModel
from hpo.trained.plain import loader_text, torch_lines
from hpo.trained.run import RunMetadata, TrainedRun
from hpo.training import models
from tests.harness.trained import pictures, predict, tiny_config, train_run

ABOUT = RunMetadata(
    classes=("a cat's", 'a "dog"', "x"),
    mean=(0.5, 0.4, 0.3),
    std=(0.2, 0.2, 0.2),
    fingerprint="",
    keep_validation=False,
    has_test=True,
    epochs=1,
)


def rebuilt(config: TrainConfig) -> tuple[nn.Module, nn.Module]:
    """Return the network of a configuration, and that of its load.py; shapes alone."""
    count = len(ABOUT.classes)
    with torch.device("meta"):
        model = models.build(
            config.model, classes=count, image_size=config.data.image_size, pretrained=False
        )
        names: dict[str, Any] = {"__name__": "load", "__file__": "load.py"}
        exec(loader_text(config, ABOUT, model), names)
        assert tuple(names["CLASSES"]) == ABOUT.classes
        return model, names["network"]()


@pytest.mark.parametrize(
    "model",
    [
        {"architecture": "resnet18", "stem": "small", "dropout": 0.3},
        {"architecture": "mobilenet_v3_small", "dropout": 0.5},
        {"architecture": "convnext_tiny", "head": {"hidden": [8], "dropout": [0.1]}},
        {"architecture": "squeezenet1_1", "head": {"hidden": [8, 4], "batch_norm": True}},
        {"architecture": "googlenet"},
        {"architecture": "vit_b_32"},
        {"architecture": "shufflenet_v2_x0_5", "head": {"hidden": []}},
        {"cnn": {"filters": [4, 4], "norm": [True, False], "residual": [False, True],
                 "pool_sizes": [2, 1], "pool": "average", "hidden": [5], "adaptive_pool": 2}},
        {"cnn": {"filters": [4]}, "head": {"hidden": [6]}},
    ],
    ids=lambda model: model.get("architecture", "small_cnn"),
)  # fmt: skip
def test_load_py_builds_the_same_network(model: dict[str, Any]) -> None:
    built, plain = rebuilt(TrainConfig.parse({"model": model, "data": {"image_size": 64}}))
    shapes = {name: tensor.shape for name, tensor in built.state_dict().items()}
    assert {name: tensor.shape for name, tensor in plain.state_dict().items()} == shapes

    def kinds(network: nn.Module) -> list[str]:
        return [repr(part).replace("DropoutLinear", "Linear") for part in network.children()]

    assert kinds(plain) == kinds(built)


def test_load_py_answers_as_the_run_does(trained_run: TrainedRun) -> None:
    root = Path(str(trained_run.config.data.root))
    seed = trained_run.seeds[0]
    plain = runpy.run_path(str(seed.files.loader))
    model = plain["load"]()
    one = TrainedModel.load(seed.files.root, device="cpu")
    images = sorted((root / "test").rglob("*.png"))[:6]
    for image, answer in zip(images, one.predict(images, k=3), strict=True):
        found = dict(zip(plain["CLASSES"], plain["predict"](model, image).tolist(), strict=True))
        assert found == pytest.approx(dict(answer.rows), abs=1e-5)


def test_the_header_of_the_weights_tells_what_they_are(trained_run: TrainedRun) -> None:
    about = trained_run.metadata
    with safetensors.safe_open(trained_run.seeds[1].files.weights, "pt") as file:
        told = file.metadata()
    assert (told["architecture"], told["seed"], told["image_size"]) == ("small_cnn", "1", "12")
    assert json.loads(told["classes"]) == list(about.classes)
    assert (json.loads(told["mean"]), json.loads(told["std"])) == (
        list(about.mean),
        list(about.std),
    )


def test_a_run_without_load_py_gets_one(
    trained_run: TrainedRun, run_copy: TrainedRun, home: Home
) -> None:
    file = run_copy.seeds[0].files.loader
    before = file.read_text()
    file.unlink()
    assert torch_lines(run_copy) == ()
    train_run(trained_run.config, run_copy.path, home, seeds=2)  # finished: nothing is trained
    assert file.read_text() == before
    assert torch_lines(run_copy)[0] == "import runpy"


def test_a_network_of_the_users_own_is_loaded_by_hpo(nets: None) -> None:
    own = {"architecture": "nets:build", "options": {"name": "Plain"}}
    config = TrainConfig.parse({"model": own, "data": {"image_size": 8}})
    model = models.build(config.model, classes=3, image_size=8)
    text = loader_text(config, ABOUT, model)
    assert "nets:build is not in torch or torchvision, so hpo loads it" in text
    assert "hpo.TrainedModel.load(folder)" in text
    compile(text, "load.py", "exec")


@pytest.mark.slow
def test_load_py_needs_no_hpo(tmp_path: Path, home: Home) -> None:
    """In a process where hpo cannot be imported, by the three lines, too."""
    root = pictures(tmp_path)
    config = tiny_config(
        root,
        {"epochs": 1, "model": {"architecture": "mobilenet_v3_small"}, "data.image_size": 32},
    )
    run = train_run(config, tmp_path / "run", home)
    image = root / "test/class1/0001.png"
    lines = [*torch_lines(run), "print(sorted(model.state_dict()) != [])"]
    assert lines[1] == "model = torchvision.models.mobilenet_v3_small(num_classes=3)"
    script = tmp_path / "three.py"
    script.write_text("\n".join(["import sys; sys.modules['hpo'] = None", *lines]))
    blocked = (
        "import sys, runpy; sys.modules['hpo'] = None; "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    loaded = run.seeds[0].files.loader
    for args in ([str(script)], ["-c", blocked, str(loaded), str(image)]):
        found = subprocess.run(
            [sys.executable, *args],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    [answer] = predict(run, [image])
    name, probability = answer.rows[0]
    told = found.stdout.split("  ")
    assert told[0] == str(image)
    best, share = told[1].split(" ")
    assert (best, float(share)) == (name, pytest.approx(probability, abs=2e-4))
