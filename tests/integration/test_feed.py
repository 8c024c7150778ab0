"""What optuna-dashboard's pages show of hpo."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import optuna
import pytest
from werkzeug.test import Client

from hpo.dashboard.app import trial_note
from hpo.dashboard.server import make_app
from hpo.search.status import read_status
from hpo.search.study import Study
from hpo.storage.database import Database
from hpo.storage.optuna import FencedStorage
from tests.harness.fakes import study_file
from tests.harness.filled import Trial, fill

HERE = "127.0.0.1:8080"


@pytest.fixture
def study(database: Database) -> Study:
    trials = [
        Trial("complete", (0.5, 0.6)),
        Trial("pruned", (0.4,), reason="![x](http://evil.example/?) <script>"),
    ]
    return fill(database, study_file(trials=6), trials)


def ask(app: Any, method: str, path: str, body: Any = None) -> Any:
    headers = {"Host": HERE, "Origin": f"http://{HERE}"}
    answer = Client(app).open(path, method=method, json=body, headers=headers, buffered=True)
    assert answer.status_code == 200, answer.text
    return json.loads(answer.get_data())


def detail(app: Any, study: Study, query: str = "") -> Any:
    return ask(app, "GET", f"/api/studies/{study.row.study_id}{query}")


def test_the_studys_note_has_its_summary_and_links(study: Study) -> None:
    found = detail(make_app(study.database), study)
    note = found["note"]["body"]
    assert note.startswith("[Workers, logs")
    assert "(/hpo/studies/toy/report)" in note
    assert "Searched 1 parameter in 2 trials" in note
    assert "hpo train toy.best.toml" in note
    assert "    trials = 6" in note


def test_each_trial_says_why_it_ended_and_all_its_metrics(study: Study) -> None:
    found = detail(make_app(study.database), study)
    complete, pruned = (one["note"]["body"] for one in found["trials"])
    assert complete.startswith("**complete**")
    assert r"| val\_top1 | ▁█ | 0.6000 | 0.6000 |" in complete
    assert "hpo export toy --trial 0" in complete
    assert "(/hpo/studies/toy/trials/0/curves.svg)" in complete
    assert "curves.svg" in found["best_trials"][0]["note"]["body"]
    # What came from outside is text: no image, no link, no tag.
    assert r"\!\[x\](http://evil.example/?) \<script\>" in pruned


def test_a_class_is_text_in_the_table_of_metrics(database: Database) -> None:
    """A class may be called anything, and metrics are named after classes."""
    file = study_file(study="metric = 'val_recall:a|b <img src=x>'")
    status = read_status(database, fill(database, file, [Trial("complete", (0.5,))]).row.name)
    (trial,) = status.trials
    rows = tuple(replace(row, metrics={file.metric: 0.5}) for row in trial.epochs)
    note = trial_note(status, replace(trial, epochs=rows), [])
    assert r"| val\_recall:a\|b \<img src=x\> | ▁ | 0.5000 | 0.5000 |" in note
    assert "1 epoch in 1 attempt, " in note


def test_figures_of_the_whole_study(study: Study) -> None:
    found = detail(make_app(study.database), study)["plotly_graph_objects"]
    figures = {one["id"]: json.loads(one["graph_object"]) for one in found}
    assert {"Curves-by-outcome", "Worker-timeline", "Value-against-cost"} <= set(figures)
    assert all(figure["data"] for figure in figures.values())


def test_a_note_that_somebody_wrote_stays(study: Study) -> None:
    app = make_app(study.database)
    before = detail(app, study)
    place = f"/api/studies/{study.row.study_id}"
    trial = before["trials"][1]
    for path, note in ((place, before["note"]), (f"{place}/{trial['trial_id']}", trial["note"])):
        ask(app, "PUT", f"{path}/note", {"body": "mine", "version": note["version"] + 1})
    after = detail(app, study)
    assert after["note"]["body"] == "mine"
    assert after["trials"][1]["note"]["body"] == "mine"
    assert after["trials"][0]["note"]["body"].startswith("**complete**")


def test_later_requests_have_new_trials_alone(study: Study) -> None:
    found = detail(make_app(study.database), study, "?after=1")
    assert [one["number"] for one in found["trials"]] == [1]
    assert found["trials"][0]["note"]["body"].startswith("**pruned**")


def test_a_study_of_others_is_left_alone(database: Database, study: Study) -> None:
    other = optuna.create_study(storage=FencedStorage(database), study_name="other")
    other.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    found = ask(make_app(database), "GET", f"/api/studies/{other._study_id}")
    assert found["note"]["body"] == found["trials"][0]["note"]["body"] == ""
    assert found["plotly_graph_objects"] == []
