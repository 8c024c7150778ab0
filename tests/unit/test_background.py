"""`hpo run` on a terminal: q leaves it running in the background, Ctrl-C ends it."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpo.search.status import StudyStatus, read_status
from hpo.storage.database import connect

pytestmark = [pytest.mark.process, pytest.mark.slow]
WAIT_S = 240.0
STUDY = """
[study]
name = "small"
trials = 3
sampler = "random"
[train]
epochs = 60
data.dataset = "digits"
model = {architecture = "small_cnn", cnn.filters = [16, 16]}
[space]
optimizer.lr = [0.01, 0.02]
"""


class OnTerminal:
    """`hpo run` as the foreground job of a terminal of its own."""

    def __init__(self, folder: Path) -> None:
        (folder / "small.toml").write_text(STUDY)
        self.url = f"sqlite:///{folder}/runs/hpo.db"
        self.fd, inner = pty.openpty()
        environment = {
            **os.environ, "HPO_HOME": str(folder / "runs"), "HPO_STORAGE": self.url,
            "TERM": "xterm", "COLUMNS": "100", "LINES": "30",
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hpo", "run", "small.toml", "--workers", "1"],
            cwd=folder,
            env=environment,
            stdin=inner,
            stdout=inner,
            stderr=inner,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(inner)
        self.shown = ""

    def read_until(self, text: str) -> None:
        """Read what is shown until `text` is; fail where it ends or takes too long."""
        deadline = time.monotonic() + WAIT_S
        while text not in self.shown:
            assert time.monotonic() < deadline, self.shown
            if select.select([self.fd], [], [], 0.2)[0]:
                self.shown += os.read(self.fd, 65536).decode(errors="replace")

    def end(self) -> int:
        """Read the rest and return the exit code."""
        deadline = time.monotonic() + WAIT_S
        while self.process.poll() is None and time.monotonic() < deadline:
            if select.select([self.fd], [], [], 0.2)[0]:
                try:
                    self.shown += os.read(self.fd, 65536).decode(errors="replace")
                except OSError:  # nobody has the terminal open any more
                    break
        return self.process.wait(WAIT_S)

    def status(self) -> StudyStatus:
        database = connect(self.url)
        try:
            return read_status(database, "small")
        finally:
            database.dispose()


@pytest.fixture
def search(tmp_path: Path) -> Iterator[OnTerminal]:
    started = OnTerminal(tmp_path)
    yield started
    started.process.kill()
    os.close(started.fd)


def test_q_leaves_it_running_and_nothing_is_lost(search: OnTerminal) -> None:
    search.read_until("/60")
    before = [worker.id for worker in search.status().live_workers]
    mode = termios.tcgetattr(search.fd)
    mode[3] |= termios.ICANON
    termios.tcsetattr(search.fd, termios.TCSANOW, mode)  # as a shell does after Ctrl-Z and fg
    deadline = time.monotonic() + WAIT_S
    while termios.tcgetattr(search.fd)[3] & termios.ICANON:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.write(search.fd, b"q")
    assert search.end() == 1  # `hpo run x && hpo export x` has nothing to export yet
    assert "small goes on in the background" in search.shown
    deadline = time.monotonic() + WAIT_S
    while (now := search.status()).state != "finished" and time.monotonic() < deadline:
        time.sleep(0.5)
    assert [worker.id for worker in now.workers] == before
    ends = {attempt.outcome for trial in now.trials for attempt in trial.attempts}
    assert ends <= {"complete", "paused", "pruned"}  # neither lost nor handed back


def test_ctrl_c_hands_back(search: OnTerminal) -> None:
    search.read_until("/60")
    os.write(search.fd, b"\x03")
    assert search.end() == 130
    assert "To resume:" in search.shown
    assert not search.status().live_workers
