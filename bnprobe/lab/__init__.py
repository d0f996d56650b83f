"""``bnprobe lab``: the experiments of the field, one command each.

An experiment is a grid of trials, each one condition and one seed, and a function that turns their figures into claims,
charts and tables. What the trials measure is kept as soon as it is there, so that a run that was stopped goes on.
"""

from __future__ import annotations

from bnprobe.lab.experiments import EXPERIMENTS, ExperimentRow
from bnprobe.lab.run import run

__all__ = ["EXPERIMENTS", "ExperimentRow", "run"]
