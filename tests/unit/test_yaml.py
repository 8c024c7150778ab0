"""Study files in YAML say what the same file in TOML says."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpo.config import yaml
from hpo.config.study import StudyFile, load_config
from hpo.errors import ConfigError

STUDY = """\
study:
  trials: 12
  metric: val_top1
train:
  epochs: 3
  clip_grad_norm: null      # off
  data: {dataset: digits}
  model.dropout: 0.1
space:
  optimizer.name: [sgd, adamw]
  optimizer.lr: {low: 1e-4, high: 1e-1, log: true}
  batch_size: [32, 64]
baseline:
  - optimizer.lr: 1e-2
"""
SAME = """\
[study]
trials = 12
metric = "val_top1"
[train]
epochs = 3
clip_grad_norm = "none"
data = {dataset = "digits"}
model.dropout = 0.1
[space]
optimizer.name = ["sgd", "adamw"]
optimizer.lr = {low = 1e-4, high = 1e-1, log = true}
batch_size = [32, 64]
[[baseline]]
optimizer.lr = 1e-2
"""


def test_a_study_in_yaml_is_the_same_study(tmp_path: Path) -> None:
    one, other = tmp_path / "digits.yaml", tmp_path / "other" / "digits.toml"
    other.parent.mkdir()
    one.write_text(STUDY)
    other.write_text(SAME)
    assert StudyFile.load(one).definition() == StudyFile.load(other).definition()
    assert StudyFile.load(one, {"study.trials": 3}).study.trials == 3


def test_a_configuration_in_yaml(tmp_path: Path) -> None:
    path = tmp_path / "best.yml"
    path.write_text("epochs: 3\ndata.dataset: digits\noptimizer: {lr: 0.05}\n")
    assert load_config(path)[0].optimizer.lr == 0.05


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"), ("on", "on"), ("true", True), ("1e-3", 1e-3), ("1.5", 1.5), ("010", 10),
        ("0x10", 16), ("2024-01-02", "2024-01-02"), ("1:30", "1:30"), ("~", "none"), ("", "none"),
        ("'1'", "1"), (".inf", float("inf")), ("1_000", "1_000"),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    found = yaml.parse(f"x: {text}")["x"]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a: 1\na: 2", "a stands twice (at line 2, column 1)"),
        ("a: &x [1]\nb: *x", "aliases (*name) are not read (at line 2, column 4)"),
        ("a: [1", "(at line 1, column"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("- 1", "no tables such as study:"),
        ("? [a]\n: 1", "a name is text"),
        ("a: " + "[" * 5000, "nested too deep"),
        ("a: " + "[" * 100 + "]" * 100, "nested more than 32 deep"),
        ("a: 1\n\tb: 2", "line 2"),
        ("b: 1\na: !!int foo", "'foo' cannot be read as int (at line 2, column 4)"),
        ("a: !!bool foo", "'foo' cannot be read as bool"),
        ("a: !!timestamp foo", "'foo' cannot be read as timestamp"),
        ("a: " + "9" * 5000, "999...' cannot be read as int"),
        ("a: !!map foo", "expected a mapping node"),
        ("a: !!set [b]", "expected a mapping node"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        StudyFile.load(path)
    assert why in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_file_names_the_nearest_of_either_kind(tmp_path: Path) -> None:
    (tmp_path / "photos.yaml").write_text(STUDY)
    with pytest.raises(ConfigError, match=r"photos\.yaml"):
        StudyFile.load(tmp_path / "photo.yaml")
