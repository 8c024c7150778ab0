"""A study file as it is written: its tables, with overrides in place, not yet validated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hpo.config.base import flatten, toml_repr, with_values
from hpo.config.parameters import KEYS
from hpo.config.space import split_space
from hpo.config.toml import nest
from hpo.config.train import TrainConfig, check_path, field_paths
from hpo.errors import ConfigError, nearest

TABLES = ("study", "train", "space", "baseline")


@dataclass
class Document:
    """The four tables of a study file, each in one shape."""

    study: dict[str, Any] = field(default_factory=dict)
    """As in TOML."""
    train: dict[str, Any] = field(default_factory=dict)
    """Nested, no dotted names."""
    space: dict[str, Any] = field(default_factory=dict)
    """{dotted path: table or list of choices}."""
    baselines: list[dict[str, Any]] = field(default_factory=list)
    """{dotted path: value} each."""

    @classmethod
    def read(cls, data: Mapping[str, Any], where: str = "") -> Document:
        """Return the top-level tables in shape; raises ConfigError for unknown ones."""
        for name, value in data.items():
            if name not in TABLES:
                raise ConfigError(_unknown_table(name), key=name, where=where)
            if name != "baseline" and not isinstance(value, Mapping):
                message = f"{toml_repr(value)}: a table: write [{name}]"
                raise ConfigError(message, key=name, where=where)
        return cls(
            study=nest(data.get("study", {}), where, "study."),
            train=nest(data.get("train", {}), where, "train."),
            space=split_space(nest(data.get("space", {}), where, "space.")),
            baselines=_baselines(data.get("baseline", []), where),
        )

    def override(self, key: str, value: Any) -> None:
        """Set one field of the study file by its dotted path (`study.trials`, `train.epochs`,
        `space.optimizer.lr`), or one of TrainConfig (`epochs`, `optimizer.lr`).

        Fixing a searched field takes it out of the space and of the baselines, and with it what is
        searched only under another value of it; searching a fixed field takes it out of [train].
        """
        head, _, rest = key.partition(".")
        if head == "study" and rest:
            self._set_study(rest, value)
        elif head == "space" and rest:
            self._search(rest, value)
        elif key == "baseline":
            self.baselines = _baselines(value, "")
        else:
            self._fix(rest if head == "train" and rest else key, value)

    def _set_study(self, path: str, value: Any) -> None:
        table = path.partition(".")[0]
        if table != path and isinstance(self.study.get(table), str):
            self.study[table] = {"name": self.study[table]}
        self.study = with_values(self.study, {path: value})

    def _search(self, path: str, value: Any) -> None:
        name, _, part = path.rpartition(".")
        if name and part in KEYS:
            leaf = self.space.get(name, {})
            leaf = {"choices": leaf} if isinstance(leaf, list) else leaf
            value = {**(leaf if isinstance(leaf, Mapping) else {}), part: value}
        else:
            name = path
        self.space[name] = value
        kept = {path: one for path, one in flatten(self.train).items() if path != name}
        self.train = with_values({}, kept)

    def _fix(self, path: str, value: Any) -> None:
        allowed = [*field_paths(), "study.trials", "study.name", "space.optimizer.lr"]
        try:
            check_path(path)
        except ConfigError:
            raise ConfigError(f"unknown field; {nearest(path, allowed)}", key=path) from None
        self.train = with_values(self.train, {path: value})
        if path in self.space:
            self._take_out(path)
            for child in list(self.space):
                self._settle(child, path, value)
            self.baselines = _without_repeats(self.baselines)

    def _settle(self, child: str, parent: str, value: Any) -> None:
        """Drop the condition of `child` on `parent`, which is fixed now, or `child` with it."""
        conditions = _conditions(self.space.get(child))
        if parent not in conditions:
            return
        wanted = conditions.pop(parent)
        if value == wanted or (isinstance(wanted, list) and value in wanted):
            self.space[child] = {**self.space[child], "when": conditions}
        else:
            self._drop(child)

    def _drop(self, name: str) -> None:
        """Take out `name` and all that depends on it."""
        self._take_out(name)
        for child in [one for one, leaf in self.space.items() if name in _conditions(leaf)]:
            if child in self.space:
                self._drop(child)

    def _take_out(self, name: str) -> None:
        del self.space[name]
        for baseline in self.baselines:
            baseline.pop(name, None)


def _conditions(leaf: Any) -> dict[str, Any]:
    when = leaf.get("when") if isinstance(leaf, Mapping) else None
    return flatten(when) if isinstance(when, Mapping) else {}


def _without_repeats(baselines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    kept: list[dict[str, Any]] = []
    for baseline in baselines:
        if baseline and baseline not in kept:
            kept.append(baseline)
    return kept


def _baselines(tables: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(tables, list) or not all(isinstance(one, Mapping) for one in tables):
        raise ConfigError(
            f"{toml_repr(tables)}: a list of tables: write [[baseline]] above each",
            key="baseline",
            where=where,
        )
    return [flatten(nest(one, where, f"baseline {i}: ")) for i, one in enumerate(tables, 1)]


def _unknown_table(name: str) -> str:
    if name in TrainConfig.model_fields:
        return "a field of the training: write it under [train] in a study file"
    return f"unknown table; {nearest(name, TABLES)}"
