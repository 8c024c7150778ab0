"""How OpenMP's threads wait in whatever `hpo` starts."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

CODE = """
import sys
from hpo.cli.main import main
try:
    main(["--version"])
except SystemExit:
    assert "torch" not in sys.modules
import torch
"""


def spin_count(**settings: str) -> str:
    """Return what OpenMP, loaded by torch after a command of hpo has begun, says of itself."""
    own = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
    clean = {key: value for key, value in os.environ.items() if key not in own}
    environment = clean | {"OMP_DISPLAY_ENV": "verbose", **settings}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True
    )
    found = re.search(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    if found is None:
        pytest.skip("torch does not use GNU's OpenMP here")
    return found[1]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "1000"),
        ({"GOMP_SPINCOUNT": "77"}, "77"),
        pytest.param({"OMP_WAIT_POLICY": "PASSIVE"}, "0", marks=pytest.mark.slow),
        pytest.param({"OMP_WAIT_POLICY": "ACTIVE"}, "30000000000", marks=pytest.mark.slow),
    ],
)
def test_threads_spin_briefly_unless_the_user_has_chosen(
    settings: dict[str, str], expected: str
) -> None:
    assert spin_count(**settings) == expected
