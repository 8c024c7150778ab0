"""The tools that an assistant gets, over the protocol."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest
from mcp import Client, StdioServerParameters

from hpo.cli.mcp import make_server
from hpo.redaction import keep_secret
from hpo.search.study import Study
from hpo.storage import records
from hpo.storage.database import Database
from tests.harness.fakes import study_file
from tests.harness.filled import Trial, fill


@pytest.fixture
def study(database: Database) -> Study:
    trials = [Trial("complete", (0.5, 0.6)), Trial("failed", reason="ran out of memory")]
    return fill(database, study_file(trials=6), trials)


def talk(database: Database, say: Callable[[Client], Awaitable[Any]], **options: bool) -> Any:
    """What comes of a conversation with the server."""

    async def run() -> Any:
        server = make_server(database, **{"read_only": False, **options})
        async with Client(server) as client:
            return await say(client)

    return anyio.run(run)


def call(database: Database, tool: str, **arguments: Any) -> tuple[bool, str]:
    """Whether a tool failed, and its answer."""

    async def say(client: Client) -> tuple[bool, str]:
        answer = await client.call_tool(tool, arguments)
        return bool(answer.is_error), "".join(part.text for part in answer.content)

    return talk(database, say)


def test_studies_and_trials_are_explained(study: Study) -> None:
    failed, listed = call(study.database, "list_studies")
    assert not failed
    assert json.loads(listed)[0]["study"] == "toy"
    found = json.loads(call(study.database, "explain_study", study="toy")[1])
    assert found["summary"][0]["kind"] == "searched"
    assert found["status"]["finished"] == 2
    assert "optimizer.lr" in found["space"]
    rows = json.loads(call(study.database, "list_trials", study="toy", state="failed")[1])
    assert [one["reason"] for one in rows["trials"]] == ["ran out of memory"]
    assert json.loads(call(study.database, "explain_trial", study="toy", number=0)[1])["epochs"]


def test_answers_are_json_whatever_was_measured(database: Database) -> None:
    assert json.loads(call(database, "list_studies")[1]) == []
    odd = [Trial("diverged", (0.5, float("nan"))), Trial("complete", (0.1,) * 250)]
    fill(database, study_file(trials=6, train="epochs = 250"), odd)
    fill(database, study_file(name="other"), [])
    listed = json.loads(call(database, "list_studies")[1])
    assert [one["study"] for one in listed] == ["toy", "other"]
    text = call(database, "explain_trial", study="toy", number=0)[1]
    assert "NaN" not in text
    assert json.loads(text)["epochs"][1]["metrics"]["val_top1"] is None
    long = json.loads(call(database, "explain_trial", study="toy", number=1)[1])
    assert (len(long["epochs"]), long["of_epochs"]) == (85, 250)
    failed, text = call(database, "explain_trial", study="other", number=0)
    assert failed
    assert "it has none yet" in text


def test_it_steers(study: Study) -> None:
    database = study.database
    assert not call(database, "enqueue", study="toy", values={"optimizer.lr": 0.01})[0]
    assert [dict(one) for one, _ in records.read_enqueued(database, study.uuid)] == [
        {"optimizer.lr": 0.01}
    ]
    assert not call(database, "stop_study", study="toy")[0]
    assert records.get_study(database, "toy").stop == "user"
    assert not call(database, "resume_study", study="toy")[0]
    assert not call(database, "extend_study", study="toy", trials=9)[0]
    assert records.get_study(database, "toy").trials == 9


@pytest.mark.parametrize(
    ("tool", "arguments", "why"),
    [
        ("explain_study", {"study": "toi"}, "toy"),
        ("explain_trial", {"study": "toy", "number": 9}, "allowed: 0 to 1"),
        ("list_trials", {"study": "toy", "state": "odd"}, "allowed: waiting"),
        ("list_trials", {"study": "toy", "last": 0}, "1 to 200"),
        ("enqueue", {"study": "toy", "values": {"optimizer.lr": 9}}, "optimizer.lr"),
        ("extend_study", {"study": "toy", "trials": 2}, "has 6 already"),
        ("extend_study", {"study": "toy"}, "give trials or max_time"),
    ],
)
def test_what_is_wrong_is_told(
    study: Study, tool: str, arguments: dict[str, Any], why: str
) -> None:
    failed, text = call(study.database, tool, **arguments)
    assert failed
    assert why in text


def test_read_only_offers_no_tool_that_writes(study: Study) -> None:
    async def names(client: Client) -> list[str]:
        return sorted(tool.name for tool in (await client.list_tools()).tools)

    assert talk(study.database, names, read_only=True) == [
        "explain_study", "explain_trial", "list_studies", "list_trials",
    ]  # fmt: skip
    assert len(talk(study.database, names)) == 8


def test_the_command_speaks_on_standard_streams(study: Study) -> None:
    command = [sys.executable, "-m", "hpo", "mcp", "--read-only"]
    environment = {**os.environ, "HPO_STORAGE": study.database.secret_url}

    async def run() -> Any:
        server = StdioServerParameters(command=command[0], args=command[1:], env=environment)
        async with Client(server) as client:
            return await client.call_tool("list_studies", {})

    assert "toy" in anyio.run(run).content[0].text
    environment["HPO_STORAGE"] = "nonsense"
    wrong = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "Traceback" not in wrong.stderr


def test_an_internal_error_reaches_the_assistant_without_passwords(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_secret("topsecret")

    def fail(*_: Any) -> None:
        raise RuntimeError("sqlite://topsecret@x")

    monkeypatch.setattr(records, "list_studies", fail)
    failed, text = call(study.database, "list_studies")
    assert failed
    assert "RuntimeError: sqlite://***@x" in text
