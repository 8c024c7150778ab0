"""What people see of a search whose trials pause at rungs, and what they may do with these."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from hpo.cli.live import print_ending
from hpo.config.study import StudyFile
from hpo.errors import NotFound
from hpo.reports.importance import importances
from hpo.reports.study import study_report
from hpo.search.status import read_status
from hpo.storage.database import Database
from hpo.trained.export import export
from tests.harness.fakes import study_file
from tests.harness.filled import Trial, fill

SCHEDULER = """\
scheduler = {name = 'promote', first_epochs = 1, reduction_factor = 3, finish = 2}\
"""


SPACE = "optimizer.lr = {low = 0.01, high = 1.0}"


def promoted(trials: int = 20, space: str = SPACE, name: str = "toy") -> StudyFile:
    """Rungs after epochs 1 and 3 of 9."""
    return study_file(trials=trials, study=SCHEDULER, train="epochs = 9", space=space, name=name)


PAUSED = [Trial("paused", (0.3 + n / 100,), "after epoch 1: 9th of 9") for n in range(6)]
HIGHER = [Trial("paused", (0.5, 0.6, 0.7 + n / 100)) for n in range(9)]
COMPLETE = [Trial("complete", tuple(0.5 + (n + e) / 100 for e in range(9))) for n in range(2)]


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
