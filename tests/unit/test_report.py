"""Reports: what each page says, for every state that a study can be in."""

from __future__ import annotations

import io
import json
import random
import re
import warnings
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from rich.console import Console
from werkzeug.test import Client

from hpo.cli.live import print_ending
from hpo.cli.tables import parameters_table
from hpo.dashboard.server import make_app
from hpo.errors import NotFound
from hpo.formatting import duration, mean_and_spread, number, setting
from hpo.paths import Home
from hpo.reports import figures, study_figures
from hpo.reports import page as page_module
from hpo.reports.importance import Importances, importances, importances_of
from hpo.reports.page import write_report
from hpo.reports.ped_anova import PedAnova
from hpo.reports.study import study_report
from hpo.reports.training import training_report
from hpo.search.status import read_status
from hpo.storage import records
from hpo.storage.database import Database
from hpo.trained.export import export
from tests.harness.fakes import study_file
from tests.harness.filled import EVIL, MIXED, RICH_SPACE, Trial, fill, trained


def drawn(page: str) -> dict[str, Any]:
    """The figures in a page, by name."""
    found = re.search(r'id="figures">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    figures: dict[str, Any] = json.loads(found[1])
    return figures


def text_of(page: str) -> str:
    """The page without its scripts, styles and tags."""
    bare = re.sub(r"<(script|style).*?</\1>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", bare))


def test_a_study_of_all_kinds_of_trials(database: Database) -> None:
    study = fill(database, study_file(trials=20, space=RICH_SPACE, name="rich"), MIXED)
    records.resolve_once(database, study.uuid, "data digits", "f00d")
    page = study_report(database, "rich")
    text, found = text_of(page), drawn(page)
    assert "Trial 11 is the best: val_top1 0.7100 in epoch 2 of 3" in text
    assert "15 of 20 trials finished" in text
    for said in ("12 complete", "1 pruned", "1 failed", "1 diverged", "out of memory", "f00d"):
        assert said in text
    assert "hpo export rich --trial 11 -o rich.best.toml --storage sqlite:///" in text
    assert "hpo train rich.best.toml --seeds 3" in text
    assert "[32, 64]" in text
    slices = {f"slice-{i}" for i in range(5)}
    assert "No parameter stands out from chance in 12 complete trials" in text
    others = {"history", "intermediate", "parallel", "loss", "accuracy", "lr"}
    assert set(found) == slices | others
    assert page.count('data-figure="') == len(found)


def test_a_page_begins_with_the_summary_and_describes_its_figures(database: Database) -> None:
    fill(database, study_file(trials=20, space=RICH_SPACE, name="rich"), MIXED)
    page = study_report(database, "rich")
    assert "Searched 5 parameters in 15 trials" in text_of(page.partition('id="best"')[0])
    described = re.findall(r'data-figure="([^"]*)" role="img" aria-label="([^"]+)"', page)
    assert {name for name, _ in described} == set(drawn(page))
    told = dict(described)
    assert told["history"].endswith("the best is trial 11 with 0.7100.")
    assert "val_loss from 0.7 to 0.54" in told["loss"]
    best = read_status(database, "rich").best
    assert best is not None
    assert f"batch_size = {best.params['batch_size']}" in told["parallel"]


def test_a_page_of_many_trials_stays_small_and_readable(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long parallel plot has the most important axes, and of too many curves some are drawn."""
    monkeypatch.setattr(study_figures, "MOST_AXES", 3)
    monkeypatch.setattr(study_figures, "MOST_POINTS", 18)
    fill(database, study_file(trials=20, space=RICH_SPACE), MIXED)
    status = read_status(database, "toy")
    shares = {"batch_size": 0.6, "optimizer.lr": 0.3, "model.cnn.filters": 0.1}
    axes = study_figures.parallel_axes(status, shares)
    assert axes == ["optimizer.lr", "model.cnn.filters", "batch_size"]
    curves = study_figures.drawn_curves(status)
    assert len(curves) < len([trial for trial in status.trials if trial.epochs])
    assert status.best in curves
    text = text_of(study_report(database, "toy"))
    assert f"Of 14 trials {len(curves)} are drawn" in text
    assert "Drawn are 3 of 5 parameters" in text
    lines = study_figures.parallel_coordinate(status, axes)
    assert lines is not None
    pale, *bright = lines["data"]
    assert len(set(pale["customdata"])) == 12
    best = {number for trace in bright for number in trace["customdata"]}
    assert best == {trial.number for trial in status.ranked()[:3]}
    assert bright[-1]["line"]["color"] == figures.ORANGE
    assert set(bright[-1]["customdata"]) == {11}


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (1e-4, "1e-4"), (2.5e-5, "2.5e-5"), (0.02, "0.02"), (64, "64")]
)
def test_ticks_are_short(value: float, text: str) -> None:
    assert figures.tick(value) == text


@pytest.mark.parametrize(
    ("mean", "std", "text"),
    [(23.6832, 32.4735, "24 ± 32"), (0.94123, 0.0123, "0.941 ± 0.012"), (0.5, None, "0.5000"),
     (0.5, 0.0, "0.5000"), (123456.0, 2345.0, "1.235e+05 ± 2.3e+03")],
)  # fmt: skip
def test_a_spread_has_two_digits(mean: float, std: float | None, text: str) -> None:
    assert mean_and_spread(mean, std) == text


def test_the_page_loads_nothing(database: Database) -> None:
    fill(database, study_file(), [Trial("complete", (0.5,))])
    page = study_report(database, "toy")
    own = re.sub(r"<script nonce[^>]*>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.findall(r"\b(?:src|href)\s*=|@import|url\(", own)
    assert "default-src 'none'" in page
    assert len(page) < 6_000_000


class Scrollers(HTMLParser):
    """Finds boxes that may scroll and hold nothing that a key could reach."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[tuple[str, bool]] = []
        self.unreachable: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        if tag in ("div", "pre"):
            scrolls = {"scroll", "log"} & set(found.get("class", "").split())
            self.open.append((str(attrs) if scrolls else "", "tabindex" in found))
        if tag in ("a", "button") or ("data-figure" in found and "min-width" not in found["style"]):
            self.open = [(box, True) for box, _ in self.open]

    def handle_endtag(self, tag: str) -> None:
        if tag in ("div", "pre"):
            box, is_reached = self.open.pop()
            self.unreachable += [box] if box and not is_reached else []


def test_what_scrolls_is_reached_by_keys(database: Database, tmp_path: Path) -> None:
    study = fill(database, study_file(trials=20, space=RICH_SPACE, name="rich"), MIXED)
    log = study.directory(Home.default()).log("w1")
    log.parent.mkdir(parents=True)
    log.write_text("epoch 1\n")
    client, here = Client(make_app(database)), "/hpo/studies/rich"
    own = [client.get(f"{here}{end}").text for end in ("", "/trials/11", "/logs")]
    for page in (study_report(database, "rich"), training_report(trained(tmp_path)), *own):
        assert "tabindex" in page
        assert not Scrollers(page).unreachable


def test_text_stands_out_from_its_ground() -> None:
    """4.5 to 1 in both schemes, as WCAG 2.2 has it for small text."""
    style = Path(page_module.__file__).with_name("templates") / "style.html"
    schemes = re.findall(r"(--ground:.*?)}", style.read_text(), re.DOTALL)
    assert len(schemes) == 3
    for scheme in schemes:
        shade = {
            name: luminance(color) for name, color in re.findall(r"--(\w+): #([0-9a-f]{6})", scheme)
        }
        for text in ("ink", "soft", "accent"):
            for ground in ("ground", "card"):
                light, dark = sorted((shade[text], shade[ground]), reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, ground, scheme)


def luminance(color: str) -> float:
    """Relative luminance of six hex digits (WCAG 2.2)."""
    parts = (value / 255 for value in bytes.fromhex(color))
    linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in parts]
    return sum(weight * one for weight, one in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_a_study_without_trials(database: Database) -> None:
    fill(database, study_file(), [])
    page = study_report(database, "toy")
    assert drawn(page) == {}
    assert "No trial has finished yet" in text_of(page)
    assert "hpo export" not in page


@pytest.mark.parametrize("outcome", ["failed", "diverged", "pruned"])
def test_a_study_without_a_complete_trial(database: Database, outcome: str) -> None:
    fill(database, study_file(), [Trial(outcome, (0.3,), "because")] * 3)
    page = study_report(database, "toy")
    why = "3 of 3 trials diverged" if outcome == "diverged" else "no trial was completed"
    assert f"There is no best trial: {why}" in text_of(page)
    assert text_of(page).count("because") == 3
    assert "history" in drawn(page)
    assert "parallel" not in drawn(page)


def test_a_loss_that_is_not_finite_is_no_value(database: Database) -> None:
    """Of a worker that died between the epoch and its trial's end, which is diverged."""
    file = study_file(study='metric = "val_loss"')
    fill(database, file, [Trial("paused", (-float("inf"),)), Trial("complete", (0.5,))])
    assert [one.value for one in read_status(database, "toy").trials] == [None, 0.7]
    assert "not finite" not in text_of(study_report(database, "toy"))


def test_a_pruned_trial_that_was_the_best_is_told(database: Database) -> None:
    trials = [Trial("complete", (0.5,)), Trial("pruned", (0.6, 0.9, 0.2), "behind"),
              Trial("pruned", (0.4,), "behind"), Trial("complete", (0.7,))]  # fmt: skip
    fill(database, study_file(), trials)
    status = read_status(database, "toy")
    note = "Pruned trial 1 reached val_top1 0.9 in epoch 2, above the best complete one"
    assert status.best is not None
    assert (status.best.number, status.to_dict()["best_pruned"]) == (3, 1)
    assert str(status.pruned_note).startswith(f"{note}: its full schedule was never run")
    assert note in text_of(study_report(database, "toy"))
    told = io.StringIO()
    print_ending(database, status, Console(file=told, width=300), hpo="hpo", flag="")
    assert note in told.getvalue()
    assert any(note in one for one in export(database, "toy")[1]["notes"])
    assert export(database, "toy", number=1)[1]["value"] == 0.9


@pytest.mark.parametrize(
    ("trials", "said"),
    [
        ([Trial("complete", (0.5,)), Trial("pruned", (0.5,))], None),
        ([Trial("complete", (0.5,)), Trial("pruned"), Trial("failed", (0.9,))], None),
        ([Trial("pruned", (0.3,)), Trial("pruned", (0.4,))],
         "Pruned trial 1 reached val_top1 0.4 in epoch 1, and no trial is complete: its full "
         "schedule was never run; hpo export toy --trial 1 takes it"),
    ],
)  # fmt: skip
def test_pruning_that_cost_nothing_is_not_told(
    database: Database, trials: list[Trial], said: str | None
) -> None:
    fill(database, study_file(), trials)
    assert read_status(database, "toy").pruned_note == said


def test_a_pruned_trial_below_the_best_loss_is_told(database: Database) -> None:
    file = study_file(study='metric = "val_loss"')
    fill(database, file, [Trial("pruned", (0.9,)), Trial("complete", (0.5,))])
    assert "trial 0 reached val_loss 0.3 in epoch 1, below the best complete one" in str(
        read_status(database, "toy").pruned_note
    )


def test_failures_without_an_epoch_are_in_the_history(database: Database) -> None:
    fill(database, study_file(), [Trial("failed", (), "out of memory")])
    page = study_report(database, "toy")
    (marks,) = [t for t in drawn(page)["history"]["data"] if t["name"] == "failed"]
    assert (marks["x"], marks["yaxis"]) == ([0], "y2")
    assert "intermediate" not in drawn(page)


def test_one_trial(database: Database) -> None:
    fill(database, study_file(), [Trial("complete", (0.5, 0.4))])
    page = study_report(database, "toy")
    assert "Parameter importance needs 8 complete trials, there are 1" in text_of(page)
    assert {"history", "parallel", "slice-0"} <= set(drawn(page))


def test_a_constant_parameter(database: Database) -> None:
    space = "optimizer.lr = {low = 0.1, high = 0.1, log = true}\nbatch_size = [32]"
    fill(database, study_file(trials=20, space=space), MIXED)
    page = study_report(database, "toy")
    assert {"slice-0", "slice-1", "parallel"} <= set(drawn(page))
    assert importances(database, "toy").shares == {}
    assert "do not tell the parameters apart" in text_of(page)


def test_values_stand_in_figures_as_they_are_written(database: Database) -> None:
    """Quotes and all, but nothing that plotly or a browser would take for HTML."""
    blocks = 'model.trainable_blocks = ["all", {first = 1}]'
    space = f"{blocks}\noptimizer.name = ['sgd', 'adamw']\nmodel.options.title = ['<b>&\"x\"', 'b']"
    own = 'model.architecture = "nets:build"'
    fill(database, study_file(train=own, space=space), [Trial("complete", (0.5,))] * 6)
    found = json.dumps(drawn(study_report(database, "toy")))
    assert "&quot;" not in found
    assert "&#" not in found
    assert '{\\"first\\": 1}' in found
    assert '&lt;b&gt;&amp;\\"x' in found
    assert "<b>&" not in found


def test_minimized_metrics_know_their_best(database: Database) -> None:
    file = study_file(study='metric = "val_loss"', trials=20)
    fill(database, file, [Trial("complete", (0.5 + i / 100,)) for i in range(3)])
    best, *_ = drawn(study_report(database, "toy"))["history"]["data"]
    assert best["name"] == "best so far"
    assert "val_loss, minimized" in text_of(study_report(database, "toy"))


def test_importances_name_every_parameter_and_sum_to_one(database: Database) -> None:
    fill(database, study_file(trials=20, space=RICH_SPACE), MIXED)
    told = importances(database, "toy")
    found = told.shares
    assert set(found) == {"optimizer.name", "optimizer.lr", "optimizer.momentum",
                          "model.cnn.filters", "batch_size"}  # fmt: skip
    assert sum(found.values()) == pytest.approx(1.0)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    momentum = sum("optimizer.momentum" in trial.params
                   for trial in read_status(database, "toy").ranked())  # fmt: skip
    assert told.having == {"optimizer.momentum": momentum}


def test_the_end_lists_every_parameter_also_one_that_the_best_trial_has_not() -> None:
    found = Importances(
        shares={"optimizer.momentum": 0.9, "optimizer.lr": 0.06, "optimizer.name": 0.04},
        outstanding=frozenset({"optimizer.momentum"}),
        trials=12,
        having={"optimizer.momentum": 6},
    )
    out = io.StringIO()
    table = parameters_table({"optimizer.lr": 0.1, "optimizer.name": "adam", "seed": 3}, found)
    Console(file=out, width=120).print(table)
    lines = [" ".join(line.split()) for line in out.getvalue().splitlines() if line.strip()]
    names = [line.split()[0] for line in lines]
    assert names[-4:] == ["optimizer.momentum", "optimizer.lr", "optimizer.name", "seed"]
    assert lines[-4].split()[1] == "-"
    assert lines[-4].endswith("90% in 6 of 12 trials")
    assert lines[-3].endswith("6% within chance")
    shares = re.findall(r"(\d+)%", out.getvalue())
    assert sum(map(int, shares)) == 100


def drawn_at_random(seed: int, count: int = 40) -> list[optuna.trial.FrozenTrial]:
    """Trials of two ranges, choices, and a range that half of them have."""
    generator = random.Random(seed)
    unit = FloatDistribution(0.0, 1.0)
    kinds = {"a": unit, "b": unit, "c": CategoricalDistribution(["x", "y"]), "d": unit}
    trials = []
    for _ in range(count):
        params: dict[str, Any] = {name: generator.random() for name in "ab"}
        params["c"] = generator.choice(["x", "y"])
        params |= {"d": generator.random()} if params["c"] == "x" else {}
        own = {name: kinds[name] for name in params}
        trials.append(optuna.trial.create_trial(params=params, distributions=own, value=0.0))
    return trials


@pytest.mark.parametrize("seed", range(4))
def test_importances_equal_those_of_optuna(seed: int) -> None:
    """Of ranges, steps, logarithms, choices and conditions, with equal values among them."""
    kinds: dict[str, BaseDistribution] = {
        "float": FloatDistribution(0.0, 1.0),
        "log": FloatDistribution(1e-5, 0.1, log=True),
        "step": FloatDistribution(0.0, 0.5, step=0.1),
        "int": IntDistribution(1, 5),
        "int log": IntDistribution(1, 300, log=True),
        "many": IntDistribution(16, 1600, step=16),
        "choice": CategoricalDistribution(["x", "y", "z"]),
        "constant": FloatDistribution(1.0, 1.0),
        "sometimes": FloatDistribution(0.5, 0.9),
    }
    generator = random.Random(seed)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    for _ in range((8, 12, 40, 150)[seed]):
        used = {k: v for k, v in kinds.items() if k != "sometimes" or generator.random() < 0.5}
        study.tell(study.ask(used), 0.0)
    values = [round(generator.random(), 1 + seed) for _ in study.trials]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = optuna.importance.PedAnovaImportanceEvaluator().evaluate(
            study, target=lambda trial: values[trial.number]
        )
    assert PedAnova(study.trials)(values) == pytest.approx(theirs, rel=1e-9)


def test_noise_is_told_as_noise() -> None:
    """Though its shares add up to 1: of 30 studies without any effect at most 4 show one."""
    alarms = 0
    for seed in range(30):
        trials, noise = drawn_at_random(seed), random.Random(100 + seed)
        found = importances_of(trials, [noise.random() for _ in trials])
        assert sum(found.shares.values()) == pytest.approx(1.0)
        alarms += bool(found.outstanding)
        if not found.outstanding:
            assert found.verdict == "no parameter stands out from chance in 40 complete trials"
    assert alarms <= 4


def test_an_effect_stands_out_from_noise() -> None:
    for seed in range(4):
        trials, noise = drawn_at_random(seed), random.Random(200 + seed)
        values = [(t.params["a"] - 0.3) ** 2 + 0.02 * noise.random() for t in trials]
        found = importances_of(trials, values)
        assert found.outstanding == {"a"}
        assert found.verdict is None
        again = importances_of(trials, values)
        assert (again.shares, again.outstanding) == (found.shares, found.outstanding)
        drawing = figures.importance(found)
        assert drawing is not None
        (bars,) = drawing["data"]
        assert [bars["y"][-1], bars["marker"]["color"][-1]] == ["a", figures.BLUE]
        assert set(bars["marker"]["color"][:-1]) == {figures.PALE}
        assert "within chance, in" in bars["text"][bars["y"].index("d")]


@pytest.mark.parametrize(
    "trials",
    [[], [Trial("complete", (0.5,))] * 7, [Trial("complete", (0.5,))] * 12],
    ids=["none", "too few", "all the same"],
)
def test_no_importances_where_there_is_nothing_to_tell(
    database: Database, trials: list[Trial]
) -> None:
    fill(database, study_file(trials=20), trials)
    found = importances(database, "toy")
    assert (found.shares, found.outstanding) == ({}, frozenset())
    assert found.verdict is not None


def test_an_unknown_study_is_named(database: Database) -> None:
    fill(database, study_file(), [])
    with pytest.raises(NotFound, match="toy"):
        study_report(database, "tou")


def test_names_from_outside_stay_text(database: Database) -> None:
    fill(database, study_file(), [Trial("failed", (0.2,), EVIL)])
    page = study_report(database, "toy")
    assert EVIL not in page
    assert "<img" not in page.replace(plotly(), "")
    assert "&lt;img src=x" in page


def plotly() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def test_a_report_is_seen_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.html"
    write_report(path, "first")
    with pytest.raises(UnicodeEncodeError):
        write_report(path, "second \ud800")
    assert path.read_text() == "first"
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


# ---- figures ----


@pytest.mark.parametrize(
    ("values", "maximize", "best", "left_out"),
    [
        ([0.97, 0.98, 0.985, 0.99, 0.975, 0.98, 0.982, 0.1], True, 0.99, 0.1),
        ([0.03, 0.02, 0.015, 0.01, 0.025, 0.02, 0.018, 2.3], False, 0.01, 2.3),
    ],
)
def test_few_bad_values_do_not_squeeze_the_rest(
    values: list[float], maximize: bool, best: float, left_out: float
) -> None:
    bounds = study_figures.focus(values, maximize=maximize)
    assert bounds is not None
    assert bounds[0] < best < bounds[1]
    assert not bounds[0] <= left_out <= bounds[1]


@pytest.mark.parametrize("values", [[0.1, 0.9], [0.5] * 20, [i / 20 for i in range(20)]])
def test_values_that_fit_are_all_shown(values: list[float]) -> None:
    assert study_figures.focus(values, maximize=True) is None


def test_lists_and_logs_have_readable_axes(database: Database) -> None:
    fill(database, study_file(trials=20, space=RICH_SPACE), MIXED)
    status = read_status(database, "toy")
    lr = study_figures.slice_plot(status, "optimizer.lr")
    lists = study_figures.slice_plot(status, "model.cnn.filters")
    assert lr is not None
    assert lists is not None
    assert lr["layout"]["xaxis"]["type"] == "log"
    assert lists["layout"]["xaxis"]["ticktext"] == ["[16, 32]", "[32, 64]"]
    momentum = study_figures.slice_plot(status, "optimizer.momentum")
    used = [t for t in status.trials if t.params.get("optimizer.name") == "sgd"
            and t.state in ("complete", "pruned")]  # fmt: skip
    assert momentum is not None
    assert len(momentum["data"][0]["x"]) == len(used)


def test_text_in_figures_is_no_html(database: Database) -> None:
    matrix = figures.confusion(["<b>cat</b>", "dog"], [[3, 1], [0, 4]])
    assert matrix is not None
    assert matrix["layout"]["xaxis"]["ticktext"] == ["&lt;b&gt;cat&lt;/b&gt;", "dog"]
    assert "<b>" not in json.dumps(matrix)


def test_confusion_colours_are_shares_of_the_true_class() -> None:
    matrix = figures.confusion(["a", "b"], [[3, 1], [0, 0]])
    assert matrix is not None
    assert matrix["data"][0]["z"] == [[0.75, 0.25], [0.0, 0.0]]
    assert [note["text"] for note in matrix["layout"]["annotations"]] == ["3", "1"]


# ---- a retrained model ----


def test_a_tested_model(tmp_path: Path) -> None:
    page = training_report(trained(tmp_path))
    text = text_of(page)
    for said in ("Measured on the test images", "test top1 ± 0.0141, n = 2", "optimizer.lr",
                 "a note", "cat"):  # fmt: skip
        assert said in text
    assert set(drawn(page)) == {"loss", "accuracy", "lr", "confusion"}
    # Summed over the two seeds.
    assert "cat predicted as dog<br>2 of 22" in json.dumps(drawn(page)["confusion"])
    # Accuracy comes before the loss, in whatever order the scores are stored.
    told = [text.index(f"test {name} ±") for name in ("top1", "top5", "loss", "macro f1")]
    assert told == sorted(told)


def test_without_a_test_split_nothing_is_called_test(tmp_path: Path) -> None:
    text = text_of(training_report(trained(tmp_path, "val")))
    assert "There is no test split: these are results on the validation images" in text
    assert "validation top1" in text
    assert len(re.findall(r"\btest\b", text.partition("Configuration")[0])) == 1


def test_without_any_split_it_says_so(tmp_path: Path) -> None:
    page = training_report(replace(trained(tmp_path, None), provenance={}))
    text = text_of(page)
    assert "nothing was measured after the training" in text
    assert "written by hand" in text
    assert "confusion" not in drawn(page)


def test_a_thousand_classes_get_a_table_instead_of_a_matrix(tmp_path: Path) -> None:
    page = training_report(trained(tmp_path, classes=[f"class {i}" for i in range(150)]))
    assert "confusion" not in drawn(page)
    assert "The matrix is drawn up to 100 classes" in text_of(page)
    assert "Most frequent confusions" in text_of(page)


def test_class_names_stay_text(tmp_path: Path) -> None:
    page = training_report(trained(tmp_path, classes=[EVIL, "dog"], note=EVIL))
    assert EVIL not in page
    assert "&lt;script&gt;alert(1)" in page


def test_a_class_name_that_is_no_utf8_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(path, training_report(trained(tmp_path, classes=["caf\udce9", "dog"])))
    assert r"caf\udce9" in path.read_text(encoding="utf-8")


# ---- values as text ----


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (8.44, "8.4 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"),
     (7500, "2 h 05 min"), (273600, "3 d 4 h")],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_numbers_and_settings() -> None:
    values = (0.97, 1.5e-6, 3.2e9, None, float("nan"), 0)
    assert [number(v) for v in values] == ["0.9700", "1.5e-06", "3.2e+09", "–", "not finite",
                                           "0.0000"]  # fmt: skip
    assert setting([[32, 64], True, None, 0.003, "adamw"]) == "[[32, 64], true, none, 0.003, adamw]"
