"""Fine-tune a model: steps, states to resume from, logs."""

from __future__ import annotations

from bnprobe.training.data import KeptEpochs
from bnprobe.training.evaluate import evaluate, score_table
from bnprobe.training.job import Job, TrainingOutcome, length_of
from bnprobe.training.log import StepLog
from bnprobe.training.run import train
from bnprobe.training.state import StateFolder

__all__ = [
    "Job",
    "KeptEpochs",
    "StateFolder",
    "StepLog",
    "TrainingOutcome",
    "evaluate",
    "length_of",
    "score_table",
    "train",
]
