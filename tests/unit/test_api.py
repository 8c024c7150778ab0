"""The public interface: `import hpo`, and the examples in its docstrings."""

from __future__ import annotations

import doctest
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hpo
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
    asked = "from hpo import *"
    assert "torch" not in loaded_by(asked, tmp_path)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Studdy'"):
        _ = hpo.Studdy  # type: ignore[attr-defined]
    assert set(hpo.__all__) <= set(dir(hpo))
