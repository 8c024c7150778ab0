"""The same folder of images by another path is the same study, and the same run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hpo.config.study import parse_study
from hpo.errors import Conflict
from hpo.paths import Home
from hpo.search import study as studies
from hpo.storage.database import Database
from tests.harness.trained import pictures, tiny_config, train_run

STUDY = """
[study]
name = "s"
trials = 2
[train]
data = {{dataset = "folder", root = "{root}", image_size = 8}}
[space]
optimizer.lr = [0.01, 0.1]
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with photos/, a link to it, a link to its parent, and sub/."""
    pictures(tmp_path).rename(tmp_path / "photos")
    (tmp_path / "sub").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    (tmp_path / "sub" / "up").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("folder", "root"),
    [
        (".", "photos/"),
        (".", "./photos"),
        (".", "sub/../photos"),
        (".", "link"),
        (".", "link/"),
        ("sub", "../photos"),
        ("sub", "up/photos"),
        ("sub", "up/sub/up/link"),
        ("photos", "."),
    ],
)
def test_the_same_folder_is_no_other_definition(
    place: Path, database: Database, monkeypatch: pytest.MonkeyPatch, folder: str, root: str
) -> None:
    first, made = studies.create(database, parse_study(STUDY.format(root="photos"), "s.toml"))
    assert made
    config = tiny_config(place / "photos", {"epochs": 1})
    train_run(config, place / "run", Home(place / "home"))
    monkeypatch.chdir(place / folder)
    again, made = studies.create(database, parse_study(STUDY.format(root=root), "s.toml"))
    assert not made
    assert again.row == first.row
    other = tiny_config(Path(root).absolute(), {"epochs": 1})
    assert train_run(other, place / "run", Home(place / "home")).metadata.fingerprint


@pytest.mark.parametrize("gone", [False, True])
def test_another_folder_is_one(place: Path, database: Database, gone: bool) -> None:
    studies.create(database, parse_study(STUDY.format(root="photos"), "s.toml"))
    shutil.copytree(place / "photos", place / "copy")
    if gone:
        shutil.rmtree(place / "photos")
    with pytest.raises(Conflict, match=r"train\.data\.root: .*photos.* -> .*copy"):
        studies.create(database, parse_study(STUDY.format(root="copy"), "s.toml"))
    link = place / "link"
    link.unlink()
    link.symlink_to(place / "copy")
    with pytest.raises(Conflict, match=r"train\.data\.root"):
        studies.create(database, parse_study(STUDY.format(root="link"), "s.toml"))
