"""A study in plain language: every kind of sentence, and where it is shown."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hpo.config.study import Verified
from hpo.reports.importance import Importances
from hpo.reports.summary import Kind, mattered, summarize, texts
from hpo.search.noise import VALIDATED
from hpo.search.status import StudyStatus, read_status
from hpo.storage import records
from hpo.storage.database import Database
from hpo.trained.export import comments, export
from tests.harness.commands import calls
from tests.harness.fakes import study_file
from tests.harness.filled import Trial, fill

BASELINE = """
[[baseline]]
optimizer.lr = 0.01
"""
RISING = [Trial("complete", (0.5, 0.52, value)) for value in (0.8, 0.86, 0.85, 0.6)]


def filled(
    database: Database, trials: list[Trial], images: dict[str, int] | None = None, **file: object
) -> StudyStatus:
    """The status of a study of these trials on 153 validation images."""
    space = str(file.pop("space", "optimizer.lr = {low = 1e-4, high = 1e-1, log = true}"))
    study = fill(database, study_file(trials=len(trials), space=space + BASELINE, **file), trials)  # type: ignore[arg-type]
    counts = {"ant": 83, "bee": 70} if images is None else images
    records.resolve_once(database, study.uuid, VALIDATED, counts)
    return read_status(database, "toy")


def test_a_best_trial_within_noise(
    database: Database, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status = filled(database, RISING)
    told = summarize(status)
    assert texts(told, Kind.SEARCHED, Kind.WON, Kind.AGAINST, Kind.NOISE) == [
        "Searched 1 parameter in 4 trials (4 complete), by val_top1 on 153 validation images.",
        "Trial 1 is the best: val_top1 0.8600 (95 % 0.796 to 0.906 on 153 images) in epoch 3 of 3.",
        "The baseline (trial 0) reached 0.8000: the best is 0.0600 above it, within noise.",
        "Not distinguishable: 2 trials within noise (2, 0).",
    ]
    rising, verify, images, few = texts(told, Kind.NEXT)
    assert verify == "hpo verify toy trains the best again with other seeds, to tell them apart."
    assert rising.startswith("The best trial was still rising in its last epoch, 3, and 3 of")
    assert images.startswith("153 images tell an accuracy to ±0.055: more validation images")
    assert few == "4 trials for 1 parameter are few: hpo extend toy --trials 10."

    hpo = calls(monkeypatch, capsys)
    storage = ("--storage", database.url.render_as_string(hide_password=False))
    _, shown, _ = hpo("status", "toy", *storage)
    assert "within noise (2, 0)" in shown
    _, data, _ = hpo("status", "toy", "--json", *storage)
    found = json.loads(data)
    assert found["best"]["ties"] == [2, 0]
    assert found["best"]["still_rises"]
    assert found["best"]["interval"]["low"] == pytest.approx(0.796, abs=1e-3)
    assert found["reference"]["number"] == 0
    assert found["summary"][0] == {"kind": "searched", "text": told[0].text}
    _, page, _ = hpo("trial", "toy", "2", *storage)
    assert "difference from the best, trial 1: within noise" in page
    assert "still rising in its last epoch" in page
    _, table, _ = hpo("trials", "toy", *storage)
    assert "Not distinguishable: 2 trials within noise (2, 0)." in table


def test_an_export_says_how_sure_its_value_is(database: Database, tmp_path: Path) -> None:
    filled(database, RISING)
    _, provenance = export(database, "toy")
    assert provenance["validation_images"] == 153
    assert provenance["interval"] == pytest.approx([0.796, 0.906], abs=1e-3)
    head = " ".join(comments(provenance))
    assert "95 % 0.796 to 0.906 on 153 images" in head
    assert "2 other trials are within noise (2, 0)" in head
    assert "still rose in the last epoch" in head


def test_a_best_trial_beyond_noise(database: Database) -> None:
    flat = [Trial("complete", (0.3, value, value)) for value in (0.5, 0.9, 0.4)]
    told = summarize(filled(database, flat, {"ant": 2_000, "bee": 2_000}))
    assert texts(told, Kind.AGAINST, Kind.NOISE) == [
        "The baseline (trial 0) reached 0.5000: the best is 0.4000 above it, beyond noise.",
        "No other complete trial is within noise of it.",
    ]


def test_trials_that_only_guess(database: Database) -> None:
    good = Trial("complete", (0.5, 0.8, 0.8))
    one_class = Trial("complete", (70 / 153, 83 / 153, 83 / 153))
    told = summarize(filled(database, [good, good, one_class, one_class]))
    assert texts(told, Kind.NEXT)[0].startswith("2 of 4 trials always named one class, val_top1")


def test_bounds_and_choices_that_could_go_on(database: Database) -> None:
    """The best are those of the largest rates and of no dropout, of which there cannot be less."""
    space = (
        "optimizer.lr = {low = 1e-3, high = 1e-1, log = true}\n"
        "model.dropout = {low = 0.0, high = 0.5}\n"
        'optimizer.name = ["sgd", "adamw"]'
    )
    status = filled(database, [Trial("complete", (0.4, 0.5, 0.5))] * 12, space=space)
    rates = [10 ** (-3 + 2 * place / 11) for place in range(12)]
    trials = tuple(
        replace(
            one,
            value=0.5 + place / 100,
            params={
                "optimizer.lr": rates[place],
                "model.dropout": 0.0 if place > 6 else 0.4,
                "optimizer.name": "sgd",
            },
        )
        for place, one in enumerate(status.trials)
    )
    told = texts(summarize(replace(status, trials=trials)), Kind.NEXT)
    assert "Never tried: optimizer.name = adamw." in told
    assert not [line for line in told if "press" in line]  # two of the best five may be by chance
    close = tuple(
        replace(one, params=one.params | {"optimizer.lr": 0.09 if n > 6 else 0.002})
        for n, one in enumerate(trials)
    )
    pressing = [line for line in texts(summarize(replace(status, trials=close)), Kind.NEXT)
                if "press" in line]  # fmt: skip
    assert pressing == [
        "The best trials press against optimizer.lr = 0.1 (5 of the best 5): let it go above 0.1."
    ]


def test_a_reference_that_is_better_or_equal_is_told_so(database: Database) -> None:
    pruned = Trial("pruned", (0.5, 0.9))
    told = summarize(filled(database, [pruned, Trial("complete", (0.3, 0.6, 0.7))]))
    assert texts(told, Kind.AGAINST) == [
        "The baseline (trial 0, pruned after epoch 2) reached 0.9000: the best complete one is "
        "0.2000 below it."
    ]


def test_what_to_try_next_can_be_typed(database: Database) -> None:
    flat = [Trial("complete", (0.3, 0.6, 0.6))] * 3
    status = filled(database, flat)

    def few(**changes: object) -> str:
        now = replace(status, row=replace(status.row, **changes))  # type: ignore[arg-type]
        return texts(summarize(now), Kind.NEXT)[-1]

    assert few() == "3 trials for 1 parameter are few: hpo extend toy --trials 10."
    assert few(trials=40, stop="user").endswith("are few: hpo resume toy.")
    over = few(trials=40, stop="rule", stop_reason="max_time = 1m is over")
    assert over.endswith("are few: it ended early, max_time = 1m is over.")
    again = replace(status, file=replace(status.file, verifies=Verified("parent", "u")))
    assert texts(summarize(again), Kind.NEXT) == ["hpo verify parent ranks its configurations."]
    folds = replace(status, file=study_file(trials=3, train="epochs = 3\ndata.folds = 3"))
    assert not any("data.folds" in line for line in texts(summarize(folds), Kind.NEXT))


def test_losses_that_only_guess_are_high(database: Database) -> None:
    worse = [Trial("complete", (0.2, 0.3, 0.3))] * 3  # a loss of 0.9 or more, of two classes
    told = summarize(filled(database, worse, study='metric = "val_loss"'))
    assert "did no better than guessing, val_loss at least 0.68" in texts(told, Kind.NEXT)[0]


def test_a_metric_without_an_interval(database: Database) -> None:
    told = summarize(filled(database, RISING, study='metric = "val_loss"'))
    (against,), (noise,) = texts(told, Kind.AGAINST), texts(told, Kind.NOISE)
    assert "noise" not in against
    assert noise == "How much of that is noise is unknown: val_loss has no interval here."


def test_a_study_without_a_best_trial(database: Database) -> None:
    told = summarize(filled(database, [Trial("failed", (), "out of memory")]))
    assert texts(told, Kind.WON) == ["No trial was completed."]
    assert not texts(told, Kind.AGAINST, Kind.NOISE)


def test_what_mattered() -> None:
    assert mattered(Importances(trials=3)).startswith("Parameter importance needs 8 complete")
    shares = {"optimizer.lr": 0.8, "batch_size": 0.2}
    noise = Importances(shares=shares, trials=30)
    assert mattered(noise) == "No parameter stands out from chance in 30 complete trials."
    found = Importances(shares=shares, outstanding=frozenset({"optimizer.lr"}), trials=30)
    assert mattered(found) == (
        "Parameter importance beyond chance, in 30 complete trials: optimizer.lr (80%)."
    )
