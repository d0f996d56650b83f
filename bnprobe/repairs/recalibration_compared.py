"""Recalibrate on the path that scores better, and compare with the model as loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from bnprobe.analysis.comparison import (
    AS_IS,
    RECALIBRATED,
    is_contradicted,
    is_surely_worse,
    make_arm,
    paired_gain,
    unit_of,
    verdict,
)
from bnprobe.config import PathChoice, StatisticsPath
from bnprobe.config.spec import Spec
from bnprobe.errors import RepairError, UserCodeError
from bnprobe.loading.workload import Workload, read_again
from bnprobe.measure.layers import ProbedLayer, find_layers
from bnprobe.measure.scores import ScoreTable
from bnprobe.measure.session import Progress, no_progress
from bnprobe.numbers import count, number
from bnprobe.records import Arm, Conclusion, Estimate, Goal, Measure, Proof, Run, leading
from bnprobe.repairs.held_out import HeldOut
from bnprobe.repairs.recalibration import Recalibrated, recalibrate_loaded, untracked
from bnprobe.rules.effect import loss_decides


@dataclass(frozen=True)
class Compared:
    """A recalibration, and how it compares with the model as loaded.

    Attributes:
        found: What was recalibrated.
        proof: The comparison; None where nothing could be scored.
        notes: What the reader should know, one sentence each.
    """

    found: Recalibrated
    proof: Proof | None
    notes: tuple[str, ...]


def recalibrate_compared(
    spec: Spec,
    workload: Workload,
    *,
    path: PathChoice = "auto",
    layers: tuple[str, ...] = (),
    num_batches: int | None = None,
    include_frozen: bool = False,
    progress: Progress = no_progress,
) -> Compared:
    """Recalibrate the model of a workload in place, and compare it with the model as loaded.

    Args:
        spec: Settings, and how the data is read again.
        workload: Its data has not been read yet.
        path: As for ``recalibrate``; "auto": "train", and where samples cannot be mixed, so that this depends on how
            they are batched, the path whose statistics score better.
        layers, num_batches, include_frozen: As for ``recalibrate``.
        progress: Called with the batches done and planned.

    Raises:
        BnprobeError: As for ``recalibrate``.
    """
    return _Comparison(spec, workload, layers, num_batches, include_frozen, progress).run(path)


class _Comparison:
    def __init__(
        self,
        spec: Spec,
        workload: Workload,
        layers: tuple[str, ...],
        num_batches: int | None,
        include_frozen: bool,
        progress: Progress,
    ) -> None:
        self.spec, self.model, self.layers, self.progress = spec, workload.model, layers, progress
        self.workload, self.include_frozen = workload, include_frozen
        self.settings = spec.settings().model_copy(update={"batches": num_batches})
        # Without statistics of its own the model as loaded is no alternative, unless its scores say so.
        # Norms that are found by running only are not asked: what their statistics begin with is theirs to say.
        known = find_layers(self.model, lambda *names: True, required=False).layers
        new = bool(known) and all(map(_is_new, known))
        self.has_statistics = not new and not workload.parameters_alone
        self.held_out = HeldOut.of(spec, workload)
        self.untracked = bool(untracked(self.model, layers))
        if self.untracked:
            # As loaded, a sample's output depends on the others of its batch.
            self.held_out = self.held_out.one_by_one()

    @property
    def assumes_goal(self) -> bool:
        return self.spec.repair.assumes_goal

    def goal(self, measure: Measure) -> Goal:
        return "min" if measure == "loss" else self.spec.repair.goal

    def run(self, path: PathChoice) -> Compared:
        as_is = self._as_is()
        first: StatisticsPath = "train" if path == "auto" else path
        found = self._recalibrate(first)
        after = self.held_out.table(self.model)
        how = [_how(found, first)]
        if path == "auto" and not found.mixed and self.held_out.batches:
            again, after, sentence = self._other_path(after)
            how = [_how(found, first) if again is None else _how(again, "eval"), sentence]
        notes = (*how, *_on_tracked(found), *found.notes, *self.held_out.notes)
        found = replace(found, tracked=_placed(found.tracked, self.workload))
        return Compared(found, self._proof(as_is, after), notes)

    def _as_is(self) -> ScoreTable:
        """The scores of the model as loaded."""
        try:
            return self.held_out.table(self.model)
        except UserCodeError:
            if not self.untracked:
                raise
            return ScoreTable()  # one value per channel

    def _recalibrate(self, path: StatisticsPath, again: bool = False) -> Recalibrated:
        source = read_again(self.spec, self.workload).source if again else self.workload.source
        return recalibrate_loaded(
            self.model,
            source,
            self.workload.forward,
            path=path,
            layers=self.layers,
            settings=self.settings,
            progress=self.progress,
            include_frozen=self.include_frozen,
        )

    def _other_path(self, by_batch: ScoreTable) -> tuple[Recalibrated | None, ScoreTable, str]:
        """The statistics of the eval path, where they score better than those of the train path that are there now.

        Returns:
            What was recalibrated on it, None where those of the train path stay; the scores of those that stay; and a
            sentence on both.
        """
        why = "Samples cannot be mixed, so that statistics of the train path depend on the batches"
        before = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        try:
            again = self._recalibrate("eval", again=True)
        except RepairError as error:
            return None, by_batch, f"{why}; those of the eval path were not found. {error}"
        by_layer = self.held_out.table(self.model)
        measure = leading(self.held_out.known, not self.assumes_goal) or "loss"
        scores = [table.score("eval").of(measure) for table in (by_batch, by_layer)]
        gain = paired_gain(by_layer, by_batch, measure, self.goal(measure))
        told = " and ".join(
            f"{'not finite' if score is None else number(score)} ({name} path)"
            for score, name in zip(scores, ("train", "eval"), strict=True)
        )
        sentence = f"{why}: both paths were tried, and the better one counts: {measure} {told}."
        if gain is None or gain.mean <= 0:
            with torch.no_grad():
                for name, buffer in self.model.named_buffers():
                    buffer.copy_(before[name])
            return None, by_batch, sentence
        return again, by_layer, sentence

    def _proof(self, before: ScoreTable, after: ScoreTable) -> Proof | None:
        if not self.held_out.batches:
            return None
        contradicted = self.assumes_goal and is_contradicted(after, before, self.spec.repair.goal)
        measure: Measure = "loss" if contradicted else self.held_out.measure
        gain = paired_gain(after, before, measure, self.goal(measure))
        unknown = not self.has_statistics and self.assumes_goal and self.held_out.loss is None
        conclusion, message = self._conclude(measure, gain, before, after)
        if contradicted:
            message = f"{message} {loss_decides()}"
        if unknown:
            what = f"The metric on the same {self.held_out.described} changes, and whether a larger or a smaller one is"
            conclusion, message = "not_compared", f"{what} better was not said (--goal)."
        worse = not unknown and is_surely_worse(after, before, self.spec.repair.goal, self.assumes_goal)
        return Proof(
            measure=measure,
            arms=tuple(self._arm(name, table) for name, table in ((AS_IS, before), (RECALIBRATED, after))),
            repaired=RECALIBRATED,
            control=AS_IS,
            gain=None if unknown else gain,
            conclusion=conclusion,
            message=message,
            images_choosing=0,
            images_proving=self.held_out.images,
            over_as_is=None if unknown else gain,
            surely_worse=worse,
            scored_on=self.held_out.data,
        )

    def _arm(self, name: str, table: ScoreTable) -> Arm:
        return make_arm(name, [Run(self.spec.data.seed, 0, 0, table.score("eval"), "finished", "", 0.0)], trained=False)

    def _conclude(
        self, measure: Measure, gain: Estimate | None, before: ScoreTable, after: ScoreTable
    ) -> tuple[Conclusion, str]:
        """The conclusion, and a sentence that explains it."""
        what = f"The {measure} on the same {self.held_out.described}"
        if gain is None:
            if after.scores(measure, "eval") is None:
                return "not_compared", f"{what} is not finite after the recalibration."
            if before.rows:
                return "better", f"{what} is not finite as loaded, and finite after the recalibration."
            return "not_compared", f"{what} cannot be computed as loaded: single samples do not run through the model."
        if gain.interval is None:
            return "undecided", f"{what}: the differences give no interval."
        unit = unit_of(after, before, measure)
        return verdict(gain.mean, gain.interval), f"{what}, paired by {unit}."


def _is_new(layer: ProbedLayer) -> bool:
    """Whether the running statistics are none, or those of a new layer."""
    mean, variance = layer.info.running_mean, layer.info.running_variance
    return mean is None or variance is None or bool((mean == 0).all() and (variance == 1).all())


def _how(found: Recalibrated, path: StatisticsPath) -> str:
    way = "in the batches of the data, which use batch statistics"
    if path == "eval":
        passes = "one pass" if found.passes == 1 else f"{found.passes} passes"
        way = f"in {passes}, with the new statistics of earlier layers in every layer"
    elif found.mixed:
        way = "in large batches that use batch statistics"
    elif path != "train":
        way += " as in training"
    return f"The statistics are those of {found.images} samples in {found.batches} batches ({path} path: {way})."


def _on_tracked(found: Recalibrated) -> Iterator[str]:
    if found.tracked:
        yield (
            f"{count(len(found.tracked), 'layer')} kept no running statistics (track_running_stats=False), and"
            " normalized by the batch at inference: the comparison as loaded is for samples that come alone."
        )


def _placed(tracked: dict[str, str | None], workload: Workload) -> dict[str, str | None]:
    """Where Python cannot tell which line makes a layer, the lines of the model file that switch tracking off."""
    lines = workload.module.lines_giving("track_running_stats") if workload.module else []
    return {name: place or (", ".join(lines) or None) for name, place in tracked.items()}
