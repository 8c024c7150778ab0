"""Ray Tune as PyTorch's tutorial uses it: ASHA, a trial for each processor; random or by Optuna."""

from __future__ import annotations

import os
import secrets
import sys

# Read when ray is imported. A token, since some of its servers listen on all addresses.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import BasicVariantGenerator, Searcher
from ray.tune.search.optuna import OptunaSearch

from benchmarks.peers.search import Config, Search, searched
from benchmarks.peers.training import epochs

LOADER_WORKERS = 0
OBJECT_STORE_BYTES = 100_000_000
LOOPBACK = "127.0.0.2"
"""For 127.0.0.1 Ray takes the machine's outer address."""
SPACE = {
    "optimizer": tune.choice(["sgd", "adamw"]),
    "lr": tune.loguniform(1e-4, 0.3),
    "weight_decay": tune.loguniform(1e-6, 1e-2),
    "momentum": tune.uniform(0.8, 0.98),
    "batch_size": tune.choice([32, 64, 128]),
    "flip": tune.choice([False, True]),
    "crop": tune.choice([False, True]),
}


def trainable(config: Config, search: Search) -> None:
    trial = tune.get_context().get_trial_id()
    training = epochs(
        search.data,
        config,
        search.epochs,
        seed=search.seed,
        loader_workers=LOADER_WORKERS,
    )
    for epoch, accuracy in enumerate(training, 1):
        search.log(trial, epoch, accuracy)
        tune.report({"accuracy": accuracy})


def run(search: Search, algorithm: Searcher | BasicVariantGenerator) -> None:
    """Search on a cluster of this machine alone."""
    ray.init(
        address="local",
        num_cpus=search.workers,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        _node_ip_address=LOOPBACK,
        log_to_driver=False,
    )
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(trainable, search=search), {"cpu": 1}),
        param_space=SPACE,
        tune_config=tune.TuneConfig(
            metric="accuracy",
            mode="max",
            num_samples=search.trials,
            scheduler=ASHAScheduler(max_t=search.epochs, grace_period=1, reduction_factor=2),
            search_alg=algorithm,
        ),
        run_config=tune.RunConfig(storage_path=str(search.out / "ray"), verbose=0),
    )
    best = tuner.fit().get_best_result()
    search.won(best.config or {}, (best.metrics or {})["accuracy"])
    ray.shutdown()


def run_random(search: Search) -> None:
    run(search, BasicVariantGenerator(random_state=search.seed))


def run_optuna(search: Search) -> None:
    run(search, OptunaSearch(seed=search.seed))


if __name__ == "__main__":
    algorithm = sys.argv.pop(1)
    searched({"random": run_random, "optuna": run_optuna}[algorithm])
