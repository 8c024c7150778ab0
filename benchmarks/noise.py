"""How often intervals hold the truth, and how often noise is told as an effect.

    python -m benchmarks.noise [--part intervals|ties|importance] [--studies 400] [--jobs 2]

- *intervals*: how often Wilson's interval holds the true accuracy, of one network (exactly, from
  the binomial distribution), and of the best of several equal ones, picked by that very value.
- *ties*: how often the trials "within noise of the best" hold the trial that is truly best, and how
  often a baseline that is as good as all others is said to be beaten beyond noise. Networks err on
  the same images: the difficulty of one is drawn from a normal distribution of `spread`, a network
  names it with probability logistic(skill - difficulty); at 0 all errors are independent.
- *importance*: in how many studies whose values do not depend on the parameters some parameter
  "stands out from chance", for spaces of several shapes and the product's own samplers.

Rates have 95 % intervals of the number of studies or rounds.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
from collections.abc import Sequence
from functools import partial

import numpy as np
import optuna
from optuna.storages import InMemoryStorage
from scipy.stats import binom

from benchmarks.host import machine, versions
from hpo.config.study import StudyFile, parse_study
from hpo.intervals import wilson
from hpo.reports.importance import importances_of
from hpo.search.noise import Noise
from hpo.search.sampling import make_sampler
from hpo.storage.records import Trial

IMAGES = (50, 153, 269, 1_000, 5_000)
SHARES = (0.5, 0.6, 0.8, 0.9, 0.95, 0.98, 0.995)
ROUNDS = 2_000

SPACES = {
    "three numbers": """
optimizer.lr = {low = 1e-4, high = 0.3, log = true}
optimizer.weight_decay = {low = 1e-6, high = 1e-2, log = true}
model.dropout = {low = 0.0, high = 0.5}
""",
    "five choices": """
optimizer.name = ["sgd", "adamw"]
batch_size = [16, 32, 64, 128]
model.cnn.filters = [[16, 32], [32, 64], [32, 64, 128]]
augment.crop_padding = [0, 1, 2]
schedule.name = ["cosine", "constant"]
""",
    "mixed, with a condition": """
optimizer.name = ["sgd", "adamw"]
optimizer.lr = {low = 1e-4, high = 0.3, log = true}
optimizer.momentum = {low = 0.8, high = 0.98, when = {"optimizer.name" = "sgd"}}
batch_size = [32, 64, 128]
model.dropout = {low = 0.0, high = 0.5, step = 0.1}
""",
    "ten of all kinds": """
optimizer.name = ["sgd", "adamw"]
optimizer.lr = {low = 1e-4, high = 0.3, log = true}
optimizer.momentum = {low = 0.8, high = 0.98, when = {"optimizer.name" = "sgd"}}
optimizer.weight_decay = {low = 1e-6, high = 1e-2, log = true}
batch_size = {low = 16, high = 128, step = 16}
model.cnn.filters = [[16, 32], [32, 64], [32, 64, 128]]
model.dropout = {low = 0.0, high = 0.5, step = 0.1}
augment.crop_padding = [0, 1]
augment.rotation = {low = 0.0, high = 20.0}
label_smoothing = {low = 0.0, high = 0.2}
""",
}
ARMS = (("random", 30), ("tpe", 30))
"""Samplers and numbers of trials."""


def coverage(share: float, images: int) -> float:
    """Return the probability that Wilson's interval holds `share`."""
    hits = np.arange(images + 1)
    held = [(one := wilson(k / images, images)).low <= share <= one.high for k in hits]
    return float(binom.pmf(hits, images, share)[held].sum())


def answers(
    draw: np.random.Generator, skills: Sequence[float], images: int, spread: float
) -> np.ndarray:
    """Return the accuracies (networks,) of networks of `skills` on the same random images."""
    difficulty = spread * draw.standard_normal(images)
    right = 1 / (1 + np.exp(difficulty[None, :] - np.asarray(skills)[:, None]))
    return (draw.random(right.shape) < right).mean(axis=1)


def truth(skill: float, spread: float) -> float:
    """Return the accuracy of a network of `skill` on all images."""
    points, weights = np.polynomial.hermite_e.hermegauss(81)
    right = 1 / (1 + np.exp(spread * points - skill))
    return float((weights * right).sum() / weights.sum())


def trial(number: int, value: float) -> Trial:
    """Return a complete trial with a value alone."""
    return Trial(number, "complete", {}, float(value), None, (), (), None)


def tie_set(values: np.ndarray, images: int) -> set[int]:
    """Return the best of `values` and the trials that tie with it, as the product has them."""
    trials = [trial(number, value) for number, value in enumerate(values)]
    best = max(trials, key=lambda one: one.value or 0.0)
    ties = Noise("val_top1", True, {"all": images}).ties(best, trials)
    return {best.number, *(one.number for one in ties or ())}


def rate(hits: int, rounds: int) -> str:
    """Return `4.2 % [2.6, 6.7]`."""
    found = wilson(hits / rounds, rounds)
    return f"{hits / rounds:.1%} [{found.low * 100:.1f}, {found.high * 100:.1f}]"


def intervals() -> None:
    """Print how often Wilson's intervals hold the truth."""
    print(f"| validation images | held, true accuracy {SHARES[0]} to {SHARES[-1]} | mean |")
    print("|---|---|---|")
    for images in IMAGES:
        found = [coverage(share, images) for share in SHARES]
        print(f"| {images:,} | {min(found):.1%} to {max(found):.1%} | {np.mean(found):.1%} |")
    print("\n| best of so many equal trials | errors independent | errors alike (spread 3) |")
    print("|---|---|---|")
    for count in (1, 3, 10, 30, 100):
        cells = [rate(_best_held(count, 269, spread), ROUNDS) for spread in (0.0, 3.0)]
        print(f"| {count} | {' | '.join(cells)} |")


def _best_held(count: int, images: int, spread: float) -> int:
    """Count the rounds in which the interval of the best of `count` equal trials holds."""
    draw, skill = np.random.default_rng(count), 3.0
    share, held = truth(skill, spread), 0
    for _ in range(ROUNDS):
        found = wilson(float(answers(draw, [skill] * count, images, spread).max()), images)
        held += found.low <= share <= found.high
    return held


def ties() -> None:
    """Print how often the trials within noise hold the truly best one, and of how many they are."""
    print("| trials | images | spread | hold the best | of how many | equal baseline beaten |")
    print("|---|---|---|---|---|---|")
    for count in (3, 10, 30, 100):
        for images in (153, 1_000):
            for spread in (0.0, 3.0):
                print(f"| {count} | {images:,} | {spread:g} | {_ties(count, images, spread)} |")


def _ties(count: int, images: int, spread: float) -> str:
    draw = np.random.default_rng((count, images, int(spread)))
    held, sizes, beaten = 0, [], 0
    for _ in range(ROUNDS):
        skills = 2.0 + 0.3 * draw.standard_normal(count)
        found = tie_set(answers(draw, list(skills), images, spread), images)
        held += int(np.argmax(skills)) in found
        sizes.append(len(found))
        beaten += 0 not in tie_set(answers(draw, [2.0] * count, images, spread), images)
    low, high = np.quantile(sizes, [0.25, 0.75])
    size = f"{np.mean(sizes):.1f} (half: {low:.0f} to {high:.0f})"
    return f"{rate(held, ROUNDS)} | {size} | {rate(beaten, ROUNDS)}"


def study(space: str, sampler: str, trials: int) -> StudyFile:
    """Return a study file of a space of SPACES."""
    text = (
        f'[study]\nname = "noise"\ntrials = {trials}\nsampler = "{sampler}"\ndefaults = false\n'
        '[train]\nepochs = 3\n[train.data]\ndataset = "digits"\n'
        f'[train.model]\narchitecture = "small_cnn"\n[space]{SPACES[space]}'
    )
    return parse_study(text, "noise")


def alarms(space: str, sampler: str, trials: int, seed: int) -> bool:
    """Return whether a parameter stands out in a study whose values are noise."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    file, noise = study(space, sampler, trials), random.Random(f"{space} {sampler} {seed}")
    own = seed + 100_000 * list(SPACES).index(space)
    view = optuna.create_study(storage=InMemoryStorage())
    for number in range(trials):
        view.sampler = make_sampler(file, number + 1_000_003 * own)
        asked = view.ask()
        file.space.suggest(asked)
        view.tell(asked, noise.gauss(0.0, 1.0))
    done = view.get_trials(deepcopy=False)
    return bool(importances_of(done, [one.values[0] for one in done]).outstanding)


def importance(studies: int, jobs: int) -> None:
    """Print in how many studies of pure noise a parameter stands out."""
    print("| space | sampler, trials | studies with a false alarm | n |")
    print("|---|---|---|---|")
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        for sampler, trials in ARMS:
            for space in SPACES:
                ask = partial(alarms, space, sampler, trials)
                found = sum(pool.map(ask, range(studies), chunksize=4))
                line = f"| {space} | {sampler}, {trials} | {rate(found, studies)} | {studies} |"
                print(line, flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", choices=("intervals", "ties", "importance"), action="append")
    parser.add_argument("--studies", type=int, default=400)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    print(f"{machine()}; {versions('optuna', 'numpy', 'scipy')}\n")
    parts = options.part or ["intervals", "ties", "importance"]
    if "intervals" in parts:
        intervals()
    if "ties" in parts:
        ties()
    if "importance" in parts:
        importance(options.studies, options.jobs)


if __name__ == "__main__":
    main()
