"""The command that installs an extra, for each way in which hpo may have been installed."""

from __future__ import annotations

import json
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from hpo import extras

ROOT = Path(extras.__file__).parents[1]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call it with the content of direct_url.json, or None for an installation by name; a virtual
    environment is active."""
    monkeypatch.setenv("VIRTUAL_ENV", sys.prefix)

    def install(origin: dict[str, Any] | None) -> None:
        class Found:
            def read_text(self, name: str) -> str | None:
                assert name == "direct_url.json"
                return None if origin is None else json.dumps(origin)

        monkeypatch.setattr(extras, "distribution", lambda name: Found())

    return install


def test_by_name(installed: Any) -> None:
    installed(None)
    assert extras.install_command("onnx") == "pip install 'hpo-vision[onnx]'"


@pytest.mark.parametrize(("editable", "option"), [(True, "-e "), (False, "")])
def test_a_clone(
    installed: Any, editable: bool, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "my clone"
    folder.mkdir()
    installed({"url": folder.as_uri(), "dir_info": {"editable": editable}})
    assert extras.install_command("s3") == f"pip install {option}'{folder}[s3]'"
    monkeypatch.chdir(folder)
    assert extras.install_command("s3") == f"pip install {option}'.[s3]'"


def test_a_folder_that_is_gone(installed: Any, tmp_path: Path) -> None:
    installed({"url": (tmp_path / "gone").as_uri(), "dir_info": {}})
    assert extras.install_command("ray") == "pip install 'hpo-vision[ray]'"


def test_a_repository(installed: Any) -> None:
    origin = {"url": "https://example.com/hpo", "vcs_info": {"vcs": "git", "commit_id": "0"}}
    installed(origin)
    command = extras.install_command("mysql")
    assert command == "pip install 'hpo-vision[mysql] @ git+https://example.com/hpo'"


def test_a_clone_that_was_never_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(extras, "distribution", missing)
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("VIRTUAL_ENV", sys.prefix)
    assert extras.install_command("onnx") == "pip install -e '.[onnx]'"


def test_without_an_active_environment_the_python_is_named(
    installed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(None)
    monkeypatch.setenv("VIRTUAL_ENV", "/somewhere/else")
    command = extras.install_command("onnx")
    assert command == f"{sys.executable} -m pip install 'hpo-vision[onnx]'"


@pytest.mark.parametrize("page", ["README.md", *sorted((ROOT / "docs").glob("*.md"))])
def test_no_page_names_another_project(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert "'hpo[" not in text
    assert "pip install hpo\n" not in text
