"""``bnprobe.Monitor``: sample a training run, screen the samples, and scan where something is wrong."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from bnprobe._version import __version__
from bnprobe.config.spec import ScanSettings
from bnprobe.errors import BnprobeError, UsageError
from bnprobe.loading.samples import count_samples
from bnprobe.measure.batch import copy_tensors
from bnprobe.monitor.changes import (
    ACTIONS,
    RAMP,
    RECALIBRATE,
    WARN,
    Change,
    change,
    require_response,
    restored,
    take_back,
    take_statistics,
)
from bnprobe.monitor.log import Sink, event_of, sink_of
from bnprobe.monitor.loss import LossTape
from bnprobe.monitor.sampling import FIGURES, Inputs, Look, Sampler, call_model
from bnprobe.monitor.screening import Screening, updates_to_ripen
from bnprobe.numbers import count, joined
from bnprobe.records import LayerSample, ModeLoss, MonitorFinding, MonitorSample, Report
from bnprobe.stats.theory import equivalent_batch_size

if TYPE_CHECKING:
    from types import TracebackType

    from torch.utils.hooks import RemovableHandle
    from typing_extensions import Self

Response = str | Callable[["Monitor", MonitorFinding], object]
"""What to do about a finding: an action, "warn", or a function of the monitor and the finding."""


class Monitor:
    """Watches the norm layers of a model while a loop trains it; the loop stays as it is.

    Every ``every`` optimizer steps it runs the step's batch once more in train and in eval mode: r, d, D and n_eq of
    every layer against its running statistics, the distance of the outputs, and the loop's own loss in both modes,
    which is what ``eval()`` would cost right now. Sequential tests screen these samples. Where they raise an alarm, the
    next batches are kept and scanned as `bnprobe.scan` does, and what the scan finds is reported. The tests are
    anytime-valid: while batches are large enough, no D is on average beyond its limit unless the loss shows nothing of
    it, and the loss is no more often twice as large in eval mode than not, the probability that a run of any length has
    an alarm is at most ``false_alarms``; see ``bnprobe.monitor.screening``.

    Between samples no hook is on the model. Weights, statistics, gradients and the random state are bit-identical to
    training without a monitor.

    Args:
        model: What the loop calls: also wrapped by DistributedDataParallel or torch.compile. In several processes the
            first one watches.
        every: Optimizer steps from sample to sample.
        log: Where samples and findings go: a folder or a .jsonl file, a SummaryWriter, a run of Weights & Biases, a
            function that takes a dictionary, or a list of these.
        on_finding: What to do about a finding: "warn"; or, to its layers and with a warning, "freeze" (their running
            statistics normalize in training, too), "renorm" (Batch Renorm, whose limits open over ten samples) or
            "recalibrate" (statistics of the batches that were scanned); or a function that takes the monitor and the
            finding; or a dictionary of these by rule, e.g. ``{"BN203": "recalibrate"}``; the others are warned of.
            Parameters and buffers stay the same objects, so that the optimizer goes on. Layers that were frozen or made
            Batch Renorm become BN again once the cause is gone: see ``bnprobe.monitor.screening``. In one process only.
        batches: Batches that a scan after an alarm takes.
        false_alarms: See above.
        include, exclude: Globs of the layers to watch, as in a scan.

    Attributes:
        step: Optimizer steps so far.
        sample: The last sample; None before the first.
        findings: All findings so far.
        report: The report of the last scan; None before the first.
        changes: The layers that are changed at the moment.

    Raises:
        UsageError: An argument cannot work.
        NothingToProbeError: The model has no norm layer, or none is selected.

    Example:
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.01)
        >>> with bnprobe.Monitor(model, every=2) as monitor:
        ...     for _ in range(4):
        ...         loss = model(next(iter(loader))[0]).square().mean()
        ...         loss.backward()
        ...         _ = optimizer.step()
        >>> monitor.step, monitor.findings
        (4, [])
        >>> monitor.sample.loss.eval != monitor.sample.loss.train
        True
    """

    def __init__(
        self,
        model: nn.Module,
        every: int = 100,
        *,
        log: Any = None,
        on_finding: Response | Mapping[str, Response] = WARN,
        batches: int = 16,
        false_alarms: float = 0.05,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> None:
        if every < 1 or batches < 2:
            raise UsageError(f"every={every} and batches={batches}: give at least 1 step and 2 batches.")
        if not 0 < false_alarms < 1:
            raise UsageError(f"false_alarms={false_alarms} is a probability: give a number between 0 and 1.")
        require_response(on_finding)
        self.step = 0
        self.sample: MonitorSample | None = None
        self.findings: list[MonitorFinding] = []
        self.report: Report | None = None
        self._called, self._every, self._batches = model, every, batches
        self.changes: list[Change] = []
        self._on_finding = on_finding
        self._settings = ScanSettings(include=tuple(include), exclude=tuple(exclude))
        self._sampler = Sampler(model, self._settings)
        self._own = {id(parameter) for parameter in self._sampler.model.parameters()}
        names = [layer.name for layer in self._sampler.layers.selected]
        self._ripe_from = {layer.name: updates_to_ripen(layer.info.momentum) for layer in self._sampler.layers.selected}
        self._screening = Screening(names, false_alarms)
        self._sinks: list[Sink] = [
            sink_of(each) for each in (log if isinstance(log, list) else [log]) if each is not None
        ]
        self._steps: RemovableHandle | None = None
        self._hooks = ExitStack()
        self._optimizer: Callable[[], Optimizer | None] = lambda: None
        self._last: Callable[[], Optimizer | None] = self._optimizer
        self._looking = self._is_compiled = self._stepping = self._over = False
        self._look: Look | None = None
        self._losses: tuple[Tensor, Tensor] | None = None
        self._tape: LossTape | None = None
        self._alarm: int | None = None
        self._rests_until = self._rest = 0
        self._kept: list[Inputs] = []

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Begin to count optimizer steps: as the beginning of a ``with`` block."""
        several = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
        responses = self._on_finding.values() if isinstance(self._on_finding, Mapping) else [self._on_finding]
        if several and any(response in ACTIONS for response in responses):
            raise UsageError("A monitor changes layers in one process only: in several, on_finding may warn or call.")
        self._over = False
        if self._steps is not None or (torch.distributed.is_initialized() and torch.distributed.get_rank()):
            return
        skipped = {layer.name: layer.reason for layer in self._sampler.layers.skipped}
        start = {"model": type(self._sampler.model).__name__, "every": self._every, "skipped": skipped}
        self._write({"event": "start", "step": self.step, "version": __version__, **start})
        self._steps = register_optimizer_step_post_hook(self._stepped)
        self._prepare()

    def stop(self) -> None:
        """End: nothing of the monitor is left on the model or the optimizers. `start` goes on.

        After an error within a step it leaves a hook that does nothing, until it is called again: torch is iterating
        over the hooks of all monitors.
        """
        self._over = True
        self._unhook()
        if self._steps is not None and not self._stepping:
            self._steps.remove()
            self._steps = None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on with, of plain values."""
        own = {"step": self.step, "alarm": self._alarm, "rest": self._rest, "rests_until": self._rests_until}
        changes = [each.state() for each in self.changes]
        found = [asdict(each) for each in self.findings]
        return {**own, "screening": self._screening.state(), "findings": found, "changes": changes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken; a scan that had begun to keep batches keeps new ones.

        Layers that were changed then are changed again; whether the cause is gone is asked of frozen ones once five
        samples were taken. Load the weights of the model afterwards.

        Raises:
            StateError: It is of other layers; nothing was changed.
            RepairError: A layer cannot be converted, as in another model.
        """
        self._screening.restore(state["screening"])  # first: it may refuse
        self.step, self._alarm = state["step"], state["alarm"]
        self._rest, self._rests_until = state["rest"], state["rests_until"]
        self.findings = [MonitorFinding(**{**each, "layers": tuple(each["layers"])}) for each in state["findings"]]
        for made in self.changes:
            self._take_back(made)
        for each in state["changes"]:
            self._follow(restored(self._sampler.model, each))
        self._kept.clear()
        if self._steps is not None:
            self._unhook()
            self._prepare()

    # --- Steps --------------------------------------------------------------------------------------------------------

    def _stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Runs after a step of any optimizer."""
        if self._over or not self._counts(optimizer):
            return
        self._unhook()
        self._stepping = True
        try:
            if self._is_compiled:
                raise UsageError("The loop calls a compiled model. Give the monitor what torch.compile returned.")
            if self._look is not None:
                self._finish(self._look)
        except Exception as error:  # a log's, too: the user's training goes on
            self._give_up(error)
            return
        finally:
            self._stepping = False
            self._look = self._losses = None
        self.step += 1
        for made in self.changes:
            if made.schedule is not None:
                made.schedule.advance()
        self._prepare()

    def _counts(self, optimizer: Optimizer) -> bool:
        """Whether a step is one of the model: of several optimizers that take turns, the first one counts.

        One that steps twice in a row has taken its place.
        """
        if not any(id(each) in self._own for group in optimizer.param_groups for each in group["params"]):
            return False
        counted, last = self._optimizer(), self._last()
        self._last = ref(optimizer)
        if counted is None or last is optimizer:
            self._optimizer = self._last
            return True
        return counted is optimizer

    def _prepare(self) -> None:
        """Hook the model where the coming step is to be looked at."""
        if self._over or (self._alarm is None and (self.step == 0 or self.step % self._every)):
            return
        before = self._called.register_forward_pre_hook(self._before, with_kwargs=True)
        after = self._called.register_forward_hook(self._after)
        self._hooks.callback(before.remove)
        self._hooks.callback(after.remove)

    def _unhook(self) -> None:
        self._hooks.close()
        if self._tape is not None:
            self._tape.stop()
            self._tape = None

    # --- A step that is looked at -------------------------------------------------------------------------------------

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            self._is_compiled = True
            return
        if self._looking or not self._sampler.model.training or not torch.is_grad_enabled():
            return  # without gradients: for a log, a second view, or the first of the two runs of a checkpoint
        if self._tape is not None:  # a second call before backward(): the loss is of both
            self._tape.drop()
            return
        if self._look is not None:
            return
        self._looking = True
        try:
            if self._alarm is not None:
                self._keep((args, kwargs))
            else:
                self._look = self._sampler.look((args, kwargs))
        except Exception as error:  # whatever it is, the user's training goes on
            self._give_up(error)
        finally:
            self._looking = False

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        if self._looking or self._look is None or self._tape is not None:
            return
        tape = self._tape = LossTape(output, self._look.eval, self._found_loss)
        tape.start()
        # Before the step, not after it: the optimizer's own functions are none of the loss.
        self._hooks.callback(register_optimizer_step_pre_hook(lambda *_: tape.stop()).remove)

    def _found_loss(self, train: Tensor, eval_: Tensor) -> None:
        self._losses = train, eval_

    def _give_up(self, error: Exception) -> None:
        self.stop()
        warnings.warn(
            f"bnprobe.Monitor stopped at step {self.step}, and training goes on: {type(error).__name__}: {error}",
            stacklevel=2,
        )

    def _finish(self, look: Look) -> None:
        """Read the figures, which waits for the device once, and screen them."""
        parts = [look.figures.flatten(), look.distance]
        if self._losses is not None:
            parts += [value.reshape(1) for value in self._losses]
        device = look.distance.device
        values: list[float] = torch.cat([part.double().to(device) for part in parts]).tolist()
        rows = [values[FIGURES * row :][:FIGURES] for row in range(len(look.layers))]
        layers, noise, ripe, gone_on = {}, {}, {}, {}
        for name, (mismatch, iid, r, square, tracked, settled) in zip(look.layers, rows, strict=True):
            layers[name] = LayerSample(mismatch, equivalent_batch_size(mismatch), r, square**0.5)
            noise[name], gone_on[name] = iid, settled
            updates = self.step if math.isnan(tracked) else tracked
            ripe[name] = updates >= self._ripe_from[name]
        difference, norm, *losses = values[FIGURES * len(rows) :]
        distance = (difference / norm) ** 0.5 if norm > 0 else None
        loss = ModeLoss(*losses) if losses else None
        self.sample = MonitorSample(self.step, look.samples, distance, loss, layers)
        self._write(event_of(self.sample))
        changed = {name: gone_on[name] for made in self.changes for name in made.layers if name in layers}
        raised = self._screening.update(self.sample, noise, ripe, changed)
        if raised and self.step >= self._rests_until:
            self._alarm = self.step
            self._write({"event": "alarm", "step": self.step, "series": raised})
        for made in [each for each in self.changes if self._screening.is_over(each.layers)]:
            self._take_back(made)
            self._write({"event": "change", "step": self.step, "action": "undo", "layers": list(made.layers)})

    # --- After an alarm -----------------------------------------------------------------------------------------------

    def _keep(self, inputs: Inputs) -> None:
        """Keep a copy of a batch; once there are enough, scan them."""
        size = count_samples(inputs)
        if size is None or (self._kept and size != count_samples(self._kept[0])):
            return
        self._kept.append(copy_tensors(inputs))
        if len(self._kept) == self._batches:
            kept, self._kept = self._kept, []
            self._scan(kept, size)

    def _scan(self, kept: list[Inputs], size: int) -> None:
        from bnprobe.commands.scan import scan

        alarm, self._alarm = self._alarm, None
        assert alarm is not None
        self._screening.forget()
        self.report = scan(
            self._sampler.model,
            kept,
            size,
            num_batches=len(kept),
            forward=call_model,
            batch_size_of=lambda batch: size,  # the others were left out
            include=self._settings.include,
            exclude=self._settings.exclude,
        )
        known = {each.rule for each in self.findings}
        found = [each for each in self.report.diagnoses if each.severity != "info"]
        # What goes on as it was is looked at again less and less often.
        self._rest = self._every if any(each.rule not in known for each in found) else max(2 * self._rest, self._every)
        self._rests_until = self.step + self._rest
        for each in found:
            finding = MonitorFinding(
                self.step, alarm, each.rule, each.cause, each.severity, each.layers, each.message, each.remedy
            )
            self.findings.append(finding)
            self._write(event_of(finding))
            response = self._response(finding.rule)
            if not callable(response) and response != WARN:
                self._act(response, finding, kept, size)
            if each.rule in known:
                continue
            if callable(response):
                response(self, finding)
            else:
                _warn(finding)

    # --- What is done about it ----------------------------------------------------------------------------------------

    def _response(self, rule: str) -> Response:
        return self._on_finding.get(rule, WARN) if isinstance(self._on_finding, Mapping) else self._on_finding

    def _act(self, action: str, finding: MonitorFinding, kept: list[Inputs], size: int) -> None:
        """Change the layers of a finding that are not changed yet; one that cannot be is warned of."""
        changed = {name for made in self.changes for name in made.layers}
        names = [name for name in finding.layers if name not in changed]
        if not names:
            return
        try:
            if action == RECALIBRATE:
                take_statistics(self._sampler.model, names, kept, size)
            else:
                self._follow(change(self._sampler.model, action, names, RAMP * self._every))
                self._screening.forget_over(names)
        except BnprobeError as error:
            warnings.warn(f"bnprobe, step {self.step}: no layer was changed: {error}", stacklevel=2)
            return
        self._write({"event": "change", "step": self.step, "action": action, "layers": names})

    def _follow(self, made: Change) -> None:
        self.changes.append(made)
        self._sampler.follow(made.layers, changed=True)

    def _take_back(self, made: Change) -> None:
        take_back(self._sampler.model, made)
        self.changes = [each for each in self.changes if each is not made]
        self._sampler.follow(made.layers, changed=False)

    def _write(self, event: dict[str, Any]) -> None:
        for sink in self._sinks:
            sink(event)


def _warn(finding: MonitorFinding) -> None:
    layers = (
        f" in {joined(finding.layers[:3])}"
        if len(finding.layers) <= 3
        else f" in {count(len(finding.layers), 'layer')}"
    )
    where = layers if finding.layers else ""
    warnings.warn(
        f"bnprobe, step {finding.step}: {finding.rule}{where}: {finding.message} Remedy: {finding.remedy}", stacklevel=2
    )
