"""A study in a database: create, run, follow, steer, export, retrain."""

from __future__ import annotations

import os
import signal
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

from hpo.api.creation import Learning, connect_to, fetch_weights, open_study
from hpo.api.trained import Progress, TrainOptions, as_names, print_line, train
from hpo.errors import InputError, Interrupted
from hpo.paths import Home

if TYPE_CHECKING:
    import pandas

    from hpo.config.study import StudyFile
    from hpo.config.train import TrainConfig
    from hpo.data.report import DataReport
    from hpo.search import study as studies
    from hpo.search.status import StudyStatus
    from hpo.search.study import Limits
    from hpo.search.verification import Verification
    from hpo.storage.database import Database
    from hpo.storage.records import StudyRow, Trial
    from hpo.trained.inference import TrainedModel
    from hpo.workers.spawn import EarlyWorkers
    from hpo.workers.supervisor import Supervisor


@dataclass(frozen=True)
class Study:
    """A study in a database, by its name. Every answer is read from the database when it is asked
    for, so that the work of other processes and hosts is in it.

    `Study.create` makes one or opens the one of that name, `hpo.load_study` opens one by its name.

    >>> import hpo
    >>> study = hpo.Study.create({
    ...     "study": {"name": "tiny", "trials": 2, "sampler": "random"},
    ...     "train": {"epochs": 1, "batch_size": 64, "data": {"dataset": "digits"},
    ...               "model": {"cnn": {"filters": [4]}}},
    ...     "space": {"optimizer.lr": {"low": 0.01, "high": 0.1, "log": True}},
    ... })
    >>> study.run(workers=1, device="cpu")
    train: 1259 images ...
    val: 269 images ...
    test: 269 images ...
    tried first:
      recommended: ...
    tiny: 0/2 trials; 1 worker on cpu; ...
    scheduler promote: no rung below epoch 1, so every trial runs to its end
    [1/2] trial 0 complete  val_top1 ... (epoch 1)  1 epoch ...
    [2/2] trial 1 complete  val_top1 ... (epoch 1)  1 epoch ...
    tiny is finished: best trial ..., val_top1 ... in epoch 1
    >>> [trial.number for trial in study.trials if trial.state == "complete"]
    [0, 1]
    >>> 0.01 <= study.best_trial.params["optimizer.lr"] <= 0.1
    True
    >>> config = study.export("best.toml")
    >>> config.epochs
    1
    >>> model = study.retrain(seeds=1, out="best", device="cpu", progress=None)
    >>> model.classes[:3]
    ('0', '1', '2')
    """

    name: str
    database: Database = field(repr=False)

    @classmethod
    def create(
        cls,
        file: StudyFile | Mapping[str, Any] | str | os.PathLike[str],
        *,
        storage: str | None = None,
        artifacts: str | None = None,
        learn_from: Sequence[str] | str | None = None,
        learn_storage: str | None = None,
        from_study: str | None = None,
    ) -> Study:
        """Create the study of a study file, its path or its tables as a dict; where a study of that
        name and definition exists, open that one. Another one of that name is replaced if nothing
        of it was trained.

        `storage` is a URL, by default HPO_STORAGE or hpo_runs/hpo.db under the working directory;
        `artifacts` a folder or URL where checkpoints and weights also go, by default HPO_ARTIFACTS.
        Every image is decoded first: bad data create nothing. A new study first tries the best
        configurations of the studies `learn_from` (names, or one), by default `study.learn_from` of
        the file, in the database `learn_storage`, by default its own; "auto": of every compatible
        study. A new one with another space takes the finished trials of `from_study`, of the same
        database, over as its own, outside its budget, where it would train them alike.

        Raises ConfigError for a file that is wrong, DataError for data that cannot be used,
        Conflict where a study of that name has another definition, and NotFound or InputError for a
        study from which it cannot learn or take trials over.
        """
        from hpo.config.study import StudyFile

        if isinstance(file, Mapping):
            file = StudyFile.from_dict(file)
        elif not isinstance(file, StudyFile):
            file = StudyFile.load(Path(file))
        study = cls(file.name, connect_to(storage))
        weakref.finalize(study, study.database.dispose)
        artifacts = artifacts or os.environ.get("HPO_ARTIFACTS")
        names = None if learn_from is None else as_names(learn_from)
        learning = Learning("auto" if names == ["auto"] else names, learn_storage, from_study)
        open_study(study.database, file, artifacts, learning)
        return study

    @property
    def file(self) -> StudyFile:
        """The study file, as it is in the database."""
        return self._load().file

    @property
    def row(self) -> StudyRow:
        """Its uuid and its limits, as they are in the database."""
        return self._load().row

    @property
    def trials(self) -> tuple[Trial, ...]:
        """All trials, in the order of their numbers."""
        return self.status().trials

    @property
    def best_trial(self) -> Trial:
        """The best complete trial; raises NotFound where none is complete. Of several metrics by
        the first one; `status().front()` has the Pareto front."""
        from hpo.trained.export import best_trials

        return best_trials(self.status(), 1)[0]

    def status(self) -> StudyStatus:
        """Read everything about the study at this moment: trials, workers, times, the best."""
        from hpo.search.status import read_status

        return read_status(self.database, self.name)

    def trials_dataframe(self) -> pandas.DataFrame:
        """Return the trials as a pandas frame, a row each, with a column for each metric that is
        optimized and each searched parameter (`optimizer.lr`). Times are in seconds.

        Raises InputError, with the command that installs it, where there is no pandas.
        """
        from hpo.extras import install_command

        try:
            import pandas
        except ImportError:
            raise InputError(
                f"trials_dataframe needs pandas: {install_command('pandas')}"
            ) from None
        head, rows = self.status().trial_rows()
        return pandas.DataFrame(rows, columns=head)

    def run(
        self,
        *,
        workers: int | None = None,
        workers_per_device: int | Literal["auto"] = 1,
        device: str | None = None,
        force: bool = False,
        progress: Progress | None = print_line,
    ) -> None:
        """Search: start `workers` processes on this host, and return when the study is over.

        Without `workers`, `workers_per_device` on each visible GPU, else on the CPU, with "auto" as
        many as a probe finds to be fastest (see `devices`); `device` puts
        all of them there ("cpu", "cuda:1", "mps"). Each is a process of its own, `python -m hpo
        worker`, which does not import the calling script. More may join from anywhere. `force`
        works although the code or images here are not those that the study began with. `progress`
        takes plain lines, by default printed; None is silent.

        A study that was stopped goes on. Ctrl-C (in a notebook, the stop button) hands the running
        trials back and raises KeyboardInterrupt, SIGTERM raises Interrupted; calling `run` again
        goes on. Raises HpoError where workers cannot work, with the last one's words.
        """
        from hpo.config.remarks import remarks
        from hpo.reports.progress import PlainView, first_lines, headline
        from hpo.search.promotion import what_decides
        from hpo.workers.process import require_count, require_device

        require_count(workers, workers_per_device)
        require_device(device)
        say = progress or (lambda line: None)
        if self.resume_stopped():
            say(f"study {self.name} was stopped; resuming it")
        if not self.is_over:
            fetch_weights(self.file, say)
            devices = self.devices(workers, workers_per_device, device, say=say)
            supervisor = self.supervisor(devices, force=force)
            report = self.data_report
            for line in report.lines() if report else ():
                say(line)
            status = self.status()
            for line in () if status.finished else first_lines(status.file):
                say(line)
            say(headline(status, self.database.shown, devices))
            say(what_decides(self.file))
            for line in remarks(self.file):
                say(line)
            view = PlainView(self.status, say)
            with interruptible(self.name) as stop:
                supervisor.run(stop, partial(view.follow, stop))
                view.finish()
        say(ending(self.status()))

    def verify(
        self,
        *,
        top: int = 5,
        seeds: int = 3,
        workers: int | None = None,
        device: str | None = None,
        force: bool = False,
        progress: Progress | None = print_line,
    ) -> Verification:
        """Train the `top` best configurations again with `seeds` other seeds each, on the same
        training and validation images, and return how they rank; `export` and `retrain` then take
        the winner. The test set stays closed.

        The trainings are the trials of a study of their own, STUDY.verify: interrupted, the same
        call goes on, a larger `top` or `seeds` adds to it, and workers may join from any host.
        `workers`, `device`, `force` and `progress` as for `run`. Raises NotFound where no trial is
        complete, and InputError for a study that cannot be verified.
        """
        child = self.verification_study(top, seeds, force=force)
        child.run(workers=workers, device=device, force=force, progress=progress)
        found = self.verification()
        assert found is not None
        return found

    def verification_study(self, top: int, seeds: int, *, force: bool = False) -> Study:
        """Create the study that `verify` runs, or add to it; starts no worker. Raises as `verify`
        does."""
        from hpo.search import verification
        from hpo.storage.optuna import quiet_optuna

        with quiet_optuna():
            home = Home.default()
            child = verification.prepare(self.database, self.name, top, seeds, home, force=force)
        return Study(child.row.name, self.database)

    def verification(self) -> Verification | None:
        """Return what `verify` has found so far; None where it was never called."""
        from hpo.search import verification

        return verification.read(self.database, self.name)

    def devices(
        self,
        workers: int | None,
        workers_per_device: int | str,
        device: str | None,
        *,
        say: Progress = print_line,
        stop: threading.Event | None = None,
    ) -> list[str]:
        """Return a device for each worker. With `workers_per_device` "auto" the first configuration
        is trained by 1, 2, 4 and 8 processes at once on the first device, some seconds each; what
        that finds is told to `say`. `stop` ends it early."""
        from hpo.workers.probe import mps_is_running, probe
        from hpo.workers.process import AUTO, first_device, spread

        count = workers_per_device
        if count == AUTO:
            first = first_device(device)
            found = probe(self.database, self.name, first, stop)
            say(found.say(first, mps=mps_is_running()))
            count = found.best
        return spread(workers, int(count), device)

    def supervisor(
        self,
        devices: Sequence[str],
        *,
        force: bool = False,
        early: EarlyWorkers | None = None,
    ) -> Supervisor:
        """Return what keeps a worker alive on each of `devices`, beginning with those that have
        started `early`. Raises InputError where a tracker of the study is not installed and, unless
        `force`, where the code here is not that with which the study began."""
        from hpo.search.fingerprints import require_code
        from hpo.search.trackers import require
        from hpo.workers.process import threads_for
        from hpo.workers.spawn import LocalProcesses, WorkerCommand
        from hpo.workers.supervisor import Supervisor

        study = self._load()
        require(study.file.study.log or ())
        if not force:
            require_code(self.database, study.uuid, study.file)
        directory, threads = study.directory(Home.default()), threads_for(len(devices))
        command = WorkerCommand(self.database, self.name, threads, force)
        spawner = LocalProcesses(command, directory, early)
        stall_timeout_s = study.file.study.stall_timeout_s
        return Supervisor(self.database, study.uuid, directory, spawner, devices, stall_timeout_s)

    @property
    def is_over(self) -> bool:
        """True where the budget is finished, or a stop rule has fired and nothing runs."""
        snapshot = self._load().snapshot()
        return snapshot.finished >= snapshot.trials or (
            snapshot.stop == "rule" and not snapshot.running
        )

    @property
    def data_report(self) -> DataReport | None:
        """What the data were like when the study was created; None where nobody looked then."""
        from hpo.search.fingerprints import read_report

        return read_report(self.database, self.row.uuid)

    def enqueue(self, values: Mapping[str, Any]) -> None:
        """Let the next trial that starts try `values`, by dotted path; the rest is sampled.

        Raises ConfigError for values outside the space, InputError where no trial is left.
        """
        from hpo.search import study as studies

        studies.enqueue(self._load(), values)

    def stop(self) -> None:
        """Let all workers, on every host, hand their trials back and end."""
        from hpo.search import study as studies

        studies.stop(self._load())

    def resume(self) -> None:
        """Lift a stop; starts no worker. Raises InputError where its rule would fire again."""
        from hpo.search import study as studies

        studies.resume(self._load())

    def resume_stopped(self) -> bool:
        """Lift the stop of a user, if there is one; return whether there was."""
        stopped = self.row.stop == "user"
        if stopped:
            self.resume()
        return stopped

    def extend(self, *, retry_failed: bool = False, **limits: Unpack[Limits]) -> int:
        """Raise the limits of the study: its budget of `trials` in all, `max_time` (seconds, or
        "1h30m"), `max_full_trainings`, `timeout_s`, `target` and `patience_trials`; and its
        `epochs`, to which complete trials then go on. Starts no worker. Returns how many failed
        configurations are tried again.

        Raises InputError for a limit that is not larger, where another one would end it at once, or
        where what was trained depends on the number of epochs; Conflict for `epochs` while a worker
        is at a trial.
        """
        from hpo.search import study as studies

        return studies.extend(self._load(), retry_failed=retry_failed, **limits)

    def delete(self, *, force: bool = False, keep_files: bool = False) -> None:
        """Remove the study and, unless `keep_files`, its logs, checkpoints and weights. Raises
        Conflict while a worker holds a trial, unless `force`."""
        from hpo.search import study as studies

        studies.delete(self._load(), Home.default(), force=force, keep_files=keep_files)

    def export(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        trial: int | None = None,
        weights: str | os.PathLike[str] | None = None,
        force: bool = False,
    ) -> TrainConfig:
        """Return the complete configuration of the best trial (after `verify` of its winner), or of
        `trial`; write it to `path` with its provenance, as `hpo.train` takes it, and the trial's
        kept weights to `weights`.

        Raises NotFound where no trial is complete, InputError for one without a result, Conflict
        where a file exists, unless `force`.
        """
        from hpo.trained import export as exports

        config, provenance = exports.export(self.database, self.name, number=trial)
        if weights is not None:
            exports.write_weights(
                self.database, self.name, int(provenance["trial"]), Path(weights), Home.default(),
                force=force,
            )  # fmt: skip
        if path is not None:
            exports.write_export(Path(path), config, provenance, force=force)
        return config

    def retrain(
        self,
        *,
        trial: int | None = None,
        out: str | os.PathLike[str] | None = None,
        **options: Unpack[TrainOptions],
    ) -> TrainedModel:
        """Train the best trial's configuration, after `verify` its winner's, or that of `trial`,
        anew: `hpo.train` of its export, with the same `options`. `out` is by default
        hpo_runs/trained/STUDY."""
        from hpo.trained.export import export

        config, provenance = export(self.database, self.name, number=trial)
        folder = Home.default().trained(self.name) if out is None else out
        return train(config, provenance=provenance, out=folder, **options)

    def report(self, path: str | os.PathLike[str]) -> None:
        """Write the whole search as one HTML page that opens without network."""
        from hpo.reports.page import write_report
        from hpo.reports.study import study_report

        write_report(Path(path), study_report(self.database, self.name))

    def _load(self) -> studies.Study:
        from hpo.search import study as studies

        return studies.load(self.database, self.name)


def load_study(name: str, *, storage: str | None = None) -> Study:
    """Open the study `name` of a database: `storage` is a URL, by default HPO_STORAGE or
    hpo_runs/hpo.db under the working directory. Raises NotFound, naming the nearest studies.

    >>> import hpo
    >>> hpo.load_study("digitz")
    Traceback (most recent call last):
    hpo.errors.NotFound: ...
    """
    study = Study(name, connect_to(storage))
    weakref.finalize(study, study.database.dispose)
    study._load()
    return study


def ending(status: StudyStatus) -> str:
    """Return what became of a study that no longer runs, in a line."""
    from hpo.formatting import number
    from hpo.reports.progress import and_paused, finished_trials

    name, best = status.row.name, status.best
    if status.state != "finished":
        done = f"{finished_trials(status)} are finished{and_paused(status)}"
        return f"{name} is {status.state}: {done}"
    why = f" ({status.row.stop_reason})" if status.row.stop_reason else ""
    if status.file.verifies is not None:  # one of its trials says nothing: seeds count together
        return f"{name} is finished{why}"
    if best is None:
        return f"{name} is finished{why}: {status.no_best}"
    value = f"{status.file.metric} {number(best.value)} in epoch {best.best_epoch}"
    return f"{name} is finished{why}: best trial {best.number}, {value}"


@contextmanager
def interruptible(name: str) -> Iterator[threading.Event]:
    """Yield an event that Ctrl-C and SIGTERM set, and raise KeyboardInterrupt or Interrupted
    afterwards. A second Ctrl-C raises at once. Signals reach the main thread alone: in another one
    nothing is caught."""
    from hpo.workers.process import event_on_signal

    if threading.current_thread() is not threading.main_thread():
        yield threading.Event()
        return
    heard: list[int] = []

    def hear(number: int) -> None:
        heard.append(number)
        if heard[:-1] and number == signal.SIGINT:
            raise KeyboardInterrupt

    with event_on_signal(hear) as stop:
        yield stop
    if heard:
        told = f"the running trials of {name} were handed back; run() goes on with them"
        raise KeyboardInterrupt(told) if signal.SIGINT in heard else Interrupted(told)
