"""The few configurations that are best to try first, learned from finished studies.

    python -m benchmarks.portfolio --storage URL [--storage URL] [--study NAME ...] [--size 4]
    python -m benchmarks.portfolio --storage URL --leave-one-out
    python -m benchmarks.portfolio --collect FOLDER --data NAME=IMAGES [--data NAME=IMAGES ...]

A study's regret is 0 for its best trial and 1 for its median one. The portfolio is chosen greedily:
each next configuration is the one that lowers most the mean, over studies, of the best regret so
far. It is printed as entries of hpo/config/recommended.toml. A configuration that a study did not
try has the regret that a random forest over that study's trials predicts.

`--leave-one-out` answers what such a start is worth on new data: for each study the portfolio is
chosen from studies of *other* data sets alone, and its regret after 1, 2, 3 and 4 trials stands
beside the mean of random starts and beside what hpo recommends by itself. Studies of one folder of
images, of one named data set, or of folders that differ only beyond an @ in their name, are of one
data set; folders beside each other are of one source. Intervals are 95 % bootstrap intervals over
data sets.

`--collect` makes studies to learn from: the digits and small cuts of the image folders by class in
`--data` (with `cifar10=FOLDER` animals, vehicles, and all ten classes at three sizes; of any other
folder one), each with two networks and the same random configurations. About an hour of one core;
goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import RandomForestRegressor
from sklearn.feature_extraction import DictVectorizer

from benchmarks.host import machine, versions
from benchmarks.small_sets import collect, recommended
from hpo.config.base import flatten
from hpo.config.data import FOLDERS
from hpo.config.parameters import canonical_json
from hpo.config.recommended import situation_of
from hpo.config.study import StudyFile
from hpo.errors import HpoError, InputError
from hpo.extras import DISTRIBUTION
from hpo.search.status import StudyStatus, read_status
from hpo.storage import records
from hpo.storage.database import connect
from hpo.storage.records import Outcome

Values = Mapping[str, Any]
Regrets = NDArray[np.float64]
FEWEST = 10
"""Trials of a study that is learned from."""
DRAWS = 10_000
"""Resamples of a bootstrap."""


# Regret and choice


@dataclass(frozen=True)
class Scale:
    """Regret by the values of a study's trials: 0 at the best, 1 at the median."""

    best: float
    median: float
    worst: float

    @classmethod
    def of(cls, values: Sequence[float | None], *, maximize: bool) -> Scale:
        """None is a trial that diverged: as bad as the worst. Raises InputError where the best is
        no better than the median."""
        known = [one for one in values if one is not None]
        if not known:
            raise InputError("no trial is complete")
        best, worst = max(known), min(known)
        if not maximize:
            best, worst = worst, best
        median = float(np.median([worst if one is None else one for one in values]))
        if best == median:
            raise InputError(f"the best value, {best:.4g}, is the median: nothing to learn")
        return cls(best, median, worst)

    def regret(self, value: float | None) -> float:
        """Below 0 for what is better than the best."""
        shown = self.worst if value is None else value
        return (self.best - shown) / (self.best - self.median)


def choose(table: Regrets, size: int) -> list[int]:
    """Columns of a table of regrets (studies, configurations), greedily: each lowers most the mean
    over studies of the least regret so far; of equals the one that is better by itself."""
    least = np.full(len(table), np.inf)
    alone = table.mean(axis=0)
    chosen: list[int] = []
    for _ in range(min(size, table.shape[1])):
        means = np.minimum(least[:, None], table).mean(axis=0)
        left = [one for one in range(table.shape[1]) if one not in chosen]
        chosen.append(min(left, key=lambda one: (means[one], alone[one])))
        least = np.minimum(least, table[:, chosen[-1]])
    return chosen


def random_start(found: Regrets, trials: int) -> float:
    """Mean, over all ways to draw `trials` different ones, of the least regret among them."""
    ordered, n = np.sort(found), len(found)
    ways = [math.comb(n - 1 - rank, trials - 1) for rank in range(n)]
    return float(np.dot(ordered, ways) / math.comb(n, trials))


def bootstrap(groups: Sequence[str], arm: Regrets, other: Regrets) -> tuple[float, float]:
    """95 % interval of mean(arm) / mean(other), pairs of a value a study, by drawing groups of
    studies with replacement."""
    names = sorted(set(groups))
    members = [np.flatnonzero(np.array(groups) == name) for name in names]
    draws = np.random.default_rng(0).integers(0, len(names), (DRAWS, len(names)))
    ratios = []
    for draw in draws:
        rows = np.concatenate([members[one] for one in draw])
        ratios.append(arm[rows].mean() / other[rows].mean())
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(high)


# Studies


@dataclass(frozen=True)
class Finished:
    """A finished study as this benchmark sees it."""

    name: str
    file: StudyFile
    drawn: list[dict[str, Any]]
    """Configurations that the study drew, in order."""
    regrets: Regrets
    """Of each of them: 0 best, 1 median."""
    shipped: list[float]
    """Regrets, by the same measure, of what hpo recommends for the study; empty: not all tried."""

    @property
    def data_set(self) -> str:
        """What names the images: a root without what is beyond an @, or a data set's name."""
        data = flatten(self.file.train)
        if data["data.dataset"] not in FOLDERS:
            return str(data["data.dataset"])
        root = Path(data["data.root"])
        return str(root.with_name(root.name.partition("@")[0]))

    @property
    def source(self) -> str:
        """The folder in which that of the images lies, or a data set's name."""
        place = Path(self.data_set)
        return str(place.parent) if place.is_absolute() else self.data_set

    @property
    def network(self) -> str:
        """The fixed part of the model's configuration."""
        return canonical_json(self.file.train.get("model", {}))


def finished(status: StudyStatus) -> Finished:
    """The study of `status`; trials that were added to it later count only for what hpo recommends.
    Raises InputError for one from which nothing can be learned."""
    ended = [t for t in status.trials if t.state in (Outcome.COMPLETE, Outcome.DIVERGED)]
    drawn = [t for t in ended if t.number < (status.file.study.trials or math.inf)]
    if len(drawn) < FEWEST:
        raise InputError(f"{len(drawn)} complete trials; {FEWEST} are needed")
    scale = Scale.of([t.value for t in drawn], maximize=status.file.direction == "maximize")
    shipped = [
        next((scale.regret(t.value) for t in ended if one.items() <= t.params.items()), None)
        for one in recommended(status.file)
    ]
    return Finished(
        name=status.row.name,
        file=status.file,
        drawn=[dict(t.params) for t in drawn],
        regrets=np.array([scale.regret(t.value) for t in drawn]),
        shipped=[] if None in shipped else [one for one in shipped if one is not None],
    )


def read_studies(urls: Sequence[str], names: Sequence[str]) -> list[Finished]:
    """Studies of the databases, of one objective each, those of `names` alone where there are any;
    says which are left out, and why."""
    found = []
    for url in urls:
        database = connect(url)
        for row in records.list_studies(database):
            if names and row.name not in names:
                continue
            try:
                found.append(finished(read_status(database, row.name)))
            except InputError as error:
                print(f"# {row.name} is left out: {error}")
        database.dispose()
    return found


# Tables of regrets


def table_of(studies: Sequence[Finished], candidates: Sequence[Values]) -> Regrets:
    """Regrets (studies, candidates), measured where a study tried the candidate, else predicted."""
    return np.array([regrets_in(study, candidates) for study in studies])


def regrets_in(study: Finished, candidates: Sequence[Values]) -> Regrets:
    """The regret of each candidate in one study."""
    known = {
        canonical_json(values): float(regret)
        for values, regret in zip(study.drawn, study.regrets, strict=True)
    }
    measured = [known.get(canonical_json(one)) for one in candidates]
    missing = [n for n, one in enumerate(measured) if one is None]
    predicted = dict(zip(missing, predict(study, [candidates[n] for n in missing]), strict=True))
    return np.array([predicted[n] if one is None else one for n, one in enumerate(measured)])


def predict(study: Finished, candidates: Sequence[Values]) -> list[float]:
    """A random forest's prediction of regrets, from the study's trials; trees need no scaling."""
    if not candidates:
        return []
    encoder = DictVectorizer(sparse=False)
    rows = encoder.fit_transform([features(one) for one in (*study.drawn, *candidates)])
    forest = RandomForestRegressor(n_estimators=200, min_samples_leaf=2, random_state=0)
    forest.fit(rows[: len(study.drawn)], study.regrets)
    return [float(one) for one in forest.predict(rows[len(study.drawn) :])]


def features(values: Values) -> dict[str, Any]:
    """Numbers as they are, the rest as text, which is encoded by one column a value."""
    return {
        name: float(one) if isinstance(one, int | float) else canonical_json(one)
        for name, one in values.items()
    }


def candidates_of(studies: Sequence[Finished]) -> list[dict[str, Any]]:
    """Every configuration that any of the studies tried, once; those alone that all of them tried,
    where there are enough: nothing is predicted then."""
    tried = [{canonical_json(one): one for one in study.drawn} for study in studies]
    every = {key: one for mine in tried for key, one in mine.items()}
    shared = [one for key, one in every.items() if all(key in mine for mine in tried)]
    return shared if len(shared) >= FEWEST else list(every.values())


# What a portfolio is worth on new data


Teaches = Callable[[Finished, Finished], bool]
"""(left out, other): whether the other may teach."""

TEACHERS: dict[str, Teaches] = {
    "portfolio of other data sets": lambda left, other: left.data_set != other.data_set,
    "... with the same network": lambda left, other: (
        left.data_set != other.data_set and left.network == other.network
    ),
    "portfolio of other sources": lambda left, other: left.source != other.source,
    "... with another network": lambda left, other: (
        left.source != other.source and left.network != other.network
    ),
}


def start_regrets(
    left: Finished, studies: Sequence[Finished], teaches: Teaches, size: int
) -> list[float] | None:
    """Regrets in `left` after 1, 2, ... trials of the portfolio of those that teach; None: none."""
    others = [one for one in studies if teaches(left, one)]
    if not others:
        return None
    candidates = candidates_of([*others, left])
    chosen = choose(table_of(others, candidates), size)
    mine = regrets_in(left, [candidates[one] for one in chosen])
    return [float(one) for one in np.minimum.accumulate(mine)]


def shipped_regrets(left: Finished, size: int) -> list[float] | None:
    """Regrets after 1, 2, ... trials of what hpo recommends by itself, the last one repeated where
    it recommends fewer; None where the study did not try all of them."""
    if not left.shipped:
        return None
    least = [float(one) for one in np.minimum.accumulate(left.shipped[:size])]
    return least + least[-1:] * (size - len(least))


def leave_one_out(studies: Sequence[Finished], size: int) -> None:
    """Print the table of all arms."""
    arms: dict[str, list[list[float] | None]] = {
        "random starts": [
            [random_start(one.regrets, k) for k in range(1, size + 1)] for one in studies
        ],
        **{
            name: [start_regrets(one, studies, teaches, size) for one in studies]
            for name, teaches in TEACHERS.items()
        },
        "what hpo recommends by itself": [shipped_regrets(one, size) for one in studies],
    }
    head = "".join(f"{f'after {k}':>9}" for k in range(1, size + 1))
    print(f"{'mean regret':34}{head}  of random's, 95 %    studies  data sets  <= half")
    for place, (name, found) in enumerate(arms.items(), 1):
        print(arm_line(f"{place} {name}", studies, found, arms["random starts"]))
    numbers = "".join(f"{place:7}" for place in range(1, len(arms) + 1))
    print(f"\n{f'regret after {size}, by line':34}{numbers}")
    for row, one in enumerate(studies):
        last = [f"{arm[row][-1]:7.2f}" if arm[row] else f"{'-':>7}" for arm in arms.values()]
        print(f"{one.name:34}{''.join(last)}")


def arm_line(
    name: str,
    studies: Sequence[Finished],
    found: Sequence[list[float] | None],
    random: Sequence[list[float] | None],
) -> str:
    """A line of the table; random's regrets are those of the same studies."""
    there = [n for n, one in enumerate(found) if one is not None]
    if not there:
        return f"{name:34}  nothing to compare"
    mine = np.array([found[n] for n in there])
    other = np.array([random[n] for n in there])[:, -1]
    groups = [studies[n].data_set for n in there]
    low, high = bootstrap(groups, mine[:, -1], other)
    means = "".join(f"{one:9.3f}" for one in mine.mean(axis=0))
    ratio = f"{mine[:, -1].mean() / other.mean():.2f} [{low:.2f}, {high:.2f}]"
    half = int((mine[:, -1] <= other / 2).sum())
    return f"{name:34}{means}  {ratio:20}{len(there):8}{len(set(groups)):11}{half:9}"


# Output


def entries(studies: Sequence[Finished], chosen: Sequence[Values]) -> str:
    """TOML of the configurations in the form of hpo/config/recommended.toml. Raises InputError for
    studies of several starts."""
    situations = [situation_of(one.file.config(one.file.space.corners()[0])) for one in studies]
    starts = sorted({one.start for one in situations})
    if len(starts) > 1:
        raise InputError(f"studies with {' and '.join(starts)} weights: choose some with --study")
    images = {one.images for one in situations}
    table = {
        "architectures": sorted({one.architecture for one in situations}),
        "start": starts[0],
        "images": images.pop() if len(images) == 1 else "any",
        "source": "hpo's own studies, benchmarks/portfolio.py",
    }
    shown = [
        ["[[recommended]]", *lines(table), "[recommended.values]", *lines(rounded(one)), ""]
        for one in chosen
    ]
    return "\n".join("\n".join(one) for one in shown)


def lines(table: Values) -> list[str]:
    """A line of TOML for each, by dotted names."""
    return [f"{name} = {json.dumps(value)}" for name, value in flatten(table).items()]


def rounded(values: Values) -> dict[str, Any]:
    """Floats at three significant digits."""
    return {
        name: float(f"{one:.3g}") if isinstance(one, float) else one for name, one in values.items()
    }


def portfolio(studies: Sequence[Finished], size: int) -> None:
    """Print the portfolio of all studies, and its regret in each."""
    candidates = candidates_of(studies)
    table = table_of(studies, candidates)
    chosen = choose(table, size)
    least = np.minimum.accumulate(table[:, chosen], axis=1)
    shown = ", ".join(f"{one:.3f}" for one in least.mean(axis=0))
    print(f"# mean regret after 1, 2, ... trials: {shown} (n = {len(studies)} studies)")
    for one, row in zip(studies, least, strict=True):
        print(f"#   {one.name}: {', '.join(f'{regret:.3f}' for regret in row)}")
    print(entries(studies, [candidates[one] for one in chosen]))


def named_folder(text: str) -> tuple[str, Path]:
    """NAME=FOLDER as its parts."""
    name, _, folder = text.partition("=")
    if not folder or not Path(folder).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: allowed: NAME=FOLDER, a folder that is there")
    return name, Path(folder).absolute()


def arguments() -> argparse.Namespace:
    """What is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--storage", action="append", default=[], help="database URL; repeatable")
    parser.add_argument("--study", action="append", default=[], help="only these; repeatable")
    parser.add_argument("--size", type=int, default=4, help="configurations of the portfolio")
    parser.add_argument("--leave-one-out", action="store_true")
    parser.add_argument("--collect", type=Path, help="folder for studies that are made first")
    parser.add_argument("--data", action="append", default=[], type=named_folder)
    parser.add_argument("--workers", type=int, default=2, help="processes that collect")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    urls = list(args.storage)
    if args.collect:
        urls.append(collect(args.collect.absolute(), dict(args.data), args.workers))
    studies = read_studies(urls, args.study)
    if not studies:
        raise SystemExit("no finished study: give --storage URL, or --collect FOLDER")
    print(f"# {machine()}; {versions(DISTRIBUTION, 'torch', 'scikit-learn')}")
    if args.leave_one_out:
        leave_one_out(studies, args.size)
    else:
        portfolio(studies, args.size)


if __name__ == "__main__":
    try:
        main()
    except HpoError as error:
        raise SystemExit(str(error)) from None
