"""How many workers a device carries: the choice, and a probe with real processes."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from hpo.api.study import Study
from hpo.errors import InputError
from hpo.paths import Home
from hpo.search import study as studies
from hpo.storage.database import Database
from hpo.workers import probe, probed, process
from tests.harness.fakes import study_file
from tests.harness.searches import TINY


class Fake:
    """A process that trains at the speed that it is left, from a table by number of processes."""

    running: int = 0

    def __init__(self, total: Mapping[int, float | str], told: list[dict[str, Any]]) -> None:
        Fake.running += 1
        self.number, self.total, self.told = Fake.running, total, told
        self.last: dict[str, Any] = {}
        self.ended = False

    def tell(self, **message: Any) -> None:
        self.last = message
        self.told.append(message)

    def answer(self) -> Mapping[str, Any]:
        rate = self.total[Fake.running]
        if isinstance(rate, str):
            return {"full": rate}
        if "seconds" in self.last:
            return {"images_per_s": rate / Fake.running}
        return {"runtime": {"precision": "bfloat16"}}

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize(
    ("total", "tried", "best", "end"),
    [
        ({1: 3100, 2: 4900, 4: 4700, 8: 9000}, [1, 2, 4], 2, ""),
        ({1: 100, 2: 190, 4: 300, 8: 302}, [1, 2, 4, 8], 4, ""),
        ({1: 100, 2: 103, 4: 90}, [1, 2, 4], 1, ""),
        ({1: 100, 2: 150, 4: "out of memory"}, [1, 2], 2, "4 did not run: out of memory"),
        ({1: "no such file"}, [], 1, "1 did not run: no such file"),
    ],
)
def test_the_fastest_number_that_fits(
    total: dict[int, float | str], tried: list[int], best: int, end: str
) -> None:
    Fake.running, told, made = 0, [], []

    def start() -> Fake:
        made.append(Fake(total, told))
        return made[-1]

    found = probe.measure(start, probe.COUNTS, cores=16)
    assert [*found.rates] == tried
    assert (found.best, found.end) == (best, end)
    assert all(one.ended for one in made)
    runtimes = [one["runtime"] for one in told if "runtime" in one]
    assert runtimes[0] is None  # the first decides, the others compute as it does
    assert all(one == {"precision": "bfloat16"} for one in runtimes[1:])
    assert {one["threads"] for one in told if "threads" in one} <= {16, 8, 4, 2}


def test_a_stop_ends_the_probe() -> None:
    Fake.running, stop = 0, threading.Event()
    stop.set()
    found = probe.measure(lambda: Fake({1: 1.0}, []), probe.COUNTS, 4, stop)
    assert (found.best, found.end) == (1, "interrupted")


@pytest.mark.parametrize(
    ("cores", "counts"), [(1, (1,)), (2, (1, 2)), (7, (1, 2, 4)), (64, (1, 2, 4, 8))]
)
def test_each_process_needs_a_core(cores: int, counts: tuple[int, ...]) -> None:
    assert probe.counts_for("cuda:0", cores) == counts


def test_the_choice_is_told_with_its_reason() -> None:
    found = probe.Found({1: 3100.4, 2: 4900.0, 4: 4700.0})
    assert found.say("cuda:0", mps=True) == (
        "2 workers a GPU: 1, 2, 4 -> 3100, 4900, 4700 images/s"
    )
    assert found.say("cuda:0", mps=False).endswith("without MPS they take turns (docs/gpu.md)")
    assert (
        found.say("cpu", mps=False) == "2 workers on the CPU: 1, 2, 4 -> 3100, 4900, 4700 images/s"
    )
    none = probe.Found({}, "1 did not run: DataError")
    assert none.say("cpu", mps=False) == "1 worker on the CPU; 1 did not run: DataError"


def test_mps_is_found_by_its_pipes_or_its_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    assert not probe.mps_is_running()
    (tmp_path / "control").touch()
    assert probe.mps_is_running()
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY")
    for name, there in (("nvidia-cuda-mps", True), ("nvidia-smi", False), (None, False)):
        one = type("Process", (), {"info": {"name": name}})

        def listed(names: object, one: Any = one) -> Iterable[Any]:
            return [one]

        monkeypatch.setattr(probe.psutil, "process_iter", listed)
        assert probe.mps_is_running() is there


def test_the_first_configuration_trains_as_long_as_it_is_asked(
    database: Database, home: Home, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    file = study_file(train=TINY)
    lines = [{"runtime": None}, *[{"threads": 1, "seconds": 0.05}] * 2]
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(json.dumps(one) + "\n" for one in lines)))
    before = torch.get_num_threads()
    probed.serve(file, torch.device("cpu"), 1, home)
    torch.set_num_threads(before)
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert answers[0]["runtime"]["deterministic"] is True
    assert all(one["images_per_s"] > 0 for one in answers[1:])
    assert len(answers) == 3


def test_a_retrieval_by_features_as_they_are_trains_nothing(
    home: Home, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    file = study_file(
        train='task = "retrieval"\nmodel.architecture = "resnet18"\nmodel.trainable_blocks = 0\n',
        space="retrieval.k = [1, 3]",
    )
    monkeypatch.setattr("sys.stdin", io.StringIO('{"runtime": null}\n'))
    probed.serve(file, torch.device("cpu"), 1, home)
    assert json.loads(capsys.readouterr().out) == {"full": "nothing is trained"}


@pytest.mark.parametrize(("workers", "per_device"), [(2, "auto"), (None, "many")])
def test_what_cannot_be_counted_is_refused(workers: int | None, per_device: str) -> None:
    with pytest.raises(InputError, match="workers"):
        process.require_count(workers, per_device)


@pytest.mark.process
def test_a_probe_of_real_processes(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    studies.create(database, study_file(train=TINY))
    monkeypatch.setattr(probe, "MEASURE_S", 0.3)
    monkeypatch.setattr(probe, "counts_for", lambda device, cores: (1, 2))
    said: list[str] = []
    devices = Study("toy", database).devices(None, "auto", "cpu", say=said.append)
    (line,) = said
    assert devices == ["cpu"] * int(line[0])
    assert "on the CPU: 1, 2 -> " in line
    monkeypatch.setattr(probe, "PATIENCE_S", 60.0)
    found = probe.probe(database, "nobody", "cpu")
    assert found.end.startswith("1 did not run: hpo: ")
    assert "nobody" in found.end
