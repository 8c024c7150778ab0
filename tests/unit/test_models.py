"""Networks of every family: build, stem, head, weights, and what is trained."""

import pickle
import urllib.error
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

from hpo.config.model import TORCHVISION_ARCHITECTURES, ModelConfig
from hpo.errors import ConfigError, DataError
from hpo.training import models, pretrained
from hpo.training.weights import weights_of

QUICK = {"small_cnn", "resnet18", "mobilenet_v2", "vit_b_32"}
# One small member of each family: image size, stem, blocks.
FAMILIES = {
    "small_cnn": (8, "small", 3),
    "alexnet": (32, "small", 5),
    "convnext_tiny": (32, "default", 8),
    "densenet121": (32, "small", 10),
    "efficientnet_b0": (32, "small", 9),
    "googlenet": (32, "small", 9),
    "inception_v3": (75, "default", 11),
    "maxvit_t": (224, "default", 4),
    "mnasnet0_5": (32, "small", 14),
    "mobilenet_v2": (32, "small", 19),
    "mobilenet_v3_small": (32, "small", 13),
    "regnet_y_400mf": (32, "small", 4),
    "resnet18": (32, "small", 4),
    "shufflenet_v2_x0_5": (32, "small", 4),
    "squeezenet1_1": (32, "small", 9),
    "swin_t": (32, "default", 8),
    "vgg11": (32, "small", 8),
    "vit_b_32": (32, "default", 12),
}


def build(architecture: str = "small_cnn", size: int = 32, **fields: Any) -> nn.Module:
    config = ModelConfig.model_validate({"architecture": architecture, **fields})
    return models.build(config, classes=3, image_size=size)


def learning(model: nn.Module) -> set[str]:
    """The outermost names of what learns."""
    return {
        name.split(".")[0] for name, part in model.named_parameters() if part.requires_grad
    }  # fmt: skip


def test_the_list_of_architectures_is_torchvisions() -> None:
    known = torchvision.models.list_models(module=torchvision.models)
    assert sorted(TORCHVISION_ARCHITECTURES) == sorted(known)


@pytest.mark.parametrize(
    "name",
    [pytest.param(one, marks=() if one in QUICK else pytest.mark.slow) for one in FAMILIES],
)
def test_a_member_of_each_family(name: str) -> None:
    size, stem, count = FAMILIES[name]
    model = build(name, size, stem=stem, dropout=0.25).eval()
    assert len(models.blocks(model)) == count
    frozen = models.set_trainable(model, 0)
    head = models.family(model).head
    learners = [key for key, part in model.named_parameters() if part.requires_grad]
    assert learners
    assert all(key.startswith(head + ".") for key in learners)
    assert frozen
    rates = [part.p for part in model.get_submodule(head).modules() if isinstance(part, nn.Dropout)]
    rates += [part.dropout for part in model.modules() if isinstance(part, models.DropoutLinear)]
    rates += [model.dropout.p] if name in ("googlenet", "inception_v3") else []
    assert rates
    assert set(rates) == {0.25}
    logits = model(torch.zeros(1, 3, size, size))
    assert logits.shape == (1, 3)


@pytest.mark.parametrize(
    "name", ["resnet18", "squeezenet1_1", "mobilenet_v3_small", "convnext_tiny", "vit_b_32"]
)
def test_a_head_of_ones_own(name: str) -> None:
    head = {
        "hidden": [16, 8],
        "activations": ["leaky_relu"],
        "dropout": [0.1, 0.2],
        "batch_norm": True,
    }
    model = build(name, head=head)
    place = model.get_submodule(models.family(model).head)
    assert isinstance(place, nn.Sequential)
    own = place[-1]
    assert isinstance(own, nn.Sequential)
    kinds = [nn.Linear, nn.BatchNorm1d, nn.LeakyReLU, nn.Dropout]
    assert [type(layer) for layer in own] == [*kinds, *kinds, nn.Linear]
    assert [layer.p for layer in own if isinstance(layer, nn.Dropout)] == [0.1, 0.2]
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 3)


BLOCKS = {
    "mobilenet_v2": ("features.0", "features.18", 19),
    "mobilenet_v3_small": ("features.0", "features.12", 13),
    "mobilenet_v3_large": ("features.0", "features.16", 17),
    "resnet18": ("layer1", "layer4", 4),
    "resnet50": ("layer1", "layer4", 4),
    "alexnet": ("features.0", "features.10", 5),
    "efficientnet_b0": ("features.0", "features.8", 9),
    "efficientnet_b7": ("features.0", "features.8", 9),
    "vit_b_16": ("encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_11", 12),
    "convnext_tiny": ("features.0", "features.7", 8),
}
"""The first block, the last, and how many there are."""


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_counted_the_same_way(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name)
    parts = models.blocks(model)
    names = {id(part): path for path, part in model.named_modules()}
    paths = [names[id(part)] for part in parts]
    with capsys.disabled():
        print(f"\n{name}: {len(paths)} blocks, {paths[0]} to {paths[-1]}")
    assert (paths[0], paths[-1], len(paths)) == BLOCKS[name]
    for last in range(len(parts) + 1):  # each block brings weights of its own
        models.set_trainable(model, last)
        learning = {key for key, one in model.named_parameters() if one.requires_grad}
        moving = {path for path in paths if any(key.startswith(f"{path}.") for key in learning)}
        assert moving == set(paths[len(paths) - last :])


def test_an_empty_head_is_one_linear_layer() -> None:
    own = build("resnet18", head={"hidden": []}).fc[-1]
    assert [type(layer) for layer in own] == [nn.Linear]


def test_the_small_stem_keeps_the_picture_large() -> None:
    model = build("resnet18", stem="small")
    assert (model.conv1.kernel_size, model.conv1.stride) == ((3, 3), (1, 1))
    before = model.layer1(model.maxpool(model.conv1(torch.zeros(1, 3, 32, 32))))
    assert before.shape[-2:] == (32, 32)


def test_a_stem_that_cannot_be_small_names_those_that_can() -> None:
    with pytest.raises(ConfigError, match=r"model\.stem: 'small': swin_t has none; .*ResNet"):
        build("swin_t", stem="small")


@pytest.mark.parametrize(
    ("name", "size"), [("alexnet", 32), ("inception_v3", 32), ("vit_b_16", 100), ("maxvit_t", 64)]
)
def test_an_image_size_that_does_not_fit(name: str, size: int) -> None:
    with pytest.raises(ConfigError, match=rf"data\.image_size: {size}: {name} cannot take"):
        build(name, size)


@pytest.mark.parametrize(
    ("name", "size", "advised"),
    [("alexnet", 32, True), ("inception_v3", 60, False), ("vgg11", 16, False)],
)
def test_a_small_stem_is_advised_where_there_is_one(name: str, size: int, advised: bool) -> None:
    with pytest.raises(ConfigError, match="choose a larger image_size") as error:
        build(name, size)
    assert ('or model.stem = "small"' in str(error.value)) == advised


@pytest.mark.parametrize("filters", [(4,), (4, 4, 4, 4, 4, 4)])
def test_small_cnn_of_any_depth_at_8_pixels(filters: tuple[int, ...]) -> None:
    model = build(size=8, cnn={"filters": list(filters)})
    assert len(models.blocks(model)) == len(filters)
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 3)


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ("all", {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc"}),
        (0, {"fc"}),
        (2, {"layer3", "layer4", "fc"}),
        (4, {"layer1", "layer2", "layer3", "layer4", "fc"}),
        ({"first": 1}, {"layer1", "fc"}),
        ({"start": 1, "stop": 3}, {"layer2", "layer3", "fc"}),
    ],
)
def test_trainable_blocks(chosen: Any, expected: set[str]) -> None:
    model = build("resnet18")
    frozen = models.set_trainable(model, chosen)
    assert learning(model) == expected
    names = {name for name, part in model.named_modules() if any(part is one for one in frozen)}
    assert names == {name for name, _ in model.named_children()} - expected - {
        "avgpool",
        *(("relu", "maxpool") if chosen == "all" else ()),
    }


@pytest.mark.parametrize("chosen", [5, {"first": 5}, {"start": 0, "stop": 5}])
def test_more_blocks_than_there_are(chosen: Any) -> None:
    with pytest.raises(ConfigError, match=r"model\.trainable_blocks: .* has 4 blocks"):
        models.set_trainable(build("resnet18"), chosen)


def test_a_final_norm_learns_with_the_last_block() -> None:
    model = build("vit_b_32")
    norm, position = model.encoder.ln.weight, model.encoder.pos_embedding
    models.set_trainable(model, 1)
    assert (norm.requires_grad, position.requires_grad) == (True, False)
    models.set_trainable(model, {"first": 1})
    assert not norm.requires_grad
    models.set_trainable(model, "all")
    assert position.requires_grad


def test_the_frozen_prefix_is_not_recorded_by_autograd() -> None:
    model = build("resnet18")
    models.set_trainable(model, 1)
    recorded = {}
    for name in ("layer3", "layer4"):
        model.get_submodule(name).register_forward_hook(
            lambda _part, _inputs, output, name=name: recorded.update({name: output.requires_grad})
        )
    model(torch.zeros(2, 3, 32, 32))
    assert recorded == {"layer3": False, "layer4": True}


def saved(model: nn.Module, path: Path) -> Path:
    state = model.state_dict()
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)
    return path


def same(ours: nn.Module, theirs: nn.Module) -> dict[str, bool]:
    """By outermost name: whether all tensors are equal."""
    other = theirs.state_dict()
    found: dict[str, bool] = {}
    for name, value in ours.state_dict().items():
        equal = value.shape == other[name].shape and torch.equal(value, other[name])
        top = name.split(".")[0]
        found[top] = found.get(top, True) and equal
    return found


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_of_other_classes_leave_the_head_random(tmp_path: Path, suffix: str) -> None:
    source = torchvision.models.resnet18(num_classes=10)
    path = saved(source, tmp_path / f"weights{suffix}")
    loaded = same(build("resnet18", weights=str(path)), source)
    assert not loaded.pop("fc")
    assert all(loaded.values())


def test_weights_of_the_same_classes_bring_their_head(tmp_path: Path) -> None:
    source = build("resnet18", dropout=0.5)
    path = saved(source, tmp_path / "weights.safetensors")
    assert all(same(build("resnet18", weights=str(path)), source).values())


def test_only_the_last_layer_of_a_long_classifier_is_new(tmp_path: Path) -> None:
    source = torchvision.models.mobilenet_v3_small(num_classes=10)
    path = saved(source, tmp_path / "weights.pth")
    model = build("mobilenet_v3_small", weights=str(path))
    assert torch.equal(model.classifier[0].weight, source.classifier[0].weight)
    own = build("mobilenet_v3_small", weights=str(path), head={"hidden": [4]})
    assert torch.equal(own.features[0][0].weight, source.features[0][0].weight)


def test_wrapped_weights_of_parallel_training(tmp_path: Path) -> None:
    source = build(cnn={"filters": [4]})
    state = {f"module.{name}": value for name, value in source.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "weights.pt")
    model = build(cnn={"filters": [4]}, weights=str(tmp_path / "weights.pt"))
    assert all(same(model, source).values())


def test_weights_that_do_not_fit_list_the_keys(tmp_path: Path) -> None:
    path = saved(build(cnn={"filters": [4, 4]}), tmp_path / "weights.pth")
    with pytest.raises(DataError, match=r"features\.1\.conv\.weight, .* \(7 in all\) unexpected"):
        build(cnn={"filters": [4]}, weights=str(path))
    with pytest.raises(DataError, match=r"features\.2\.conv\.weight, .* missing"):
        build(cnn={"filters": [4, 4, 4]}, weights=str(path))
    with pytest.raises(DataError, match=r"\(4, 3, 3, 3\) instead of \(8, 3, 3, 3\)"):
        build(cnn={"filters": [8, 4]}, weights=str(path))


def test_a_small_stem_does_not_take_weights_of_a_large_one(tmp_path: Path) -> None:
    path = saved(torchvision.models.resnet18(), tmp_path / "weights.pth")
    with pytest.raises(DataError, match=r"conv1\.weight \(64, 3, 7, 7\) instead of"):
        build("resnet18", weights=str(path), stem="small")


def test_position_embeddings_are_stretched(tmp_path: Path) -> None:
    source = torchvision.models.vit_b_32(image_size=64)
    path = saved(source, tmp_path / "weights.pth")
    model = build("vit_b_32", 96, weights=str(path))
    assert model.encoder.pos_embedding.shape == (1, 10, 768)
    assert torch.equal(model.conv_proj.weight, source.conv_proj.weight)


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Path.touch, (Path("evil"),)


def test_code_in_a_file_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with (tmp_path / "weights.pth").open("wb") as file:
        torch.save({"weight": Evil()}, file)
    with pytest.raises(DataError, match="holds code, which is never run"):
        build(weights=str(tmp_path / "weights.pth"))
    (tmp_path / "weights.pt").write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(DataError, match="holds code, which is never run"):
        build(weights=str(tmp_path / "weights.pt"))
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_a_file_that_is_no_weights(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"not weights at all")
    with pytest.raises(DataError, match=name):
        build(weights=str(tmp_path / name))
    with pytest.raises(DataError, match="no such file"):
        build(weights=str(tmp_path / f"missing-{name}"))


def test_a_file_of_something_else(tmp_path: Path) -> None:
    torch.save([1, 2, 3], tmp_path / "weights.pth")
    with pytest.raises(DataError, match="not a state dict"):
        pretrained.read_file(tmp_path / "weights.pth")


def test_an_unknown_weights_name_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r"resnet50 has IMAGENET1K_V1, IMAGENET1K_V2"):
        build("resnet50", 64, weights="IMAGENET1K_V9")
    with pytest.raises(ConfigError, match="small_cnn has none by name"):
        build(weights="DEFAULT")


def test_weights_that_cannot_be_downloaded_never_become_random(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def offline(*_args: object, **_kwargs: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("hpo.training.weights.urlopen", offline)
    with pytest.raises(
        DataError, match=r"no network.*Put .*resnet18-.*\.pth into .*--from-scratch"
    ):
        build("resnet18", weights="DEFAULT")


def test_a_file_in_torch_hubs_cache_runs_no_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Code:
        def __reduce__(self) -> Any:
            return (tmp_path / "touched").mkdir, ()

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = weights_of("resnet18")["DEFAULT"].path
    path.parent.mkdir(parents=True)
    torch.save({"fc.weight": Code()}, path)
    with pytest.raises(DataError, match="cannot be read"):
        build("resnet18", weights="DEFAULT")
    assert not (tmp_path / "touched").exists()


def test_names_in_densenets_old_files() -> None:
    old = "features.denseblock1.denselayer2.norm.1.running_mean"
    assert pretrained._modern(old) == "features.denseblock1.denselayer2.norm1.running_mean"
    assert pretrained._modern("features.norm5.weight") == "features.norm5.weight"
