"""What a new study learns from earlier ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from hpo.api.study import Study
from hpo.cli.main import main
from hpo.config.recommended import MOST
from hpo.config.study import StudyFile
from hpo.errors import ConfigError, InputError, NotFound
from hpo.search import study as studies
from hpo.search.warm_start import Evaluated, apart, choose, learn, obstacle, translated
from hpo.storage.database import Database, connect
from tests.harness.filled import Trial, fill

LR = {"low": 1e-4, "high": 1.0, "log": True}
SPACE: dict[str, Any] = {"optimizer.name": ["sgd", "adamw"], "optimizer.lr": LR}


def study(
    name: str = "new",
    space: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None,
    **fields: Any,
) -> StudyFile:
    return StudyFile.from_dict(
        {
            "study": {"name": name, "trials": 30, "sampler": "random", "defaults": False, **fields},
            "train": {"data.dataset": "digits", **(train or {})},
            "space": SPACE if space is None else space,
        }
    )


NETWORK = {"model.architecture": "resnet18"}


@pytest.mark.parametrize(
    ("earlier", "why"),
    [
        (study(), None),
        (study(metric="val_macro_f1"), None),
        (study(metric="val_loss"), "val_loss is minimized, and val_top1 maximized"),
        (study(train={"task": "retrieval"}, metric="val_precision_at_k"), "its task is retrieval"),
        (study(train=NETWORK), r"it trains resnet\*, .* \(scratch\), not small_cnn \(scratch\)"),
        (study(space={"model.architecture": ["resnet18", "small_cnn"], **SPACE}), None),
        (study(space={"label_smoothing": [0.0, 0.1]}), "none of the same parameters"),
    ],
)
def test_which_studies_are_compatible(earlier: StudyFile, why: str | None) -> None:
    found = obstacle(study(), earlier)
    if why is None:
        assert found is None
    else:
        assert re.search(why, found or "")


def test_networks_of_one_family_are_compatible_but_not_frozen_ones_with_trained_ones() -> None:
    here = study(train={"model.architecture": "resnet50"})
    assert obstacle(here, study(train=NETWORK)) is None
    tuned = {**NETWORK, "model.weights": "DEFAULT"}
    assert "fine-tuned" in (obstacle(here, study(train=tuned)) or "")
    frozen = {**tuned, "model.trainable_blocks": 0}
    assert "frozen" in (obstacle(study(train=tuned), study(train=frozen)) or "")


def test_a_configuration_is_cut_to_the_new_space_with_what_was_fixed_there() -> None:
    earlier = study("old", {"optimizer.lr": LR}, {"optimizer.name": "adamw", "batch_size": 32})
    new = study(space={**SPACE, "batch_size": [128, 256], "optimizer.lr": {**LR, "high": 0.01}})
    assert translated(new, earlier, {"optimizer.lr": 0.004}) == {
        "optimizer.name": "adamw",
        "optimizer.lr": 0.008,  # the root of 128 / 32
        "batch_size": 128,
    }
    fixed = study(space={"optimizer.lr": LR}, train={"optimizer.name": "sgd"})
    assert translated(fixed, earlier, {"optimizer.lr": 0.004}) is None


# Choosing


def at(lr: float, regret: float, source: str, name: str = "sgd") -> Evaluated:
    return Evaluated({"optimizer.name": name, "optimizer.lr": lr}, regret, source)


def test_apart() -> None:
    space = study().space
    one = {"optimizer.name": "sgd", "optimizer.lr": 0.01}
    assert apart(one, one, space) == 0
    assert apart(one, {**one, "optimizer.name": "adamw"}, space) == 0.5
    assert apart(one, {**one, "optimizer.lr": 1.0}, space) == pytest.approx(0.25)
    assert apart(one, {"optimizer.name": "sgd"}, space) == 0.5


def test_of_one_study_the_best_ones_that_differ() -> None:
    trials = [at(0.1, 0.0, "best"), at(0.11, 0.3, "alike"), at(0.1, 0.6, "other", "adamw"),
              at(0.001, 1.0, "worst")]  # fmt: skip
    found = choose([trials], study().space, [], 4)
    assert [one.source for one in found] == ["best", "other", "worst"]
    assert [one.source for one in choose([trials], study().space, [], 2)] == ["best", "other"]
    known = [{"optimizer.name": "sgd", "optimizer.lr": 0.1}]
    assert [one.source for one in choose([trials], study().space, known, 1)] == ["other"]
    far = [at(0.5, 0.0, "far")]  # a fifth of the range, however many parameters are the same
    assert [one.source for one in choose([far], study().space, known, 1)] == ["far"]


def test_of_several_studies_first_what_is_good_in_all_then_what_adds_most() -> None:
    a = [at(0.1, 0.0, "a0"), at(0.01, 0.2, "a1"), at(0.001, 1.0, "a2")]
    b = [at(0.001, 0.0, "b0"), at(0.01, 0.2, "b1"), at(0.1, 1.0, "b2")]
    found = [one.source for one in choose([a, b], study().space, [], 3)]
    assert found == ["a1", "a0", "b0"]  # the middle is good in both


# In databases


def earlier(database: Database, name: str = "old", **fields: Any) -> StudyFile:
    """A study whose first trials are known: the learning rate by trial, and what it reached."""
    file = study(name, trials=3, **fields)
    fill(database, file, [Trial("complete", (0.7, 0.8)), Trial("complete", (0.95,)),
                          Trial("pruned", (0.99,))])  # fmt: skip
    return file


def test_a_new_study_tries_the_best_configurations_of_an_earlier_one_first(
    database: Database,
) -> None:
    earlier(database)
    made, _ = studies.create(database, study(defaults=True), ["old"])
    kinds = [one.kind for one in made.file.proposals]
    assert kinds == ["learned"] * len(made.file.learned) + ["recommended"] * MOST
    best = next(one for one in studies_trials(database, "old") if one.number == 1)
    first = made.file.learned[0]
    assert first.source == "study old, trial 1: val_top1 0.9500"
    assert first.values["optimizer.lr"] == pytest.approx(best.params["optimizer.lr"])
    assert not any("trial 2" in one.source for one in made.file.learned)  # was pruned
    assert studies.load(database, "new").file.proposals == made.file.proposals


def studies_trials(database: Database, name: str) -> Any:
    return Study(name, database).trials


def test_a_study_that_exists_keeps_what_it_learned(database: Database) -> None:
    earlier(database)
    studies.create(database, study())
    again, is_new = studies.create(database, study(), ["old"])
    assert (is_new, again.file.proposals) == (False, ())


def test_auto_takes_every_compatible_study_and_the_file_may_say_so(database: Database) -> None:
    earlier(database, "one")
    earlier(database, "two", train={"model.cnn.filters": [8]})
    earlier(database, "other", metric="val_loss")
    studies.create(database, study("empty"))
    made, _ = studies.create(database, study(learn_from="auto"))
    assert made.file.learned
    assert {one.source.partition(",")[0] for one in made.file.learned} <= {"study one", "study two"}
    assert learn(study(), "auto", database) == made.file.learned


def test_learning_from_another_database_says_which_without_its_password(
    database: Database, tmp_path: Path
) -> None:
    earlier(database)
    here = connect(f"sqlite:///{tmp_path / 'here.db'}")
    made, _ = studies.create(here, study(), ["old"], database)
    assert f"study old in {database.shown}, trial 1" in made.file.learned[0].source
    with pytest.raises(NotFound, match="no study 'old'"):
        studies.create(here, study("third"), ["old"])
    here.dispose()


def test_the_python_api_learns(database: Database, tmp_path: Path) -> None:
    earlier(database)
    there = database.url.render_as_string(hide_password=False)
    made = Study.create(study(), storage=f"sqlite:///{tmp_path / 'a.db'}", learn_from="auto",
                        learn_storage=there)  # fmt: skip
    assert made.file.learned
    with pytest.raises(NotFound):
        Study.create(study("b"), storage=f"sqlite:///{tmp_path / 'a.db'}", learn_from=["none"])
    with pytest.raises(NotFound, match="no study 'none'"):  # a name alone is not its letters
        Study.create(study("b"), storage=f"sqlite:///{tmp_path / 'a.db'}", learn_from="none")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"metric": "val_loss"}, "new cannot learn from old: val_top1 is maximized"),
        ({"space": {"label_smoothing": [0.0, 0.1]}}, "none of the same parameters"),
        (
            {"train": {"optimizer.name": "rmsprop"}, "space": {"optimizer.lr": LR}},
            "none of its 2 complete trials has a counterpart",
        ),
    ],
)
def test_an_incompatible_study_is_refused_and_nothing_is_created(
    database: Database, fields: dict[str, Any], says: str
) -> None:
    earlier(database)
    with pytest.raises(InputError, match=says):
        studies.create(database, study(**fields), ["old"])
    with pytest.raises(NotFound):
        studies.load(database, "new")


def test_an_unknown_study_is_refused_with_the_nearest(database: Database) -> None:
    earlier(database)
    with pytest.raises(NotFound, match=r"no study 'odl'.*did you mean 'old'"):
        studies.create(database, study(), ["odl"])


def test_a_study_without_a_complete_trial_is_refused(database: Database) -> None:
    studies.create(database, study("old"))
    with pytest.raises(InputError, match="it has no complete trial"):
        studies.create(database, study(), ["old"])


@pytest.mark.parametrize("value", ["old", [], ["a b"], [1], 3, True])
def test_what_learn_from_may_be(value: Any) -> None:
    with pytest.raises(ConfigError, match=r'learn_from: .*"auto", or a list of names of studies'):
        study(learn_from=value)


def test_auto_stands_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s.toml"
    path.write_text("[space]\noptimizer.lr = [0.1, 0.2]\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["run", str(path), "--learn-from", "auto", "--learn-from", "old"])
    assert "name none beside it" in capsys.readouterr().err
