"""benchmarks.gpu: what it says without a GPU, and a rehearsal of all its parts on the CPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu

ROOT = Path(__file__).parents[2]


def test_without_a_gpu_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 0
    assert "there is no CUDA device here, so nothing was measured" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "said"),
    [(["--only", "steps,speed"], "--only speed: allowed: tests, steps"),
     (["--data", "nowhere"], "--data nowhere: there is no such folder")],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(
    given: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main(given)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_a_part_is_left_out_where_time_is_short(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = gpu.Bench(torch.device("cpu"), True, None, 0.0, tmp_path)
    gpu.run_part(bench, "kill")
    assert [line[:2] for line in bench.lines] == [("kill", "left out")]
    assert "it needs 90" in capsys.readouterr().out
    assert not bench.failed


def test_a_fault_of_one_part_ends_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(bench: gpu.Bench) -> None:
        raise RuntimeError("CUDA error: something\nin many lines")

    monkeypatch.setitem(gpu.PARTS, "memory", (broken, 0.0))
    bench = gpu.Bench(torch.device("cpu"), True, None, 1e12, tmp_path)
    gpu.run_part(bench, "memory")
    assert bench.lines == [("memory", "failed", "0", "RuntimeError: CUDA error: something")]
    assert bench.failed


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.timeout(1200)
def test_a_rehearsal_runs_every_part(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--device",
        "cpu",
        "--tiny",
        "--minutes",
        "99",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HPO_HOME": str(tmp_path)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert {row[0].strip("| ") for row in rows} == gpu.PARTS.keys()
    told = {(row[0].strip("| "), row[1]): row[3].strip("| ") for row in rows}
    assert sum(part == "steps" for part, _ in told) == len(gpu.NETWORKS)
    assert sum(part == "cifar" for part, _ in told) == len(gpu.RECIPES)
    (killed,) = (result for (part, _), result in told.items() if part == "kill")
    assert killed == "3 of 3 trials complete, 9 of 9 epochs equal bit for bit"
    (answered,) = (result for (part, _), result in told.items() if part == "memory")
    assert re.match(r"answered: micro-batch 8, 2 of 2 epochs", answered)
