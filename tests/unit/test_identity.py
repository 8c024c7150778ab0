"""Whether a worker of an earlier run is gone: only where that is certain."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hpo.workers import process as identity
from hpo.workers.process import is_gone

ME = identity.process_identity()
pytestmark = pytest.mark.skipif(not ME, reason="this system does not tell processes apart")


def of_a_child(code: str) -> tuple[subprocess.Popen[str], str]:
    me = "from hpo.workers.process import process_identity\nprint(process_identity(), flush=True)"
    script = f"{me}\n{code}"
    child = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    return child, child.stdout.readline().strip()


def test_a_process_is_gone_when_it_has_ended_reaped_or_not() -> None:
    child, found = of_a_child("input()")
    assert not is_gone(found)
    assert child.stdin is not None
    child.kill()
    while not is_gone(found):  # a zombie until it is waited for
        assert child.returncode is None
    child.communicate()
    assert is_gone(found)


BOOT, NAMESPACE, USER, PROCESS, STARTED = range(5)


@pytest.mark.parametrize(
    ("field", "gone"),
    [
        (None, False),
        (BOOT, False),  # the machine was restarted, or is another one: it may live there
        (NAMESPACE, False),  # another container
        (USER, False),  # whose processes we may not be shown
        (PROCESS, True),  # there is none of that id
        (STARTED, True),  # the id was given out again
    ],
)
def test_certain_or_not(field: int | None, gone: bool) -> None:
    fields = ME.split()
    if field is not None:
        fields[field] = "99999999"
    assert is_gone(" ".join(fields)) is gone


@pytest.mark.parametrize("process", ["", "nonsense"])
def test_who_did_not_say_is_not_gone(process: str) -> None:
    assert not is_gone(process)
