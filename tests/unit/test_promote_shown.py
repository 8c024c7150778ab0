"""What people see of a search whose trials pause at rungs, and what they may do with these."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from hpo.cli.live import Screen, print_ending
from hpo.cli.status import _only
from hpo.cli.tables import studies_table, trial_page
from hpo.config.study import StudyFile
from hpo.errors import InputError, NotFound
from hpo.paths import Home
from hpo.reports.importance import importances
from hpo.reports.progress import PlainView
from hpo.reports.rungs import rung_figure
from hpo.reports.study import study_report
from hpo.search import study as studies
from hpo.search.status import StudyStatus, read_status
from hpo.storage.database import Database
from hpo.storage.records import Attempt, Epoch, Outcome
from hpo.storage.records import Trial as Stored
from hpo.trained.export import export
from tests.harness.fakes import study_file
from tests.harness.filled import Trial, fill
from tests.harness.searches import search
from tests.unit.test_live import drawn, worker
from tests.unit.test_live import status as fixed
from tests.unit.test_promote_search import promoted as promoting
from tests.unit.test_promote_search import run as turns

SCHEDULER = """\
scheduler = {name = 'promote', first_epochs = 1, reduction_factor = 3, finish = 2}\
"""


SPACE = "optimizer.lr = {low = 0.01, high = 1.0}"


def promoted(trials: int = 20, space: str = SPACE, name: str = "toy") -> StudyFile:
    """Rungs after epochs 1 and 3 of 9."""
    return study_file(trials=trials, study=SCHEDULER, train="epochs = 9", space=space, name=name)


PAUSED = [Trial("paused", ((30 + n) / 100,), "9th of 9 after epoch 1") for n in range(6)]
HIGHER = [Trial("paused", (0.5, 0.6, (70 + n) / 100)) for n in range(9)]
COMPLETE = [Trial("complete", tuple((50 + n + e) / 100 for e in range(9))) for n in range(2)]


@pytest.mark.parametrize(
    ("trials", "compared"),
    [
        ([*PAUSED, *COMPLETE], "8 trials by their first epoch"),
        ([*PAUSED, *HIGHER, *COMPLETE], "11 trials by their first 3 epochs"),
        ([*PAUSED, Trial("diverged", (0.4, float("nan"))), Trial("failed")], "0 complete trials"),
        (COMPLETE * 5, "10 complete trials"),
    ],
)
def test_importance_where_few_are_complete(
    database: Database, trials: list[Trial], compared: str
) -> None:
    fill(database, promoted(), trials)
    assert importances(database, "toy").compared == compared


@pytest.mark.slow
def test_importance_by_the_first_epochs_is_of_those_values(database: Database) -> None:
    """The one parameter of two that the values follow has the most, and it is said of what."""
    space = "optimizer.lr = {low = 0.01, high = 1.0}\nlabel_smoothing = {low = 0.0, high = 0.5}"
    fill(database, promoted(32, space, "drawn"), [Trial("paused", (0.1,))] * 32)
    rates = [trial.params["optimizer.lr"] for trial in read_status(database, "drawn").trials]
    paused = [Trial("paused", (0.0, rate, rate / 2)) for rate in rates[:30]]
    complete = [Trial("complete", (0.0, rate, *(1.0,) * 7)) for rate in rates[30:]]
    fill(database, promoted(32, space, "rates"), [*paused, *complete])
    found = importances(database, "rates")
    assert found.shares["optimizer.lr"] > 0.7
    assert (found.trials, found.epochs) == (32, 3)
    out = io.StringIO()
    console = Console(file=out, width=200)
    print_ending(database, read_status(database, "rates"), console, hpo="hpo", flag="")
    said = "parameter stands out from chance in 32 trials by their first 3 epochs"
    assert said in out.getvalue()
    assert said in re.sub(r"\s+", " ", study_report(database, "rates"))


def test_importance_without_a_scheduler_is_of_complete_trials(database: Database) -> None:
    fill(database, study_file(trials=20, train="epochs = 9"), [*HIGHER, *COMPLETE])
    assert importances(database, "toy").compared == "2 complete trials"


def test_a_paused_trial_is_exported_and_says_so(database: Database) -> None:
    fill(database, promoted(), [*PAUSED, *HIGHER])
    with pytest.raises(NotFound, match=r"15 paused\).*; hpo export toy --trial 14 takes the best"):
        export(database, "toy")
    config, provenance = export(database, "toy", number=14)
    assert config.epochs == 9
    assert (provenance["state"], provenance["stopped_epoch"]) == ("paused", None)
    assert provenance["notes"][1] == (
        "This trial is paused after epoch 3 of 9: it has not run to its end."
    )


@pytest.fixture
def halfway(database: Database) -> StudyStatus:
    """Fifteen paused trials, nine of which came to the second rung, and two complete ones."""
    fill(database, promoted(), [*PAUSED, *HIGHER, *COMPLETE, Trial("failed", (), "no images")])
    return read_status(database, "toy")


def test_a_status_counts_what_was_begun_and_its_epochs(halfway: StudyStatus) -> None:
    found = halfway.to_dict()
    spent = 6 * 1 + 9 * 3 + 2 * 9
    assert (found["budget"], found["finished"], found["begun"]) == (20, 3, 18)
    assert found["trials"]["paused"] == 15
    assert found["epochs"] == spent
    assert spent < found["expected_epochs"] < 20 * 9
    assert halfway.done == spent / found["expected_epochs"]
    assert halfway.progress == f"18/20 begun, {spent}/~{found['expected_epochs']} epochs"
    assert found["rungs"] == [
        {"epoch": 1, "reached": 17, "went_on": 11, "paused": 6, "threshold": 0.5},
        {"epoch": 3, "reached": 11, "went_on": 2, "paused": 9, "threshold": 0.76},
    ]
    assert found["best_so_far"] == {"number": 16, "value": 0.59, "state": "complete", "epochs": 9}


def test_the_best_so_far_while_nothing_is_complete(database: Database) -> None:
    fill(database, promoted(), [*PAUSED, *HIGHER])
    status = read_status(database, "toy")
    assert status.to_dict()["best"] is None
    assert status.to_dict()["best_so_far"] == {
        "number": 14, "value": 0.78, "state": "paused", "epochs": 3,
    }  # fmt: skip
    text = "\n".join(drawn(Screen(status), 100))
    assert "best so far val_top1 0.7800 (trial 14, paused after epoch 3)" in text
    assert "15 paused" in text
    assert "reached  epoch 1: 15  epoch 3: 9  the end: 0" in text
    page = re.sub(r"\s+", " ", study_report(database, "toy"))
    assert "The best so far is trial 14, paused after epoch 3: val_top1 0.7800." in page
    assert "0 of 20 trials finished, 15 paused; the study is waiting" in page
    listed = "\n".join(drawn(studies_table([status]), 120))
    assert "0/20, 15 paused" in listed
    assert "0.7800 so far" in listed


def test_where_a_paused_trial_stands(halfway: StudyStatus) -> None:
    trial = halfway.trials[8]
    text = "\n".join(drawn(trial_page(halfway, trial, None), 120))
    assert "paused at its rung: 7th of 11 after epoch 3; the best 3 go on" in text
    assert "why it ended" not in text
    low = "\n".join(drawn(trial_page(halfway, halfway.trials[0], None), 120))
    assert "17th of 17 after epoch 1; the best 5 go on" in low
    assert "9th of 9 after epoch 1" in low  # when it paused
    over = "\n".join(drawn(trial_page(halfway, halfway.trials[17], None), 120))
    assert "paused" not in over
    assert "why it ended: no images" in over


@pytest.mark.parametrize(
    ("busy", "spent", "expected", "workers", "left"),
    [(0, 10, 40, 1, 30.0), (0, 10, 40, 2, 15.0), (2, 9, 40, 2, 15.0), (0, 40, 40, 1, 0.0)],
)
def test_the_time_left_follows_the_epochs(
    busy: int, spent: int, expected: int, workers: int, left: float
) -> None:
    """A second an epoch, of which those in progress are half done."""
    file = promoted(20)
    status = read_rows(file, busy, spent, workers)
    status.__dict__["expected_epochs"] = expected
    assert status.eta_s == pytest.approx(left)


def read_rows(file: StudyFile, busy: int, spent: int, workers: int) -> StudyStatus:
    """A status of `spent` epochs of paused trials, of a second each, and `busy` half a second in
    theirs."""
    rows = (Epoch(1, 1, 0.0, {"val_top1": 0.5}, 1),)
    trials = [_trial(n, "paused", 1.0, rows) for n in range(spent)]
    trials += [_trial(spent + n, "running", 0.5, ()) for n in range(busy)]
    live = tuple(worker(f"w{n}") for n in range(workers))
    return replace(fixed(tuple(trials), live), file=file)


def _trial(number: int, state: str, seconds: float, rows: tuple[Epoch, ...]) -> Stored:
    live = state == "running"
    began = 40.0 - seconds
    attempt = Attempt(
        number=number, k=1, worker="w", started=began, ended=None if live else 40.0,
        outcome=None if live else Outcome.PAUSED, reason=None, value=None, first_epoch=1,
        epoch=len(rows), runtime=None, live=live,
    )  # fmt: skip
    return Stored(number, state, {}, 0.5 if rows else None, 1 if rows else None, rows,
                  (attempt,), None)  # fmt: skip


def test_plain_lines_tell_pauses_once_and_the_last_ones_together(
    database: Database, home: Home
) -> None:
    study, _ = studies.create(database, promoting(trials=6, finish=1))
    lines: list[str] = []
    view = PlainView(lambda: read_status(database, "toy"), lines.append)
    turns(study, home, 5)
    view.finish()
    view.finish()
    paused = list(lines)
    assert paused
    assert all(" paused  val_top1 0." in line and "after epoch" in line for line in paused)
    assert paused[0].startswith("[1/6] trial 0 paused  val_top1 0.")
    search(database, home, promoting(trials=6, finish=1))
    view.finish()
    view.finish()
    status = read_status(database, "toy")
    assert sum(" complete  " in line for line in lines) == status.count("complete") == 1
    assert sum("pruned" in line for line in lines) == 1
    dropped = status.count("pruned")
    assert lines[-1] == (
        f"[6/6] {dropped} paused trials pruned: not among the best at the end of the study"
    )
    again = PlainView(lambda: read_status(database, "toy"), lines.append)
    count = len(lines)
    again.finish()
    assert len(lines) == count


def test_trials_are_listed_by_state(halfway: StudyStatus, database: Database) -> None:
    assert [trial.number for trial in _only(halfway, ["paused"]).trials] == list(range(15))
    assert len(_only(halfway, ["complete", "failed"]).trials) == 3
    assert _only(halfway, []).trials == halfway.trials
    with pytest.raises(InputError, match="--state pausd: allowed: waiting, running, paused, inter"):
        _only(halfway, ["pausd"])


def test_the_report_shows_the_rungs(halfway: StudyStatus, database: Database) -> None:
    page = study_report(database, "toy")
    text = re.sub(r"\s+", " ", re.sub("<[^>]+>", " ", page))
    assert "rung reached went on paused there val_top1 to go on" in text
    assert "after epoch 1 17 11 6 0.5000 after epoch 3 11 2 9 0.7600 the end, epoch 9 2" in text
    assert "Scheduler promote: first rung after epoch 1, then 3 of 9; one in 3 goes on" in text
    figure = rung_figure(halfway)
    assert figure is not None
    did_not, went_on = figure["data"]
    assert (len(did_not["x"]), len(went_on["x"])) == (6 + 9, 11 + 2)
    assert [line["y0"] for line in figure["layout"]["shapes"]] == [0.5, 0.76]
    fill(database, study_file(name="plain"), COMPLETE)
    assert "Rungs" not in study_report(database, "plain")
    assert rung_figure(read_status(database, "plain")) is None
