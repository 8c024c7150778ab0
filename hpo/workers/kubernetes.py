"""What runs a study on Kubernetes, as plain data: an Indexed Job of workers and a dashboard.

The cluster only starts workers again; which trial is whose is decided in the database, as anywhere
else. Whoever is told to end hands its trial back and exits with 130, so that another pod follows.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

from hpo.errors import HpoError, InputError, Interrupted

Manifest = dict[str, Any]

USER = 10001
"""Of the image's Dockerfile."""
HOME = "/var/lib/hpo"
STUDIES = "/etc/hpo"
SECRETS = "/run/secrets/hpo"
DATA = "/srv/hpo/data"
PORT = 8080
DASHBOARD = "hpo-dashboard"

LONGEST_NAME = 26
"""A pod's host name is its job's, a dash and its index: at most 32 characters are in the names of
workers, by which health checks tell pods apart that share a volume."""
GRACE_S = 90
"""A worker hands back after the step in hand, which may be a long one."""
RESTARTS = 20
"""Crashes of one worker after which its index is given up; disruptions do not count."""
LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
NAME = re.compile(rf"{LABEL.pattern}(\.{LABEL.pattern})*")
QUANTITY = re.compile(r"[1-9]\d*(\.\d+)?(k|M|G|T|Ki|Mi|Gi|Ti)")


@dataclass(frozen=True)
class Order:
    """What is wanted. Names are those of objects in the cluster; URLs hold no password.

    Raises InputError for what Kubernetes would refuse.
    """

    study: str
    storage: str
    image: str
    source: str | None = None
    """Text of the study file that makes the study; None: it is in the database."""
    workers: int = 1
    namespace: str | None = None
    cpus: int = 2
    memory: str = "4Gi"
    gpus: int = 0
    data_claim: str | None = None
    data_path: str = DATA
    home_claim: str | None = None
    artifacts: str | None = None
    artifacts_secret: str | None = None
    storage_secret: str = "hpo-storage"
    dashboard_secret: str = "hpo-dashboard"

    def __post_init__(self) -> None:
        _check("--namespace", self.namespace, LABEL)
        _check("--data-claim", self.data_claim, NAME)
        _check("--home-claim", self.home_claim, NAME)
        _check("--artifacts-secret", self.artifacts_secret, NAME)
        _check("--storage-secret", self.storage_secret, NAME)
        _check("--dashboard-secret", self.dashboard_secret, NAME)
        if not QUANTITY.fullmatch(self.memory):
            raise InputError(f"--memory {self.memory!r}: a number and a unit, such as 4Gi or 500Mi")
        if not self.data_path.startswith("/") or ":" in self.data_path:
            raise InputError(f"--data-path {self.data_path!r}: an absolute path, such as {DATA}")
        if self.artifacts is not None and "://" not in self.artifacts:
            raise InputError(
                f"--artifacts {self.artifacts!r}: pods see no folder of this machine; a URL, "
                "such as s3://BUCKET/FOLDER (a volume of the cluster: --home-claim)"
            )
        if not self.image or re.search(r"\s", self.image):
            raise InputError(f"--image {self.image!r}: the name of an image, such as hpo:1.0")


def _check(option: str, value: str | None, allowed: re.Pattern[str]) -> None:
    if value is not None and not (allowed.fullmatch(value) and len(value) <= 253):
        raise InputError(
            f"{option} {value!r}: allowed: lower-case letters, digits and, inside, '-'"
        )


def job_name(study: str) -> str:
    """`hpo-STUDY` as a name of Kubernetes; of a study whose name is none, a readable one with a
    digest, so that two studies never share it."""
    plain = re.sub(r"[^a-z0-9]+", "-", study.lower()).strip("-")
    name = f"hpo-{plain}"
    if plain == study and len(name) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(study.encode()).hexdigest()[:6]
    return f"{name[: LONGEST_NAME - 7].rstrip('-')}-{digest}"


def manifests(order: Order) -> list[Manifest]:
    """Everything that `kubectl apply` needs but the secrets, in its order."""
    study = [] if order.source is None else [_study_file(order, order.source)]
    return [*study, _job(order), _deployment(order), _service(order)]


def _object(order: Order, api: str, kind: str, name: str, component: str) -> Manifest:
    metadata: Manifest = {"name": name}
    if order.namespace:
        metadata["namespace"] = order.namespace
    metadata["labels"] = _labels(component)
    return {"apiVersion": api, "kind": kind, "metadata": metadata}


def _labels(component: str) -> dict[str, str]:
    return {"app.kubernetes.io/name": "hpo", "app.kubernetes.io/component": component}


def _study_file(order: Order, source: str) -> Manifest:
    found = _object(order, "v1", "ConfigMap", job_name(order.study), "worker")
    return found | {"data": {f"{order.study}.toml": source}}


def _job(order: Order) -> Manifest:
    found = _object(order, "batch/v1", "Job", job_name(order.study), "worker")
    found["metadata"]["annotations"] = {"hpo/study": order.study}
    return found | {
        "spec": {
            "completionMode": "Indexed",
            "completions": order.workers,
            "parallelism": order.workers,
            "backoffLimitPerIndex": RESTARTS,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {"rules": _failure_rules()},
            "template": {
                "metadata": {"labels": _labels("worker")},
                "spec": _worker_pod(order),
            },
        }
    }


def _failure_rules() -> list[Manifest]:
    """What the end of a pod means: the first rule that fits. Exit code 0 is no failure: the study
    is over, or stopped."""
    disrupted = {"type": "DisruptionTarget", "status": "True"}
    return [
        # A node is drained or lost: others go on with the trial, and a new pod follows.
        {"action": "Ignore", "onPodConditions": [disrupted]},
        # Handed back after a signal.
        {"action": "Ignore", "onExitCodes": _exits(Interrupted)},
        # No worker can work like this.
        {"action": "FailJob", "onExitCodes": _exits(InputError)},
    ]


def _exits(*errors: type[HpoError]) -> Manifest:
    codes = [error.exit_code for error in errors]
    return {"containerName": "worker", "operator": "In", "values": codes}


def _worker_pod(order: Order) -> Manifest:
    study = order.study if order.source is None else f"{STUDIES}/{order.study}.toml"
    device = "cuda" if order.gpus else "cpu"
    resources = _resources(str(order.cpus), order.memory, order.memory)
    if order.gpus:
        resources["limits"]["nvidia.com/gpu"] = order.gpus
    worker = _container(order, "worker") | {
        "args": ["worker", study, "--device", device, "--threads", str(order.cpus)],
        "resources": resources,
        "livenessProbe": {
            "exec": {"command": ["python", "-m", "hpo.workers.alive"]},
            "initialDelaySeconds": 300,
            "periodSeconds": 60,
            "timeoutSeconds": 10,
        },
    }
    if order.artifacts is not None:
        worker["env"].append({"name": "HPO_ARTIFACTS", "value": order.artifacts})
    if order.artifacts_secret is not None:
        worker["envFrom"] = [{"secretRef": {"name": order.artifacts_secret}}]
    worker["volumeMounts"] += [
        {"name": "home", "mountPath": HOME},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]
    volumes = [
        {"name": "home", **_claim_or_empty(order.home_claim)},
        # Images too large for memory are read by processes that hand batches over in it.
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}},
    ]
    if order.source is not None:
        worker["volumeMounts"].append({"name": "study", "mountPath": STUDIES, "readOnly": True})
        volumes.append({"name": "study", "configMap": {"name": job_name(order.study)}})
    if order.data_claim is not None:
        worker["volumeMounts"].append(
            {"name": "data", "mountPath": order.data_path, "readOnly": True}
        )
        claim = {"claimName": order.data_claim, "readOnly": True}
        volumes.append({"name": "data", "persistentVolumeClaim": claim})
    return _pod(order, worker, volumes) | {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_S,
    }


def _resources(cpu: str, memory: str, most: str) -> Manifest:
    """The processor has no limit: one would only slow down what has the threads it was given."""
    return {"requests": {"cpu": cpu, "memory": memory}, "limits": {"memory": most}}


def _claim_or_empty(claim: str | None) -> Manifest:
    return {"persistentVolumeClaim": {"claimName": claim}} if claim else {"emptyDir": {}}


def _pod(order: Order, container: Manifest, volumes: list[Manifest]) -> Manifest:
    """The database's tables are made, or brought up to date, before the container starts."""
    tables = _container(order, "tables") | {
        "args": ["storage", "upgrade"],
        "resources": _resources("100m", "512Mi", "1Gi"),
    }
    return {
        "initContainers": [tables],
        "containers": [container],
        "volumes": [
            {"name": "tmp", "emptyDir": {}},
            _secret_volume("storage", order.storage_secret),
            *volumes,
        ],
        # As in the image; the group may read secrets and write volumes.
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "automountServiceAccountToken": False,
        # Else the service hpo-dashboard would come as HPO_DASHBOARD_PORT and the like.
        "enableServiceLinks": False,
    }


def _secret_volume(name: str, secret: str) -> Manifest:
    return {"name": name, "secret": {"secretName": secret, "defaultMode": 0o440}}


def _container(order: Order, name: str) -> Manifest:
    """What all of them share: the image, the database, and no rights."""
    return {
        "name": name,
        "image": order.image,
        "env": [
            {"name": "HPO_STORAGE", "value": order.storage},
            {"name": "HPO_STORAGE_PASSWORD_FILE", "value": f"{SECRETS}/storage/password"},
        ],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "storage", "mountPath": f"{SECRETS}/storage", "readOnly": True},
        ],
    }


def _deployment(order: Order) -> Manifest:
    """One dashboard for all studies of the database."""
    found = _object(order, "apps/v1", "Deployment", DASHBOARD, "dashboard")
    dashboard = _container(order, "dashboard") | {
        "args": ["dashboard", "--host", "0.0.0.0", "--port", str(PORT)],
        "ports": [{"name": "http", "containerPort": PORT}],
        "resources": _resources("100m", "512Mi", "2Gi"),
        "readinessProbe": _probe(10),
        "livenessProbe": _probe(60),
    }
    dashboard["env"] += [
        {"name": "HPO_DASHBOARD_PASSWORD_FILE", "value": f"{SECRETS}/dashboard/password"},
        {"name": "HPO_DASHBOARD_TOKEN_FILE", "value": f"{SECRETS}/dashboard/token"},
        {"name": "HPO_DASHBOARD_ALLOWED_HOSTS", "value": DASHBOARD},
    ]
    dashboard["volumeMounts"].append(
        {"name": "dashboard", "mountPath": f"{SECRETS}/dashboard", "readOnly": True}
    )
    pod = _pod(order, dashboard, [_secret_volume("dashboard", order.dashboard_secret)])
    return found | {
        "spec": {
            "replicas": 1,
            # Two at once would answer with two memories of who is logged in.
            "strategy": {"type": "Recreate"},
            "selector": {"matchLabels": _labels("dashboard")},
            "template": {"metadata": {"labels": _labels("dashboard")}, "spec": pod},
        }
    }


def _probe(delay_s: int) -> Manifest:
    return {
        "httpGet": {
            "path": "/healthz",
            "port": "http",
            # The dashboard answers to names that it knows, and kubelet asks by the pod's address.
            "httpHeaders": [{"name": "Host", "value": "localhost"}],
        },
        "initialDelaySeconds": delay_s,
        "periodSeconds": 15,
        "timeoutSeconds": 5,
        "failureThreshold": 4,
    }


def _service(order: Order) -> Manifest:
    """Inside the cluster only."""
    return _object(order, "v1", "Service", DASHBOARD, "dashboard") | {
        "spec": {
            "type": "ClusterIP",
            "selector": _labels("dashboard"),
            "ports": [{"name": "http", "port": PORT, "targetPort": "http"}],
        }
    }
