"""Real searches, small enough for a unit test: one worker in this process."""

from __future__ import annotations

import threading

import torch

from hpo.config.study import StudyFile
from hpo.paths import Home
from hpo.search import study as studies
from hpo.search.study import Study
from hpo.search.trial import TrialRunner
from hpo.storage.database import Database
from hpo.storage.optuna import FencedStorage
from hpo.workers.worker import Worker

TINY = """
epochs = 3
batch_size = 64
model.cnn.filters = [4]
runtime = {precision = "float32", memory_format = "contiguous"}
"""
"""Lines of [train] that make an epoch of digits take a fraction of a second."""


def search(database: Database, home: Home, file: StudyFile) -> Study:
    """Create the study of `file` and run it to its end."""
    study, _ = studies.create(database, file)
    storage = FencedStorage(database)
    runner = TrialRunner(
        study, storage, study.optuna_study(storage), home, torch.device("cpu"), threads=1
    )
    Worker(study, storage, runner, home=home).run(threading.Event())
    return study
