"""Architectures and losses of the user's own, found from the working directory."""

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from torch import nn

from hpo.config.model import ModelConfig
from hpo.config.parameters import Choice, Int
from hpo.config.schema import json_schema
from hpo.config.study import StudyFile, parse_study
from hpo.config.toml import parse as parse_toml
from hpo.config.train import TrainConfig
from hpo.errors import ConfigError
from hpo.training import models
from hpo.training.checkpoint import Checkpoint, best_weights, load_trained, save_weights
from hpo.training.learner import Learner
from hpo.training.losses import focal, make_loss
from tests.harness.training import CPU, assert_resumes, config, files, run

MINE = """
import random

import numpy
import torch
from torch import nn
from torch.nn import functional
from torchvision import models


class Net(nn.Module):
    def __init__(self, classes, image_size):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.features = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.fc = nn.Linear(4 * (image_size - 2) ** 2, classes)

    def forward(self, x):
        return self.fc(self.features(self.stem(x)).flatten(1))


def net(classes, image_size):
    return Net(classes, image_size)


def deep(classes, image_size, width=4, name="fc"):
    model = Net(classes, image_size)
    model.stem = nn.Conv2d(3, width, 3, padding=1)
    model.features = nn.Sequential(nn.Conv2d(width, 4, 3), nn.ReLU())
    model.called = name
    return model


def with_blocks(classes, image_size):
    model = Net(classes, image_size)
    model.blocks = [model.stem, model.features]
    return model


def without_blocks(classes, image_size):
    model = Net(classes, image_size)
    model.body = model.features
    del model.features
    model.forward = lambda x: model.fc(model.body(model.stem(x)).flatten(1))
    return model


def resnet(classes, image_size):
    return models.resnet18(num_classes=classes)


def strange_blocks(classes, image_size):
    model = Net(classes, image_size)
    model.blocks = [nn.Linear(1, 1)]
    return model


class Tied(Net):
    # One weight has two names, and layers are left out at random.

    def __init__(self, classes, image_size):
        super().__init__(classes, image_size)
        self.again = nn.Conv2d(4, 4, 3, padding=1)
        self.once_more = nn.Conv2d(4, 4, 3, padding=1)
        self.once_more.weight = self.again.weight

    def forward(self, x):
        x = self.stem(x)
        if not self.training or random.random() < 0.5:
            x = self.again(x)
        if not self.training or numpy.random.rand() < 0.5:
            x = self.once_more(x)
        return self.fc(self.features(x).flatten(1))


def tied(classes, image_size):
    return Tied(classes, image_size)


def raises(classes, image_size):
    raise KeyError("width")


def too_few(classes, image_size):
    return Net(classes - 1, image_size)


def breaks(classes, image_size):
    return Net(classes, image_size + 1)


def no_module(classes, image_size):
    return 3


def no_arguments():
    return Net(3, 8)


def no_linear(classes, image_size):
    return nn.Sequential(nn.Conv2d(3, classes, image_size), nn.Flatten())


def a_pair(classes, image_size):
    model = Net(classes, image_size)
    forward = model.forward
    model.forward = lambda x: (forward(x), None)
    return model


not_a_function = 3


def squares(logits, labels):
    return ((logits.softmax(1) - functional.one_hot(labels, logits.shape[1])) ** 2).sum(1)


def mean_of_squares(logits, labels):
    return squares(logits, labels).mean()


def per_logit(logits, labels):
    return logits ** 2


def detached(logits, labels):
    return squares(logits, labels).detach()


def a_number(logits, labels):
    return 1.0


def broken(logits, labels):
    return logits[:, 99].mean()
"""


@pytest.fixture(autouse=True)
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module of the user's in the working directory."""
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "damaged.py").write_text("import nowhere_to_be_found")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in ("mine", "damaged"):
        sys.modules.pop(name, None)


def build(name: str, **fields: Any) -> nn.Module:
    chosen = ModelConfig.model_validate({"architecture": f"mine:{name}", **fields})
    return models.build(chosen, classes=3, image_size=8)


def learning(model: nn.Module) -> set[str]:
    return {name.split(".")[0] for name, one in model.named_parameters() if one.requires_grad}


class TestArchitectures:
    @pytest.mark.parametrize(
        ("name", "blocks", "last"),
        [
            ("net", 2, {"features", "fc"}),
            ("with_blocks", 2, {"features", "fc"}),
            ("resnet", 4, {"layer4", "fc"}),
        ],
    )
    def test_blocks_and_head(self, name: str, blocks: int, last: set[str]) -> None:
        model = build(name)
        assert len(models.blocks(model)) == blocks
        assert learning(model) == {part for part, one in model.named_children()
                                   if any(True for _ in one.parameters())}  # fmt: skip
        models.set_trainable(model, 1)
        assert learning(model) == last
        models.set_trainable(model, 0)
        assert learning(model) == {"fc"}

    def test_without_blocks_the_head_alone_or_all_learns(self) -> None:
        model = build("without_blocks")
        frozen = models.set_trainable(model, 0)
        assert learning(model) == {"fc"}
        assert model.body in frozen
        with pytest.raises(ConfigError, match="1: this network has 0 blocks"):
            models.set_trainable(model, 1)

    def test_its_last_layer_is_kept_unless_a_head_is_asked_for(self) -> None:
        torch.manual_seed(0)
        whole = build("net").state_dict()
        torch.manual_seed(0)
        own = sys.modules["mine"].Net(3, 8).state_dict()
        assert all(torch.equal(whole[name], own[name]) for name in own)
        headed = build("net", head={"hidden": [5]})
        assert [type(one) for one in headed.fc[0]] == [nn.Linear, nn.ReLU, nn.Dropout, nn.Linear]
        models.set_trainable(headed, 0)
        assert sum(one.requires_grad for one in headed.parameters()) == 4
        assert build("net", dropout=0.5).fc.dropout == 0.5

    def test_it_trains_resumes_and_comes_back(self, tmp_path: Path) -> None:
        settings = config(model={"architecture": "mine:net"}, ema_decay=0.9)
        last = assert_resumes(settings, tmp_path, 2)[-1]
        assert last.checkpoint is not None
        save_weights(tmp_path / "w.safetensors", best_weights(last.checkpoint), {})
        loaded = load_trained(tmp_path / "w.safetensors", settings.model, classes=3, image_size=8)
        assert loaded(torch.zeros(1, 3, 8, 8)).shape == (1, 3)
        again = build("net", weights=str(tmp_path / "w.safetensors"))
        assert torch.equal(again.fc.weight, loaded.fc.weight)

    def test_it_may_tie_weights_and_draw_from_any_generator(self, tmp_path: Path) -> None:
        settings = config(model={"architecture": "mine:tied"})
        before = random.getstate(), np.random.get_state()[1].tolist()
        last = assert_resumes(settings, tmp_path, 2)[-1]
        assert (random.getstate(), np.random.get_state()[1].tolist()) == before
        assert last.checkpoint is not None
        weights = best_weights(last.checkpoint)
        save_weights(tmp_path / "w.safetensors", weights, {})
        loaded = load_trained(tmp_path / "w.safetensors", settings.model, classes=3, image_size=8)
        assert torch.equal(loaded.get_submodule("once_more").weight, weights["again.weight"])

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("mine:raises", "'mine:raises' raised KeyError: 'width'"),
            ("mine:too_few", "the network of 'mine:too_few' made a tensor of shape (2, 2) of 2 "
             "images; allowed: logits of shape (2, 3), one for each class"),
            ("mine:a_pair", "the network of 'mine:a_pair' made tuple of 2 images; allowed: logits "
             "of shape (2, 3), one for each class"),
            ("mine:breaks", "the network of 'mine:breaks' raised RuntimeError: "),
            ("mine:no_module", "'mine:no_module' returned int, not a nn.Module"),
            ("mine:no_arguments", "'mine:no_arguments' raised TypeError: no_arguments() got an "
             "unexpected keyword argument 'classes'"),
            ("mine:no_linear", "the network of 'mine:no_linear' has no nn.Linear; its head is its "
             "last linear layer"),
            ("mine:strange_blocks", "`blocks` of the network of 'mine:strange_blocks' is not a "
             "list of modules in it"),
            ("mine:not_a_function", "'mine:not_a_function' cannot be imported (TypeError: it is "
             "int, not a function)"),
            ("mine:missing", "'mine:missing' cannot be imported (AttributeError: module 'mine' has "
             "no attribute 'missing'); it is looked for in the working directory"),
            ("nowhere:net", "'nowhere:net' cannot be imported (ModuleNotFoundError: there is no "
             "nowhere.py, and no folder nowhere)"),
            ("damaged:net", "'damaged:net' cannot be imported (ModuleNotFoundError: No module "
             "named 'nowhere_to_be_found')"),
        ],
    )  # fmt: skip
    def test_one_that_does_not_work(self, name: str, message: str) -> None:
        with pytest.raises(ConfigError) as caught:
            models.build(ModelConfig(architecture=name), classes=3, image_size=8)
        assert str(caught.value).startswith(f"model.architecture: {message}")

    def test_options_are_arguments(self) -> None:
        model = build("deep", options={"width": 6, "name": "x"})
        assert (model.stem.out_channels, model.called) == (6, "x")
        with pytest.raises(ConfigError, match=r"'mine:net' raised TypeError: .*'width'"):
            build("net", options={"width": 6})

    def test_options_are_searched(self) -> None:
        text = """
        [study]
        name = "widths"
        [train.model]
        architecture = "mine:deep"
        options.name = "fixed"
        [space]
        model.options.width = {low = 2, high = 8}
        model.options.rate = [0.1, 0.5]
        """
        jsonschema.Draft7Validator(json_schema()).validate(parse_toml(text))
        file = parse_study(text)
        assert file.space == {"model.options.width": Int(low=2, high=8),
                              "model.options.rate": Choice(choices=(0.1, 0.5))}  # fmt: skip
        made = file.config({"model.options.width": 3, "model.options.rate": 0.5})
        assert made.model.options == {"name": "fixed", "width": 3, "rate": 0.5}
        assert TrainConfig.parse(made.to_dict()) == made
        again = StudyFile.from_definition(file.definition())
        assert again.definition() == file.definition()
        fixed = parse_study(text, overrides={"model.options.width": 4})
        assert list(fixed.space) == ["model.options.rate"]
        assert fixed.config({"model.options.rate": 0.1}).model.options["width"] == 4

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"classes": 3}, "model.options: {\"classes\": 3}: allowed: names of arguments other "
             "than classes and image_size"),
            ({"a b": 3}, "model.options: {\"a b\": 3}: allowed: names of arguments other than "
             "classes and image_size"),
            ({"width": [1]}, "model.options.width: [1]: allowed: a number, a text, true or false"),
            (3, "model.options: 3: allowed: a table"),
        ],
    )  # fmt: skip
    def test_options_that_are_none(self, options: Any, message: str) -> None:
        with pytest.raises(ConfigError) as caught:
            TrainConfig.parse({"model": {"options": options}})
        assert str(caught.value) == message

    def test_fields_that_do_not_fit_it(self) -> None:
        with pytest.raises(ConfigError, match=r"model\.stem: 'small': mine:net has none"):
            build("net", stem="small")
        with pytest.raises(ConfigError, match="mine:net has none by name; give a file"):
            build("net", weights="DEFAULT")
        with pytest.raises(ConfigError, match="unknown architecture; your own is named module:fun"):
            TrainConfig.parse({"model": {"architecture": "mine:"}})


def logits() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(6, 3, requires_grad=True), torch.arange(6) % 3


class TestLosses:
    @pytest.mark.parametrize("smoothing", [0.0, 0.2])
    def test_cross_entropy(self, smoothing: float) -> None:
        loss = make_loss(config(label_smoothing=smoothing))(*logits())
        expected = nn.CrossEntropyLoss(label_smoothing=smoothing)(*logits())
        torch.testing.assert_close(loss, expected)

    @pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
    def test_focal_is_its_formula(self, gamma: float) -> None:
        values, labels = logits()
        right = values.softmax(1)[range(6), labels]
        expected = -((1 - right) ** gamma * right.log()).mean()
        settings = config(loss="focal", focal_gamma=gamma)
        torch.testing.assert_close(make_loss(settings)(values, labels), expected)

    def test_focal_without_gamma_is_cross_entropy(self) -> None:
        torch.testing.assert_close(focal(*logits(), 0.0, 0.1).mean(),
                                   nn.CrossEntropyLoss(label_smoothing=0.1)(*logits()))  # fmt: skip

    def test_focal_has_a_slope_where_all_is_right(self) -> None:
        sure = torch.tensor([[100.0, 0.0]], requires_grad=True)
        focal(sure, torch.tensor([0]), 0.5).mean().backward()
        assert sure.grad is not None
        assert sure.grad.isfinite().all()

    def test_ones_own_may_be_a_mean_or_single_losses(self) -> None:
        single = make_loss(config(loss="mine:squares"))(*logits())
        mean = make_loss(config(loss="mine:mean_of_squares"))(*logits())
        torch.testing.assert_close(single, mean)
        assert single.shape == ()

    @pytest.mark.parametrize("loss", ["focal", "mine:squares"])
    def test_they_train_and_resume(self, tmp_path: Path, loss: str) -> None:
        whole = assert_resumes(config(loss=loss, epochs=6), tmp_path, 2)
        assert whole[-1].metrics["train_loss"] < whole[0].metrics["train_loss"]
        assert whole[0].metrics["train_loss"] != run(config())[0].metrics["train_loss"]

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("per_logit", "'mine:per_logit' returned a tensor of shape (16, 3) for 16 images; "
             "allowed: a differentiable tensor of shape () or (16,)"),
            ("detached", "'mine:detached' returned a tensor without a gradient for 16 images; "
             "allowed: a differentiable tensor of shape () or (16,)"),
            ("a_number", "'mine:a_number' returned float for 16 images; allowed: a differentiable "
             "tensor of shape () or (16,)"),
            ("broken", "'mine:broken' raised IndexError: index 99 is out of bounds for dimension 1 "
             "with size 3"),
            ("missing", "'mine:missing' cannot be imported (AttributeError: module 'mine' has no "
             "attribute 'missing')"),
        ],
    )  # fmt: skip
    def test_one_that_does_not_work(self, tmp_path: Path, name: str, message: str) -> None:
        with pytest.raises(ConfigError) as caught:
            run(config(loss=f"mine:{name}"), checkpoint=files(tmp_path / "out"))
        assert str(caught.value).startswith(f"loss: {message}")
        assert not (tmp_path / "out").exists()

    def test_an_unknown_name(self) -> None:
        with pytest.raises(ConfigError) as caught:
            config(loss="focall")
        assert str(caught.value) == (
            'loss: "focall": unknown loss (your own is named module:function); did you mean '
            "'focal'?"
        )


class TestAverage:
    @pytest.mark.parametrize("after", [1, 3])
    def test_resumed_equals_uninterrupted(self, tmp_path: Path, after: int) -> None:
        phases = [{"epochs": 2, "trainable_blocks": 0}, {"epochs": 3}]
        assert_resumes(config(ema_decay=0.9, phases=phases), tmp_path, after)

    def test_it_is_the_average_over_the_steps(self) -> None:
        made = Learner(config(ema_decay=0.5), classes=3, device=CPU)
        assert made.average is not None
        expected = {name: value.clone() for name, value in made.model.state_dict().items()}
        images, labels = torch.randn(8, 3, 8, 8), torch.arange(8) % 3
        for step in range(1, 21):
            made.train_mode()
            made.step((images, labels), 0.1)
            decay = min(0.5, (1 + step) / (10 + step))
            for name, value in made.model.state_dict().items():
                old = expected[name]
                mean = decay * old + (1 - decay) * value
                expected[name] = mean if value.is_floating_point() else value.clone()
        for name, value in made.average.model.state_dict().items():
            torch.testing.assert_close(value, expected[name])
        assert not made.average.model.training
        assert made.model.training

    def test_the_average_is_what_is_evaluated_and_kept(self, tmp_path: Path) -> None:
        at = files(tmp_path)
        results = run(config(ema_decay=0.99), checkpoint=at)
        plain = run(config())
        assert [one.metrics["train_loss"] for one in results] == [
            one.metrics["train_loss"] for one in plain
        ]
        assert results[0].metrics["val_loss"] != plain[0].metrics["val_loss"]
        best = best_weights(at(4))
        kept = Checkpoint.load(at(results[-1].best_epoch))
        assert kept.average is not None
        assert all(torch.equal(best[name], kept.average[name]) for name in best)
        assert any(not torch.equal(best[name], kept.model[name]) for name in best)

    @pytest.mark.parametrize("decay", [0.0, 1.0])
    def test_its_range(self, decay: float) -> None:
        with pytest.raises(ConfigError, match="ema_decay"):
            config(ema_decay=decay)


class TestRatesOfTheBackbone:
    def test_the_head_learns_at_the_rate_and_the_rest_at_its_part(self) -> None:
        made = Learner(config(optimizer={"backbone_lr_factor": 0.1}), classes=3, device=CPU)
        made.step((torch.randn(8, 3, 8, 8), torch.arange(8) % 3), 0.5)
        head, rest = made.optimizer.param_groups
        assert (head["lr"], rest["lr"]) == (0.5, pytest.approx(0.05))
        named = {id(one): name for name, one in made.model.named_parameters()}
        assert {named[id(one)].split(".")[0] for one in head["params"]} == {"classifier"}
        assert {named[id(one)].split(".")[0] for one in rest["params"]} == {"features"}

    def test_a_frozen_backbone_leaves_one_group(self) -> None:
        fields = {"optimizer": {"backbone_lr_factor": 0.1}, "phases": [
            {"epochs": 1, "trainable_blocks": 0}, {"epochs": 1}]}  # fmt: skip
        made = Learner(config(**fields), classes=3, device=CPU)
        assert len(made.optimizer.param_groups) == 1
        made.start_phase(made.config.phase_of(2))
        assert len(made.optimizer.param_groups) == 2

    @pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "rmsprop"])
    def test_resumed_equals_uninterrupted(self, tmp_path: Path, name: str) -> None:
        optimizer = {"name": name, "lr": 0.01, "backbone_lr_factor": 0.1}
        assert_resumes(config(optimizer=optimizer), tmp_path, 2)

    def test_a_factor_of_one_changes_nothing(self) -> None:
        made = Learner(config(), classes=3, device=CPU)
        assert len(made.optimizer.param_groups) == 1


def test_the_schema_takes_names_of_ones_own() -> None:
    fields = json_schema()["definitions"]
    for path in ("loss", "model.architecture"):
        assert "pattern" in fields[path]["anyOf"][1]
