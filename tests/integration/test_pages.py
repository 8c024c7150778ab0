"""The pages in a real browser: figures drawn, nothing loaded, nothing from outside run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver import ActionChains

from hpo.dashboard import server
from hpo.reports import study as report
from hpo.reports.compare import compare
from hpo.reports.compare_page import comparison_report
from hpo.reports.importance import Importances
from hpo.reports.page import write_report
from hpo.reports.study import study_report
from hpo.reports.training import training_report
from hpo.storage.database import Database
from tests.harness.browser import OFFLINE, Browser, browser, missing
from tests.harness.fakes import study_file
from tests.harness.filled import EVIL, MIXED, RICH_SPACE, Trial, fill, trained

if missing():
    pytest.skip(f"not installed: {missing()}", allow_module_level=True)


FORGOTTEN = "[...document.querySelectorAll('.plot')].filter(p => !p.querySelector('svg')).length"
AXIS = """(axis, from) => {
  const element = document.querySelector('#plot-parallel'), box = element.getBoundingClientRect();
  const { xaxis, yaxis } = element._fullLayout;
  const down = (y) => box.top + yaxis._offset + yaxis.l2p(y);
  return [box.left + xaxis._offset + xaxis.l2p(axis), down(1.03), down(from)];
}"""
WIDEST = """() => Math.max(...[...document.querySelectorAll('.plot .main-svg')]
  .map((figure) => figure.getBoundingClientRect().right))"""
FIRST_COLUMN = (
    "[...document.querySelectorAll('#trials tbody tr')].map(r => +r.cells[0].textContent)"
)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile"), *OFFLINE) as found:
        yield found


@pytest.fixture
def offline(chromium: Browser) -> Iterator[Browser]:
    """The browser as new: no page, no complaints, its own size."""
    yield chromium
    chromium.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    chromium.open("about:blank")
    chromium.complaints()


@pytest.fixture
def page(tmp_path: Path, database: Database, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The report of a study with trials of all kinds, one of them with a hostile reason, as if one
    of its parameters stood out from chance."""
    shares = {"optimizer.lr": 0.6, "batch_size": 0.2, "optimizer.name": 0.1,
              "optimizer.momentum": 0.05, "model.cnn.filters": 0.05}  # fmt: skip
    found = Importances(shares, frozenset({"optimizer.lr"}), 12, {"optimizer.momentum": 5})
    monkeypatch.setattr(report, "importances", lambda *_: found)
    trials = [*MIXED, Trial("failed", (), EVIL)]
    fill(database, study_file(trials=20, space=RICH_SPACE), trials)
    path = tmp_path / "report.html"
    write_report(path, study_report(database, "toy"))
    return path


def show(offline: Browser, path: Path) -> None:
    offline.open(path.as_uri())
    offline.until(lambda: offline.js("document.body.dataset.ready"), f"{path.name} drawn")


def check_quiet(offline: Browser) -> None:
    """Nothing was loaded, and the console is empty: no error, nothing refused by the policy."""
    assert offline.requests() == []
    assert offline.complaints() == []


def test_a_study_report_draws_every_figure_from_one_file(offline: Browser, page: Path) -> None:
    show(offline, page)
    assert offline.js("document.querySelectorAll('.plot').length") == 12
    assert offline.js(FORGOTTEN) == 0
    points = "document.querySelectorAll('#plot-history .point').length"
    assert offline.js(points) == len(MIXED) + 1
    lines = "document.querySelectorAll('#plot-parallel .js-line').length"
    assert offline.js(lines) >= 5
    assert offline.js("document.querySelectorAll('#plot-importance .bars .point').length") == 5
    check_quiet(offline)


@pytest.mark.browser
def test_several_objectives_and_a_comparison_are_drawn(
    offline: Browser, tmp_path: Path, database: Database
) -> None:
    costly = [Trial("complete", (0.5, 0.6 + i / 100), costs=(5.0 + i % 3,)) for i in range(6)]
    file = study_file(name="pair", study='metrics = ["val_top1", "latency_ms"]')
    fill(database, file, costly)
    path = tmp_path / "pair.html"
    write_report(path, study_report(database, "pair"))
    show(offline, path)
    assert offline.js("document.querySelectorAll('#plot-front-latency_ms .point').length") == 6
    assert offline.js("document.querySelectorAll('#groups table').length") == 1
    assert offline.js(FORGOTTEN) == 0
    check_quiet(offline)
    page = tmp_path / "compare.html"
    write_report(page, comparison_report(compare(database, ["pair"]), "pair"))
    show(offline, page)
    assert offline.js("document.querySelectorAll('.plot').length") == 3  # one study: equal costs
    assert offline.js(FORGOTTEN) == 0
    check_quiet(offline)


@pytest.mark.browser
def test_a_table_sorts_by_a_click(offline: Browser, page: Path) -> None:
    show(offline, page)
    header = offline.driver.find_element("xpath", "//section[@id='trials']//button[.='val_top1']")
    numbers = list(range(len(MIXED) + 1))
    assert offline.js(FIRST_COLUMN) == numbers
    header.click()
    rising = offline.js(FIRST_COLUMN)
    assert rising[0] == 12  # the pruned one
    assert rising[-3:] == [13, 14, 15]  # failed and diverged: no value, last in either order
    header.click()
    assert offline.js(FIRST_COLUMN)[0] == 11
    assert offline.js(FIRST_COLUMN)[-3:] == [13, 14, 15]


@pytest.mark.browser
def test_a_drag_along_an_axis_picks_out_trials(offline: Browser, page: Path) -> None:
    show(offline, page)
    offline.js("document.querySelector('#plot-parallel').scrollIntoView({block: 'center'})")
    x, top, bottom = offline.js(f"({AXIS})(1, 0.5)")  # the upper half of the learning rates
    mouse = ActionChains(offline.driver)
    pointer = mouse.w3c_actions.pointer_action
    pointer.move_to_location(int(x), int(top)).pointer_down()
    pointer.move_to_location(int(x), int(bottom)).pointer_up()
    mouse.perform()
    told = "document.querySelector('[data-picked]').textContent"
    offline.until(lambda: " of 12 trials" in offline.js(told), "the number of trials")
    picked = int(offline.js(told).split()[0])
    assert 0 < picked < 12
    lines = "document.querySelectorAll('#plot-parallel .js-line').length"
    assert offline.js(lines) == 12 + picked
    offline.driver.find_element("xpath", "//p[@data-picked]/button").click()
    assert offline.js("document.querySelector('[data-picked]').hidden")
    assert offline.js(lines) == 12 + 3
    check_quiet(offline)


@pytest.mark.browser
def test_on_paper_no_figure_is_cut(offline: Browser, page: Path) -> None:
    show(offline, page)
    offline.js("dispatchEvent(new Event('beforeprint'))")
    assert offline.js(f"({WIDEST})()") <= 860
    assert offline.js("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    offline.js("dispatchEvent(new Event('afterprint'))")
    assert 860 < offline.js(f"({WIDEST})()") <= 1280


@pytest.mark.browser
def test_a_page_fits_a_phone(offline: Browser, page: Path) -> None:
    size = {"width": 390, "height": 840, "deviceScaleFactor": 1, "mobile": True}
    offline.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    show(offline, page)
    assert offline.js("document.documentElement.scrollWidth") <= 390


@pytest.mark.browser
def test_nothing_from_outside_runs(offline: Browser, tmp_path: Path, page: Path) -> None:
    run = trained(tmp_path, classes=[EVIL, "dog", "frog"], note=EVIL)
    training = tmp_path / "training.html"
    write_report(training, training_report(run))
    for path in (page, training):
        show(offline, path)
        assert offline.js("document.querySelectorAll('img, main script').length") == 0
        assert EVIL in offline.js("document.body.textContent")
        check_quiet(offline)


@pytest.mark.browser
def test_a_training_report_draws_every_figure(offline: Browser, tmp_path: Path) -> None:
    path = tmp_path / "training.html"
    write_report(path, training_report(trained(tmp_path)))
    show(offline, path)
    assert offline.js("document.querySelectorAll('.plot').length") == 4
    assert offline.js(FORGOTTEN) == 0
    assert offline.js("document.querySelectorAll('#plot-confusion .hm image').length") == 1
    check_quiet(offline)


@pytest.mark.browser
def test_the_dashboard_shows_the_study_and_its_trials(tmp_path: Path, database: Database) -> None:
    study = fill(database, study_file(trials=20), MIXED)
    address, stop = server.start_subprocess(database)
    try:
        with browser(tmp_path / "profile") as found:
            text = "document.body.innerText"
            found.open(address)
            found.until(lambda: "toy" in found.js(text), "the study's name")
            found.open(f"{address}/studies/{study.row.study_id}/trials")
            last = f"Trial {len(MIXED) - 1}"
            found.until(lambda: last in found.js(text), "the last trial")
            assert "Trial 0" in found.js(text)
            origin = address.removesuffix("/dashboard")
            assert all(name.startswith(origin) for name in found.requests())
            assert found.requests()
    finally:
        stop()
