"""The pictures of the front page, from a real run; `python docs/tools/pictures.py` draws them anew.

Needs Chromium for the report, and as long as the search on scikit-learn's digits: a minute or two.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.terminal_theme import DIMMED_MONOKAI

from hpo.cli.live import Screen
from hpo.errors import NotFound
from hpo.search.status import StudyStatus, read_status
from hpo.storage.database import connect

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "docs" / "pictures"
HPO = (sys.executable, "-m", "hpo")
WIDTH, HEIGHT = 1100, 1075
"""Pixels of the report's picture."""
COLUMNS, LINES = 100, 30
POLL_S = 0.2
PROMPT = "$ hpo run studies/digits.toml --workers 2"


def main() -> None:
    """Search, and draw what was seen."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        os.environ["HPO_HOME"] = str(home)
        os.environ.pop("HPO_STORAGE", None)
        command = (*HPO, "run", "studies/digits.toml", "--workers", "2", "--plain")
        with subprocess.Popen(command, cwd=ROOT) as search:
            _watch(home, search)
        page = home / "report.html"
        subprocess.run((*HPO, "report", "digits", "-o", str(page)), cwd=ROOT, check=True)
        _photograph(page, PICTURES / "report.png")


def _watch(home: Path, search: subprocess.Popen[bytes]) -> None:
    """Draw the live view of `search` while both workers train, the latest of half its trials."""
    while not (home / "hpo.db").exists() and search.poll() is None:
        time.sleep(POLL_S)
    database = connect(f"sqlite:///{home / 'hpo.db'}")
    while search.poll() is None:
        time.sleep(POLL_S)
        with contextlib.suppress(NotFound):
            if _is_typical(status := read_status(database, "digits")):
                _draw(status, PICTURES / "live.svg")
    database.dispose()


def _is_typical(status: StudyStatus) -> bool:
    """Tell whether it is in its second half, with a bar for each worker."""
    training = [worker for worker in status.live_workers if worker.value is not None]
    return len(training) == 2 and 0.5 < status.done < 0.85 and status.eta_s is not None


def _draw(status: StudyStatus, path: Path) -> None:
    console = Console(record=True, width=COLUMNS, height=LINES, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    console.print(PROMPT, style="bold", highlight=False)
    console.print()
    console.print(Screen(status, clock=lambda: 0.0, read=0.0))
    console.print()
    svg = console.export_svg(title="hpo", theme=DIMMED_MONOKAI, unique_id="live")
    # A page must load nothing from elsewhere: any monospaced font will do.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    path.write_text(svg.replace("Fira Code, monospace", "monospace"), encoding="utf-8")


def _photograph(page: Path, path: Path) -> None:
    """Take a picture of the beginning of `page`, in 128 colours."""
    subprocess.run(
        ("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
         f"--window-size={WIDTH},{HEIGHT}", "--virtual-time-budget=8000",
         f"--screenshot={path}", page.as_uri()),
        check=True,
    )  # fmt: skip
    with Image.open(path) as image:
        image.convert("RGB").quantize(128).save(path, optimize=True)


if __name__ == "__main__":
    main()
