"""The command line, called in the process of the test."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from hpo.cli.main import main

Hpo = Callable[..., tuple[int, str, str]]


def calls(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Hpo:
    """Calls `hpo` with its arguments: exit code, output, errors."""
    monkeypatch.setattr(sys, "argv", ["hpo"])
    monkeypatch.setenv("COLUMNS", "160")

    def call(*args: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(arg) for arg in args])
        said = capsys.readouterr()
        assert isinstance(end.value.code, int)
        return end.value.code, said.out, said.err

    return call
