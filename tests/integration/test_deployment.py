"""docker-compose.yml, the Dockerfile and the pages about many machines say what is true."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest

from hpo.config.study import StudyFile
from hpo.paths import Home
from hpo.workers.healthcheck import host, is_alive
from hpo.workers.process import new_worker_id
from tests.harness.deployment import ROOT, VARIABLE, compose, in_order, parse, shown_commands

COMPOSE = compose()
SERVICES: dict[str, Any] = COMPOSE["services"]
OURS = [name for name, service in SERVICES.items() if service["image"] == "hpo"]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", "")
PAGE = (ROOT / "docs" / "many-machines.md").read_text(encoding="utf-8")


def test_compose_is_valid() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run(
        [*command, "docker-compose.yml"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", OURS)
def test_commands_of_compose_parse(name: str) -> None:
    command = SERVICES[name]["command"]
    assert " ".join(command).startswith(parse(command))


def test_compose_starts_in_order() -> None:
    order = in_order(SERVICES)
    assert order[:3] == ["database", "init", "dashboard"]
    assert SERVICES["init"]["depends_on"] == {"database": {"condition": "service_healthy"}}
    done = {"init": {"condition": "service_completed_successfully"}}
    assert all(SERVICES[name]["depends_on"] == done for name in OURS if name != "init")


def test_compose_shows_the_dashboard_alone_and_to_this_machine_alone() -> None:
    shown = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert shown == {"dashboard": ["127.0.0.1:8080:8080"]}


def test_compose_holds_no_secret() -> None:
    for service in SERVICES.values():
        for name, value in service.get("environment", {}).items():
            if re.search("PASSWORD|TOKEN|KEY|SECRET", name):
                assert name.endswith("_FILE"), name
                assert value.removeprefix("/run/secrets/") in service["secrets"]
    files = {name: one["file"] for name, one in COMPOSE["secrets"].items()}
    assert files == {name: f"./secrets/{name}" for name in ("database", "dashboard", "token")}
    assert "/secrets/" in (ROOT / ".gitignore").read_text().splitlines()


def test_containers_of_ours_may_do_nothing_special() -> None:
    for name in OURS:
        service = SERVICES[name]
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service.get("privileged"), name


def test_every_service_that_stays_is_watched_and_started_again() -> None:
    for name in ("database", "dashboard"):
        assert SERVICES[name]["restart"] == "unless-stopped"
        assert "test" in SERVICES[name]["healthcheck"]
    for name in ("worker", "worker-gpu"):  # their health check is the image's
        assert SERVICES[name]["restart"] == "on-failure"
        assert "healthcheck" not in SERVICES[name]


def test_a_gpu_is_reserved_by_its_profile_alone() -> None:
    reserving = [name for name, service in SERVICES.items() if "deploy" in service]
    assert reserving == ["worker-gpu"]
    assert SERVICES["worker-gpu"]["profiles"] == ["gpu"]
    (device,) = SERVICES["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]


def test_the_study_of_compose_is_there() -> None:
    path = next(word for word in SERVICES["worker"]["command"] if word.endswith(".toml"))
    assert StudyFile.load(ROOT / path).name == "digits"
    assert "./studies:/srv/hpo/studies:ro" in SERVICES["worker"]["volumes"]


def test_every_variable_is_explained() -> None:
    text = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    names = {found["name"] for found in VARIABLE.finditer(text)}
    names |= {name for service in SERVICES.values() for name in service.get("environment", {})}
    (environment,) = re.findall(r"^ENV (.*)$", DOCKERFILE, re.MULTILINE)
    names |= set(re.findall(r"(\w+)=", environment))
    explained = set(re.findall(r"^\| `(\w+)`", PAGE, re.MULTILINE))
    assert names <= explained, names - explained


def test_the_image_installs_what_pyproject_asks_for() -> None:
    """The Dockerfile's own line, run here."""
    (line,) = re.findall(r"^RUN (python -c .*?) > requirements.txt", DOCKERFILE, re.MULTILINE)
    (extras,) = re.findall(r'^ARG EXTRAS="(.*)"', DOCKERFILE, re.MULTILINE)
    done = subprocess.run(
        ["sh", "-c", line.replace("python", f"'{sys.executable}'", 1)],
        cwd=ROOT, env={"EXTRAS": extras}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    wanted = project["dependencies"] + [one for name in extras.split() for one in optional[name]]
    assert done.stdout.splitlines() == wanted
    # Everything but tests, pages, data frames, assistants, trackers, and launchers elsewhere.
    elsewhere = {
        "test",
        "docs",
        "pandas",
        "ray",
        "mcp",
        "timm",
        "tensorboard",
        "mlflow",
        "wandb",
        "all",
    }
    assert set(optional) - set(extras.split()) <= elsewhere


def test_the_image_is_nobody_special_and_starts_hpo() -> None:
    users = re.findall(r"^USER (.*)$", DOCKERFILE, re.MULTILINE)
    assert users == ["10001:10001"]
    assert 'ENTRYPOINT ["tini", "--", "hpo"]' in DOCKERFILE
    assert "HEALTHCHECK" in DOCKERFILE


def test_the_image_gets_the_code_alone() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules == ["*", "!pyproject.toml", "!README.md", "!hpo", "**/__pycache__"]
    copied = re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE)
    assert {f"!{one}" for one in copied} == {rule for rule in rules if rule.startswith("!")}


def test_the_secrets_of_the_page_are_those_of_compose(tmp_path: Path) -> None:
    """Made by the very line that people type, and not made again over others."""
    lines = re.findall(r"^    (\(?umask .*secrets.*)$", PAGE, re.M)
    assert len(lines) == 1
    subprocess.run(["sh", "-c", lines[0]], cwd=tmp_path, check=True)
    made = {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}
    assert set(made) == set(COMPOSE["secrets"])
    assert all(len(text.strip()) == 32 and len(text.splitlines()) == 1 for text in made.values())
    assert len(set(made.values())) == len(made)
    # The folder is closed; a file in it may be read by the user of a container.
    assert stat.S_IMODE((tmp_path / "secrets").stat().st_mode) == 0o700
    assert all(stat.S_IMODE((tmp_path / "secrets" / one).stat().st_mode) == 0o644 for one in made)
    again = subprocess.run(["sh", "-c", lines[0]], cwd=tmp_path, capture_output=True, check=False)
    assert again.returncode != 0
    assert {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()} == made


def test_commands_are_found_in_a_page() -> None:
    page = "    A=b hpo list  # all\n```\n./x/hpo run a.toml \\\n  --plain | cat\n```\nhpo no\n"
    page += "    docker compose run --rm hpo status digits && echo\n    docker build --tag hpo .\n"
    assert sorted(shown_commands(page)) == [
        ["list"], ["run", "a.toml", "--plain"], ["status", "digits"],
    ]  # fmt: skip
    assert parse(["list"]) == "list"
    with pytest.raises(Exception, match="--plane"):
        parse(["run", "a.toml", "--plane"])


def test_a_worker_is_alive_while_it_leaves_signs(home: Home) -> None:
    """The image's health check."""
    sign = home.study("0" * 32).alive(new_worker_id())
    sign.parent.mkdir(parents=True)
    command = [sys.executable, "-m", "hpo.workers.healthcheck"]
    assert subprocess.run(command, check=False).returncode == 1
    sign.touch()
    assert subprocess.run(command, check=False).returncode == 0
    now = time.time()
    os.utime(sign, (now - 100, now - 100))
    assert subprocess.run([*command, "50"], check=False).returncode == 1
    assert is_alive(home, host(), now, 150)
    assert not is_alive(home, "another", now, 150)
    (check,) = re.findall(r"HEALTHCHECK .*CMD \[(.*)\]", DOCKERFILE)
    assert [word.strip('" ') for word in check.split(",")] == ["python", *command[1:]]
