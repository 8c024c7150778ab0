"""Networks of timm: built, cut into blocks, started from weights, trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hpo.config.model import ModelConfig
from hpo.config.train import TrainConfig
from hpo.errors import ConfigError, DataError
from hpo.paths import Home
from hpo.training import models, timm_models, timm_names
from hpo.training.weights import find_weights, needed_weights
from tests.harness.trained import pictures, tiny_config, train_run


def built(architecture: str = "timm:test_resnet", *, classes: int = 3, **fields: Any) -> Any:
    config = ModelConfig(architecture=architecture, **fields)
    return models.build(config, classes=classes, image_size=64)


@pytest.mark.parametrize(
    ("name", "blocks", "head"),
    [("test_resnet", 4, "fc"), ("test_vit", 6, "head"), ("test_convnext", 4, "head.fc")],
)
def test_blocks_and_head_are_timms(name: str, blocks: int, head: str) -> None:
    model = built(f"timm:{name}", trainable_blocks=1)
    family = models.family(model)
    assert len(family.blocks.split("|")) == blocks
    assert family.head == head
    assert model.get_submodule(head).out_features == 3
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 3)


def test_dropout_and_options_reach_the_network() -> None:
    assert built(dropout=0.4).drop_rate == 0.4
    with pytest.raises(ConfigError, match="no_such"):
        built(options={"no_such": 1})


@pytest.mark.parametrize(
    ("architecture", "why"),
    [
        ("timm:resnet1888", "unknown model of timm"),
        ("timm:deit_tiny_distilled_patch16_224", "not one linear layer"),
        ("timm:", "own is named module:function"),
        ("timm:a b", "own is named module:function"),
    ],
)
def test_what_cannot_be_built_is_told(architecture: str, why: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=why):
        built(architecture)


def test_weights_of_a_file_fit_another_number_of_classes(tmp_path: Path) -> None:
    known = built(classes=7)
    path = tmp_path / "known.safetensors"
    save_file({name: one.contiguous() for name, one in known.state_dict().items()}, path)
    model = models.build(
        ModelConfig(architecture="timm:test_resnet", weights=str(path)), classes=3, image_size=64
    )
    own = model.state_dict()
    for name, one in known.state_dict().items():
        if not name.startswith("fc."):
            assert torch.equal(one, own[name]), name
    other = tmp_path / "other.safetensors"
    save_file({"nothing": torch.zeros(1)}, other)
    with pytest.raises(DataError, match=r"other\.safetensors"):
        built(weights=str(other))


def test_weights_are_named_as_timm_names_them() -> None:
    found = find_weights("DEFAULT", "timm:vit_tiny_patch16_224")
    assert "timm/vit_tiny_patch16_224" in found.url
    with pytest.raises(ConfigError, match="augreg_in21k"):
        find_weights("nonsense", "timm:vit_tiny_patch16_224")
    values = {"architecture": "timm:resnet18", "weights": "DEFAULT"}
    (needed,) = needed_weights([TrainConfig.parse({"model": values})])
    assert "resnet18" in needed.url


def test_the_normalisation_is_that_of_the_weights() -> None:
    mean, std = timm_models.normalization(ModelConfig(architecture="timm:vit_tiny_patch16_224"))
    assert mean == std == (0.5, 0.5, 0.5)


def test_without_timm_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm_names, "find_spec", lambda name: None)
    timm_names.hub_repositories.cache_clear()
    with pytest.raises(ConfigError, match=r"needs timm: .*install .*\[timm\]"):
        find_weights("DEFAULT", "timm:resnet18")
    timm_names.hub_repositories.cache_clear()


def test_one_is_trained_and_predicts(tmp_path: Path) -> None:
    values = {
        "model.architecture": "timm:test_resnet", "model.trainable_blocks": 1,
        "data.image_size": 64, "data.normalize": "pretrained", "epochs": 1,
    }  # fmt: skip
    config = tiny_config(pictures(tmp_path), values)
    run = train_run(config, tmp_path / "run", Home(tmp_path / "home"))
    assert run.metadata.mean != (0.0, 0.0, 0.0)
    assert run.seeds[0].metrics["test"]["loss"] > 0
