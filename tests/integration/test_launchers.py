"""Every launcher keeps the contract, with real processes and training; see `launcher_scenes`."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.clusters import SLURM_TOOLS

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]
STEPS = {"placed", "replaced", "stopped", "finished"}


def play(scene: str, url: str) -> set[str]:
    """Play a scene in an interpreter of its own; the steps that it took."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.harness.launcher_scenes", scene],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "SCENE_URL": url},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("scene", ["over_fake", "over_local"])
def test_contract(scene: str, url: str) -> None:
    assert play(scene, url) == STEPS


@pytest.mark.cluster
@pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in SLURM_TOOLS),
    reason="needs Slurm: apt-get install slurmctld slurmd slurm-client",
)
def test_contract_over_slurm(url: str) -> None:
    assert play("over_slurm", url) == STEPS | {"requeued"}


@pytest.mark.cluster
@pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="needs Ray: pip install -e '.[ray]'"
)
@pytest.mark.databases("postgresql")
def test_contract_over_ray_and_nodes_that_fail(url: str) -> None:
    steps = {"node killed", "raylet stopped", "training twice", "finished after failures"}
    url = url.replace("postgres@", f"postgres:{secrets.token_hex(8)}@")  # it trusts any
    assert play("over_ray", url) == STEPS | steps
