"""Optuna as its tutorials use it: TPE, a median pruner, an SQLite file, several processes."""

from __future__ import annotations

import multiprocessing
import os

import optuna
import torch
from optuna.study import MaxTrialsCallback
from optuna.trial import TrialState

from benchmarks.peers.search import Config, Search, searched
from benchmarks.peers.training import epochs

LOADER_WORKERS = 0
BEGUN = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)


def suggested(trial: optuna.Trial) -> Config:
    config: Config = {
        "optimizer": trial.suggest_categorical("optimizer", ["sgd", "adamw"]),
        "lr": trial.suggest_float("lr", 1e-4, 0.3, log=True),
        "weight_decay": trial.suggest_float("weight_decay", 1e-6, 1e-2, log=True),
        "batch_size": trial.suggest_categorical("batch_size", [32, 64, 128]),
        "flip": trial.suggest_categorical("flip", [False, True]),
        "crop": trial.suggest_categorical("crop", [False, True]),
    }
    if config["optimizer"] == "sgd":
        config["momentum"] = trial.suggest_float("momentum", 0.8, 0.98)
    return config


def opened(search: Search, worker: int = 0) -> optuna.Study:
    return optuna.create_study(
        storage=f"sqlite:///{search.out / 'optuna.db'}",
        study_name="peer",
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=search.seed * search.workers + worker),
        pruner=optuna.pruners.MedianPruner(),
        load_if_exists=True,
    )


def work(search: Search, worker: int) -> None:
    """What one process does, until as many trials as asked for have begun."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // search.workers))

    def objective(trial: optuna.Trial) -> float:
        config = suggested(trial)
        training = epochs(
            search.data,
            config,
            search.epochs,
            seed=search.seed,
            loader_workers=LOADER_WORKERS,
        )
        for epoch, accuracy in enumerate(training, 1):
            search.log(trial.number, epoch, accuracy)
            trial.report(accuracy, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned
        return accuracy

    enough = MaxTrialsCallback(search.trials, states=BEGUN)
    opened(search, worker).optimize(objective, callbacks=[enough])


def run(search: Search) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = opened(search)
    processes = [
        multiprocessing.Process(target=work, args=(search, worker))
        for worker in range(search.workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("a process of the search died")
    best = study.best_trial
    search.won(best.params, best.value or 0.0)


if __name__ == "__main__":
    searched(run)
