"""Kubernetes manifests of a study, from the template kubernetes.yaml: an Indexed Job of workers and
a dashboard.

The cluster only restarts workers; which worker runs which trial is decided in the database, as
everywhere. A worker that is asked to end hands its trial back and exits with 130, so that another
pod follows.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from importlib.resources import files
from string import Template
from typing import Any

from hpo.errors import InputError

LONGEST_NAME = 26
"""A pod's host name is its job's, a dash and its index: at most 32 characters are in the names of
workers, by which health checks tell pods apart that share a volume."""
LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
NAME = re.compile(rf"{LABEL.pattern}(\.{LABEL.pattern})*")
QUANTITY = re.compile(r"[1-9]\d*(\.\d+)?(k|M|G|T|Ki|Mi|Gi|Ti)")


def require_name(option: str, value: str | None, allowed: re.Pattern[str] = NAME) -> None:
    """Raise InputError for the value of `option` where Kubernetes would refuse it as a name."""
    if value is not None and not (allowed.fullmatch(value) and len(value) <= 253):
        raise InputError(
            f"{option} {value!r}: allowed: lower-case letters, digits and, inside, '-'"
        )


def job_name(study: str) -> str:
    """Return `hpo-STUDY` as a Kubernetes name. A study name that is not allowed there becomes a
    readable one with a digest, so that two studies never share it."""
    plain = re.sub(r"[^a-z0-9]+", "-", study.lower()).strip("-")
    name = f"hpo-{plain}"
    if plain == study and len(name) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(study.encode()).hexdigest()[:6]
    return f"{name[: LONGEST_NAME - 7].rstrip('-')}-{digest}"


def manifests(options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return everything that `kubectl apply` needs but the secrets, in its order.

    `options` are those of `hpo manifest` by name, with the study's name as `study`, its file's text
    as `source` (None: the database has the study), and `storage` without a password.
    """
    import yaml

    study, source = options["study"], options["source"]
    values = {
        **options,
        "job": job_name(study),
        "study_or_file": study if source is None else f"/etc/hpo/{study}.toml",
        "device": "cuda" if options["gpus"] else "cpu",
        "gpus": options["gpus"] or None,
        "no_home_claim": options["home_claim"] is None,
    }
    template = files(__package__).joinpath("kubernetes.yaml").read_text(encoding="utf-8")
    filled: list[dict[str, Any]] = _fill(yaml.safe_load(template), values)
    return filled


def _fill(node: Any, values: Mapping[str, Any]) -> Any:
    """Return a part of the template with `values`, as the template's head describes."""
    if isinstance(node, str):
        if node.startswith("$") and node[1:] in values:
            return values[node[1:]]
        return Template(node).substitute(values)
    if isinstance(node, list):
        return [_fill(item, values) for item in node if _is_wanted(item, values)]
    if isinstance(node, dict):
        filled = {_fill(key, values): _fill(item, values) for key, item in node.items()}
        return {
            key: item for key, item in filled.items() if key != "when" and item not in (None, [])
        }
    return node


def _is_wanted(item: Any, values: Mapping[str, Any]) -> bool:
    return not isinstance(item, dict) or "when" not in item or bool(values[item["when"]])
