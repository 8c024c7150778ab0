"""A study's artifacts: what goes there, who goes on from there, what stays, and what a store that
fails does to a search."""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpo.config.study import StudyFile
from hpo.errors import Conflict, DiskFull, InputError, StorageError
from hpo.paths import Home
from hpo.search import retention, sync
from hpo.search import study as studies
from hpo.search import trial as objective
from hpo.search.retention import Best
from hpo.search.status import StudyStatus, read_status
from hpo.search.study import Study
from hpo.search.sync import Checkpoints, Mirror
from hpo.storage import records
from hpo.storage.artifacts import Folder, Store
from hpo.storage.database import Database
from hpo.storage.leases import Lease
from hpo.storage.records import Attempt, Epoch, Outcome
from hpo.training.checkpoint import Checkpoint
from tests.harness.fakes import study_file
from tests.harness.filled import Trial, fill
from tests.harness.searches import TINY, search

UUID = "0" * 32


@pytest.fixture
def place(tmp_path: Path) -> str:
    return str(tmp_path / "store")


def begun(database: Database, file: StudyFile, place: str, home: Home) -> Study:
    """The study of `file` with its artifacts in `place`."""
    study, _ = studies.create(database, file)
    sync.keep(database, study.row, sync.check(place, study.row, database), home)
    return study


def small(**options: Any) -> StudyFile:
    return study_file(train=TINY, **options)


def files(place: str) -> list[str]:
    """Names within the study of all that lies in the store."""
    return sorted("/".join(path.relative_to(place).parts[1:]) for path in Path(place).rglob("*.*"))


def curve(status: StudyStatus, number: int = 0) -> list[list[float]]:
    rows = status.trials[number].epochs
    return [[row.metrics[name] for name in ("train_loss", "val_loss", "val_top1")] for row in rows]


class Dying:
    """`leases.record_epochs`, after whose call for an epoch the worker is gone, once."""

    def __init__(self, epoch: int, *, before: bool = False) -> None:
        self.epoch, self.before, self.original = epoch, before, objective.leases.record_epochs
        self.due = True

    def __call__(self, database: Any, lease: Any, rows: Any, **options: Any) -> Any:
        dies = self.due and rows[-1].epoch == self.epoch
        self.due = self.due and not dies
        if dies and self.before:
            raise OSError("the host went away")
        done = self.original(database, lease, rows, **options)
        if dies:
            raise OSError("the host went away")
        return done


class Failing(Folder):
    """A store that cannot be written or read while `down`."""

    down = False

    def _put(self, *args: Any) -> None:
        if self.down:
            raise TimeoutError("no answer")
        super()._put(*args)

    def _get(self, *args: Any) -> None:
        if self.down:
            raise TimeoutError("no answer")
        super()._get(*args)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> type[Failing]:
    monkeypatch.setattr(Failing, "down", False)
    monkeypatch.setattr(sync, "open_store", Failing)
    return Failing


def resumed(
    database: Database,
    file: StudyFile,
    homes: tuple[Home, Home],
    monkeypatch: pytest.MonkeyPatch,
    dying: Dying,
) -> StudyStatus:
    """A worker on the first host dies, one on the second finishes the study."""
    monkeypatch.setattr(objective.leases, "record_epochs", dying)
    with pytest.raises(OSError, match="went away"):
        search(database, homes[0], file)
    search(database, homes[1], file)
    return read_status(database, file.name)


@pytest.fixture
def homes(tmp_path: Path) -> tuple[Home, Home]:
    return Home(tmp_path / "host-1"), Home(tmp_path / "host-2")


class TestATakeoverOnAnotherHost:
    @pytest.fixture
    def whole(self, database: Database, home: Home) -> StudyStatus:
        """An undisturbed search."""
        search(database, home, small(trials=1, name="whole"))
        return read_status(database, "whole")

    @pytest.mark.parametrize("before", [True, False])
    def test_goes_on_from_the_checkpoint_in_the_artifacts(
        self,
        database: Database,
        homes: tuple[Home, Home],
        place: str,
        whole: StudyStatus,
        before: bool,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        file = small(trials=1)
        begun(database, file, place, homes[0])
        dying = Dying(2, before=before)
        status = resumed(database, file, homes, monkeypatch, dying)
        assert [row.attempt for row in status.trials[0].epochs] == [1, 2 if before else 1, 2]
        assert curve(status) == curve(whole)

    def test_begins_again_without_artifacts_and_says_so(
        self,
        database: Database,
        homes: tuple[Home, Home],
        whole: StudyStatus,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        status = resumed(database, small(trials=1), homes, monkeypatch, Dying(2))
        assert [row.attempt for row in status.trials[0].epochs] == [2, 2, 2]
        assert curve(status) == curve(whole)
        assert (
            "trial 0: 2 epochs are finished, their checkpoint is on another host: it begins again"
        ) in caplog.text

    def test_goes_on_from_an_older_one_where_the_newest_never_arrived(
        self,
        database: Database,
        homes: tuple[Home, Home],
        place: str,
        whole: StudyStatus,
        failing: type[Failing],
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """The database points to two epochs, the store has the first one's checkpoint alone."""
        file = small(trials=1)
        begun(database, file, place, homes[0])
        original = objective.leases.begin_epoch

        def fails_from_the_second(database: Any, lease: Any, epoch: int, progress: Any) -> None:
            failing.down = lease.k == 1 and epoch == 2
            original(database, lease, epoch, progress)

        monkeypatch.setattr(objective.leases, "begin_epoch", fails_from_the_second)
        dying = Dying(2)
        monkeypatch.setattr(objective.leases, "record_epochs", dying)
        with pytest.raises(OSError, match="went away"):
            search(database, homes[0], file)
        assert files(place) == ["study.toml", "trials/0/attempt-1/epoch-1.ckpt"]
        assert "epoch-2.ckpt is on this host alone, the next one is tried again" in caplog.text
        failing.down = False
        search(database, homes[1], file)
        status = read_status(database, "toy")
        assert [row.attempt for row in status.trials[0].epochs] == [1, 2, 2]
        assert curve(status) == curve(whole)

    def test_a_checkpoint_with_code_is_not_run(
        self, database: Database, homes: tuple[Home, Home], place: str, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    ) -> None:  # fmt: skip
        file = small(trials=1)
        begun(database, file, place, homes[0])
        monkeypatch.setattr(objective.leases, "record_epochs", Dying(2))
        with pytest.raises(OSError, match="went away"):
            search(database, homes[0], file)
        (checkpoint,) = Path(place).rglob("epoch-2.ckpt")
        checkpoint.write_bytes(b"cos\nsystem\n(S'touch " + bytes(tmp_path / "pwned") + b"'\ntR.")
        search(database, homes[1], file)
        trial = read_status(database, "toy").trials[0]
        assert trial.state == "complete"
        assert "holds code, which is never run" in caplog.text
        assert "epoch-2.ckpt is damaged: attempt" in str(trial.attempts[-2].reason)
        assert not (tmp_path / "pwned").exists()


class TestAStoreThatFails:
    def test_loses_no_epoch_and_the_next_one_is_tried_again(
        self, database: Database, home: Home, place: str, failing: type[Failing],
        monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    ) -> None:  # fmt: skip
        begun(database, small(trials=1), place, home)
        seen: dict[int, list[str]] = {}
        original = objective.leases.record_epochs

        def record(database: Any, lease: Any, rows: Any, **options: Any) -> Any:
            seen[rows[-1].epoch] = files(place)
            failing.down = rows[-1].epoch == 1  # the second one's checkpoint finds no answer
            return original(database, lease, rows, **options)

        monkeypatch.setattr(objective.leases, "record_epochs", record)
        study = search(database, home, small(trials=1))
        assert seen == {
            1: ["study.toml", "trials/0/attempt-1/epoch-1.ckpt"],
            2: ["study.toml", "trials/0/attempt-1/epoch-1.ckpt"],
            3: ["study.toml", *(f"trials/0/attempt-1/epoch-{n}.ckpt" for n in (1, 3))],
        }
        status = read_status(database, "toy")
        assert [row.checkpoint for row in status.trials[0].epochs] == [1, 1, 1]
        assert "no answer; epoch-2.ckpt is on this host alone" in caplog.text
        kept = [f"trials/0/attempt-1/{name}" for name in ("predictions.npz", "weights.safetensors")]
        assert files(place) == ["study.toml", *kept]
        assert sync.find(database, study.uuid, home) is not None

    def test_never_stops_a_search(
        self, database: Database, home: Home, place: str, failing: type[Failing]
    ) -> None:
        begun(database, small(trials=2), place, home)
        failing.down = True
        search(database, home, small(trials=2))
        status = read_status(database, "toy")
        assert status.count("complete") == 2
        assert files(place) == ["study.toml"]
        assert len(list(home.root.rglob("weights.safetensors"))) == 2

    def test_does_not_keep_a_study_from_being_deleted(
        self, database: Database, home: Home, place: str, failing: type[Failing],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        study = begun(database, small(), place, home)

        def refused(*_: Any) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(failing, "_remove", refused)
        with pytest.raises(StorageError, match="was deleted, but not its artifacts") as caught:
            studies.delete(study, home)
        assert f"remove {place}/{study.uuid} by hand" in str(caught.value)
        assert records.find_study(database, "toy") is None


class TestTheUrl:
    def test_is_kept_with_the_study(self, database: Database, home: Home, place: str) -> None:
        study = begun(database, small(), place, home)
        found = sync.find(database, study.uuid, home)
        assert found is not None
        assert found.url == f"{place}/{study.uuid}"
        assert files(place) == ["study.toml"]

    def test_another_one_is_refused_and_both_are_named(
        self, database: Database, home: Home, place: str, tmp_path: Path
    ) -> None:
        study = begun(database, small(), place, home)
        other = str(tmp_path / "other")
        with pytest.raises(Conflict) as caught:
            sync.check(other, study.row, database)
        assert place in str(caught.value)
        assert other in str(caught.value)
        assert not Path(other).exists()
        with pytest.raises(Conflict):
            sync.keep(database, study.row, other, home)
        assert sync.check(f"{place}/", study.row, database) == place

    def test_may_be_given_later(self, database: Database, home: Home, place: str) -> None:
        file = small(trials=2)
        study, _ = studies.create(database, file)
        assert sync.find(database, study.uuid, home) is None
        begun(database, file, place, home)
        search(database, home, file)
        assert len([name for name in files(place) if name.endswith(".safetensors")]) == 2

    def test_a_worker_in_another_place_is_refused(
        self, database: Database, home: Home, place: str, failing: type[Failing],
        caplog: pytest.LogCaptureFixture,
    ) -> None:  # fmt: skip
        study = begun(database, small(), place, home)
        found = sync.find(database, study.uuid, home)
        assert found is not None
        found.verify()
        failing.down = True
        found.verify()  # cannot be told now
        assert "no answer; checkpoints stay on this host until it can be reached" in caplog.text
        failing.down = False
        Path(place, study.uuid, "study.toml").unlink()
        with pytest.raises(InputError, match="mount the folder at that path"):
            found.verify()

    def test_what_was_deleted_is_gone(self, database: Database, home: Home, place: str) -> None:
        file = small(trials=1)
        begun(database, file, place, home)
        begun(database, small(name="other"), place, home)
        study = search(database, home, file)
        assert len(files(place)) == 4
        studies.delete(study, home)
        assert files(place) == ["study.toml"]


def attempt(number: int, k: int, outcome: str | None, value: float | None = None) -> Attempt:
    ended = None if outcome is None else 1.0
    return Attempt(
        number,
        k,
        "w",
        0.0,
        ended,
        Outcome(outcome) if outcome else None,
        None,
        value,
        1,
        3,
        None,
        live=outcome is None,
    )


ATTEMPTS = {
    0: [attempt(0, 1, "complete", 0.5)],
    1: [attempt(1, 1, "lost"), attempt(1, 2, "complete", 0.9)],
    2: [attempt(2, 1, "handed_back")],
    3: [attempt(3, 1, "lost"), attempt(3, 2, None)],
    4: [attempt(4, 1, "pruned")],
    5: [attempt(5, 1, "failed")],
}


def names(*trials: int) -> list[str]:
    """Two attempts with two checkpoints and weights each, of every one of `trials`."""
    kinds = ("epoch-9.ckpt", "epoch-10.ckpt", "weights.safetensors", ".epoch-3.ckpt.1f")
    return [f"trials/{n}/attempt-{k}/{kind}" for n in trials for k in (1, 2) for kind in kinds]


class TestWhatStays:
    def test_all_of_a_trial_that_runs_or_is_free_or_is_unknown(self) -> None:
        best = Best(frozenset(), frozenset())
        assert retention.surplus(names(2, 3, 7), ATTEMPTS, best) == []
        assert retention.surplus(["study.toml", "report.html", "x/0/y"], ATTEMPTS, best) == []

    def test_nothing_of_a_trial_that_is_over(self) -> None:
        gone = retention.surplus(names(0, 1, 4, 5), ATTEMPTS, Best(frozenset(), frozenset()))
        assert gone == names(0, 1, 4, 5)

    def test_weights_of_the_last_attempt_and_the_newest_checkpoint(self) -> None:
        best = Best(frozenset([1]), frozenset([1]))
        gone = retention.surplus(names(0, 1), ATTEMPTS, best)
        assert set(names(0, 1)) - set(gone) == {
            "trials/1/attempt-2/weights.safetensors",
            "trials/1/attempt-2/epoch-10.ckpt",
        }

    def test_checkpoints_as_asked_for_best_first(
        self, database: Database, home: Home, place: str
    ) -> None:
        file = small(trials=4, study="keep_checkpoints = 2")
        begun(database, file, place, home)
        study = search(database, home, file)
        ranked = read_status(database, "toy").ranked()
        for root in (Path(place), study.directory(home).root):
            found = sorted(root.rglob("*.ckpt"))
            assert {path.parents[1].name for path in found} == {str(t.number) for t in ranked[:2]}
            assert [path.name for path in found] == ["epoch-3.ckpt"] * 2
            assert all(Checkpoint.load(path).epoch == 3 for path in found)
            weights = {path.parents[1].name for path in root.rglob("weights.safetensors")}
            assert weights == {str(t.number) for t in ranked[:3]}

    def test_no_empty_folder(self, database: Database, home: Home, place: str) -> None:
        file = small(trials=4)
        begun(database, file, place, home)
        study = search(database, home, file)
        for root in (Path(place), study.directory(home).trials):
            assert all(any(path.iterdir()) for path in root.rglob("*") if path.is_dir())

    def test_weights_of_the_whole_front(self, database: Database) -> None:
        """Five trials, each better in one metric and worse in the other, and one that is beaten."""
        costs = [(0.5 + i / 10, 100.0 + i) for i in range(5)]
        trials = [Trial("complete", (value,), costs=(cost,)) for value, cost in costs]
        beaten = Trial("complete", (0.5,), costs=(200.0,))
        file = study_file(
            trials=6, study='metrics = ["val_top1", "parameters"]\nkeep_checkpoints = 2'
        )
        study = fill(database, file, [beaten, *trials])
        attempts = records.read_attempts(database, study.uuid)
        best = retention.best_of_all(study, attempts)
        assert best.weights == {1, 2, 3, 4, 5}
        assert best.checkpoints == {5, 4}
        for values, kept in (((0.4, 50.0), True), ((0.5, 100.0), True), ((0.5, 101.0), False)):
            ending = objective.Ending(Outcome.COMPLETE, values[0], objectives=values)
            assert retention.is_kept(study, ending) is kept

    def test_weights_of_the_front_of_a_real_search(self, database: Database, home: Home) -> None:
        study_lines = 'metrics = ["val_top1", "parameters"]'
        space = "model.cnn.filters = [[1], [2], [3], [4], [5], [6]]"
        train = TINY.replace("model.cnn.filters = [4]\n", "")
        file = study_file(trials=6, study=study_lines, space=space, train=train, sampler="grid")
        study = search(database, home, file)
        front = {str(trial.number) for trial in read_status(database, "toy").front()}
        found = study.directory(home).root.rglob("weights.safetensors")
        assert {path.parents[1].name for path in found} == front


class Remembering(Store):
    """Says what was asked of it, in order."""

    def __init__(self, there: list[str]) -> None:
        super().__init__("memory")
        self.there, self.calls = there, []
        self.calls: list[str]

    def _put(self, local: Path, key: str, moved: Callable[[], None]) -> None:
        self.calls.append(f"put {key.removeprefix(UUID)}")

    def _get(self, key: str, local: Path, moved: Callable[[], None]) -> None:
        self.calls.append(f"get {key.removeprefix(UUID)}")
        local.write_bytes(b"")

    def _remove(self, key: str) -> None:
        self.calls.append(f"remove {key.removeprefix(UUID)}")

    def _list(self, prefix: str) -> Any:
        yield from (f"{UUID}/{name}" for name in self.there)

    def _folders(self) -> Any:
        yield UUID


LEASE = Lease(UUID, 1, 0, 3, "token", "w", 30.0)


def sound(_path: Path, _rows: Any) -> None:
    """Nothing is wrong with any file."""


def test_an_attempt_removes_what_its_predecessors_left_once_its_own_is_recorded(
    home: Home,
) -> None:
    left = [f"trials/0/attempt-{k}/epoch-{n}.ckpt" for k, n in ((1, 1), (1, 2), (2, 2))]
    store = Remembering(left)
    directory = home.study(UUID)
    checkpoints = Checkpoints(directory, Mirror(store, directory), LEASE)
    rows = [Epoch(1, 1, 0.0, {}, 1), Epoch(2, 2, 0.0, {}, 2)]
    found, path = checkpoints.newest(rows, sound)
    assert (found, path) == (rows, directory.checkpoint(0, 2, 2))
    assert store.calls == [f"get /{left[2]}"]
    checkpoints.share(checkpoints.path(3))
    assert store.calls[1:] == ["put /trials/0/attempt-3/epoch-3.ckpt"]
    checkpoints.recorded(checkpoints.path(3))
    assert sorted(store.calls[2:]) == [f"remove /{name}" for name in left]
    assert path is not None
    assert not path.exists()
    checkpoints.share(checkpoints.path(4))
    checkpoints.recorded(checkpoints.path(4))
    assert store.calls[-1] == "remove /trials/0/attempt-3/epoch-3.ckpt"


def test_what_waits_for_the_database_is_there_once(home: Home) -> None:
    """Each checkpoint holds all epochs before it, so the last one will do."""
    store = Remembering([])
    directory = home.study(UUID)
    checkpoints = Checkpoints(directory, Mirror(store, directory), LEASE)
    for epoch in (1, 2, 3, 4):
        checkpoints.share(checkpoints.path(epoch))
        if epoch in (1, 4):
            checkpoints.recorded(checkpoints.path(epoch))
    files = [f"/trials/0/attempt-3/epoch-{epoch}.ckpt" for epoch in range(5)]
    assert store.calls == [
        f"put {files[1]}", f"put {files[2]}",
        f"put {files[3]}", f"remove {files[2]}",
        f"put {files[4]}", f"remove {files[3]}",
        f"remove {files[1]}",
    ]  # fmt: skip


def test_a_full_disk_here_does_not_begin_the_trial_again(home: Home) -> None:
    """It is handed back, and goes on where there is room."""

    class Full(Remembering):
        def _get(self, key: str, local: Path, moved: Callable[[], None]) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    directory = home.study(UUID)
    checkpoints = Checkpoints(
        directory, Mirror(Full(["trials/0/attempt-1/epoch-1.ckpt"]), directory), LEASE
    )
    with pytest.raises(DiskFull, match=r"epoch-1\.ckpt does not fit"):
        checkpoints.newest([Epoch(1, 1, 0.0, {}, 1)], sound)


@pytest.mark.parametrize("bad", ["../../x", "1/../../../x", -1, 2.5, None, "1\n"])
def test_a_row_that_somebody_changed_leads_nowhere(home: Home, bad: Any) -> None:
    directory = home.study(UUID)
    for call in (
        lambda: home.study(bad),
        lambda: home.study(f"{UUID}\n"),
        lambda: directory.checkpoint(bad, 1, 1),
        lambda: directory.checkpoint(1, bad, 1),
        lambda: directory.checkpoint(1, 1, bad),
        lambda: directory.weights(bad, 1),
        lambda: directory.weights(1, bad),
        lambda: directory.log(f"../{bad}"),
        lambda: directory.alive(f"/{bad}"),
    ):
        with pytest.raises(StorageError, match="somebody changed it"):
            call()


def test_a_checkpoint_that_the_rows_do_not_name_is_not_used(home: Home) -> None:
    store = Remembering(["trials/0/attempt-1/epoch-2.ckpt"])
    directory = home.study(UUID)
    checkpoints = Checkpoints(directory, Mirror(store, directory), LEASE)
    row = Epoch(2, 2, 0.0, {}, 2)
    assert checkpoints.newest([row], sound) == ([], None)
    assert checkpoints.newest([dataclasses.replace(row, checkpoint=None)], sound) == ([], None)
    assert store.calls == []
