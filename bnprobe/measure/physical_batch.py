"""Several micro-batches as one physical batch: may they run together, and how many?

They may if one emulated step gives what the same real micro-batches give. What may differ is rounding, which a network
amplifies from layer to layer. How much this network does is measured too: one micro-batch runs again with its inputs
changed in the last digits. A model that mixes the samples of a batch shows a jump far above that. Where rounding would
hide the jump, a copy of the model is compared in float64.

Random layers draw other numbers in every run, so with them the question is put otherwise: with the same random draws,
does a micro-batch stay as it is when another one takes the place of its neighbour? A model that draws random numbers in
eval mode as well cannot be told from one that mixes, and is not emulated. Nor is one that raises on joined
micro-batches.

In most models they differ by no more than rounding. A scan sees that by its first physical batch, which it measures
anyway (``agreement``); all of this runs only where there is more to be seen (``self_check``).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from textwrap import shorten
from typing import Any, Literal

import torch
from torch import Tensor

from bnprobe.config.spec import ScanSettings
from bnprobe.distributed import OPENING
from bnprobe.errors import BnprobeError, UsageError, UserCodeError, message_of
from bnprobe.measure.batch import CannotEmulateError, in_float64, join, map_leaves, pick, tensors_of, to_device
from bnprobe.measure.forward_pass import Pass, Recorded, RowLayout, Slot
from bnprobe.measure.layers import named_once
from bnprobe.measure.memory import Chunks, Footprint, fits_in_memory, is_out_of_memory, plan_samples
from bnprobe.measure.reader import Reader
from bnprobe.measure.restore import preserved_random_state, random_state, set_mode
from bnprobe.measure.session import PATHS, Alone, PathName, Session
from bnprobe.records import SelfCheck
from bnprobe.stats.moments import square_distances, statistics_distance
from bnprobe.stats.segments import Segments
from bnprobe.wording import either, option

_AMPLIFICATION = 50.0
"""An error counts once it is this many times the effect of the changed last digits."""

_FLOOR = 1000.0
"""Errors below this many units in the last place are rounding, whatever the network, and agreement, whatever the
tolerance."""

_BLIND = 0.3
"""A tolerance above this, in standard deviations, would let real mixing pass: the check cannot decide."""


_SAID = 120
"""Characters of the message of an exception that a report quotes."""

_NOTHING = "No layer and no output shows whether micro-batches can run together."

_OTHER_CALLS = "the layers are called differently in a larger batch"

DIFFERENT_SIZES = "the micro-batches differ in size"
"""Why they run one by one."""


@dataclass(frozen=True)
class Emulation:
    """Whether micro-batches run together, and what the check learned on the way.

    Attributes:
        trusted: Micro-batches may run together.
        reason: One sentence for the report.
        check: The comparison; None if it could not be made.
        layouts: For each path, the row layout of the calls that see several rows per sample.
        values: For each path, the values per channel and sample that each call saw.
        alone: What this process's first micro-batches gave by themselves, where its first physical batch, which holds
            them, is still to be compared with it: until then micro-batches are trusted to run together.
        opening: Where that is so, the micro-batches that the self-check compares if it is to decide.
    """

    trusted: bool
    reason: str
    check: SelfCheck | None
    layouts: Mapping[str, Mapping[Slot, RowLayout]]
    values: Mapping[str, Mapping[Slot, float]] = field(default_factory=dict)
    alone: tuple[Alone, ...] = ()
    opening: tuple[Any, ...] = ()

    @property
    def closed(self) -> Emulation:
        """The same without what is still to be compared."""
        return replace(self, alone=(), opening=())

    def layouts_of(self, path: PathName) -> dict[Slot, RowLayout]:
        """The row layouts on one path; those of the train path also hold without random layers."""
        return dict(self.layouts.get("train" if path == "steady" else path, {}))

    def require_same_sizes(self, path: PathName, pass_: Pass) -> None:
        """Refuse a pass whose layers saw other numbers of values per sample than when this was checked.

        Images of one size then gave feature maps of another: the model pads or cuts them to a size that the batch
        decides.

        Raises:
            CannotEmulateError: They did.
        """
        known = self.values.get("train" if path == "steady" else path, {})
        if any(known.get(slot, values) != values for slot, values in _values_per_sample(pass_).items()):
            raise CannotEmulateError("the size of a layer's input changes from batch to batch")

    def require_same_calls(self, path: PathName, pass_: Pass) -> None:
        """Refuse a pass that called other layers, or in another order, than when this was checked.

        The model then decides by the batch which layers to call, and decided for all micro-batches in it at once.

        Raises:
            CannotEmulateError: It did.
        """
        known = self.values.get(path)
        if known is not None and list(known) != list(pass_.records):
            raise CannotEmulateError("which layers are called, or in which order, depends on the batch")


@dataclass(frozen=True)
class Batching:
    """How micro-batches run.

    Attributes:
        batch_size: Samples in a micro-batch.
        emulation: Whether micro-batches may run together.
        at_once: How many do, where they may.
    """

    batch_size: int
    emulation: Emulation
    at_once: int = 1

    @property
    def reason(self) -> str:
        """Why micro-batches run together or not, one sentence."""
        if self.emulation.trusted and self.at_once == 1:
            return "One micro-batch already fills a physical batch."
        return self.emulation.reason

    def pass_over(self, micro_batches: int, path: PathName, **options: Any) -> Pass:
        """A pass over so many micro-batches; ``options`` are fields of ``Pass``."""
        samples = micro_batches * self.batch_size
        return Pass(samples, self.batch_size, layouts=self.emulation.layouts_of(path), **options)

    def chunks(self, device: torch.device) -> Chunks:
        """Runs micro-batches at once, as many as allowed."""
        return Chunks(device, self.batch_size, self.at_once if self.emulation.trusted else 1)


Check = Callable[[Session, list[Any], int], tuple[Emulation, Footprint]]
"""``self_check`` or ``check_samples``."""


def self_check(session: Session, micro_batches: list[Any], batch_size: int) -> tuple[Emulation, Footprint]:
    """Compare one emulated step of the given micro-batches (on the device) with real ones.

    Returns:
        The verdict, and what one sample takes in memory.
    """
    before = random_state()
    verdict, footprint = _check(session, "check train", micro_batches, batch_size)
    random = random_state() != before
    if random:
        # What was drawn differs from run to run: without dropout and the like there is something to compare.
        verdict, footprint = _check(session, "check", micro_batches, batch_size)
    if verdict.trusted:
        # Batch statistics can hide a mixing of samples that shows with running ones, e.g. of batch_norm by hand.
        verdict = _worse(verdict, _check(session, "check eval", micro_batches, batch_size)[0])
    if verdict.trusted and random:
        verdict = _unless_mixed_at_random(session, micro_batches, batch_size, verdict)
    return verdict, footprint


def agreement(
    session: Session,
    alone: Sequence[Alone],
    micro_batches: Sequence[Any],
    passes: Mapping[PathName, Pass],
    outputs: Mapping[PathName, Any],
) -> SelfCheck | None:
    """The self-check by a physical batch: whether what micro-batches give in it is what they gave alone, to rounding.

    Args:
        alone: What some of them gave.
        micro_batches: On the host, in the order in which they were joined.
        passes, outputs: Of the physical batch, on both paths.

    Returns:
        Not passed where they differ by more than rounding does by itself, or None where nothing shows it: then
        ``self_check`` decides, and ``agrees_as_far`` whether that explains it.

    Raises:
        CannotEmulateError: The layers saw something else than they did alone.
    """
    floor, number = _unit(session) * _FLOOR, len(micro_batches)
    of_outputs: list[float] = []
    of_statistics: list[float] = []
    places = {id(batch): position for position, batch in enumerate(micro_batches)}
    positions = [places[id(each.batch)] for each in alone if id(each.batch) in places]
    if len(positions) < len(alone):
        return None
    for path in PATHS:
        pass_, reals = passes[path], [each.passes[path] for each in alone]
        if any(_values_per_sample(real) != _values_per_sample(pass_) for real in reals):
            raise CannotEmulateError(_OTHER_CALLS)
        references, size = _references(reals), pass_.batch_size
        if references:
            of_statistics.append(_largest_difference(session, references, pass_, positions))
        outputs_alone = zip(positions, [each.outputs[path] for each in alone], strict=True)
        pairs = [pair for at, output in outputs_alone for pair in _pairs_at(at, size, output, outputs[path], number)]
        error = _relative_error(pairs)
        if error is None and not references:
            return None
        of_outputs.append(error or 0.0)
    output_error, statistic_error = max(of_outputs), max(of_statistics, default=0.0)
    agrees = max(output_error, statistic_error) <= floor
    return SelfCheck(output_error, statistic_error, floor, agrees, None)


def agrees_as_far(verdict: Emulation, found: SelfCheck) -> Emulation:
    """The verdict of ``self_check``, refused where a larger physical batch differs by far more than that explains.

    A model may do something else from some number of samples on, which two micro-batches do not show.
    """
    check = verdict.check
    if not verdict.trusted or check is None or check.float64:  # errors of float64 say nothing about those of float32
        return verdict
    tolerance = max(check.tolerance, _AMPLIFICATION * max(check.output_error, check.statistic_error))
    if max(found.output_error, found.statistic_error) <= tolerance:
        return verdict
    return Emulation(False, "The model does something else in a larger batch.", replace(found, tolerance=tolerance), {})


def check_samples(session: Session, micro_batches: list[Any], batch_size: int) -> tuple[Emulation, Footprint]:
    """As ``self_check``, on the eval path alone: whether samples are independent of each other there."""
    return _check(session, "check eval", micro_batches, batch_size)


def _worse(verdict: Emulation, inference: Emulation) -> Emulation:
    """Combine two checks, the first of which passed."""
    if not inference.trusted or verdict.check is None or inference.check is None:
        return inference
    one, other = verdict.check, inference.check
    worst = SelfCheck(
        output_error=max(one.output_error, other.output_error),
        statistic_error=max(one.statistic_error, other.statistic_error),
        tolerance=max(one.tolerance, other.tolerance),
        passed=True,
        first_layer=None,
        paths=(*one.paths, *other.paths),
        float64=one.float64 or other.float64,
    )
    layouts, values = {**verdict.layouts, **inference.layouts}, {**verdict.values, **inference.values}
    return replace(verdict, check=worst, layouts=layouts, values=values)


def footprint_of(pass_: Pass) -> Footprint:
    """What a sample takes in memory."""
    sizes = [record.bytes // pass_.samples for record in pass_.records.values()]
    return Footprint(total=sum(sizes), largest=max(sizes, default=0))


def _values_per_sample(pass_: Pass) -> dict[Slot, float]:
    return {slot: record.values * (record.groups or 1) / pass_.batch_size for slot, record in pass_.records.items()}


@dataclass(frozen=True)
class _Comparison:
    """One emulated step against the same micro-batches for real, on one path.

    Attributes:
        emulation: The verdict.
        footprint: What one sample takes in memory.
        blind: The micro-batches differ, by no more than rounding might: the comparison decides nothing.
        calls: The calls that were compared.
    """

    emulation: Emulation
    footprint: Footprint
    blind: bool = False
    calls: frozenset[Slot] = frozenset()


def _check(session: Session, path: PathName, micro_batches: list[Any], batch_size: int) -> tuple[Emulation, Footprint]:
    """Compare on one path; in float64 where rounding hides the answer, unless random numbers do."""
    before = random_state()
    found = _compare(session, path, micro_batches, batch_size)
    verdict = found.emulation
    if found.blind and random_state() == before:
        verdict = _in_float64(session, path, micro_batches, batch_size, found) or verdict
    return verdict, found.footprint


_COMPARED: dict[PathName, Literal["train", "steady", "eval"]] = {"check train": "train", "check": "steady"}
"""The path that a check is about; any other is about the eval path."""


def _compare(session: Session, path: PathName, micro_batches: list[Any], batch_size: int) -> _Comparison:
    reals = [Pass(batch_size, batch_size) for _ in micro_batches]
    outputs = [session.forward(path, batch, real)[0] for batch, real in zip(micro_batches, reals, strict=True)]
    footprint = footprint_of(reals[0])
    try:
        emulated = Pass(batch_size * len(micro_batches), batch_size, references=_references(reals))
        output, _ = session.forward(path, join(micro_batches, batch_size), emulated)
        if emulated.records.keys() != reals[0].records.keys():
            raise CannotEmulateError(_OTHER_CALLS)
    except (CannotEmulateError, UserCodeError) as error:
        return _Comparison(not_emulated(as_sentence(error)), footprint)
    found = _output_error(outputs, output, batch_size * len(micro_batches))
    if found is None and not _references(reals):
        return _Comparison(not_emulated(_NOTHING), footprint)
    check, blind = _verdict(session, path, micro_batches[0], outputs[0], reals, emulated, found or 0.0)
    name = _COMPARED.get(path, "eval")
    check = replace(check, paths=(name,))
    part = "eval" if name == "eval" else "train"
    layouts, values = {part: emulated.layouts}, {part: _values_per_sample(emulated)}
    emulation = Emulation(check.passed, _reason(check.passed, blind, batch_size), check, layouts, values)
    return _Comparison(emulation, footprint, blind, frozenset(emulated.records))


def _in_float64(
    session: Session, path: PathName, micro_batches: list[Any], batch_size: int, blind: _Comparison
) -> Emulation | None:
    """The verdict on a copy of the model in float64; None where none can be made or run, or that is blind too."""
    tensors = [*session.model.parameters(), *session.model.buffers()]
    samples = 2 * batch_size * len(micro_batches)
    needed = samples * blind.footprint.total + sum(2 * tensor.nbytes for tensor in tensors)
    if not fits_in_memory(Footprint(needed, needed), 1, session.device):
        return None
    try:
        twin = _twin_in_float64(session)
        with twin.installed():
            found = _compare(twin, path, [in_float64(batch) for batch in micro_batches], batch_size)
    except Exception:  # the user's modules may refuse to be copied, or compute in float32 whatever they get
        return None
    if found.blind or found.calls != blind.calls:
        return None
    verdict = found.emulation
    return replace(verdict, check=verdict.check and replace(verdict.check, float64=True))


def _twin_in_float64(session: Session) -> Session:
    set_mode(session.model, True, session.held)  # so that the copy shows which modules are held in eval mode
    model = copy.deepcopy(session.model).double()
    originals, copies = ([found.module for found in named_once(each)] for each in (session.model, model))
    twins = dict(zip(originals, copies, strict=True))
    layers = tuple(
        replace(layer, module=twins[layer.module], info=layer.family.describe(twins[layer.module]))
        for layer in session.layers.layers
    )
    return Session(model, replace(session.layers, layers=layers), session.functions, session.device)


def _unless_mixed_at_random(
    session: Session, micro_batches: list[Any], batch_size: int, verdict: Emulation
) -> Emulation:
    """The verdict, refused if in training a micro-batch changes with its neighbour although the random draws are the
    same: how many numbers a model draws depends on shapes, not on values.
    """

    def run(one: Any, other: Any) -> _Run:
        pass_ = Pass(2 * batch_size, batch_size, layouts=verdict.layouts_of("train"))
        with preserved_random_state():
            return pass_.records, session.forward("check train", join([one, other], batch_size), pass_)[0]

    first, second = micro_batches[:2]
    try:
        together, again = run(first, second), run(first, second)
        replaced = [run(first, first), run(second, second)]
    except (CannotEmulateError, UserCodeError) as error:
        return not_emulated(as_sentence(error))
    # Kernels that add up in any order differ from run to run by themselves.
    noise = [_moved(session, together, again, position, batch_size) for position in (0, 1)]
    moved = [_moved(session, together, other, position, batch_size) for position, other in enumerate(replaced)]
    largest = max((difference for found in noise for difference, _ in found), default=0.0)
    tolerance = _unit(session) * _FLOOR + _AMPLIFICATION * largest
    beyond = [(difference, layer) for found in moved for difference, layer in found if difference > tolerance]
    assert verdict.check is not None  # it passed
    check = replace(verdict.check, paths=(*verdict.check.paths, "train"))
    if not beyond and tolerance <= _BLIND:
        return replace(verdict, check=check)
    furthest, layer = beyond[0] if beyond else (largest, None)
    check = replace(check, statistic_error=furthest, tolerance=tolerance, passed=False, first_layer=layer)
    mixes = "In training, the model mixes the samples of a batch at random."
    return Emulation(False, mixes if beyond else _reason(False, True, batch_size), check, {})


_Run = tuple[Mapping[Slot, Recorded], Any]
"""What was recorded of a forward pass, and its output."""


def _moved(session: Session, run: _Run, other: _Run, position: int, batch_size: int) -> list[tuple[float, str | None]]:
    """How far two runs of two micro-batches differ in the one at a position: call by call, with the layer's name, and
    in each tensor of the output, without one.
    """
    found: list[tuple[float, str | None]] = []
    (records, output), (other_records, other_output) = run, other
    for slot, record in records.items():
        layer = session.layers.layers[slot[0]]
        compared = other_records.get(slot)
        groups = slice(position * (record.groups or 1), (position + 1) * (record.groups or 1))
        here = replace(record, mean=record.mean[groups], variance=record.variance[groups])
        there = None if compared is None else (compared.mean[groups], compared.variance[groups])
        found.append((torch.inf if there is None else _difference(here, *there, layer.info.eps), layer.name))
    for one, two in zip(tensors_of(output), tensors_of(other_output), strict=False):
        same = one.is_floating_point() and one.shape == two.shape
        if same and one.dim() > 0 and one.shape[0] % (2 * batch_size) == 0:
            rows = zip(*(_rows_of(each, position, batch_size, 2) for each in (one, two)), strict=True)
            found.append((min(_relative(*pair) for pair in rows), None))
    return found


def _relative(one: Tensor, other: Tensor) -> float:
    """Relative L2 difference."""
    one, other = _finite(one.double()), _finite(other.double())
    return float((one - other).norm()) / (float(one.norm()) or 1.0)


def _verdict(
    session: Session,
    path: PathName,
    batch: Any,
    output: Any,
    reals: list[Pass],
    emulated: Pass,
    output_error: float,
) -> tuple[SelfCheck, bool]:
    """Whether the emulated pass agrees with the real ones, and whether rounding hides the answer.

    Only where they differ by more than rounding does by itself is it of interest how much the network amplifies it.

    Args:
        batch: The first micro-batch, which runs again with its inputs changed in the last digits.
        output: What it gave.
        output_error: Of the outputs.
    """
    layers, floor = session.layers.layers, _unit(session) * _FLOOR
    references = _references(reals)
    errors = {
        slot: _difference(emulated.records[slot], *real, layers[slot[0]].info.eps) for slot, real in references.items()
    }
    if max([output_error, *errors.values()]) <= floor:
        return SelfCheck(output_error, max(errors.values(), default=0.0), floor, True, None), False
    shaken, size = Pass(reals[0].batch_size, reals[0].batch_size), reals[0].batch_size
    try:
        shaken_output, _ = session.forward(path, _shake(batch), shaken)
    except UserCodeError:  # a model that refuses the changed inputs has to agree to rounding
        shaken, shaken_output = reals[0], output
    check, blind = _judge(session, errors, shaken, reals[0], floor)
    tolerance = floor + _AMPLIFICATION * (_output_error([output], shaken_output, size) or 0.0)
    agrees = output_error <= floor or output_error <= tolerance <= _BLIND
    blind = blind or (not agrees and not tolerance <= _BLIND)
    return replace(check, output_error=output_error, passed=check.passed and agrees), blind


def _judge(
    session: Session, errors: Mapping[Slot, float], shaken: Pass, first: Pass, floor: float
) -> tuple[SelfCheck, bool]:
    """Walk through the calls in order; the tolerance grows with the amplification seen so far."""
    tolerance = floor
    worst = 0.0
    for slot, error in errors.items():
        layer, record = session.layers.layers[slot[0]], first.records[slot]
        moved = _difference(shaken.records.get(slot), record.mean, record.variance, layer.info.eps)
        tolerance = max(tolerance, floor + _AMPLIFICATION * moved)
        worst = max(worst, error)
        blind = not tolerance <= _BLIND
        if error > floor and (blind or error > tolerance):
            return SelfCheck(0.0, worst, tolerance, False, layer.name), blind
    return SelfCheck(0.0, worst, tolerance, True, None), False


def _references(reals: list[Pass]) -> dict[Slot, tuple[Tensor, Tensor]]:
    """Statistics of all real micro-batches, per call."""
    slots = [slot for slot in reals[0].records if all(slot in real.records for real in reals)]
    found = {slot: [real.records[slot] for real in reals] for slot in slots}
    return {
        slot: (torch.cat([record.mean for record in records]), torch.cat([record.variance for record in records]))
        for slot, records in found.items()
    }


def _difference(record: Recorded | None, mean: Tensor, variance: Tensor, eps: float) -> float:
    if record is None or record.mean.shape != mean.shape:
        return torch.inf
    # What overflows does so in both: on the eval path that is a symptom to report, no sign of mixing.
    return statistics_distance(_finite(record.mean), _finite(record.variance), _finite(mean), _finite(variance), eps)


def _largest_difference(
    session: Session, references: Mapping[Slot, tuple[Tensor, Tensor]], joined: Pass, positions: Sequence[int]
) -> float:
    """As ``_difference``, of the call of a joined pass that differs most from what some of its micro-batches gave."""
    layers = session.layers.layers
    parts = [(*joined.records[slot].per_group(joined.batch_size), *reference) for slot, reference in references.items()]
    mean, variance, *alone = (_finite(torch.cat(each, 1)) for each in zip(*parts, strict=True))
    segments = Segments(torch.tensor([part[0].shape[1] for part in parts]))
    eps = segments.spread(torch.tensor([layers[index].info.eps for index, _ in references], dtype=torch.float64))
    squares = square_distances(mean[positions], variance[positions], alone[0], alone[1], eps.to(mean)).mean(0)
    return float(segments.mean(squares.cpu()).max().sqrt())


def _shake(batch: Any) -> Any:
    """The same batch with floating-point values changed by about four units in the last place."""
    generator = torch.Generator().manual_seed(0)

    def change(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        noise = torch.randn(leaf.shape, generator=generator).to(leaf.device, leaf.dtype)
        changed = leaf + leaf * noise * (4 * torch.finfo(leaf.dtype).eps)
        return changed.clamp(leaf.min(), leaf.max()) if leaf.numel() else changed  # e.g. probabilities stay below 1

    return map_leaves(batch, change)


def _unit(session: Session) -> float:
    """Unit in the last place of the dtype that the model computes in."""
    dtypes = [parameter.dtype for parameter in session.model.parameters() if parameter.is_floating_point()]
    widest = torch.float64 if dtypes and all(dtype == torch.float64 for dtype in dtypes) else torch.float32
    coarsest = max((torch.finfo(dtype).eps for dtype in dtypes), default=torch.finfo(widest).eps)
    # Of half-precision models a thousand units would be everything: take what a statistic of many values loses.
    return min(coarsest, 0.05 / _FLOOR)


def _output_error(outputs: list[Any], joint: Any, samples: int) -> float | None:
    """Relative L2 difference between the concatenated real outputs and the emulated output; None if none compares."""
    pairs: list[tuple[Tensor, list[Tensor]]] = []
    for parts, whole in zip(zip(*map(tensors_of, outputs), strict=False), tensors_of(joint), strict=False):
        if any(part.dim() == 0 for part in parts) or whole.numel() == 0:
            continue
        per_sample = whole.dim() > 0 and whole.shape[0] % samples == 0
        if per_sample and whole.is_floating_point() and sum(part.shape[0] for part in parts) == whole.shape[0]:
            pairs.append((whole, _arrangements(parts, samples)))
    return _relative_error(pairs)


def _pairs_at(
    position: int, size: int, alone: Any, joint: Any, micro_batches: int
) -> list[tuple[Tensor, list[Tensor]]]:
    """The outputs of a micro-batch that ran alone that compare, with what may be its rows in those of several."""
    pairs = zip(tensors_of(alone), tensors_of(joint), strict=False)
    return [
        (part, _rows_of(whole, position, size, micro_batches))
        for part, whole in pairs
        if part.is_floating_point() and part.numel() and part.dim() and part.shape[0] % size == 0
        if whole.shape == (part.shape[0] * micro_batches, *part.shape[1:])
    ]


def _rows_of(whole: Tensor, position: int, size: int, micro_batches: int) -> list[Tensor]:
    """Those of one micro-batch, if rows of one sample are consecutive, or in blocks of all samples."""
    blocks = whole.unflatten(0, (-1, micro_batches, size))
    return [whole.unflatten(0, (micro_batches, -1))[position], blocks[:, position].flatten(0, 1)]


def _relative_error(pairs: list[tuple[Tensor, list[Tensor]]]) -> float | None:
    """Relative L2 difference of tensors from the arrangement of others that is nearest; None if there are none."""
    error = norm = 0.0
    for tensor, arrangements in pairs:
        reference = _finite(tensor.double())
        size = float(reference.norm()) or 1.0
        difference = min(float((_finite(each.double()) - reference).norm()) / size for each in arrangements)
        weight = float(reference.square().sum())
        error += difference**2 * weight
        norm += weight
    return None if not pairs else (error / norm) ** 0.5 if norm > 0 else error


def _arrangements(parts: tuple[Tensor, ...], samples: int) -> list[Tensor]:
    """The rows of several outputs in the order of one: one after the other, or block by block."""
    plain = torch.cat(parts)
    blocks = plain.shape[0] // samples
    if blocks == 1:
        return [plain]
    return [plain, torch.cat([part.chunk(blocks)[block] for block in range(blocks) for part in parts])]


def _finite(values: Tensor) -> Tensor:
    return values.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def as_sentence(error: CannotEmulateError | BnprobeError, raiser: str = "Joined micro-batches raise") -> str:
    """Why micro-batches cannot run together, or otherwise than the loader gives them, for the report."""
    if isinstance(error, UserCodeError):
        said = shorten(message_of(error.error).strip().partition("\n")[0], _SAID, placeholder=" ...")
        text = f"{raiser} {type(error.error).__name__}{f': {said}' if said else ''}"
        return text if text.endswith((".", "!", "?")) else f"{text}."
    text = str(error).removesuffix(".")
    return f"{text[0].upper()}{text[1:]}."


def _reason(passed: bool, blind: bool, batch_size: int) -> str:
    if passed:
        return f"Statistics are taken per group of {batch_size} sample{'s' if batch_size > 1 else ''}."
    if blind:
        return "The forward pass is random, or amplifies rounding errors too much to verify emulation."
    return "The model mixes the samples of a batch."


def plan_batching(session: Session, reader: Reader, settings: ScanSettings, later: bool = False) -> Batching:
    """Whether micro-batches may run together, and how many do.

    Args:
        later: Where nothing speaks against it they may, for now: the caller sees in the first physical batch, by
            ``agreement``, whether they do. Then there is no check in the verdict yet.

    Raises:
        UsageError: The physical batch asked for is smaller than a micro-batch.
    """
    size = reader.batch_size
    if settings.physical_batch and settings.physical_batch < size:
        raise UsageError(
            f"{option('--physical-batch', settings.physical_batch)} is smaller than the batch size, {size}."
            f" Give at least {size}, or a smaller {option('--batch-size')}."
        )
    if not settings.emulate:
        return Batching(size, not_emulated(f"Switched off ({either('--no-emulate', 'emulate=False')})."))
    opening = reader.look_ahead(OPENING)
    if reader.varies:
        return Batching(size, not_emulated(as_sentence(CannotEmulateError(DIFFERENT_SIZES))))
    most = settings.physical_batch or plan_samples(Footprint(0, 0), session.device)
    if most // size < OPENING and not settings.batch_sizes:
        # The train path runs as it is; that samples are independent on the eval path is still to be known.
        emulation, _ = checked(session, opening, size, check_samples)
        return Batching(size, emulation)
    own = reader.look_ahead_own(OPENING) if later and not settings.batch_sizes else []
    if not reader.varies and (found := _on_trust(session, own, size)) is not None:
        emulation, footprint = replace(found[0], opening=tuple(opening)), found[1]
    else:
        emulation, footprint = checked(session, opening, size, self_check)
    if not emulation.trusted:
        return Batching(size, emulation)
    samples = settings.physical_batch or plan_samples(footprint, session.device)
    return Batching(size, emulation, max(1, samples // size))


def _on_trust(session: Session, own: list[Any], size: int) -> tuple[Emulation, Footprint] | None:
    """The verdict before the first physical batch, which is to show it; and what a sample takes in memory.

    The micro-batch by which layers were looked for ran then, so the others run here.

    Args:
        own: The first micro-batches of this process, which its first physical batch holds. In several processes one has
            run already at most.

    Returns:
        None where that physical batch cannot show it: random numbers are drawn, rows are not samples, autocast is on,
            which the self-check does without, or a micro-batch raises by itself.
    """
    explored, session.alone = session.alone, None
    if explored is None or len(own) < OPENING or session.autocast is not None:
        return None
    records = [record for pass_ in explored.passes.values() for record in pass_.records.values()]
    rows_are_samples = all(record.rows == size and record.groups is None for record in records)
    if explored.random or explored.passes.keys() != set(PATHS) or not rows_are_samples:
        return None
    alone = tuple(explored if batch is explored.batch else Alone(batch) for batch in own)
    try:
        for each, path in itertools.product(alone, PATHS):
            if each is not explored:
                session.run_alone(path, each, size)
    except UserCodeError:
        return None
    values: dict[str, Mapping[Slot, float]] = {path: _values_per_sample(explored.passes[path]) for path in PATHS}
    emulation = Emulation(True, _reason(True, False, size), None, {}, values, alone)
    return emulation, footprint_of(explored.passes["train"])


def checked(session: Session, opening: list[Any], size: int, check: Check) -> tuple[Emulation, Footprint]:
    """Run a check on the first micro-batches, which are measured afterwards; also what a sample takes in memory.

    Args:
        opening: Two micro-batches of ``size`` samples, on the host. A single one says by its halves whether samples
            are independent on the eval path.

    Raises:
        UserCodeError: The model raised, and not for want of autocast.
    """
    unknown = Footprint(0, 0)
    if len(opening) < OPENING:
        return _checked_in_halves(session, opening, size), unknown
    try:
        return check(session, [to_device(batch, session.device) for batch in opening], size)
    except UserCodeError:
        if session.autocast is None:
            raise
        return not_emulated("The self-check runs without autocast, which this model does not support."), unknown
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return not_emulated("Two micro-batches do not fit into memory together."), unknown


def _checked_in_halves(session: Session, opening: list[Any], size: int) -> Emulation:
    reason, half = "The data gives only one micro-batch.", size // 2
    if not opening or not half:
        return not_emulated(reason)
    parts = [pick(opening[0], list(range(start, start + half)), size) for start in (0, half)]
    try:
        emulation, _ = check_samples(session, [to_device(part, session.device) for part in parts], half)
    except Exception:  # the micro-batch itself may still run
        return not_emulated(reason)
    return replace(emulation, reason=reason, check=None) if emulation.trusted else not_emulated(reason)


def not_emulated(reason: str) -> Emulation:
    """Micro-batches run one by one; ``reason`` is one sentence for the report."""
    return Emulation(trusted=False, reason=reason, check=None, layouts={})
