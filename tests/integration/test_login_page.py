"""The dashboard behind its gateway, as a person uses it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from hpo.search import study as studies
from hpo.search.study import Study
from hpo.storage import leases
from hpo.storage.database import Database
from hpo.storage.optuna import FencedStorage, add_waiting
from tests.harness.browser import Browser, browser, missing
from tests.harness.dashboards import PASSWORD, running
from tests.harness.fakes import study_file
from tests.harness.filled import MIXED, RICH_SPACE, fill

if missing():
    pytest.skip(f"not installed: {missing()}", allow_module_level=True)

pytestmark = pytest.mark.browser

TEXT = "document.body.innerText"
LOCAL = ("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",)


@pytest.fixture
def study(database: Database) -> Study:
    return fill(database, study_file(trials=20, lease_s=600, space=RICH_SPACE), MIXED)


@pytest.fixture
def chromium(tmp_path: Path) -> Iterator[Browser]:
    with browser(tmp_path / "profile", *LOCAL) as found:
        yield found


def one(page: Browser, selector: str) -> WebElement:
    """The first visible element of a CSS selector."""
    found: list[WebElement] = page.until(
        lambda: [
            e for e in page.driver.find_elements(By.CSS_SELECTOR, selector) if e.is_displayed()
        ],
        selector,
    )
    return found[0]


def button(page: Browser, label: str) -> WebElement:
    """The visible button that reads `label`, in whatever case."""

    def look() -> WebElement | None:
        buttons = page.driver.find_elements(By.TAG_NAME, "button")
        return next((e for e in buttons if e.text.strip().lower() == label.lower()), None)

    found = page.until(look, f"the button {label!r}")
    assert found is not None
    return found


def log_in(page: Browser, password: str) -> None:
    field = one(page, "input[type=password]")
    field.send_keys(password)
    button(page, "Log in").click()


def reads(page: Browser, text: str) -> None:
    page.until(lambda: text in page.js(TEXT), f"the text {text!r}")


def shows_study(page: Browser) -> None:
    """The study's first page, its plots drawn from its trials."""
    page.until(
        lambda: page.js("document.querySelectorAll('.plotly .main-svg').length") >= 4, "plots"
    )
    points = "document.querySelectorAll('.plotly .point').length"
    page.until(lambda: page.js(points) >= len(MIXED) - 1, "points")


def test_log_in_look_write_a_note_log_out(chromium: Browser, tmp_path: Path, study: Study) -> None:
    with running(study.database, tmp_path / "run") as own:
        chromium.open(f"{own.address}/studies/{study.row.study_id}")
        assert one(chromium, "input[type=password]") == chromium.driver.switch_to.active_element
        assert chromium.complaints() == []
        log_in(chromium, "a guess")
        reads(chromium, "Wrong password.")
        (complaint,) = chromium.complaints()
        assert "401" in complaint
        log_in(chromium, PASSWORD)
        shows_study(chromium)
        assert chromium.driver.current_url == f"{own.address}/studies/{study.row.study_id}"
        for page in ("analytics", "trials", "note"):
            chromium.open(f"{own.address}/studies/{study.row.study_id}/{page}")
            reads(chromium, {"analytics": "Contour", "trials": "Trial 14"}.get(page, "Note"))
        save_note(chromium, "looks **good**")
        chromium.until(lambda: chromium.js("document.querySelectorAll('textarea').length") == 0,
                       "the note's end")  # fmt: skip
        chromium.driver.refresh()
        chromium.until(lambda: chromium.js("document.querySelector('strong')?.innerText") == "good",
                       "the note")  # fmt: skip
        assert chromium.complaints() == []
        assert all(name.startswith(own.origin) for name in chromium.requests())
        button(chromium, "Log out").click()
        one(chromium, "input[type=password]")
        chromium.driver.back()
        one(chromium, "input[type=password]")
        assert "toy" not in chromium.js(TEXT)
        assert chromium.complaints() == []


def save_note(page: Browser, text: str) -> None:
    icon = one(page, "[data-testid=EditIcon]")
    icon.find_element(By.XPATH, "./ancestor::button").click()
    one(page, "textarea").send_keys(text)
    button(page, "Save").click()


def test_a_session_that_ended_leads_to_the_login(
    chromium: Browser, tmp_path: Path, study: Study
) -> None:
    with running(study.database, tmp_path / "run") as own:
        chromium.open(own.address)
        log_in(chromium, PASSWORD)
        reads(chromium, "toy")
        chromium.driver.delete_all_cookies()
        button(chromium, "Reload").click()
        one(chromium, "input[type=password]")
        assert chromium.driver.current_url.startswith(f"{own.origin}/login")


def test_what_is_refused_is_said_why(chromium: Browser, tmp_path: Path, study: Study) -> None:
    add_waiting(FencedStorage(study.database), study.row.study_id)
    assert leases.claim(study.database, study.uuid, study.snapshot().free[0], "w1") is not None
    with running(study.database, tmp_path / "run", locked=False) as own:
        chromium.open(own.address)
        one(chromium, "button[aria-label='delete study']").click()
        button(chromium, "Yes").click()
        reads(chromium, "is being worked on by w1")
        chromium.open(own.address)
        one(chromium, "button[aria-label='rename study']").click()
        one(chromium, "[role=dialog] input").send_keys("other")
        button(chromium, "Rename").click()
        reads(chromium, "a study keeps its name")


def test_read_only(chromium: Browser, tmp_path: Path, study: Study) -> None:
    with running(study.database, tmp_path / "run", "--read-only", locked=False) as own:
        chromium.open(f"{own.address}/studies/{study.row.study_id}")
        shows_study(chromium)
        assert chromium.js("document.querySelector('#hpo-bar span').innerText") == "read-only"
        assert chromium.complaints() == []
        chromium.open(f"{own.address}/studies/{study.row.study_id}/note")
        save_note(chromium, "no")
        reads(chromium, "Failed: this dashboard is read-only")


def test_the_login_needs_no_script_and_fits_a_phone(tmp_path: Path, study: Study) -> None:
    with (
        running(study.database, tmp_path / "run") as own,
        browser(tmp_path / "profile", "--blink-settings=scriptEnabled=false") as plain,
    ):
        size = {"width": 320, "height": 640, "deviceScaleFactor": 1, "mobile": True}
        plain.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        plain.open(own.address)
        field = one(plain, "input[type=password]")
        assert field.accessible_name == "Password"
        assert field.rect["width"] < 320
        field.send_keys(PASSWORD)
        button(plain, "Log in").click()
        plain.until(lambda: plain.driver.current_url == own.address, "the dashboard")


def test_own_pages_refresh_themselves_and_steer(
    chromium: Browser, tmp_path: Path, study: Study
) -> None:
    with running(study.database, tmp_path / "run") as own:
        chromium.open(f"{own.origin}/hpo")
        log_in(chromium, PASSWORD)
        one(chromium, "a[href='/hpo/studies/toy']").click()
        reads(chromium, "out of memory")
        button(chromium, "Stop").click()
        reads(chromium, "workers save after the current epoch")
        button(chromium, "Resume").click()
        reads(chromium, "Resumed.")
        chromium.js("document.documentElement.dataset.seen = 'yes'")
        studies.extend(study, trials=33)
        reads(chromium, "15 / 33")  # the live part is new, the page is not
        assert chromium.js("document.documentElement.dataset.seen") == "yes"
        one(chromium, "textarea").send_keys("optimizer.lr = 9")
        button(chromium, "Enqueue").click()
        one(chromium, "[role=alert]")
        assert one(chromium, "textarea").get_attribute("value") == "optimizer.lr = 9"
        chromium.open(f"{own.origin}/hpo/studies/toy/report")
        chromium.until(lambda: chromium.js("document.body.dataset.ready") == "true", "figures")
        (complaint,) = chromium.complaints()
        assert "409" in complaint  # of the form that was refused
