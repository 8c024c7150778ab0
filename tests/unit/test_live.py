"""What the live view draws, at several widths, from fixed data."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from hpo.cli.console import bar, cell
from hpo.cli.live import NARROW, LiveView, Screen, opened, worker_name
from hpo.cli.tables import trials_csv
from hpo.errors import StorageUnavailable
from hpo.formatting import sparkline
from hpo.reports.progress import PlainView, View, headline
from hpo.search.status import StudyStatus
from hpo.storage.records import Attempt, Epoch, Outcome, StudyRow, Trial, WorkerRow
from tests.harness.fakes import study_file

WIDTHS = (60, 100, 140)


def trial(number: int, state: str, values: list[float], reason: str | None = None) -> Trial:
    """A trial that began at 10 x its number seconds and took 10."""
    live = state == "running"
    epochs = tuple(
        Epoch(i, 1, 0.0, {"val_top1": value, "seconds": 2.0}, 1)
        for i, value in enumerate(values, 1)
    )
    attempt = Attempt(
        number=number, k=1, worker="w1", started=10.0 * number,
        ended=None if live else 10.0 * number + 10, outcome=None if live else Outcome(state),
        reason=reason, value=None, first_epoch=1, epoch=len(values), runtime=None, live=live,
    )  # fmt: skip
    best = max(values, default=None)
    where = values.index(best) + 1 if best is not None else None
    params = {"optimizer.lr": 0.003 * (number + 1)}
    return Trial(number, state, params, best, where, epochs, (attempt,), reason)


def worker(name: str, number: int | None = 3, host: str = "box", value: float = 0.91) -> WorkerRow:
    return WorkerRow(
        id=name, host=host, pid=1, device="cuda:1", versions={}, started=0.0, seen=40.0,
        ended=None, reason=None, number=number, epoch=3, epochs=15, value=value,
        images_per_s=12345.6,
    )  # fmt: skip


TRIALS = (
    trial(0, "complete", [0.5, 0.9, 0.8]),
    trial(1, "pruned", [0.4], "median pruned it after epoch 1"),
    trial(2, "failed", [], "the images ran out"),
    trial(3, "running", [0.7, 0.91]),
)


def status(
    trials: tuple[Trial, ...] = TRIALS,
    workers: tuple[WorkerRow, ...] = (worker("w1"), worker("w2", None)),
    **changes: object,
) -> StudyStatus:
    file = study_file(trials=6, name="flowers")
    row = StudyRow(
        uuid="u", study_id=1, name="flowers", definition={}, source="", created=0.0, trials=6,
        timeout_s=None, target=None, patience_trials=None, lease_s=30.0, stop=None,
        stop_reason=None,
    )  # fmt: skip
    return StudyStatus(replace(row, **changes), file, 40.0, trials, workers, workers)


def drawn(item: object, width: int = 100) -> list[str]:
    """The lines that `item` makes on a terminal of `width` columns."""
    out = Console(file=io.StringIO(), width=width, height=25, force_terminal=True,
                  color_system=None, legacy_windows=False)  # fmt: skip
    out.print(item)
    assert isinstance(out.file, io.StringIO)
    return [line.rstrip() for line in out.file.getvalue().splitlines()]


@pytest.mark.parametrize("width", WIDTHS)
def test_a_screen_fits_and_says_all(width: int) -> None:
    lines = drawn(Screen(status()), width)
    text = "\n".join(lines)
    assert max(map(len, lines)) <= min(width, 100)
    for part in ("flowers", "3/6 trials", "1 complete", "1 pruned", "1 failed", "1 running",
                 "best val_top1 0.9000 (trial 0)", "elapsed 40 s", "left", "cuda:1", "3/15",
                 "0.9100", "12,346", "waits for a trial", "with lr 0.003",
                 "trial 1 pruned  val_top1 0.4000  1 epoch: median"):  # fmt: skip
        assert part in text, part
    assert len(lines) == 12, text


@pytest.mark.parametrize("width", WIDTHS)
def test_each_worker_shows_its_phase(width: int) -> None:
    prepares = replace(worker("w1"), epochs=None, reason="decoding 120/398")
    trains = replace(worker("w2"), reason="step 12/31")
    screen = Screen(status(workers=(prepares, trains)), loading=["cpu"])
    text = "\n".join(drawn(screen, width))
    assert "decoding 120/398" in text
    assert ("step 12/31" in text) == (width >= NARROW)
    assert "loading torch" in text


def test_while_workers_start_the_study_is_not_said_to_wait() -> None:
    text = "\n".join(drawn(Screen(status((), ()), loading=["cpu", "cpu"])))
    assert text.count("loading torch") == 2
    assert "waiting" not in text


def test_the_best_value_rises_from_trial_to_trial() -> None:
    rising = tuple(trial(i, "complete", [value]) for i, value in enumerate((0.5, 0.4, 0.9)))
    assert "▁▁█  0.5000 to 0.9000 over 3 trials" in drawn(Screen(status(rising)))


@pytest.mark.parametrize("width", WIDTHS)
def test_long_names_are_cut_not_wrapped(width: int) -> None:
    far = tuple(worker(f"w{i}", host="a-machine-with-a-name-" + "x" * 40 + str(i)) for i in (1, 2))
    lines = drawn(Screen(status(workers=far)), width)
    assert max(map(len, lines)) <= width
    assert len(lines) == 12


def test_hosts_are_shown_where_there_are_several() -> None:
    two = (worker("w1", host="alpha"), worker("w2", host="beta"))
    assert "alpha:cuda:1" in "\n".join(drawn(Screen(status(workers=two))))
    assert "box" not in "\n".join(drawn(Screen(status())))


def test_many_workers_are_counted() -> None:
    many = tuple(worker(f"w{i}") for i in range(30))
    lines = drawn(Screen(status(workers=many)))
    assert "and 20 more" in lines  # of 25 lines, 15 are for the rest
    assert len(lines) <= 25


def test_an_empty_study_says_so() -> None:
    text = "\n".join(drawn(Screen(status(trials=(), workers=()))))
    assert "0/6 trials" in text
    assert "no worker has started yet" in text
    assert "best" not in text


def test_a_finished_study_has_no_worker_lines() -> None:
    text = "\n".join(drawn(Screen(status(stop="rule", trials=TRIALS[:3]))))
    assert "finished" in text
    assert "cuda:1" not in text


def test_time_goes_on_between_two_readings() -> None:
    text = "\n".join(drawn(Screen(status(), read=100.0, clock=lambda: 105.0)))
    assert "elapsed 45 s" in text


class Readings:
    """Statuses in turn, and a clock that the test moves."""

    def __init__(self, *found: StudyStatus | StorageUnavailable, cost_s: float = 0.0) -> None:
        self.found, self.cost_s = list(found), cost_s
        self.now, self.count = 0.0, 0

    def read(self) -> StudyStatus:
        self.now += self.cost_s
        self.count += 1
        found = self.found[min(self.count, len(self.found)) - 1]
        if isinstance(found, StorageUnavailable):
            raise found
        return found

    def clock(self) -> float:
        return self.now


def plain_console() -> Console:
    return Console(file=io.StringIO(), width=200)


def test_the_database_is_read_once_a_second_at_most() -> None:
    readings = Readings(status())
    view = View(readings.read, print, readings.clock)
    for tenth in range(30):
        readings.now = tenth / 10
        view.tick()
    assert readings.count == 3  # at 0, 1 and 2 s


def test_slow_readings_become_rare() -> None:
    readings = Readings(status(), cost_s=2.0)
    view = View(readings.read, print, readings.clock)
    readings.now = 10.0
    view.tick()
    readings.now += 19.0
    view.tick()
    assert readings.count == 2
    readings.now += 2.0
    view.tick()
    assert readings.count == 3


def test_plain_lines_tell_each_trial_once() -> None:
    readings = Readings(status(TRIALS[:1]), status(), status())
    lines: list[str] = []
    view = PlainView(readings.read, lines.append, readings.clock)
    view.finish()
    view.finish()
    assert lines == [
        "[2/6] trial 1 pruned  val_top1 0.4000 (epoch 1)  1 epoch  2.0 s: "
        "median pruned it after epoch 1",
        "[3/6] trial 2 failed: the images ran out",
    ]


def test_a_live_view_shows_what_was_read_last() -> None:
    readings = Readings(status(TRIALS[:1]), status())
    view = LiveView(plain_console(), readings.read, readings.clock)
    view.say("stopping")
    view.finish()
    assert "3/6 trials" in "\n".join(drawn(view.screen))
    assert "stopping" in drawn(view.screen)


AWAY = StorageUnavailable("db: connection refused")


def test_a_live_view_says_that_the_database_is_unavailable_and_shows_what_it_had() -> None:
    readings = Readings(status(), AWAY, AWAY, status())
    view = LiveView(plain_console(), readings.read, readings.clock)
    for away in (True, True, False):
        view.finish()
        text = "\n".join(drawn(view.screen, 200))
        assert "3/6 trials" in text
        assert ("database unavailable" in text) is away
        assert ("connection refused" in text) is away


def test_plain_lines_tell_an_outage_once() -> None:
    readings = Readings(status(TRIALS[:1]), AWAY, AWAY, status(TRIALS[:2]))
    lines: list[str] = []
    view = PlainView(readings.read, lines.append, readings.clock)
    for _ in range(3):
        view.finish()
    away, back, trial = lines
    assert away.startswith("database unavailable")
    assert back == "database available again"
    assert trial.startswith("[2/6] trial 1 pruned")


def test_plain_lines_tell_how_the_first_trial_of_a_worker_begins() -> None:
    def at(now: float, reason: str | None, value: float | None = None) -> StudyStatus:
        at_work = replace(worker("w1"), reason=reason, value=value)
        return status((), (at_work,))

    phases = ["decoding 1/9", "decoding 5/9", "decoding 8/9", "step 2/9", None, "step 3/9"]
    readings = Readings(*(at(0, one, 0.5 if one is None else None) for one in ["", *phases]))
    lines: list[str] = []
    view = PlainView(readings.read, lines.append, readings.clock)
    for now in (1, 2, 12, 13, 14, 15):
        readings.now = now
        view.finish()
    said = ("decoding 1/9", "decoding 8/9", "step 2/9")
    assert lines == [f"w1: trial 3: {one}" for one in said]


def test_the_headline_of_a_log() -> None:
    line = headline(status(), "sqlite:///x.db", ["cpu", "cpu"])
    assert line == "flowers: 3/6 trials; 2 workers on cpu; sqlite:///x.db"


def test_names_with_markup_are_shown_as_they_are() -> None:
    odd = status((trial(0, "failed", [], "no [bold]class[/bold] [/x]"),))
    readings = Readings(status(()), odd)
    out = plain_console()
    with opened(out, readings.read, plain=True) as view:
        view.finish()
    assert isinstance(out.file, io.StringIO)
    assert "no [bold]class[/bold] [/x]" in out.file.getvalue()


def test_a_terminal_that_cannot_be_drawn_on_gets_lines() -> None:
    out = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    with opened(out, Readings(status(())).read) as view:
        assert isinstance(view, PlainView)


def test_csv_is_safe_for_spreadsheets_and_exact() -> None:
    odd = trial(0, "failed", [0.1 + 0.2], '=HYPERLINK("http://x")')
    head, row = trials_csv(status((odd,))).splitlines()
    assert head.startswith("number,state,val_top1,best_epoch,epochs,seconds,attempts,reason")
    assert row == (
        '0,failed,0.30000000000000004,1,1,2.0,1,"\'=HYPERLINK(""http://x"")",sampled,0.003'
    )  # fmt: skip


@pytest.mark.parametrize(
    ("item", "shown"),
    [("=1", "'=1"), ("+x", "'+x"), ("-x", "'-x"), ("@x", "'@x"), ("\tx", "'\tx"), ("a=1", "a=1"),
     (-1.5, "-1.5"), (True, "true"), (None, ""), ([1, "=2"], '[1, "=2"]')],
)  # fmt: skip
def test_cells(item: object, shown: str) -> None:
    assert cell(item) == shown


def test_workers_of_one_device_are_told_apart() -> None:
    first, second = (worker(f"box-{end}") for end in "ab")
    assert worker_name(first, [first, second], with_host=False) == "cuda:1 a"
    assert worker_name(second, [first, second], with_host=True) == "box:cuda:1 b"
    assert worker_name(first, [first], with_host=False) == "cuda:1"


def test_sparklines() -> None:
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([float("nan"), 1.0, 2.0]) == "·▁█"


def test_bars() -> None:
    assert bar(0.5, 4) == "██  "
    assert bar(1 / 32, 4) == "▏   "
    assert bar(2.0, 4) == "████"
