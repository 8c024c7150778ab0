"""hpo's own pages at /hpo: what they show, what they change, and who may."""

from __future__ import annotations

import json
from typing import Any

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner
from werkzeug.test import Client, TestResponse

from hpo.cli.main import app as cli
from hpo.dashboard.auth import Credentials
from hpo.dashboard.gateway import Settings
from hpo.dashboard.server import make_app
from hpo.paths import Home
from hpo.search.study import Study
from hpo.storage import leases, records
from hpo.storage.database import Database
from hpo.storage.optuna import FencedStorage, add_waiting
from hpo.storage.tables import attempts
from tests.harness.fakes import study_file
from tests.harness.filled import Trial, fill

HERE = "127.0.0.1:8080"
PAGE = "/hpo/studies/toy"


@pytest.fixture
def study(database: Database) -> Study:
    trials = [
        Trial("complete", (0.5, 0.6)),
        Trial("pruned", (0.4,), reason="pruned after <b>epoch</b> 1"),
        Trial("failed", reason="ran out of memory"),
    ]
    return fill(database, study_file(trials=6), trials)


def ask(app: Any, path: str, form: dict[str, str] | None = None, **headers: str) -> TestResponse:
    """The response to a request of a browser on this machine; a write where there is a form."""
    headers = {"Host": HERE, **headers}
    method = "GET" if form is None else "POST"
    path, _, query = path.partition("?")
    return Client(app).open(
        path, method=method, query_string=query, data=form, headers=headers, buffered=True
    )


def own(app: Any, path: str, form: dict[str, str]) -> TestResponse:
    return ask(app, path, form, Origin=f"http://{HERE}")


def test_studies_and_their_trials_with_reasons(study: Study) -> None:
    app = make_app(study.database)
    overview = ask(app, "/hpo").text
    assert f'<a href="{PAGE}">toy</a>' in overview
    page = ask(app, PAGE)
    assert page.status_code == 200
    assert "script-src 'self'" in page.headers["Content-Security-Policy"]
    assert "pruned after &lt;b&gt;epoch&lt;/b&gt; 1" in page.text
    assert "ran out of memory" in page.text
    only = ask(app, f"{PAGE}?state=failed").text
    assert "ran out of memory" in only
    assert "pruned after" not in only


def test_a_study_that_is_over_has_no_time_left(database: Database) -> None:
    fill(database, study_file(trials=1), [Trial("complete", (0.5,))])
    overview = ask(make_app(database), "/hpo").text
    assert "finished" in overview
    assert "about 0" not in overview


def test_a_trial_the_logs_and_the_report(study: Study) -> None:
    log = study.directory(Home.default()).log("w1")
    log.parent.mkdir(parents=True)
    log.write_text("epoch 1\n<script>alert(1)</script> \x1b[31mred\n")
    app = make_app(study.database)
    trial = ask(app, f"{PAGE}/trials/0").text
    assert "val_top1" in trial
    assert "0.6" in trial
    logs = ask(app, f"{PAGE}/logs").text
    assert "&lt;script&gt;alert(1)" in logs
    assert "\x1b" not in logs
    report = ask(app, f"{PAGE}/report")
    assert "Plotly" in report.text
    assert "'nonce-" in report.text
    assert "default-src 'none'" in report.headers["Content-Security-Policy"]


@pytest.mark.parametrize(
    "path", ["/hpo/studies/none", f"{PAGE}/trials/99", "/hpo/other", f"{PAGE}/stop"]
)
def test_what_is_not_there_is_a_page_that_says_so(study: Study, path: str) -> None:
    found = ask(make_app(study.database), path)
    assert found.status_code == 404
    assert 'role="alert"' in found.text


def test_stop_and_resume(study: Study) -> None:
    app = make_app(study.database)
    answer = own(app, f"{PAGE}/stop", {})
    assert (answer.status_code, answer.headers["Location"]) == (303, f"{PAGE}?told=stop")
    assert records.get_study(study.database, "toy").stop == "user"
    page = ask(app, answer.headers["Location"]).text
    assert "Stopping" in page
    assert f"{PAGE}/resume" in page
    own(app, f"{PAGE}/resume", {})
    assert records.get_study(study.database, "toy").stop is None


def test_extend_and_enqueue(study: Study) -> None:
    app = make_app(study.database)
    own(app, f"{PAGE}/extend", {"trials": "4"})
    assert records.get_study(study.database, "toy").trials == 10
    name = next(iter(study.file.space))
    value = 0.05
    answer = own(app, f"{PAGE}/enqueue", {"values": f"{name}={value}\n"})
    assert answer.status_code == 303, answer.text
    assert [dict(params) for params, _ in records.read_enqueued(study.database, study.uuid)] == [
        {name: value}
    ]


@pytest.mark.parametrize(
    ("action", "form", "why"),
    [
        ("extend", {"trials": "-3"}, "allowed: a number from 1"),
        ("extend", {"time": "soon"}, "soon"),
        ("extend", {}, "how many more trials"),
        ("enqueue", {"values": "what"}, "KEY=VALUE"),
        ("enqueue", {"values": "no.such = 1"}, "no.such"),
        ("enqueue", {"values": ""}, "KEY=VALUE"),
    ],
)
def test_a_form_that_is_wrong_changes_nothing_and_is_shown_again(
    study: Study, action: str, form: dict[str, str], why: str
) -> None:
    app = make_app(study.database)
    answer = own(app, f"{PAGE}/{action}", form)
    assert answer.status_code == 409
    assert why in answer.text
    if form.get("values"):
        assert form["values"] in answer.text
    assert records.get_study(study.database, "toy").trials == 6
    assert not records.read_enqueued(study.database, study.uuid)


def test_a_long_form_is_read_and_shown_again_whole(study: Study) -> None:
    app, text = make_app(study.database), "optimizer.lr = " + "9" * 20_000
    answer = own(app, f"{PAGE}/enqueue", {"values": text})
    assert answer.status_code == 409
    assert text in answer.text


def test_costs_of_several_objectives_are_shown(database: Database) -> None:
    several = study_file(study='metrics = ["val_top1", "latency_ms"]')
    fill(database, several, [Trial("complete", (0.5, 0.6), costs=(3.25,))])
    page = ask(make_app(database), PAGE).text
    assert "latency_ms" in page
    assert ">3.25<" in page


def test_an_attempt_whose_worker_is_gone_ended_with_its_lease(study: Study) -> None:
    add_waiting(FencedStorage(study.database), study.row.study_id)
    taken = leases.claim(study.database, study.uuid, study.snapshot().free[0], "w")
    assert taken is not None
    app, number = make_app(study.database), taken.lease.number
    assert ">running<" in ask(app, f"{PAGE}/trials/{number}").text
    with study.database.write() as c:
        c.execute(sa.update(attempts).where(attempts.c.outcome.is_(None)).values(
            started=1_000.0, until=1_090.0))  # fmt: skip
    page = ask(app, f"{PAGE}/trials/{number}").text
    assert ">running<" not in page
    assert ">1 min 30 s<" in page


def test_a_study_of_a_newer_version_hides_no_other(study: Study) -> None:
    database = study.database
    newer = fill(database, study_file(name="newer"), []).row
    odd = {**newer.definition, "study": {**newer.definition["study"], "novel": 1}}
    records.update_study(database, newer.uuid, definition=json.dumps(odd))
    app = make_app(database)
    page = ask(app, "/hpo").text
    assert "study &#39;newer&#39; is of a newer hpo" in page
    assert 'href="/hpo/studies/toy"' in page
    answer = ask(app, "/hpo/studies/newer")
    assert (answer.status_code, "study.novel: unknown key" in answer.text) == (500, True)
    assert ask(app, f"/api/studies/{newer.study_id}").status_code == 200
    listed = CliRunner().invoke(cli, ["list", "--json", "--storage", database.secret_url])
    assert [one["study"] for one in json.loads(listed.stdout)] == ["toy"]
    assert "study 'newer' is of a newer hpo" in listed.stderr


def test_a_page_elsewhere_changes_nothing(study: Study) -> None:
    app = make_app(study.database)
    answer = ask(app, f"{PAGE}/stop", {}, Origin="http://evil.example")
    assert answer.status_code == 403
    assert records.get_study(study.database, "toy").stop is None


def test_read_only_pages_have_no_forms_and_refuse_them(study: Study) -> None:
    app = make_app(study.database, Settings(read_only=True))
    page = ask(app, PAGE).text
    assert "<form" not in page
    assert "read-only" in page
    assert own(app, f"{PAGE}/stop", {}).status_code == 403
    assert records.get_study(study.database, "toy").stop is None


def test_they_are_behind_the_login(study: Study) -> None:
    app = make_app(study.database, Settings(Credentials.of(password="a long secret")))
    answer = ask(app, PAGE)
    assert (answer.status_code, answer.headers["Location"]) == (
        303,
        "/login?next=%2Fhpo%2Fstudies%2Ftoy",
    )
    assert own(app, f"{PAGE}/stop", {}).status_code == 401


def test_many_trials_come_in_pages(database: Database) -> None:
    fill(database, study_file(trials=130), [Trial("complete", (0.5,))] * 130)
    app = make_app(database)
    first, last = ask(app, PAGE).text, ask(app, f"{PAGE}?page=2").text
    assert first.count(f'<a href="{PAGE}/trials/') == 100
    assert last.count(f'<a href="{PAGE}/trials/') == 30
    assert "Page 1 of 2" in first
    assert ask(app, f"{PAGE}?page=junk").status_code == 200
