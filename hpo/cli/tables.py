"""Studies, trials and runs as tables for the terminal, CSV and JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from textwrap import indent
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table

from hpo.cli.console import FittedTable, Text, as_json, bar, cell, moment, nearby
from hpo.errors import NotFound
from hpo.formatting import Table as Cells
from hpo.formatting import duration, measured, number, plural, plus_minus, setting, sparkline
from hpo.reports.progress import and_paused
from hpo.search.status import StudyStatus, words_of
from hpo.storage.records import Trial

if TYPE_CHECKING:
    from hpo.reports.importance import Importances
    from hpo.search.fingerprints import Code
    from hpo.trained.inference import Prediction, RunEvaluation
    from hpo.trained.run import TrainedRun


STYLES = {
    "complete": "green",
    "pruned": "yellow",
    "failed": "red",
    "diverged": "red",
    "infeasible": "red",
    "running": "cyan",
    "paused": "blue",
    "interrupted": "magenta",
    "waiting": "dim",
    "finished": "green",
    "stopped": "yellow",
}
PLAIN = ("top1", "top5", "loss", "macro_f1")
SCORES = ("precision_at_5", "precision_at_k", *PLAIN)
"""Scores by which networks are compared, for all tasks."""
BAR = 20
"""Width of the bar of a parameter's importance."""


def plain_table(*headers: str, right: Iterable[str] = ()) -> FittedTable:
    """Return a table without lines; columns named in `right` hold numbers."""
    table = FittedTable()
    for header in headers:
        justify = "right" if header in set(right) else "left"
        table.add_column(Text(header), justify=justify, overflow="fold")  # type: ignore[arg-type]
    return table


def cells_table(table: Cells) -> FittedTable:
    """Return a report's table for a terminal."""
    pairs = zip(table.headers, table.kinds, strict=True)
    shown = plain_table(*table.headers, right=[head for head, kind in pairs if kind == "number"])
    for row in table.rows:
        shown.add_row(*(Text(cell.text) for cell in row))
    return shown


def groups_csv(groups: Sequence[Mapping[str, Any]]) -> str:
    """Return trials summarized by a parameter's value (`reports.groups.group_data`), as CSV."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for place, row in enumerate(groups):
        sums = {key: one for key, one in row.items() if isinstance(one, Mapping)}
        flat = {f"{key}_{name}": one[name] for key, one in sums.items() for name in one}
        if place == 0:
            writer.writerow(["value", "complete", "pruned", *flat])
        counts = [row["value"], len(row["complete"]), row["pruned"]]
        writer.writerow([cell(one) for one in [*counts, *flat.values()]])
    return out.getvalue()


def state_text(state: str) -> Text:
    """Return a state in its color."""
    return Text(state, STYLES.get(state, ""))


def studies_table(studies: Sequence[StudyStatus]) -> Table:
    """Return a table of all studies of a database, a line each."""
    numbers = ("trials", "best", "workers")
    table = plain_table("study", "state", "trials", "metric", "best", "workers", "created",
                        right=numbers)  # fmt: skip
    for one in studies:
        best = one.best_so_far
        table.add_row(
            Text(one.row.name),
            state_text(one.state),
            (str(one.finished) if one.budget is None else f"{one.finished}/{one.budget}")
            + and_paused(one),
            Text(one.file.metric),
            number(best.value if best else None) + ("" if one.best or not best else " so far"),
            str(len(one.live_workers)),
            moment(one.row.created),
        )
    return table


def noise_lines(status: StudyStatus) -> str | None:
    """Return how sure the best value is, and what it is to be compared with; None without a best
    trial."""
    from hpo.reports.summary import Kind, summarize, texts

    kinds = (Kind.WON, Kind.AGAINST, Kind.NOISE)
    return None if status.best is None else " ".join(texts(summarize(status), *kinds))


def trials_csv(status: StudyStatus) -> str:
    """Return trials as CSV, numbers in full precision, times in seconds."""
    head, rows = status.trial_rows()
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    writer.writerows([cell(item) for item in row] for row in rows)
    return out.getvalue()


def to_json(data: Any) -> str:
    """Return indented JSON; a number that JSON lacks (a loss that is not finite) becomes null."""
    return as_json(_finite(data))


def _finite(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {str(key): _finite(one) for key, one in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(one) for one in data]
    infinite = isinstance(data, float) and data - data != 0
    return None if infinite else data


def trial_page(status: StudyStatus, trial: Trial, code: Code | None) -> Group:
    """Return everything about a trial: parameters, curve, attempts, why it ended, and the `code`
    with which its study started."""
    shown = number(trial.value)
    epoch = f" (epoch {trial.best_epoch})" if trial.best_epoch else ""
    title = Text.assemble(
        (f"{status.row.name} trial {trial.number}", "bold"),
        "  ",
        state_text(trial.state),
        f"  {status.file.metric} {shown}{epoch}  {duration(trial.seconds)} of training",
    )
    parts: list[RenderableType] = [title]
    if trial.values:
        parts.append(Text("  ".join(f"{k} {measured(k, v)}" for k, v in trial.values.items())))
    parts.append(Text(f"where it comes from: {trial.origin.removeprefix('from ')}"))
    parts += [Text(line) for line in _certainty(status, trial)]
    if place := status.place_of(trial):
        parts.append(Text(f"paused at its rung: {place}"))
    elif trial.reason:
        parts.append(Text(f"why it ended: {trial.reason}"))
    parts += [Text(), parameters_table(trial.params)]
    if trial.epochs:
        parts += [Text(), _curve(status, trial)]
    if trial.attempts:
        parts += [Text(), _attempts(status, trial)]
    if code is not None:
        parts += [Text(), *_code(status, trial, code)]
    return Group(*parts)


def _certainty(status: StudyStatus, trial: Trial) -> Iterator[str]:
    """Yield how sure a trial's value is, how it compares with the best one, and whether its curve
    still rises."""
    best, noise = status.best, status.noise
    if interval := noise.describe(trial):
        yield interval
    if best is not None and trial.state == "complete" and status.ties is not None:
        numbers = [one.number for one in status.ties]
        if trial.number != best.number:
            side = "within" if trial.number in numbers else "beyond"
            yield f"difference from the best, trial {best.number}: {side} noise"
        elif numbers:
            yield f"the best; {plural(len(numbers), 'trial')} within noise of it"
    if noise.still_rises(trial):
        yield f"still {'rising' if noise.maximize else 'falling'} in its last epoch"


def _code(status: StudyStatus, trial: Trial, code: Code) -> Iterator[Text]:
    """Yield the code that computed a trial, and the attempts with other code."""
    yield Text(f"code {code}")
    used = {one.worker: one.k for one in trial.attempts}
    for forced in status.forced:
        if forced.worker in used:
            attempt = f"attempt {used[forced.worker]} was forced: {forced}"
            yield Text(attempt, "yellow")


def sources(status: StudyStatus, trial: Trial, code: Code | None) -> str:
    """Return the user's own modules that a trial names, as the study's first worker had them.
    Raises NotFound if there are none."""
    config = status.file.config(trial.params)
    named = {name.partition(":")[0] for name in (config.loss, config.model.architecture,
                                                 config.data.dataset)}  # fmt: skip
    texts = {one: text for one, text in (code.sources if code else {}).items() if one in named}
    if not texts:
        raise NotFound(
            f"trial {trial.number} of {status.row.name!r} names no module of your own as its loss, "
            "architecture or data set, or none of its workers has started"
        )
    return "".join(f"# {one}\n{text}" for one, text in texts.items())


def _curve(status: StudyStatus, trial: Trial) -> Group:
    target = status.file.metric
    names = list(dict.fromkeys(name for row in trial.epochs for name in row.metrics))
    table = plain_table("epoch", *names, right=("epoch", *names))
    for row in trial.epochs:
        style = "bold" if row.epoch == trial.best_epoch else None
        cells = [_measured(name, row.metrics.get(name)) for name in names]
        table.add_row(str(row.epoch), *cells, style=style)
    curve = sparkline([row.metrics.get(target, float("nan")) for row in trial.epochs])
    return Group(table, Text(f"{target}  {curve}", "cyan"))


def _measured(name: str, measured: float | None) -> str:
    """Format fractions and losses with four decimals, other numbers with four digits."""
    if measured is None or name.startswith(("train_", "val_")):
        return number(measured)
    if name == "images_per_s":
        return f"{measured:,.0f}"
    return setting(float(measured))


def _attempts(status: StudyStatus, trial: Trial) -> Table:
    hosts = {worker.id: worker.host for worker in status.workers}
    table = plain_table("attempt", "worker", "host", "epochs", "time", "outcome", "reason",
                        right=("attempt", "time"))  # fmt: skip
    for one in trial.attempts:
        done = [row.epoch for row in trial.epochs if row.attempt == one.k]
        epochs = "-" if not done else f"{done[0]} to {done[-1]}" if len(done) > 1 else f"{done[0]}"
        table.add_row(
            str(one.k),
            Text(one.worker),
            Text(hosts.get(one.worker, "-")),
            epochs,
            duration(status.end_of(one) - one.started),
            words_of(one),
            Text(one.reason or ""),
        )
    return table


def parameters_table(params: Mapping[str, Any], found: Importances | None = None) -> Table:
    """Return a table of parameters and values. If some importances stand out, it has those of all
    parameters of the study, most important first."""
    shares = found.shares if found and found.outstanding else {}
    table = plain_table("parameter", "value", *(["importance"] * bool(shares)))
    names = [*shares, *(name for name in params if name not in shares)]
    for name in names:
        value = setting(params[name]) if name in params else "-"
        row = [Text(name), Text(value, "bold")]
        if found and shares:
            share, stands_out = shares.get(name), name in found.outstanding
            text = "" if share is None else f"{bar(share, BAR)} {share:4.0%}"
            note = "" if share is None else found.note(name)
            row.append(Text(f"{text}  {note}".rstrip(), "cyan" if stands_out else "dim"))
        table.add_row(*row)
    return table


def counts(status: StudyStatus) -> str:
    """Return `30 trials finished: 18 complete, 11 pruned, 1 failed`."""
    kinds = ("complete", "pruned", "diverged", "infeasible", "failed")
    parts = [f"{found} {kind}" for kind in kinds if (found := status.count(kind))]
    finished = f"{plural(status.finished, 'trial')} finished"
    text = f"{finished}: {', '.join(parts)}" if parts else finished
    return f"{text}; {status.taken_note}" if status.taken_note else text


def runs_table(runs: Sequence[TrainedRun]) -> Table:
    """Return a table of trained runs, a line each: mean ± standard deviation over their seeds."""
    from hpo.trained.run import PARTS

    known = {name for run in runs for name in run.summary[run.measured_part]}
    scores = [name for name in SCORES if name in known]
    table = plain_table("run", "measured on", "seeds", *scores, right=("seeds", *scores))
    for run in runs:
        part = run.measured_part
        found = run.summary[part]
        cells = [_spread(found.get(name)) for name in scores]
        table.add_row(Text(nearby(run.path)), PARTS[part], str(len(run.seeds)), *cells)
    return table


def networks_table(run: TrainedRun) -> Table:
    """Return a table of a run's networks on the same test images, a line each: seeds, ensemble, and
    ONNX files (means over seeds). It is empty for one seed without files."""
    summary = run.summary
    known = {*(summary["test"] or {}), *(name for one in summary["onnx"].values() for name in one)}
    scores = [name for name in PLAIN if name in known]
    columns = (*scores, *(("MB", "ms/image") if summary["onnx"] else ()))
    table = plain_table("network", *columns, right=columns)
    if summary["test"] is not None:
        tested = {one.seed: one.metrics["test"] for one in run.seeds}
        _add_members(table, scores, tested, summary["ensemble"])
    for file, found in summary["onnx"].items():
        cells = [_spread(found.get(name)) for name in scores]
        size, latency = found["bytes"]["mean"] / 1e6, found["latency_ms"]["mean"]
        table.add_row(Text(file), *cells, number(size, 2), number(latency, 2))
    return table


def _add_members(
    table: Table,
    scores: Sequence[str],
    seeds: Mapping[int, Mapping[str, Any]],
    ensemble: Mapping[str, Any] | None,
) -> None:
    """Add a line for each of several seeds, and one for their ensemble, if any."""
    for seed, found in seeds.items() if len(seeds) > 1 else ():
        table.add_row(f"seed {seed}", *(number(found.get(name)) for name in scores))
    if ensemble:
        values = [number(ensemble.get(name)) for name in scores]
        table.add_row(f"ensemble of {len(seeds)}", *values, style="bold")


def _spread(found: Mapping[str, float | None] | None) -> str:
    """Format as `0.9812 ± 0.0021`; a dash if it was not measured."""
    return plus_minus(None, None) if found is None else plus_minus(found["mean"], found["std"])


def run_notes(runs: Sequence[TrainedRun]) -> Iterator[str]:
    """Yield notes on how to read the numbers."""
    from hpo.trained.run import PARTS

    if any(run.summary["test"] is not None for run in runs):
        yield "the test set was opened once per seed, after training"
    if any(len(run.seeds) > 1 for run in runs):
        yield "mean ± standard deviation over seeds (n - 1)"
    if any(run.summary["ensemble"] for run in runs):
        yield "ensemble: mean of the seeds' probabilities, from the same logits"
    if any(run.summary["onnx"] for run in runs):
        yield "ONNX files: onnxruntime on the CPU; ms/image is a median, one image at a time"
    for run in runs:
        for one in run.certainties:
            yield f"{run.path}: {one} ({PARTS[run.measured_part]})"
    for run in runs:
        entries = [entry for one in run.seeds for entry in one.onnx]
        found = [entry["max_difference"] for entry in entries if "max_difference" in entry]
        if found:
            yield (
                f"{nearby(run.path)}: ONNX logits differ from torch's, on the same training "
                f"images, by at most {max(found):.2g}"
            )
    for run in runs:
        yield from (f"{nearby(run.path)}: {note}" for note in run.notes)
        yield f"{nearby(run.path / 'report.html')}: curves, classes, confusion matrix"


def evaluation_page(found: RunEvaluation) -> Group:
    """Return the scores of a run on one set of images, of its seeds and their ensemble, and of each
    class (means over seeds)."""
    seeds = plural(len(found.seeds), "seed")
    title = Text(f"{found.data}: {plural(found.images, 'image')}, {seeds}", "bold")
    scores = plain_table("score", "mean ± std" if len(found.seeds) > 1 else "value",
                         right=("value",))  # fmt: skip
    for name, spread in found.summary.items():
        scores.add_row(name, _spread(spread))
    columns = ("precision", "recall", "f1")
    by_seed = [one["per_class"] for one in found.scores().values()]
    classes = plain_table("class", *columns, "images", right=(*columns, "images"))
    for name in found.classes:
        rows = [per_class[name] for per_class in by_seed]
        means = [number(sum(row[column] for row in rows) / len(rows)) for column in columns]
        classes.add_row(Text(name), *means, f"{rows[0]['support']:,}")
    warning = [Text(one, "yellow") for one in (found.overlap, found.absent) if one]
    parts: list[RenderableType] = [title, *warning, Text(), scores, Text()]
    parts += [Text(str(one)) for one in found.certainties]
    if len(by_seed) > 1:
        names = [name for name in SCORES if name in found.summary]
        members = plain_table("network", *names, right=names)
        _add_members(members, names, found.scores(), found.ensemble)
        parts += [Text(), members]
    return Group(*parts, Text(), classes)


def answers_table(answers: Iterable[Prediction], columns: Sequence[str]) -> Table:
    """Return a table with a line per class or neighbour of each image, the first one in bold."""
    table = plain_table("image", *columns, "note", right=(columns[-1],))
    for one in answers:
        image, empty = str(one.path), [""] * len(columns)
        if one.error is not None:
            table.add_row(Text(image), *empty, Text(one.error, "red"))
        for place, (*names, value) in enumerate(one.rows):
            note = _seen(one) if place == 0 else ""
            table.add_row(
                Text(image if place == 0 else ""),
                *(Text(name) for name in names),
                number(value),
                Text(note, "yellow"),
                style="bold" if place == 0 else None,
            )
    return table


def _seen(answer: Prediction) -> str:
    """Return what the run did with an image, if anything."""
    if answer.trained_on:
        return "trained on"
    return "validated on" if answer.validated_on else ""


def answers_json(answers: Iterable[Prediction]) -> Iterator[str]:
    """Yield a JSON list, entry by entry as they come."""
    before = "["
    for one in answers:
        yield f"{before}\n{indent(to_json(one.to_dict()), '  ')}"
        before = ","
    yield "\n]\n"


def answers_csv(answers: Iterable[Prediction], columns: Sequence[str], shown: int) -> Iterator[str]:
    """Yield CSV lines with a group of `columns` for each of the `shown` classes or neighbours."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    numbered = [f"{name}{place or ''}" for place in (0, *range(2, shown + 1)) for name in columns]
    writer.writerow(["file", *numbered, "error", "trained_on", "validated_on"])
    yield text.getvalue()
    for one in answers:
        text.seek(0)
        text.truncate()
        values = [value for entry in one.rows for value in entry]
        values += [None] * (len(numbered) - len(values))
        row = [str(one.path), *values, one.error, one.trained_on, one.validated_on]
        writer.writerow([cell(value) for value in row])
        yield text.getvalue()
