"""A real Chromium without a window, driven by its own chromedriver; nothing is downloaded."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

T = TypeVar("T")

DEADLINE_S = 120
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")
DRIVERS = ("chromedriver", "chromium.chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
OFFLINE = ("--host-resolver-rules=MAP * ~NOTFOUND",)


def _found(names: Sequence[str]) -> str | None:
    return next((path for name in names if (path := shutil.which(name))), None)


def missing() -> str:
    """What these tests need and this machine lacks; empty if nothing."""
    needed = {"chromium": CHROMIUMS, "chromedriver": DRIVERS}
    return " and ".join(name for name, names in needed.items() if _found(names) is None)


class Browser:
    """One page at a time, with all that it asked for and complained about."""

    def __init__(self, driver: Chrome) -> None:
        self.driver = driver

    def open(self, address: str) -> None:
        self.driver.get(address)

    def js(self, script: str, *arguments: Any) -> Any:
        """The value of the expression `script`."""
        return self.driver.execute_script(f"return {script}", *arguments)

    def until(self, look: Callable[[], T], what: str) -> T:
        """What `look` gives once it is true; fails after DEADLINE_S saying `what` did not come."""
        wait = WebDriverWait(self.driver, DEADLINE_S, poll_frequency=0.1)
        found: T = wait.until(lambda _: look(), message=f"{what} did not come")
        return found

    def requests(self) -> list[str]:
        """Addresses that the page loaded besides itself."""
        found: list[str] = self.js("performance.getEntriesByType('resource').map(e => e.name)")
        return found

    def complaints(self) -> list[str]:
        """Errors and warnings of the console since the last call."""
        return [
            entry["message"]
            for entry in self.driver.get_log("browser")  # type: ignore[no-untyped-call]
            if entry["level"] in ("SEVERE", "WARNING")
        ]


@contextmanager
def browser(profile: Path, *flags: str, size: tuple[int, int] = (1280, 900)) -> Iterator[Browser]:
    """A browser with an empty profile in `profile`, ended at the end."""
    options = ChromeOptions()
    options.binary_location = _found(CHROMIUMS) or ""
    for flag in (*FLAGS, *flags, f"--user-data-dir={profile}", "--window-size={},{}".format(*size)):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options=options, service=Service(_found(DRIVERS)))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
