"""What to do next: why, and the command, a variant of the one that the user ran."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bnprobe.records import Diagnosis, Layer, Report, Scan
from bnprobe.rules import effect, rule_of

if TYPE_CHECKING:
    from bnprobe.records import SweepReport

SAVE = {"--format": "json", "--output": "report.json"}
_TO_SAVE = "To save the report:"

CARRIED = frozenset(
    (
        *("--checkpoint", "--key", "--strip-prefix", "--model-arg", "--unsafe-load", "--data", "--eval-data"),
        *("--batch-size", "--seed", "--device", "--autocast", "--goal", "--max-batches", "--threshold"),
        *("--include", "--exclude"),
    )
)
"""Options of a scan with which a repair loads the same model and data and judges them in the same way."""

EXPORTED = frozenset(("--model-arg", "--data", "--batch-size", "--seed"))
"""Options of a repair with which an export loads the same model and data; those of its checkpoint have done their work.
"""

FLAGS = frozenset(
    (
        *("--unsafe-load", "--no-emulate", "--what-if", "--no-what-if", "--gradients", "--thorough"),
        *("--dry-run", "--check", "--finetune", "--resume", "--include-frozen"),
        *("--verbose", "--all", "--exit-zero", "--force"),
    )
)
"""Options of a scan, sweep or repair that have no value."""

REPORTING = frozenset(
    (
        *("--format", "--output", "--output-dir", "--baseline", "--write-baseline"),
        *("--force", "--verbose", "--all", "--exit-zero"),
    )
)
"""Options of a scan that say what becomes of its report: another scan has a report of its own."""

_INSTEAD = {
    "--batches": "--max-batches",
    "--max-batches": "--batches",
    "--batch-size": "--batch-sizes",
    "--what-if": "--no-what-if",
}
"""An option that is set stands for another one, too, which would contradict it."""

_WHY = {
    "recalibrate": "To recalibrate the running statistics, and to compare before and after:",
    "convert": "To convert these layers, and to measure what that gains:",
}

_WITHOUT_TRAINING = "To convert the layers without training, which was measured to help:"

_OF_MICRO_BATCHES = "To recalibrate on batches as in training, which was measured to help:"

_LARGEST_SUGGESTED = 64
_BATCHES_OF_LARGEST = 4


@dataclass(frozen=True)
class NextStep:
    """Something to do next: why, and the command (None: nothing that a command could do)."""

    why: str
    command: str | None = None

    @property
    def when_saved(self) -> NextStep | None:
        """What is left of it in a report that is a file already; None: nothing."""
        if not self.why.endswith(_TO_SAVE):
            return self
        why = self.why.removesuffix(_TO_SAVE).rstrip()
        return NextStep(why) if why else None


def diagnosed_step(report: Report, command: str) -> NextStep:
    """The remedy of a diagnosis that was tried and is surely a gain, the best; else what the first remedy says."""
    if (step := _tried_step(report, command)) is not None:
        return step
    first = report.diagnoses[0]
    rule = rule_of(first.rule)
    if rule is None:
        return keep_step(command)
    if "(--goal)" in first.remedy:
        return NextStep("If a larger metric is better (else --goal min):", with_options(command, {"--goal": "max"}))
    if rule.larger_batches and (step := _enough_step(report, command) or _try_sizes_step(report, command)):
        return step
    named = [arguments for arguments in rule.commands if _names(first.remedy, arguments)]
    for arguments in named:
        if _can_run(arguments, report):
            return NextStep(_WHY[arguments.split()[0]], _repair(arguments, first, report, command))
    return NextStep(f"To read about {rule.code}, with an example:", f"bnprobe explain {rule.code}")


def _tried_step(report: Report, command: str) -> NextStep | None:
    """The command of a remedy without training that a diagnosis names, and that is surely a gain: the best of these."""
    if report.scan.synthetic:
        return None
    gaps, chance = report.summary.gaps, report.summary.chance
    said = [diagnosis.remedy for diagnosis in report.diagnoses if diagnosis.severity != "info"]

    def is_said(arguments: str) -> bool:
        return any(_names(remedy, arguments) for remedy in said)

    named: list[str] = [name for name, arguments in effect.COMMANDS.items() if is_said(arguments)]
    advised = effect.advised(report.remedies, gaps, chance)
    if advised is not None and is_said(effect.arguments_of(advised, report.scan)):
        # It gains more than recalibrating, by a comparison on the same samples.
        named = [advised.name, *(name for name in named if name != "recalibrated")]
    best = effect.best_gain(named, report.remedies, gaps, chance)
    if best is None:
        return None
    if best is advised:
        return advised_step(report, command)
    return NextStep(_WHY["recalibrate"], _whole(effect.COMMANDS[best.name], [], report, command))  # type: ignore[index]


def advised_step(report: Report, command: str) -> NextStep | None:
    """What is surely better without training, where something is."""
    remedy = effect.advised(report.remedies, report.summary.gaps, report.summary.chance)
    if remedy is None or report.scan.synthetic:
        return None
    why, all_layers = _OF_MICRO_BATCHES, list[str]()  # recalibrate takes all without an option
    if remedy.name in effect.CONVERSIONS:
        why, all_layers = _WITHOUT_TRAINING, ["*"]
    # It was tried in all these layers together.
    everywhere = {layer.name for layer in report.layers} == set(remedy.layers) and not report.skipped
    layers = all_layers if everywhere else remedy.layers
    return NextStep(why, _whole(effect.arguments_of(remedy, report.scan), layers, report, command))


def _names(remedy: str, arguments: str) -> bool:
    """Whether a remedy names this command, and not one that goes on."""
    return re.search(rf"bnprobe {re.escape(arguments)}(?! --)", remedy) is not None


def keep_step(command: str) -> NextStep:
    """There is nothing to find out: save the report."""
    return NextStep(_TO_SAVE, with_options(command, SAVE))


def interrupted_step(report: Report, command: str) -> NextStep | None:
    """Measure to the end, where something cut the scan short."""
    if not report.scan.partial:
        return None
    failed = report.scan.stopped == "failed"
    return NextStep(
        "Fix what the error names, then measure to the end:" if failed else "To measure to the end:",
        with_options(command, {}),
    )


def more_batches_step(scan: Scan, command: str) -> NextStep:
    """More batches, to decide what is undecided."""
    # Four times the batches halve the intervals.
    more = str(4 * max(scan.batches, 1))
    if scan.stopped == "data_exhausted":
        text = f"All data was used. More data or another --threshold is needed to decide. {_TO_SAVE}"
        return NextStep(text, with_options(command, SAVE))
    if scan.stopped == "requested":
        return NextStep("To decide, measure more batches:", with_options(command, {"--batches": more}))
    return NextStep("To decide, allow more batches:", with_options(command, {"--max-batches": more}))


def batch_size_step(report: Report, command: str) -> NextStep:
    """What is known of larger batches, or how to find out."""
    larger = _larger_sizes(report)
    if (step := _enough_step(report, command)) is not None:
        return step
    if larger:
        text = f"At no batch size up to {larger[-1]} do all layers pass. {_TO_SAVE}"
        return NextStep(text, with_options(command, SAVE))
    return _try_sizes_step(report, command) or keep_step(command)


def _larger_sizes(report: Report) -> list[int]:
    """The larger batch sizes that were measured."""
    sizes = {point.batch_size for layer in report.layers for point in layer.batch_sizes}
    return sorted(size for size in sizes if size > report.scan.batch_size)


def _enough_step(report: Report, command: str) -> NextStep | None:
    enough = [size for size in _larger_sizes(report) if not under_limit(report.layers, size)]
    if not enough:
        return None
    return NextStep(
        f"At batch size {enough[0]} no layer is under its limit at inference. To check training too:",
        with_options(command, {"--batch-size": str(enough[0])}),
    )


def _try_sizes_step(report: Report, command: str) -> NextStep | None:
    check = report.scan.self_check
    if check is None or not check.passed or _larger_sizes(report):  # samples cannot be regrouped, or were
        return None
    to_try = _sizes_to_try(report.scan)
    if len(to_try) < 2:
        return None
    options = {"--batch-sizes": ",".join(map(str, to_try))}
    needed = _BATCHES_OF_LARGEST * to_try[-1] // report.scan.batch_size
    if report.scan.batches < needed and report.scan.stopped != "data_exhausted":
        options["--batches"] = str(needed)
    return NextStep("To see what a larger batch would change:", with_options(command, options))


def sweep_step(report: SweepReport, command: str) -> NextStep | None:
    """A scan at the size at which every layer passes, or at the one that was swept; None where no layer is flagged."""
    if not any(layer.flagged for layer in report.layers):
        return None
    scan = shlex.join(["bnprobe", "scan", *_carried(shlex.split(command)[2:])])
    enough = report.smallest.likely
    if enough is None or enough <= report.scan.batch_size:
        return NextStep("To see why, and what helps:", scan)
    return NextStep(f"To check training at batch size {enough} too:", with_options(scan, {"--batch-size": str(enough)}))


def under_limit(layers: tuple[Layer, ...], batch_size: int) -> list[Layer]:
    """The layers whose eval-path mismatch at a batch size is beyond their limit."""
    return [
        layer
        for layer in layers
        for point in layer.batch_sizes
        if point.batch_size == batch_size and point.mismatch > point.limit
    ]


def _sizes_to_try(scan: Scan) -> list[int]:
    """Batch sizes from this one on, each twice the last; no larger than data that is known to be used up."""
    steps = max(3, (_LARGEST_SUGGESTED // scan.batch_size).bit_length() - 1)
    sizes = [scan.batch_size << step for step in range(steps + 1)]
    limit = scan.images if scan.stopped == "data_exhausted" else sizes[-1]
    return [size for size in sizes if size <= limit]


# --- The command of a remedy ------------------------------------------------------------------------------------------


def _can_run(arguments: str, report: Report) -> bool:
    """Whether the model file has what the command needs: real data; to train, a loss and held-out data, too."""
    if report.scan.synthetic:
        return False
    trained = [gap for gap in report.summary.gaps if gap.measure == "loss" and gap.held_out is not None]
    return bool(trained) or "--finetune" not in arguments


def _repair(arguments: str, diagnosis: Diagnosis, report: Report, command: str) -> str:
    """The whole command, on the layers of the diagnosis where no layer is flagged."""
    converts = arguments.startswith("convert") and not any(layer.flagged for layer in report.layers)
    return _whole(arguments, (diagnosis.layers or ("*",)) if converts else (), report, command)


def _whole(arguments: str, layers: Iterable[str], report: Report, command: str) -> str:
    """The whole command: the target and options of the user's, the layers, and a new file for the weights."""
    words = ["bnprobe", arguments.split()[0], *_carried(shlex.split(command)[2:]), *arguments.split()[1:]]
    words += [word for name in layers for word in ("--layers", name)]
    done = "recalibrated" if words[1] == "recalibrate" else "repaired"
    return shlex.join([*words, "-o", _weights(report, done)])


def _weights(report: Report, done: str) -> str:
    """A name for the new weights."""
    before = "" if report.scan.checkpoint is None else f"{Path(report.scan.checkpoint).stem}-"
    return f"{before}{done}.safetensors"


def _carried(words: list[str]) -> list[str]:
    """The target, and the options that another command takes too, with their values."""
    return [word for option, said in _options(words) if not option or option in CARRIED for word in said]


def chosen_options(command: str, options: Collection[str]) -> list[str]:
    """The words of these options in a command, with their values, in both spellings.

    Args:
        command: A command quoted for a POSIX shell, e.g. ``"bnprobe convert model.py --finetune --batch-size 2"``.
        options: Names such as ``"--batch-size"``.
    """
    return [word for option, said in _options(shlex.split(command)) if option in options for word in said]


def _options(words: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """The options of a command and their words, e.g. "--seed" and "--seed 1" or "--seed=1"; "" of an argument."""
    remaining = iter(words)
    for word in remaining:
        option, equals, _ = word.partition("=")
        if not word.startswith("-"):
            yield "", [word]
        elif equals or option in FLAGS or (len(word) > 2 and word[1] != "-"):  # -oFILE
            yield option, [word]
        else:
            yield option, [word, next(remaining, "")]


# --- Variants of a command --------------------------------------------------------------------------------------------


def with_options(command: str, options: dict[str, str]) -> str:
    """The command with options set, without what they replace or contradict, and without those on its report.

    Args:
        command: A command quoted for a POSIX shell, e.g. ``"bnprobe scan model.py --batch-size 2"``.
        options: Values by option; "" for an option without a value.
    """
    replaced = {*REPORTING, *options, *(_INSTEAD[option] for option in options if option in _INSTEAD)}
    words = [word for option, said in _options(shlex.split(command)) if option not in replaced for word in said]
    for option, value in options.items():
        words += [option, value] if value else [option]
    return shlex.join(words)


def scan_of(repair: str, checkpoint: str | None = None) -> str:
    """The scan that a repair begins with, and that of the weights that it wrote.

    Args:
        repair: The command of the repair, as typed.
        checkpoint: The new weights; None: the same as those of the repair.
    """
    old = ("--checkpoint", "--key", "--strip-prefix", "--unsafe-load")
    words = _carried(shlex.split(repair)[2:])
    if checkpoint is not None:
        words = [word for option, said in _options(words) if option not in old for word in said]
        words += ["--checkpoint", checkpoint]
    return shlex.join(["bnprobe", "scan", *words])
