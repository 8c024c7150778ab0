"""`hpo manifest`: what it prints is valid, and what it cannot print it says."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from hpo.cli.main import main
from hpo.cli.workers import ManifestOptions
from hpo.config.study import StudyFile
from hpo.errors import InputError
from hpo.workers.launchers import kubernetes
from hpo.workers.launchers.kubernetes import LABEL, LONGEST_NAME, job_name
from tests.harness.deployment import ROOT, parse

URL = "postgresql+psycopg://hpo@database/hpo"
PLAIN = ManifestOptions(study="digits", storage=URL, image="hpo:1")
DIGITS = ROOT / "studies" / "digits.toml"
FULL = replace(
    PLAIN,
    workers=4,
    namespace="ml",
    cpus=8,
    memory="16Gi",
    gpus=1,
    data_claim="photos",
    home_claim="runs",
    artifacts="s3://bucket/hpo",
    artifacts_secret="bucket",
)


def manifests(options: ManifestOptions) -> list[dict[str, Any]]:
    """PLAIN is of a study by its name, FULL of one by its file."""
    source = DIGITS.read_text(encoding="utf-8") if options.workers > 1 else None
    return kubernetes.manifests(vars(options) | {"source": source})


def objects(options: ManifestOptions) -> dict[str, Any]:
    """By kind."""
    return {one["kind"]: one for one in manifests(options)}


def worker(options: ManifestOptions) -> Any:
    return objects(options)["Job"]["spec"]["template"]["spec"]


@pytest.mark.parametrize(
    "options", [PLAIN, FULL, replace(PLAIN, study="Ab._c")], ids=["1", "2", "3"]
)
def test_manifests_are_valid(options: ManifestOptions) -> None:
    for one in manifests(options):
        kubernetes_validate.validate(one, kubernetes_validate.latest_version(), strict=True)


def test_the_job_has_an_index_for_each_worker() -> None:
    spec = objects(FULL)["Job"]["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 4, 4)
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] >= 60


def test_the_end_of_a_pod_means_what_its_exit_code_says() -> None:
    rules = objects(PLAIN)["Job"]["spec"]["podFailurePolicy"]["rules"]
    codes = {
        code: rule["action"]
        for rule in rules
        for code in rule.get("onExitCodes", {}).get("values", [])
    }
    assert codes[130] == "Ignore"
    assert codes[2] == "FailJob"
    assert 0 not in codes
    assert 1 not in codes
    assert rules[0] == {
        "action": "Ignore",
        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
    }


@pytest.mark.parametrize("options", [PLAIN, FULL], ids=["plain", "full"])
def test_commands_parse_and_variables_are_explained(options: ManifestOptions) -> None:
    page = (ROOT / "docs" / "many-machines.md").read_text(encoding="utf-8")
    explained = set(re.findall(r"^\| `(\w+)`", page, re.MULTILINE))
    for kind in ("Job", "Deployment"):
        pod = objects(options)[kind]["spec"]["template"]["spec"]
        for container in (*pod["initContainers"], *pod["containers"]):
            parse(container["args"])
            assert {one["name"] for one in container["env"]} <= explained


def test_secrets_are_named_and_never_held() -> None:
    for kind in ("Job", "Deployment"):
        pod = objects(FULL)[kind]["spec"]["template"]["spec"]
        mounted = {one["name"]: one for one in pod["volumes"]}
        for container in (*pod["initContainers"], *pod["containers"]):
            paths = {one["mountPath"]: mounted[one["name"]] for one in container["volumeMounts"]}
            for one in container["env"]:
                if re.search("PASSWORD|TOKEN", one["name"]):
                    folder, _, key = one["value"].rpartition("/")
                    assert "secretName" in paths[folder]["secret"]
                    assert key in ("password", "token")


def test_pods_may_do_nothing_special() -> None:
    for kind in ("Job", "Deployment"):
        pod = objects(FULL)[kind]["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False
        for container in (*pod["initContainers"], *pod["containers"]):
            rights = container["securityContext"]
            assert rights["readOnlyRootFilesystem"]
            assert not rights["allowPrivilegeEscalation"]
            assert rights["capabilities"] == {"drop": ["ALL"]}


def test_a_study_file_travels_with_the_job(tmp_path: Path) -> None:
    found = objects(FULL)
    ((name, text),) = found["ConfigMap"]["data"].items()
    (tmp_path / name).write_text(text)
    assert StudyFile.load(tmp_path / name).name == "digits"
    (container,) = worker(FULL)["containers"]
    assert container["args"][1] == "/etc/hpo/digits.toml"
    assert "ConfigMap" not in objects(PLAIN)
    assert worker(PLAIN)["containers"][0]["args"][1] == "digits"


def test_claims_and_devices() -> None:
    (container,) = worker(FULL)["containers"]
    assert container["resources"]["limits"] == {"memory": "16Gi", "nvidia.com/gpu": 1}
    assert container["args"][2:] == ["--device", "cuda", "--threads", "8"]
    assert {"name": "HPO_ARTIFACTS", "value": "s3://bucket/hpo"} in container["env"]
    assert container["envFrom"] == [{"secretRef": {"name": "bucket"}}]
    volumes = {one["name"]: one for one in worker(FULL)["volumes"]}
    assert volumes["home"]["persistentVolumeClaim"] == {"claimName": "runs"}
    assert volumes["data"]["persistentVolumeClaim"] == {"claimName": "photos", "readOnly": True}
    volumes = {one["name"]: one for one in worker(PLAIN)["volumes"]}
    assert volumes["home"] == {"name": "home", "emptyDir": {}}
    assert "data" not in volumes


def test_any_study_has_a_name_in_kubernetes_and_no_two_the_same() -> None:
    names = ["digits", "Digits", "my_study", "my-study", "a" * 64, "a" * 63 + "b", "_", "a.b-"]
    made = [job_name(name) for name in names]
    assert made[0] == "hpo-digits"
    assert made[3] == "hpo-my-study"
    assert len(set(made)) == len(names)
    assert all(LABEL.fullmatch(name) and len(name) <= LONGEST_NAME for name in made)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("namespace", one) for one in ("A", "a_b", "-a", "a" * 64, "a.b", "")),
        *((f"{one}_claim", "A b") for one in ("data", "home")),
        *((f"{one}_secret", "A/b") for one in ("storage", "dashboard", "artifacts")),
        ("artifacts", "/mnt/hpo"),
        *(("memory", one) for one in ("4", "0Gi", "4 Gi", "four")),
        ("data_path", "data"),
        ("image", "two words"),
    ],
)
def test_what_kubernetes_would_refuse_is_refused_here(field: str, value: str) -> None:
    with pytest.raises(InputError, match=f"--{field.replace('_', '-')} {value!r}"):
        replace(PLAIN, **{field: value})


Said = tuple[int, str, str]


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> Said:
    with pytest.raises(SystemExit) as end:
        main(["manifest", *arguments])
    out, err = capsys.readouterr()
    assert isinstance(end.value.code, int)
    return end.value.code, out, err


def test_the_command_prints_yaml_without_the_password(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPO_STORAGE", URL.replace("@", ":geheim@"))
    study = str(DIGITS)
    code, out, err = said(capsys, study, "--workers", "2")
    assert (code, err) == (0, "")
    assert "geheim" not in out
    read = list(yaml.safe_load_all(out))
    image = read[1]["spec"]["template"]["spec"]["containers"][0]["image"]
    assert read == manifests(replace(PLAIN, workers=2, image=image))
    assert "kubectl create secret generic hpo-storage --from-file=password=secrets/database" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["digits"], "pods cannot share a file"),
        (["digits", "--storage", "postgresql+psycopg://hpo@localhost/hpo"], "the pod itself"),
        (["digits", "--storage", "postgresql+psycopg:///hpo"], "the pod itself"),
        (["digits", "--storage", f"{URL}?sslpassword=x"], "sslpassword may hold a secret"),
        (["no such.toml", "--storage", URL], "no such.toml"),
        (["no/name", "--storage", URL], "study.name"),
        (["digits", "--storage", URL, "--namespace", "A"], "--namespace 'A'"),
    ],
)
def test_what_cannot_be_printed_is_said(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    code, out, err = said(capsys, *arguments)
    assert (code, out) == (2, "")
    assert words in err
