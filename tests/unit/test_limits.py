"""Limits of a study: durations in words, what a file may give, what `hpo run` and `extend` take."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from hpo.cli.live import Screen, print_ending
from hpo.config.study import StudyFile, parse_study
from hpo.errors import ConfigError, Conflict, InputError
from hpo.formatting import exact_duration, parse_duration
from hpo.reports.progress import headline, trial_line
from hpo.search import study as studies
from hpo.search.status import StudyStatus, read_status
from hpo.storage import records
from hpo.storage.database import Database, connect
from hpo.storage.tables import OPEN_ENDED
from tests.harness.commands import Hpo, calls
from tests.harness.fakes import study_file
from tests.harness.filled import MIXED, fill
from tests.unit.test_live import TRIALS, drawn, status

SPACE = "[space]\noptimizer.lr = {low = 0.001, high = 0.1}\n"
GRID = '[space]\noptimizer.name = ["sgd", "adam", "adamw"]\n'


@pytest.mark.parametrize(
    ("text", "seconds", "exact"),
    [
        ("90s", 90, "1m30s"),
        ("30m", 1800, "30m"),
        ("1h30m", 5400, "1h30m"),
        ("2 h", 7200, "2h"),
        (" 2 h 05 min ", 7500, "2h5m"),
        ("1.5h", 5400, "1h30m"),
        ("1d", 86_400, "1d"),
        ("45", 45, "45s"),
        (45, 45, "45s"),
        (0.5, 0.5, "0.5s"),
        ("1d2h3m4.567s", 93_784.567, "1d2h3m4.567s"),
    ],
)
def test_a_duration_is_read_and_written(text: str | float, seconds: float, exact: str) -> None:
    assert parse_duration(text) == seconds
    assert exact_duration(seconds) == exact
    assert parse_duration(exact) == seconds


@pytest.mark.parametrize(
    "text",
    ["2 hours and a bit", "", "h", "-1", "0", "0s", "0.0001", "30m1h", "1m1m", "1e3", "inf", "nan",
     "1.h", "\u0663s", "10001d", -5, 0, 1e12, float("nan"), float("inf")],
)  # fmt: skip
def test_what_is_no_duration(text: str | float) -> None:
    with pytest.raises(ValueError, match=r"a time such as 90s, 30m, 1h30m, 2 h or a number"):
        parse_duration(text)


def parse(study: str, space: str = SPACE) -> StudyFile:
    return parse_study(f'[study]\nname = "x"\n{study}\n{space}', "x.toml")


@pytest.mark.parametrize(
    ("given", "trials"),
    [
        ("", 50),
        ('max_time = "30m"', None),
        ("max_full_trainings = 2.5", None),
        ('max_time = "30m"\ntrials = 8', 8),
        ('max_time = 60\ntrials = "none"', None),
        ("timeout_s = 60", 50),
        ('max_time = "none"', 50),
    ],
)
def test_trials_are_open_ended_beside_time_or_epochs(given: str, trials: int | None) -> None:
    file = parse(given)
    assert file.study.trials == trials
    again = StudyFile.from_definition(json.loads(json.dumps(file.definition())))
    assert again.study == file.study


@pytest.mark.parametrize("given", ["", 'max_time = "1h"', 'max_time = "1h"\ntrials = "none"'])
def test_the_points_of_a_grid_remain_its_limit(given: str) -> None:
    assert parse(f'sampler = "grid"\n{given}', GRID).study.trials == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            'max_time = "2 hours and a bit"',
            'study.max_time: "2 hours and a bit": allowed: a time s',
        ),
        ('max_time = "-1h"', 'study.max_time: "-1h": allowed: a time such as'),
        ("max_time = 0", "study.max_time: 0: allowed: a time such as"),
        ("max_time = -3.5", "study.max_time: -3.5: allowed: a time such as"),
        ("max_time = true", "study.max_time: true: "),
        ("max_time = [1]", "study.max_time: [1]: allowed: a number"),
        ("max_full_trainings = 0", "study.max_full_trainings: 0: input should be greater than 0"),
        ("max_full_trainings = -2", "study.max_full_trainings: -2: input should be greater"),
        ('max_full_trainings = "many"', 'study.max_full_trainings: "many": allowed: a number'),
        ('trials = "none"', "study.trials: none: allowed only beside max_time or max_full_train"),
        ('max_times = "1h"', "study.max_times: unknown key; did you mean 'max_time'"),
    ],
)
def test_bad_limits(given: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(given)
    assert str(error.value).startswith(f"x.toml: {message}")


def open_ended(**changes: object) -> StudyStatus:
    limits = {"trials": OPEN_ENDED, "max_time_s": 1800.0, "max_full_trainings": 14.0}
    now = status()
    return replace(now, row=replace(now.row, **limits | changes))  # type: ignore[arg-type]


def test_an_open_ended_study_is_shown_without_a_number_of_trials() -> None:
    now = open_ended()
    text = "\n".join(drawn(Screen(now)))
    assert "3 trials, no limit" in text
    assert "elapsed 40 s of 30m" in text
    assert "2.0 of 14 full trainings" in text
    assert headline(now, "db", ["cpu"]) == (
        "flowers: 3 trials, no limit, at most 30m, at most 14 full trainings; 1 worker on cpu; db"
    )
    assert trial_line(now, TRIALS[0], 1).startswith("[1] trial 0 complete")
    told = now.to_dict()
    assert (told["budget"], told["max_time_s"], told["epochs"]) == (None, 1800.0, 6)
    assert str(OPEN_ENDED) not in json.dumps(told) + text


def test_once_a_budget_is_spent_the_running_epochs_are_the_last() -> None:
    text = "\n".join(drawn(Screen(open_ended(stop="rule", stop_reason="max_time = 30m is over"))))
    assert "last epochs" in text
    assert "left" not in text


def test_the_end_names_the_option_that_gives_more(database: Database) -> None:
    fill(database, study_file(trials=100, name="short", study="max_full_trainings = 2.5"), MIXED)
    study = studies.load(database, "short")
    assert study.rule(study.snapshot()) is not None
    out = Console(file=io.StringIO(), width=100)
    print_ending(database, read_status(database, "short"), out, hpo="hpo", flag="")
    assert isinstance(out.file, io.StringIO)
    told = out.file.getvalue()
    assert "stopped: max_full_trainings = 2.5: 40 epochs were spent\n" in told
    assert "to go on: hpo extend short --max-full-trainings +2.5\n" in told


@pytest.mark.parametrize(
    ("changes", "eta_s"),
    [
        ({}, (1800 - 40)),  # by time; by epochs: 14 x 3 - 6 epochs, 10 s each, by two workers
        ({"max_time_s": None}, 36 * 40 / 6 / 2),
        ({"max_full_trainings": None}, 1800 - 40),
        ({"max_full_trainings": None, "max_time_s": None, "timeout_s": 100.0}, 30),
        ({"max_time_s": 60.0}, 20),
        ({"max_time_s": 10.0}, 0),
        ({"trials": 4}, 0),
    ],
)
def test_the_time_left_is_that_of_the_budget_that_ends_first(
    changes: dict[str, object], eta_s: float
) -> None:
    now = open_ended(**changes)
    first = min(eta_s, 36 * 40 / 6 / 2) if now.row.max_full_trainings else eta_s
    assert now.eta_s == pytest.approx(first)
    assert replace(now, live_workers=()).eta_s is None


@pytest.mark.parametrize(
    ("changes", "done"),
    [
        ({"max_time_s": None, "max_full_trainings": None, "trials": 6}, 0.5),
        ({"max_time_s": 50.0}, 0.8),
        ({"max_time_s": 5.0}, 1.0),
        ({"max_full_trainings": 4.0}, 0.5),
    ],
)
def test_the_bar_is_at_the_budget_of_which_most_is_spent(
    changes: dict[str, object], done: float
) -> None:
    assert open_ended(**changes).done == pytest.approx(done)


# Raising limits


@pytest.fixture
def database(database: Database) -> Database:
    fill(database, study_file(trials=100, study='max_time = "1h"\nmax_full_trainings = 50'), MIXED)
    return database


def test_limits_are_raised(database: Database) -> None:
    study = studies.load(database, "toy")
    studies.extend(study, max_time="2h", max_full_trainings=60, patience_trials=90, timeout_s="3h")
    row = records.get_study(database, "toy")
    assert (row.max_time_s, row.max_full_trainings, row.timeout_s) == (7200, 60, 10_800)
    assert (row.patience_trials, row.trials) == (90, 100)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_time": "30m"}, "--max-time 30m: study 'toy' has 1h already; give more"),
        ({"max_time": 3600}, "--max-time 1h: study 'toy' has 1h already; give more"),
        ({"max_time": "soon"}, "--max-time soon: allowed: a time such as"),
        ({"max_full_trainings": 50}, "--max-full-trainings 50: study 'toy' has 50 already"),
        ({"max_full_trainings": float("nan")}, "--max-full-trainings nan: give a number above 0"),
        ({"patience_trials": 0}, "--patience-trials 0: give a number above 0"),
        ({"timeout_s": -1}, "--timeout-s -1: allowed: a time such as"),
        ({"timeout_s": 0.001, "trials": 200}, "would stop at once: timeout_s = 0.001 of training "
         "were spent; raise the limit: hpo extend toy --timeout-s ..."),
        ({"target": 0.0}, "would stop at once: the target 0 was reached"),
        ({"target": float("nan")}, "hpo extend toy: study.target: nan: "),
        ({"trials": 2**31 - 1}, "hpo extend toy: study.trials: 2147483647: "),
    ],
)  # fmt: skip
def test_a_limit_that_is_not_larger_changes_nothing(
    database: Database, limits: dict[str, float], message: str
) -> None:
    before = records.get_study(database, "toy")
    with pytest.raises(InputError) as error:
        studies.extend(studies.load(database, "toy"), **limits)  # type: ignore[misc]
    assert message in str(error.value)
    assert records.get_study(database, "toy") == before


@pytest.mark.parametrize(
    ("given", "limits", "message"),
    [
        ('sampler = "grid"', {"trials": 3}, "study.trials: 3: the grid has 2 points"),
        ('scheduler = "promote"', {"patience_trials": 3}, "patience_trials: 3: under promote"),
    ],
)
def test_a_limit_that_its_file_could_not_have_is_refused(
    tmp_path: Path, given: str, limits: dict[str, int], message: str
) -> None:
    text = f'[study]\nname = "x"\ntrials = 2\n{given}\n[space]\noptimizer.lr = [0.1, 0.01]'
    study, _ = studies.create(connect(f"sqlite:///{tmp_path}/x.db"), parse_study(text))
    with pytest.raises(InputError) as error:
        studies.extend(study, **limits)  # type: ignore[misc]
    assert message in str(error.value)


def test_a_study_whose_time_is_over_is_resumed_with_more_of_it(database: Database) -> None:
    study = studies.load(database, "toy")
    records.update_study(database, study.uuid, max_full_trainings=0.1)
    assert study.spent() == "max_full_trainings = 0.1: 40 epochs were spent"
    for go_on in (lambda: studies.resume(study), lambda: studies.extend(study, trials=200)):
        with pytest.raises(InputError, match=r"hpo extend toy --max-full-trainings \.\.\."):
            go_on()
    assert study.snapshot().stop == "rule"
    studies.extend(study, max_full_trainings=90)
    assert study.snapshot().stop is None


def test_the_same_file_with_other_limits_names_the_option(database: Database) -> None:
    def file(limits: str) -> StudyFile:
        return study_file(trials=100, study=limits)

    with pytest.raises(Conflict, match="extend toy --max-time 2h --max-full-trainings 60"):
        studies.create(database, file('max_time = "2h"\nmax_full_trainings = 60'))
    with pytest.raises(Conflict, match=r"study.max_time: \"1h\" -> \(not given\)"):
        studies.create(database, file("max_full_trainings = 50"))
    studies.extend(studies.load(database, "toy"), max_time="2h")
    for limits in ("1h", "2h"):  # as it was created, and as it is now
        same = file(f'max_time = "{limits}"\nmax_full_trainings = 50')
        assert studies.create(database, same)[1] is False


def test_what_ends_an_open_ended_study_cannot_be_a_larger_number_of_trials(
    database: Database,
) -> None:
    study, _ = studies.create(database, parse("max_time = 60"))
    with pytest.raises(InputError, match="--trials 9: study 'x' has no limit on trials"):
        studies.extend(study, trials=9)
    assert studies.load(database, "x").row.is_open_ended
    studies.enqueue(study, {"optimizer.lr": 0.01})
    assert read_status(database, "x").budget is None


# Commands


@pytest.fixture
def hpo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Hpo:
    return calls(monkeypatch, capsys)


def test_extend_takes_sums_and_durations(hpo: Hpo, database: Database) -> None:
    url = database.secret_url
    said = hpo("extend", "toy", "--max-time", "+30m", "--max-full-trainings", "+5",
               "--timeout-s", "4h", "--storage", url)  # fmt: skip
    assert said[0] == 0
    assert (
        "toy: 100 trials in total, at most 1h30m, at most 55 full trainings, at most 4h of"
        in (said[1])
    )
    for options, message in (
        (["--max-time", "a bit"], "--max-time 'a bit': allowed: a time such as 90s"),
        (["--max-full-trainings", "x"], "--max-full-trainings 'x': a number such as 12.5, or +5"),
        (["--trials", "x"], "--trials 'x': a whole number such as 50, or +20 for 20 more"),
        ([], "nothing to extend: give --trials, --max-time"),
    ):
        code, _, err = hpo("extend", "toy", *options, "--storage", url)
        assert code == 2
        assert message in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--time", "2 hours"], 'study.max_time: "2 hours": allowed: a time such as 90s, 30m'),
        (["--time", "1h", "--set", "study.max_time=2h"], "study.max_time: given twice"),
        (["--max-full-trainings", "-1"], "study.max_full_trainings: -1.0: input should be gre"),
        (["--trials", "0"], "--trials"),
    ],
)
def test_bad_limits_of_a_run_create_nothing(
    hpo: Hpo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.toml").write_text(SPACE)
    code, _, err = hpo("run", "x.toml", *options, "--storage", "sqlite:///new.db")
    assert code == 2
    assert message in err
    assert not Path("new.db").exists()


def test_plus_of_a_limit_that_is_not_there(hpo: Hpo, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'new.db'}"
    studies.create(connect(url), parse("max_time = 60"))
    for given in (["--trials", "+5"], ["--max-full-trainings", "+5"]):
        code, _, err = hpo("extend", "x", *given, "--storage", url)
        assert code == 2
        assert f"{given[0]} '+5': study 'x' has no such limit yet" in err


@pytest.mark.parametrize("key", ["timeout_s", "lease_s", "stall_timeout_s"])
def test_every_field_of_time_is_also_written_as_a_duration(key: str) -> None:
    text = "[study]\nname = 's'\n{} = {}\n[space]\nbatch_size = [8, 16]\n"
    for given, seconds in (("'1h30m'", 5400.0), (90, 90.0)):
        assert getattr(parse_study(text.format(key, given), "s.toml").study, key) == seconds
    with pytest.raises(
        ConfigError, match=f'{key}: "soon": allowed: a time such as 90s, 30m, 1h30m'
    ):
        parse_study(text.format(key, "'soon'"), "s.toml")
