"""Run an experiment: trials side by side in processes, each kept as soon as it is done."""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from bnprobe._version import __version__
from bnprobe.analysis.description import environment
from bnprobe.errors import UsageError
from bnprobe.files import append, make_folder, only_run, write_whole
from bnprobe.lab.experiment import Budget, Condition, Experiment, MissingFigureError, Results, Values, bounded
from bnprobe.lab.experiments import EXPERIMENTS, ExperimentRow
from bnprobe.measure.restore import preserved_process, seed_everything
from bnprobe.numbers import count
from bnprobe.records import Claim, LabReport, Tool, Trial
from bnprobe.registry import load_code, require

TRIALS = "trials.jsonl"
"""The file of a folder in which trials are kept: a line that says what is run, then one for each trial."""

_MOST = 1000
"""The largest budget, of a week, and the most seeds."""

_LEAST = 256
"""Images to train on: the largest batch of an experiment."""

Progress = Callable[[int, int], None]
"""Called with the trials done and all."""


def run(
    name: str,
    folder: str | os.PathLike[str] | None = None,
    *,
    budget: float = 1.0,
    seeds: int = 5,
    data: str | None = None,
    jobs: int | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
) -> LabReport:
    """Run an experiment, or what is left of one that was stopped.

    Args:
        name: Of ``EXPERIMENTS``.
        folder: Where trials are kept; None: nowhere.
        budget: Amount of work, as a multiple of the default.
        seeds: Trials of each condition, with the seeds 0, 1, ...
        data: A folder of images, one folder in it for each class, or one with the files of CIFAR-10; None: the digits
            of scikit-learn.
        jobs: Processes; None: one for each core that this process may use. Figures do not depend on it. An experiment
            that takes times has one.
        fresh: Do not use trials that are in the folder.
        progress: See `Progress`.

    Returns:
        What was found.

    Raises:
        UsageError: There is no such experiment, it does not take data, a value makes no sense, the folder holds trials
            of something else, or scikit-learn is not installed.
        OutputError: The folder cannot be written, or another run writes to it.
        MemoryError: A process that ran trials was ended by the system.

    Example:
        >>> from bnprobe import lab
        >>> report = lab.run("scratch", budget=0.02, seeds=1, jobs=1)
        >>> report.claims[0].verdict
        'shown'
    """
    row = EXPERIMENTS[name]
    settings = _checked(row, Budget(budget, seeds, data), jobs)
    experiment = _loaded(row)
    planned = list(product(range(seeds), experiment.conditions(settings)))  # all conditions of a seed, then the next
    show = progress or (lambda done, total: None)
    with _keeping(None if folder is None else Path(folder), row, settings, fresh) as kept:
        left = [each for each in planned if _key(*each) not in kept.trials]
        show(len(planned) - len(left), len(planned))
        side_by_side = 1 if row.alone else jobs or _cores()
        for number, trial in enumerate(_run(row, left, settings, side_by_side), start=1):
            kept.add(trial)
            show(len(planned) - len(left) + number, len(planned))
    trials = tuple(kept.trials[_key(*each)] for each in planned)
    found = LabReport(
        tool=Tool("bnprobe", __version__),
        environment=environment(torch.device("cpu")),
        experiment=row.name,
        title=row.title,
        question=row.question,
        sources=row.sources,
        data=_described(row, settings),
        budget=budget,
        seeds=seeds,
        seconds=sum(trial.seconds for trial in trials),
        claims=(),
        charts=(),
        tables=(),
        notes=(),
        trials=trials,
        folder=data,
    )
    return concluded(found)


def concluded(found: LabReport) -> LabReport:
    """The same trials, with what today's code makes of them: answer, claims, charts, tables and notes.

    Raises:
        UsageError: The experiment is not there any more, or the data that it was run with.
    """
    experiment, results = _loaded(EXPERIMENTS[found.experiment]), Results(found.trials)
    budget = Budget(found.budget, found.seeds, found.folder)
    answer = ""
    with suppress(MissingFigureError):
        answer = experiment.answer(results, budget)
    return replace(
        found,
        answer=answer and f"A look at budget {found.budget:g}: {answer}" if found.budget < 1 else answer,
        claims=tuple(_decided(claim, found.budget) for claim in experiment.claims(results, budget)),
        charts=tuple(map(bounded, experiment.charts(results, budget))),
        tables=tuple(experiment.tables(results, budget)),
        notes=(*_small(found.budget), *experiment.notes(results, budget)),
    )


def _decided(claim: Claim, budget: float) -> Claim:
    """A claim about trained networks stays open where they are trained for a part of their steps."""
    if budget >= 1 or not claim.trained:
        return claim
    return replace(claim, verdict="open", evidence=f"{claim.evidence} Decided at budget 1.")


def _checked(row: ExperimentRow, budget: Budget, jobs: int | None) -> Budget:
    if not 0 < budget.factor <= _MOST:
        raise UsageError(f"The budget must be a number above 0, and at most {_MOST:,}, but is {budget.factor}.")
    if not 1 <= budget.seeds <= _MOST:
        raise UsageError(f"At least one seed is needed, and at most {_MOST:,}, but there are {budget.seeds}.")
    if jobs is not None and jobs < 1:
        raise UsageError(f"At least one process is needed, but there are {jobs}.")
    require("sklearn", "lab", f"The experiment {row.name}")
    if budget.data is not None:
        if not row.takes_data:
            raise UsageError(f"The experiment {row.name} makes its own data: leave --data out.")
        from bnprobe.lab.data import load

        images = len(load(budget.data).train)  # so that what is wrong with it is said at once
        if images < _LEAST:
            raise UsageError(
                f"--data {budget.data} has {count(images, 'image')} to train on; at least {_LEAST} are needed."
            )
    return budget


def _loaded(row: ExperimentRow) -> Experiment:
    found: Experiment = load_code(row.code, f"The experiment {row.name}", UsageError)
    return found


def _small(budget: float) -> Iterator[str]:
    if budget < 1:
        yield (
            f"At budget {budget:g} networks are trained for fewer steps, and may have learned little: claims about"
            " training are left open, and decided at budget 1. What is exact, or what a formula gives, is decided at"
            " any budget."
        )


def _described(row: ExperimentRow, budget: Budget) -> str:
    if not row.takes_data:
        return ""
    from bnprobe.lab.data import load

    return load(budget.data).description


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- Trials -----------------------------------------------------------------------------------------------------------


def _run(row: ExperimentRow, left: Sequence[tuple[int, Condition]], budget: Budget, jobs: int) -> Iterator[Trial]:
    """Trials as they are done, in the order in which they end."""
    if jobs == 1 or len(left) < 2:
        yield from (_trial(row, seed, condition, budget) for seed, condition in left)
        return
    from joblib import Parallel, delayed

    calls = (delayed(_trial)(row, seed, condition, budget) for seed, condition in left)
    with warnings.catch_warnings():
        # Workers whose memory has grown are replaced; joblib warns of that.
        warnings.filterwarnings("ignore", "A worker stopped while some jobs were given", UserWarning)
        try:
            yield from Parallel(n_jobs=min(jobs, len(left)), return_as="generator_unordered", batch_size=1)(calls)
        except BrokenProcessPool:
            raise MemoryError(
                "A process that ran trials was ended by the system; the same command goes on, and needs less with fewer"
                " --jobs."
            ) from None


def _trial(row: ExperimentRow, seed: int, condition: Condition, budget: Budget) -> Trial:
    """One trial. Layers this small gain nothing from several threads, and figures would depend on their number."""
    with preserved_process():
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            seed_everything(seed)
            begun = time.process_time()
            values = _loaded(row).trial(condition, seed, budget)
            return Trial(dict(condition), seed, _finite(values), round(time.process_time() - begun, 3))
        finally:
            torch.set_num_threads(threads)


def _finite(values: Values) -> dict[str, float | tuple[float | None, ...] | None]:
    def number(value: float | None) -> float | None:
        return float(value) if value is not None and math.isfinite(value) else None

    return {
        name: number(value) if value is None or isinstance(value, int | float) else tuple(map(number, value))
        for name, value in values.items()
    }


def _key(seed: int, condition: Mapping[str, Any]) -> str:
    return json.dumps([seed, dict(condition)], sort_keys=True)


@contextmanager
def _keeping(folder: Path | None, row: ExperimentRow, budget: Budget, fresh: bool) -> Iterator[_Kept]:
    """The trials of a run, of which no other adds to the file meanwhile: its budget could be another."""
    if folder is None:
        yield _Kept(None, row, budget, fresh)
        return
    make_folder(folder, "--output-dir")
    with only_run(folder / TRIALS, option="--output-dir"):
        kept = _Kept(folder / TRIALS, row, budget, fresh)
        kept.begin()
        yield kept


class _Kept:
    """The trials of a run, which its file keeps.

    Args:
        path: Of the file; None: nothing is kept.
        row, budget: What is run.
        fresh: Begin anew.

    Raises:
        UsageError: The file is of another experiment, budget or version, or cannot be read.
    """

    def __init__(self, path: Path | None, row: ExperimentRow, budget: Budget, fresh: bool) -> None:
        self.trials: dict[str, Trial] = {}
        self._path = path
        data = None if budget.data is None else str(Path(budget.data).resolve())
        images = _described(row, budget)
        self._head = {"experiment": row.name, "version": __version__, "budget": budget.factor, "data": [data, images]}
        if path is not None and not fresh and path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        try:
            first, *lines = path.read_text(encoding="utf-8").splitlines() or [""]
            head = json.loads(first)
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{path} holds no trials of an experiment ({error}); give --fresh or another --output-dir."
            ) from None
        if head != self._head:
            differs = [key for key in self._head if not isinstance(head, dict) or head.get(key) != self._head[key]]
            raise UsageError(
                f"{path} is of a run with another {', '.join(differs)}; give --fresh to begin anew, or another"
                " --output-dir."
            )
        for line in lines:
            try:
                trial = _read_trial(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # the line that was being written when the run was stopped
            self.trials[_key(trial.seed, trial.condition)] = trial

    def begin(self) -> None:
        """Write the file anew, without a line that was cut off.

        Raises:
            OutputError: It cannot be written.
        """
        if self._path is not None:
            lines = [self._head, *map(asdict, self.trials.values())]
            write_whole(self._path, "".join(f"{json.dumps(line)}\n" for line in lines))

    def add(self, trial: Trial) -> None:
        """Keep a trial."""
        self.trials[_key(trial.seed, trial.condition)] = trial
        if self._path is not None:
            append(self._path, f"{json.dumps(asdict(trial))}\n")


def _read_trial(line: Mapping[str, Any]) -> Trial:
    seed, seconds = int(line["seed"]), float(line["seconds"])
    return Trial(dict(line["condition"]), seed, _finite(line["values"]), seconds)
