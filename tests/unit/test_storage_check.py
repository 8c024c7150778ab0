"""`hpo storage check` from outside, and the files that it looks at."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa

from hpo.doctor import files, rules
from hpo.doctor.repair import outcome_of_state
from hpo.doctor.rules import Finding, Rows, StoredStudy, StoredTrial, diagnose
from hpo.doctor.scan import check_all, repair_all
from hpo.errors import StorageError
from hpo.paths import Home
from hpo.search import study as studies
from hpo.search import sync
from hpo.search.study import Study
from hpo.storage import leases, records, tables
from hpo.storage.database import Database, connect
from hpo.storage.optuna import FencedStorage
from hpo.storage.records import FINAL, FINISHED_STATES, Attempt, Outcome
from tests.harness.fakes import study_file
from tests.harness.filled import Trial as Filled
from tests.harness.filled import fill
from tests.unit.test_cli import Hpo, here, hpo

__all__ = ["hpo"]

UUID = "a" * 32


@pytest.fixture
def toy(hpo: Hpo) -> Iterator[Database]:
    """The default database with a study of six trials: five complete, one in hand."""
    home = Home.default()
    home.root.mkdir()
    database = connect(home.storage)
    file = study_file(trials=6, study="keep_checkpoints = 1")
    study = fill(database, file, [Filled("complete", (0.5 + n / 10,)) for n in range(5)])
    storage = FencedStorage(database)
    storage.create_new_trial(study.row.study_id)
    taken = leases.claim(database, study.uuid, study.snapshot().free[0], "w-live")
    assert taken is not None
    yield database
    database.dispose()


def toy_study(database: Database) -> Study:
    return studies.load(database, "toy")


def hand_back(database: Database) -> None:
    leases.release_worker(database, "w-live", "for the test")


def lay(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def there(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


class TestCommand:
    def test_nothing_wrong_is_one_line(self, hpo: Hpo, toy: Database) -> None:
        called = hpo("storage", "check")
        assert called.code == 0, called.out
        assert called.out == "1 study, 6 trials, 6 attempts, 5 epochs: no faults\n"

    def test_without_a_database_none_is_made(self, hpo: Hpo) -> None:
        for args in ([], ["--repair"], ["--storage", "sqlite:///other.db"]):
            called = hpo("storage", "check", *args)
            assert called.code == 2
            assert "hpo run STUDY.toml" in called.err
            assert len(called.err.splitlines()) == 1
        assert here() == []

    @pytest.mark.parametrize(
        ("url", "says"),
        [
            ("nonsense", "storage URL"),
            ("oracle://me@server/hpo", "no driver"),
            ("sqlite:///text.db", "not a database"),
            ("sqlite:///theirs.db", "none of hpo's tables"),
        ],
    )
    def test_bad_databases(self, hpo: Hpo, url: str, says: str) -> None:
        Path("text.db").write_text("not a database " * 100)
        optuna.create_study(storage="sqlite:///theirs.db")
        before = here()
        called = hpo("storage", "check", "--repair", "--storage", url)
        assert (called.code, says in called.err) == (2, True), called.err
        assert "Traceback" not in called.err
        assert [name for name in here() if not name.startswith("theirs.db-")] == before

    def test_faults_are_listed_and_mended(self, hpo: Hpo, toy: Database) -> None:
        study = toy_study(toy)
        storage = FencedStorage(toy)
        one = storage.create_new_trial(study.row.study_id)
        storage.set_trial_state_values(one, optuna.trial.TrialState.FAIL)
        with toy.write() as c:
            c.execute(sa.update(tables.optuna_trials).values(state="RUNNING").where(
                tables.optuna_trials.c.number == 0
            ))  # fmt: skip
            c.execute(sa.text("DELETE FROM trial_values WHERE trial_id = 1"))
        called = hpo("storage", "check")
        assert called.code == 1
        assert called.out.splitlines() == [
            "contradiction: toy, trial 0, attempt 1: it ended its trial as complete; in Optuna's "
            "tables that is RUNNING still",
            "    --repair: Optuna is told COMPLETE, as the attempt ended",
            "trial without attempt: toy, trial 6: it is FAIL in Optuna's tables, and no worker of "
            "hpo had it: another tool made it",
            "    left to you: whether it is a result only you can know; for one more trial of "
            "hpo's own: hpo extend toy --trials +1",
            "1 study, 7 trials, 6 attempts, 5 epochs: 2 faults, --repair repairs 1",
        ]
        called = hpo("storage", "check", "--repair")
        assert called.code == 1
        lines = called.out.splitlines()
        assert lines[0].startswith("repaired: contradiction: toy, trial 0, attempt 1: ")
        assert lines[-1] == "1 study, 7 trials, 6 attempts, 5 epochs: 1 fault"
        told = json.loads(hpo("storage", "check", "--json").out)
        assert [(one["kind"], one["trial"]) for one in told["faults"]] == [
            ("trial without attempt", 6)
        ]
        assert told["counts"] == {"studies": 1, "trials": 7, "attempts": 6, "epochs": 5}

    def test_a_trial_that_another_tool_made_is_shown(self, hpo: Hpo, toy: Database) -> None:
        view = toy_study(toy).optuna_study(FencedStorage(toy))
        view.tell(view.ask(), 0.9)
        assert hpo("storage", "check").code == 1
        assert hpo("trial", "toy", "6").code == 0

    def test_notes_are_no_faults(self, hpo: Hpo, toy: Database) -> None:
        optuna.create_study(storage=FencedStorage(toy), study_name="evil\x1b[2Jname")
        called = hpo("storage", "check", "--repair")
        assert called.code == 0
        assert called.out.startswith("no fault: study of Optuna's own: evil\\x1b[2Jname: ")
        assert called.out.endswith("no faults\n")

    def test_an_old_schema(self, hpo: Hpo, toy: Database) -> None:
        with toy.write() as c:
            c.execute(sa.delete(tables.schema))
            c.execute(tables.schema.insert().values(version=1))
        called = hpo("storage", "check", "--repair")
        assert called.code == 1
        assert "hpo storage upgrade" in called.out
        assert called.out.splitlines()[-1] == "nothing else was checked: 1 fault"

    def test_a_newer_schema(self, hpo: Hpo, toy: Database) -> None:
        with toy.write() as c:
            c.execute(tables.schema.insert().values(version=99))
        called = hpo("storage", "check")
        assert (called.code, "upgrade hpo" in called.err) == (2, True)

    def test_a_damaged_file(self, hpo: Hpo, toy: Database) -> None:
        hand_back(toy)
        toy.dispose()
        with sqlite3.connect(Home.default().database) as raw:
            raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            raw.execute("PRAGMA writable_schema = ON")
            raw.execute("DELETE FROM sqlite_master WHERE name = 'ix_hpo_epochs_study'")
        raw.close()
        called = hpo("storage", "check", "--repair")
        assert called.code == 1
        assert called.out.startswith("damaged database: ")
        assert "restore a backup" in called.out

    def test_rows_of_optunas_that_belong_to_nothing(self, hpo: Hpo, toy: Database) -> None:
        with sqlite3.connect(Home.default().database) as raw:
            raw.execute("INSERT INTO trial_values (trial_id, objective, value, value_type) "
                        "VALUES (999, 0, 1.0, 'FINITE')")  # fmt: skip
        raw.close()
        called = hpo("storage", "check", "--repair")
        assert called.code == 1
        assert "1 row of Optuna's table trial_values" in called.out
        assert "left to you: they are Optuna's" in called.out


class TestFiles:
    @pytest.fixture(params=["here", "store"])
    def root(self, request: pytest.FixtureRequest, toy: Database, tmp_path: Path) -> Path:
        """Where the files of the study lie: under HPO_HOME, or in a folder for all hosts."""
        study, home = toy_study(toy), Home.default()
        if request.param == "here":
            return study.directory(home).root
        url = sync.check(str(tmp_path / "shared"), study.row, toy)
        sync.keep(toy, study.row, url, home)
        return tmp_path / "shared" / study.uuid

    def findings(self, database: Database, **kwargs: str) -> list[Finding]:
        return list(check_all(database, Home.default(), **kwargs).findings)

    def test_trials_that_are_over_leave_nothing(self, toy: Database, root: Path) -> None:
        stays = [
            *(f"trials/{n}/attempt-1/weights.safetensors" for n in range(5)),
            "trials/4/attempt-1/epoch-1.ckpt",  # keep_checkpoints = 1: of the best one
            "trials/5/attempt-1/epoch-1.ckpt",  # to go on from
            "logs/w-1.log",
        ]
        goes = ["trials/1/attempt-1/epoch-1.ckpt", "trials/2/attempt-1/.epoch-1.ckpt.ab12cd34"]
        lay(root, *stays, *goes)
        everything = there(root)
        assert self.findings(toy) == []  # somebody works on the study, who tidies up
        hand_back(toy)
        (one,) = self.findings(toy)
        assert (one.kind, one.study, one.trial) == (rules.SURPLUS_FILES, "toy", None)
        assert str(root) in one.message
        assert all(name in one.message for name in goes)
        assert there(root) == everything
        assert [x.message for x in repair_all(toy, check_all(toy, Home.default()))] == [one.message]
        assert there(root) == sorted({*everything} - {*goes})
        assert self.findings(toy) == []

    def test_nothing_of_a_paused_trial_is_touched(self, hpo: Hpo) -> None:
        home = Home.default()
        home.root.mkdir()
        scheduler = "scheduler = {name = 'promote', first_epochs = 1, finish = 1}"
        curves = [(0.1 * n,) for n in range(12)]
        database = connect(home.storage)
        file = study_file(trials=12, study=scheduler, train="epochs = 6")
        study = fill(database, file, [Filled("paused", curve) for curve in curves])
        names = [f"trials/{n}/attempt-1/epoch-1.ckpt" for n in range(12)]
        root = study.directory(home).root
        lay(root, *names)
        assert len(files.Place(home).names(study.uuid)) == 12
        before = there(root)
        for option in ([], ["--repair"]):
            called = hpo("storage", "check", *option)
            assert (called.code, called.out.count("no faults")) == (0, 1), called.out
        for name in names[:5]:  # dropped on purpose: they are trained again if they go on
            (root / name).unlink()
        assert hpo("storage", "check").code == 0
        assert there(root) == sorted(names[5:]) != before
        database.dispose()

    def test_a_worker_that_lives_is_waited_for(self, toy: Database, root: Path) -> None:
        lay(root, "trials/1/attempt-1/epoch-1.ckpt")
        hand_back(toy)
        about = {"host": "h", "pid": 1, "device": "cpu"}
        uuid = toy_study(toy).uuid
        records.add_worker(toy, "w-2", uuid, versions={}, process="p", **about)
        assert self.findings(toy) == []
        cure = files.RemoveSurplus(toy_study(toy), files.Place(Home.default()))
        assert not cure.apply(toy)
        records.end_worker(toy, "w-2", "over")
        (one,) = self.findings(toy)
        assert (one.kind, one.trial) == (rules.SURPLUS_FILES, 1)

    def test_a_folder_that_goes_meanwhile_is_nothing(
        self, toy: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        trials = toy_study(toy).directory(Home.default()).trials
        lay(trials, "1/attempt-1/epoch-1.ckpt")
        hand_back(toy)
        scandir = os.scandir

        def removed_under_us(path: Any = ".") -> Any:
            if not isinstance(path, int) and Path(path) == trials / "1" / "attempt-1":
                shutil.rmtree(trials / "1")
            return scandir(path)

        monkeypatch.setattr(os, "scandir", removed_under_us)
        assert self.findings(toy) == []
        assert not (trials / "1").exists()

    def test_files_of_no_trial_are_left(self, toy: Database, root: Path) -> None:
        lay(root, "trials/99/attempt-1/epoch-1.ckpt", "trials/what")
        before = there(root)
        (one,) = self.findings(toy)
        assert (one.kind, one.fault, one.repair) == (rules.ORPHAN_FILES, True, None)
        assert "2 files" in one.message
        assert "hpo storage copy" in one.advice
        assert repair_all(toy, check_all(toy, Home.default())) == []
        assert there(root) == before

    def test_a_folder_of_no_study(self, toy: Database, tmp_path: Path) -> None:
        home = Home.default()
        lay(home.root / "studies", f"{UUID}/trials/0/attempt-1/weights.safetensors", "notes/x")
        (one,) = self.findings(toy)
        assert (one.kind, one.fault, one.repair) == (rules.ORPHAN_FILES, True, None)
        assert f"studies/{UUID}: 1 file" in one.message
        other = Home(tmp_path / "elsewhere")  # of other databases too
        lay(other.root / "studies", f"{UUID}/trials/0/attempt-1/weights.safetensors")
        (one,) = check_all(toy, other).findings
        assert (one.kind, one.fault) == (rules.ORPHAN_FILES, False)

    def test_a_store_that_the_command_names(self, hpo: Hpo, toy: Database, tmp_path: Path) -> None:
        lay(tmp_path / "shared", f"{UUID}/study.toml", "other/x")
        (one,) = self.findings(toy, artifacts=str(tmp_path / "shared"))
        assert (one.kind, one.fault) == (rules.ORPHAN_FILES, False)
        called = hpo("storage", "check", "--artifacts", tmp_path / "shared")
        assert (called.code, f"shared/{UUID}: 1 file" in called.out) == (0, True)
        called = hpo("storage", "check", "--artifacts", "s3://key:secret@bucket")
        assert (called.code, "secret" in called.err) == (2, False)

    def test_a_store_that_cannot_be_reached(self, toy: Database, tmp_path: Path) -> None:
        (one,) = self.findings(toy, artifacts=str(tmp_path / "not-mounted"))
        assert (one.kind, one.fault) == (rules.UNREAD_ARTIFACTS, True)
        assert "No such file" in one.message


def test_a_name_that_leads_elsewhere_is_refused(toy: Database) -> None:
    """As every path of a row that somebody changed."""
    study = toy_study(toy)
    with pytest.raises(StorageError):
        files.Place(Home.default()).names(f"../{study.uuid}")


def test_ten_thousand_trials_take_a_few_queries(database: Database) -> None:
    count = 10_000
    study = studies.create(database, study_file(trials=count))[0]
    trials = [
        {"trial_id": n + 1, "number": n, "study_id": study.row.study_id, "state": "COMPLETE"}
        for n in range(count)
    ]
    tried = [
        {"trial_id": n + 1, "k": 1, "study": study.uuid, "number": n, "token": "t", "worker": "w",
         "started": 1.0, "until": 2.0, "ended": 2.0, "outcome": "complete", "value": 0.5}
        for n in range(count)
    ]  # fmt: skip
    done = [
        {"trial_id": n + 1, "epoch": e, "study": study.uuid, "attempt": 1, "finished": 2.0,
         "metrics": "{}"}
        for n in range(count) for e in (1, 2)
    ]  # fmt: skip
    with database.write() as c:
        c.execute(tables.optuna_trials.insert(), trials)
        c.execute(tables.attempts.insert(), tried)
        c.execute(tables.epochs.insert(), done)
    said: list[str] = []
    sa.event.listen(
        database.engine, "before_cursor_execute", lambda *args: said.append(str(args[2]))
    )
    checked = check_all(database, Home.default())
    assert checked.findings == ()
    assert (checked.counts.trials, checked.counts.epochs) == (count, 2 * count)
    assert len(said) < 50


NOW, LEASE = 1000.0, 30.0


def attempt(k: int, until: float, outcome: str | None = None) -> Attempt:
    ended = None if outcome is None else until
    return Attempt(
        0, k, "w", 0.0, ended, Outcome(outcome) if outcome else None, None, 0.5, None, None, None,
        live=outcome is None and until >= NOW, until=until,
    )  # fmt: skip


def judged(
    state: str, *rows: Attempt, number: int = 0, epochs: dict[int, int] | None = None
) -> list[Finding]:
    trial = StoredTrial(7, number, state, rows, epochs or {})
    return list(diagnose(Rows(NOW, [StoredStudy(UUID, "toy", 5, LEASE, [trial])])))


@pytest.mark.parametrize(
    ("state", "rows"),
    [
        ("WAITING", []),
        ("WAITING", [attempt(1, NOW + 9)]),
        ("RUNNING", [attempt(1, NOW + 9)]),
        ("RUNNING", [attempt(1, NOW, "handed_back")]),
        ("RUNNING", [attempt(1, NOW, "lost"), attempt(2, NOW + 9)]),
        ("RUNNING", [attempt(1, NOW, "paused")]),
        ("RUNNING", [attempt(1, NOW, "paused"), attempt(2, NOW + 9)]),
        ("RUNNING", [attempt(1, NOW, "lost"), attempt(2, NOW, "paused")]),
        ("PRUNED", [attempt(1, NOW, "paused"), attempt(2, NOW, "pruned")]),
        *((outcome.optuna_state, [attempt(1, NOW, "lost"), attempt(2, NOW, outcome)])
          for outcome in FINAL),
    ],
)  # fmt: skip
def test_what_a_search_may_look_like(state: str, rows: list[Attempt]) -> None:
    assert judged(state, *rows, epochs={1: 2} if rows else {}) == []


@pytest.mark.parametrize(
    ("state", "rows", "kind", "says"),
    [
        ("RUNNING", ["paused"], rules.CONTRADICTION, "none of its trial's epochs are there"),
        ("PRUNED", ["paused"], rules.UNATTEMPTED_TRIAL, "its last attempt was paused: another"),
        ("COMPLETE", ["paused"], rules.UNATTEMPTED_TRIAL, "its last attempt was paused: another"),
        ("RUNNING", ["pruned", "paused"], rules.CONTRADICTION, "another attempt came after it"),
    ],
)
def test_what_no_pause_looks_like(state: str, rows: list[str], kind: str, says: str) -> None:
    found = judged(state, *(attempt(k, NOW, one) for k, one in enumerate(rows, 1)))
    assert (found[0].kind, found[0].fault, found[0].repair) == (kind, True, None)
    assert says in found[0].message


@pytest.mark.parametrize("ago", [0.1, 10.0, 1e6])
def test_an_expired_lease_is_a_note(ago: float) -> None:
    (one,) = judged("RUNNING", attempt(1, NOW - ago))
    assert (one.kind, one.fault) == (rules.EXPIRED_LEASE, False)


@pytest.mark.parametrize("outcome", [None, "lost", "paused"])
def test_nobody_takes_a_trial_beyond_the_budget(outcome: str | None) -> None:
    (one,) = judged("RUNNING", attempt(1, NOW - 9, outcome), number=5)
    assert (one.fault, one.repair) == (True, None)
    assert "--trials 6" in one.advice


@pytest.mark.parametrize("state", [*FINISHED_STATES, "RUNNING", "WAITING"])
@pytest.mark.parametrize("outcome", [None, "lost", "handed_back", "paused", *FINAL])
def test_every_fault_is_mended_or_left_with_a_reason(state: str, outcome: str | None) -> None:
    for until in (NOW - 9, NOW + 9, NOW + 1e6):
        for found in judged(state, attempt(1, until, outcome), epochs={2: 1}):
            assert not found.fault or (found.repair is None) == bool(found.advice)


def test_the_tables_of_outcomes_are_whole() -> None:
    assert {outcome.optuna_state for outcome in FINAL} == set(FINISHED_STATES)
    ended = {state: outcome_of_state(state) for state in ("FAIL", "PRUNED")}
    assert all(outcome and outcome.optuna_state == state for state, outcome in ended.items())
