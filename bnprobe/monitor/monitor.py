"""``bnprobe.Monitor``: sample a training run, screen the samples, and scan where something is wrong."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from itertools import islice
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
from bnprobe.distributed import ALONE, current_world
from bnprobe.errors import UsageError, warn_user
from bnprobe.loading.samples import count_samples_of_call
from bnprobe.measure.batch import copy_tensors
from bnprobe.measure.layers import anatomy
from bnprobe.monitor.changes import ACTIONS, WARN, Change, require_response
from bnprobe.monitor.inputs import CAUSE, INPUTS, REMEDY, InputShift
from bnprobe.monitor.log import Lines, Sink, event_of, sink_of
from bnprobe.monitor.loss import LossTape
from bnprobe.monitor.orders import Orders
from bnprobe.monitor.sampling import FIGURES, Hook, Inputs, Look, Sampler, call_model
from bnprobe.monitor.screening import Screening, updates_to_ripen
from bnprobe.monitor.updates import Counted, UpdateCount, diagnosed
from bnprobe.nn import SyncBatchRenorm
from bnprobe.numbers import listed
from bnprobe.records import LayerSample, ModeLoss, MonitorFinding, MonitorSample, Report
from bnprobe.rules.facts import Facts
from bnprobe.stats.theory import equivalent_batch_size

if TYPE_CHECKING:
    from types import TracebackType

    from torch.utils.hooks import RemovableHandle
    from typing_extensions import Self

Response = str | Callable[["Monitor", MonitorFinding], object]
"""What to do about a finding: an action, "warn", or a function of the monitor and the finding."""

_FEWEST_KEPT = 4
"""Batches of one size that a scan can tell something from, where sizes vary."""

PARTS = 10
"""The scores of so many batches are taken from sample to sample."""


class Monitor:
    """Watches the norm layers of a model while a loop trains it; the loop stays as it is.

    Every ``every`` optimizer steps it runs the step's batches once more in train and in eval mode: r, d, D and n_eq of
    every layer against its running statistics, the distance of the outputs, and the loop's own loss in both modes,
    which is what ``eval()`` would cost right now. Sequential tests screen these samples. Where they raise an alarm, the
    next batches are kept and scanned as `bnprobe.scan` does, and what the scan finds is reported. The tests are
    anytime-valid: while batches are large enough and exchangeable, no D is on average beyond its limit unless the loss
    shows nothing of it, the loss is no more often twice as large in eval mode than not, and hardly any step updates the
    running statistics beyond what it is trained by, the probability that a run of any length has an alarm is at most
    ``false_alarms``; see ``bnprobe.monitor.screening`` and ``bnprobe.monitor.inputs``.

    Between samples the model has a hook in ten of the steps, for means of the inputs, and in the others none. Weights,
    statistics, gradients and the random state are bit-identical to training without a monitor.

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
            A finding on the "inputs" has no layers, so that there is nothing to change.
            Parameters and buffers stay the same objects, so that the optimizer goes on. Layers that were frozen or made
            Batch Renorm become BN again once the cause is gone: see ``bnprobe.monitor.screening``. In several processes
            all enter the monitor, and change the same layers after the same step, as the first one decides.
        batches: Batches that a scan after an alarm takes.
        false_alarms: See above.
        include, exclude: Globs of the layers to watch, as in a scan.

    Attributes:
        step: Optimizer steps so far.
        sample: The last sample; None before the first.
        findings: All findings so far.
        report: The report of the last scan; None before the first.

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
        self._on_finding = on_finding
        self._settings = ScanSettings(include=tuple(include), exclude=tuple(exclude))
        self._sampler = Sampler(model, self._settings)
        self._own = {id(parameter) for parameter in self._sampler.model.parameters()}
        names = [layer.name for layer in self._sampler.layers.selected]
        self._ripe_from = {layer.name: updates_to_ripen(layer.info.momentum) for layer in self._sampler.layers.selected}
        self._screening = Screening(names, false_alarms)
        self._orders = Orders(self._sampler, self._screening, every, self._done, self._warn)
        self._sinks: list[Sink] = [
            sink_of(each) for each in (log if isinstance(log, list) else [log]) if each is not None
        ]
        self._steps: RemovableHandle | None = None
        self._hooks = ExitStack()
        self._optimizer: Callable[[], Optimizer | None] = lambda: None
        self._last: Callable[[], Optimizer | None] = self._optimizer
        self._is_looking = self._is_compiled = self._stepping = self._over = self._keeps = False
        self._looks: list[Look] = []
        self._look: Look | None = None
        self._losses: list[tuple[Tensor, Tensor] | None] = []
        self._tape = LossTape(self._found_loss)
        self._thread = 0
        self._world, self._gave_up = ALONE, False
        self._in_train_mode = True
        self._inputs, self._input_due, self._is_due = InputShift(), False, False
        self._updates = UpdateCount(lambda: self._is_looking)
        self._counted: list[dict[str, Counted]] = []
        self._alarm: int | None = None
        self._rests_until = self._rest = 0
        self._kept: dict[int | None, list[Inputs]] = {}

    def __enter__(self) -> Self:
        if self in _running:
            raise UsageError("This monitor is watching already: enter it once, around the whole loop.")
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Begin to count optimizer steps: as the beginning of a ``with`` block, in every process.

        Raises:
            UsageError: Says what cannot be watched; the same in every process, where layers may be changed in several.
            OutputError: The log cannot be written.
        """
        if self in _running:
            return
        self._world = current_world()
        self._orders.world = self._world if self._acts else ALONE
        self._require_watchable()
        self._over = self._gave_up = False
        if not self._world.is_main and not self._acts:
            return
        if self._world.is_main:
            skipped = {layer.name: layer.reason for layer in self._sampler.layers.skipped}
            start = {"model": type(self._sampler.model).__name__, "every": self._every, "skipped": skipped}
            self._write({"event": "start", "step": self.step, "version": __version__, **start})
        if self._steps is None:
            self._steps = register_optimizer_step_post_hook(self._stepped)
        _running.append(self)
        self._prepare()

    def _require_watchable(self) -> None:
        """Refuse what cannot be watched; where processes change layers together, in all of them or in none."""
        problem = self._sync_problem() or self._other_problem()
        if self._acts:
            names = [layer.name for layer in self._sampler.layers.selected]
            found = self._world.gather((problem, self.step, self._every, names))
            problem = next((each for each, *_ in found if each), None)
            if problem is None and any(each != found[0] for each in found):
                problem = (
                    "The monitors of the processes differ in every, their steps or their layers: to change layers in"
                    " all of them, they must be the same."
                )
        if problem:
            raise UsageError(problem)

    def _sync_problem(self) -> str | None:
        if self._world.size == 1:
            return None
        kinds = nn.SyncBatchNorm | SyncBatchRenorm
        names = [name for name, module in self._sampler.model.named_modules() if isinstance(module, kinds)]
        if not names:
            return None
        return (
            f"{listed(names, 3)}: with SyncBatchNorm, layers take the statistics of all processes. A sample runs in"
            " one, and would wait for the others without an end: such a model can be watched in one process only."
        )

    def _other_problem(self) -> str | None:
        """That another monitor watches layers that this one may change, or may change layers that this one watches."""
        own = {layer.module: layer.name for layer in self._sampler.layers.selected}
        for other in _running:
            shared = [own[layer.module] for layer in other._sampler.layers.selected if layer.module in own]
            if shared and (self._acts or other._acts):
                return (
                    f"Another monitor watches {listed(shared, 3)} already, and on_finding of one of the two changes"
                    ' layers. Give the layers to one monitor: with include and exclude, or on_finding="warn" for both.'
                )
        return None

    @property
    def changes(self) -> list[Change]:
        """The layers that are changed at the moment."""
        return self._orders.changes

    @property
    def _acts(self) -> bool:
        """Whether it may change layers by itself."""
        responses = self._on_finding.values() if isinstance(self._on_finding, Mapping) else [self._on_finding]
        return any(response in ACTIONS for response in responses if not callable(response))

    def stop(self) -> None:
        """End: nothing of the monitor is left on the model or the optimizers. `start` goes on.

        After an error within a step it leaves a hook that does nothing, until it is called again: torch is iterating
        over the hooks of all monitors.
        """
        self._over = True
        self._unhook()
        if self in _running:
            _running.remove(self)
        for sink in self._sinks:
            if isinstance(sink, Lines):
                sink.close()
        if self._steps is not None and not self._stepping:
            self._steps.remove()
            self._steps = None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on with, of plain values."""
        own = {"step": self.step, "alarm": self._alarm, "rest": self._rest, "rests_until": self._rests_until}
        own["in_train_mode"] = self._in_train_mode
        changes = [each.state() for each in self.changes]
        found = [asdict(each) for each in self.findings]
        tests = {"screening": self._screening.state(), "inputs": self._inputs.state()}
        return {**own, **tests, "findings": found, "changes": changes}

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
        self._in_train_mode = state["in_train_mode"]
        self.findings = [MonitorFinding(**{**each, "layers": tuple(each["layers"])}) for each in state["findings"]]
        self._orders.restore(state["changes"])
        self._inputs.restore(state["inputs"])
        self._kept.clear()
        self._counted.clear()
        if self._steps is not None:
            self._unhook()
            self._prepare()

    # --- Steps --------------------------------------------------------------------------------------------------------

    def _stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Runs after a step of any optimizer."""
        if self._over or not self._counts(optimizer):
            if not self._is_own(optimizer):
                self._updates.clear()
            return
        self._unhook()
        looks, self._looks, self._look = self._looks, [], None
        losses, self._losses = self._losses, []
        self._stepping = True
        try:
            if self._is_compiled:
                raise UsageError("The loop calls a compiled model. Give the monitor what torch.compile returned.")
            if _in_backward():
                raise UsageError("The optimizer steps within backward(), when the loss and the step are not over.")
            if self._alarm is not None:
                self._counted.append(self._updates.found())
            elif looks:
                self._finish(looks, losses)
        except Exception as error:  # a log's, too: the user's training goes on
            self._give_up(error)
        try:
            is_time = self._together and self.step and self.step % self._every == 0
            if is_time and not self._orders.agree(self._gave_up):
                self.stop()
        except Exception as error:
            self._give_up(error)
            self.stop()
        finally:
            self._stepping = False
        if self._over:
            return
        self.step += 1
        for made in self.changes:
            if made.schedule is not None:
                made.schedule.advance()
        self._prepare()

    @property
    def _together(self) -> bool:
        """Whether layers are changed in several processes: in all of them after the same step."""
        return self._orders.world.size > 1

    def _counts(self, optimizer: Optimizer) -> bool:
        """Whether a step is one of the model: of several optimizers that take turns, the first one counts.

        One that steps twice in a row has taken its place.
        """
        if not self._is_own(optimizer):
            return False
        counted, last = self._optimizer(), self._last()
        self._last = ref(optimizer)
        if counted is None or last is optimizer:
            self._optimizer = self._last
            return True
        return counted is optimizer

    def _is_own(self, optimizer: Optimizer) -> bool:
        """Whether it moves a parameter of the model."""
        given = {id(each) for group in optimizer.param_groups for each in group["params"]}
        if self._own.isdisjoint(given):  # some may have been put in the place of others
            self._own = {id(parameter) for parameter in self._sampler.model.parameters()}
        return not self._own.isdisjoint(given)

    def _prepare(self) -> None:
        """Hook the model where the coming step is to be looked at, or the scores of its inputs are to be taken."""
        if self._over or self._gave_up or not self._world.is_main:
            return
        due = self._alarm is not None or (self.step > 0 and self.step % self._every == 0)
        self._input_due = self.step % max(1, self._every // PARTS) == 0
        if not (due or self._input_due):
            return
        self._is_due, self._keeps = due, self._alarm is not None
        self._tape = LossTape(self._found_loss)
        self._thread = threading.get_ident()
        before = self._called.register_forward_pre_hook(Hook(self._before), prepend=True, with_kwargs=True)
        self._hooks.callback(before.remove)
        if not due:
            return
        if not self._keeps:
            self._in_train_mode = False  # until a call has shown it
        after = self._called.register_forward_hook(Hook(self._after), with_kwargs=True)
        self._hooks.callback(after.remove)
        # Before the step, not after it: the optimizer's own functions are none of the loss.
        self._hooks.callback(register_optimizer_step_pre_hook(self._leaves_tape).remove)
        if not hasattr(self._called, "_orig_mod"):  # compiled code does not call the hooks of layers
            self._updates.start(self._sampler.layers.selected)
            self._hooks.callback(self._updates.stop)

    def _leaves_tape(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if threading.get_ident() == self._thread:
            self._tape.leave()

    def _unhook(self) -> None:
        self._hooks.close()
        self._tape.leave()

    # --- A step that is looked at -------------------------------------------------------------------------------------

    def _is_of_step(self) -> bool:
        """Whether a call of the model is one that trains: each of them is an update of the running statistics.

        One without gradients is for a log, or the first of the two runs of a checkpoint; one within ``backward()`` is
        the second of them. One in eval mode is of the step if none in train mode is.
        """
        if self._is_looking or not torch.is_grad_enabled():
            return False
        if self._in_train_mode and not self._sampler.model.training:
            return False
        return threading.get_ident() == self._thread and not (_in_backward() and self._looks)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            self._is_compiled = True
            return
        if not self._is_of_step():
            return
        self._tape.leave()  # what the model computes is none of the loss
        self._is_looking = True
        try:
            with LossTape.silence():
                self._see((args, kwargs))
        except Exception as error:  # whatever it is, the user's training goes on
            self._give_up(error)
        finally:
            self._is_looking = False

    def _see(self, inputs: Inputs) -> None:
        """Take the scores of a call's inputs, look at it, or keep its batch."""
        trains = self._sampler.model.training
        if self._input_due and trains:
            self._input_due = False
            self._inputs.take(self.step, inputs)
        if not self._is_due:
            return
        if self._keeps:
            if self._alarm is not None:  # else the batches are complete with an earlier call of this step
                self._keep(inputs)
            return
        if trains and not self._in_train_mode:  # what was called before in eval mode was no training
            self._looks.clear()
            self._losses.clear()
            self._tape = LossTape(self._found_loss)
            self._in_train_mode = True
        if gone := self._sampler.find_again():
            self._warn(f"watched no more, since not there any more: {listed(gone)}")
        self._look = self._sampler.look(inputs, self._tape.in_eval(inputs))
        self._looks.append(replace(self._look, eval=None))  # outputs may be large, and calls many

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if torch.compiler.is_compiling() or self._look is None or not self._is_of_step():
            return
        look, self._look = self._look, None
        self._tape.add((args, kwargs), output, look.eval)
        if _in_backward() or not self._tape.enter():
            self._losses.append(None)

    def _found_loss(self, found: tuple[Tensor, Tensor] | None) -> None:
        if not any(map(_has_gradient, self._sampler.model.parameters())):
            self._losses.clear()  # zero_grad() left nothing of what was called before
        self._losses.append(found)

    def _give_up(self, error: Exception) -> None:
        if self._together:  # the others wait for what this process decides: it tells them in the next step that is due
            self._gave_up = True
            self._unhook()
        else:
            self.stop()
        text = f"bnprobe.Monitor stopped at step {self.step}, and training goes on: {type(error).__name__}: {error}"
        warn_user(text)

    def _finish(self, looks: Sequence[Look], losses: Sequence[tuple[Tensor, Tensor] | None]) -> None:
        """Read the figures of all calls of a step, which waits for the device once, and screen their means."""
        device = looks[0].distance.device
        known = [each for each in losses if each is not None] if None not in losses else []
        parts = [part for look in looks for part in (look.figures.flatten(), look.distance)]
        parts += [value.reshape(1) for pair in known for value in pair]
        parts += self._inputs.waiting()
        values = iter(torch.cat([part.double().to(device) for part in parts]).tolist())
        calls: dict[str, list[list[float]]] = {layer.name: [] for layer in self._sampler.layers.selected}
        distances = []
        for look in looks:
            for name in look.layers:
                calls[name].append(list(islice(values, FIGURES)))
            distances.append(list(islice(values, 2)))
        frozen = frozenset().union(*(look.frozen for look in looks))
        layers, noise, ripe, gone_on = {}, {}, {}, {}
        for name, rows in calls.items():
            if rows:
                means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
                mismatch, noise[name], r, square, tracked, gone_on[name] = means
                layers[name] = LayerSample(mismatch, equivalent_batch_size(mismatch), r, square**0.5, name in frozen)
                if name in frozen:  # of the calls that completed enough samples
                    together = [row[-1] for row in rows if not math.isnan(row[-1])]
                    gone_on[name] = sum(together) / len(together) if together else math.nan
                updates = self.step if math.isnan(tracked) else tracked
                ripe[name] = name in frozen or updates >= self._ripe_from[name]
        difference, norm = (sum(column) for column in zip(*distances, strict=True))
        distance = (difference / norm) ** 0.5 if norm > 0 else None
        pairs = [tuple(islice(values, 2)) for _ in known]
        self._inputs.update(list(values))
        loss = ModeLoss(*(sum(column) for column in zip(*pairs, strict=True))) if pairs else None
        sizes = [look.samples for look in looks if look.samples is not None]
        samples = round(sum(sizes) / len(sizes)) if len(sizes) == len(looks) else None
        self.sample = MonitorSample(self.step, samples, distance, loss, layers)
        self._write(event_of(self.sample))
        changed = {name: gone_on[name] for made in self.changes for name in made.layers if name in layers}
        # Of batches whose number of samples is not known, no noise is known.
        held = {name: gone_on[name] if samples else math.nan for name in frozen}
        extra = any(each.extra for each in self._updates.found().values())
        others = {INPUTS: self._inputs.e_value}
        raised = self._screening.update(self.sample, noise, ripe, changed, held, extra, others)
        wanted = [each for each in raised if each == INPUTS or self.step >= self._rests_until]
        if wanted:
            self._write({"event": "alarm", "step": self.step, "series": wanted})
        if INPUTS in wanted:
            message = self._inputs.message()
            self._inputs.forget()
            self._tell(MonitorFinding(self.step, self.step, INPUTS, CAUSE, "warning", (), message, REMEDY), [], 0)
        if set(wanted) - {INPUTS}:
            self._alarm = self.step
        self._orders.take_back_what_is_over()

    # --- After an alarm -----------------------------------------------------------------------------------------------

    def _keep(self, inputs: Inputs) -> None:
        """Keep a copy of a batch; once there are enough of one size, scan them.

        The last batch of an epoch may be smaller, so sizes are kept apart. Where sizes vary so much that none comes to
        enough in twice the batches, the most frequent one is scanned.
        """
        size = count_samples_of_call(*inputs)
        # Of a size that is not known, batches are only counted.
        self._kept.setdefault(size, []).append(((), {}) if size is None else copy_tensors(inputs))
        kept = {number: batches for number, batches in self._kept.items() if number is not None}
        largest = max(kept, key=lambda number: len(kept[number]), default=None)
        is_last = sum(map(len, self._kept.values())) >= 2 * self._batches
        if largest is not None and len(kept[largest]) >= (_FEWEST_KEPT if is_last else self._batches):
            self._kept.clear()
            self._scan(kept[largest], largest)
        elif is_last:
            self._kept.clear()
            self._alarm = None
            self._screening.forget()
            self._warn(
                "an alarm could not be looked into: batches differ in their number of samples, or it is not known."
            )

    def _scan(self, kept: list[Inputs], size: int) -> None:
        from bnprobe.commands.scan import scan

        alarm, self._alarm = self._alarm, None
        assert alarm is not None
        counted, self._counted = self._counted, []
        self._screening.forget()
        with self._sampler.held():
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
            facts = Facts(anatomy(self._sampler.layers, self._sampler.model), scan=self.report.scan)
        known = {each.rule for each in self.findings}
        diagnoses = [*self.report.diagnoses, *diagnosed(counted, self.report.layers, facts)]
        found = [each for each in diagnoses if each.severity != "info"]
        # What goes on as it was is looked at again less and less often.
        self._rest = self._every if any(each.rule not in known for each in found) else max(2 * self._rest, self._every)
        self._rests_until = self.step + self._rest
        for each in found:
            finding = MonitorFinding(
                self.step, alarm, each.rule, each.cause, each.severity, each.layers, each.message, each.remedy
            )
            self._tell(finding, kept, size)

    def _tell(self, finding: MonitorFinding, kept: list[Inputs], size: int) -> None:
        """Write a finding down, act on it, and warn of a rule once."""
        is_known = finding.rule in {each.rule for each in self.findings}
        self.findings.append(finding)
        self._write(event_of(finding))
        response = self._response(finding.rule)
        if not callable(response) and response != WARN:
            self._orders.act(response, finding.layers, kept, size)
        if is_known:
            return
        if callable(response):
            response(self, finding)
        else:
            where = f" in {listed(finding.layers, 3)}" if finding.layers else ""
            self._warn(f"{finding.rule}{where}: {finding.message} Remedy: {finding.remedy}")

    # --- What is done about it ----------------------------------------------------------------------------------------

    def _response(self, rule: str) -> Response:
        return self._on_finding.get(rule, WARN) if isinstance(self._on_finding, Mapping) else self._on_finding

    def _done(self, action: str, layers: list[str]) -> None:
        self._write({"event": "change", "step": self.step, "action": action, "layers": layers})

    def _warn(self, text: str) -> None:
        warn_user(f"bnprobe, step {self.step}: {text}")

    def _write(self, event: dict[str, Any]) -> None:
        for sink in self._sinks:
            sink(event)


_running: list[Monitor] = []
"""The monitors that watch at the moment."""


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _has_gradient(parameter: nn.Parameter) -> bool:
    """Whether there is one, which is not known of those that are no plain tensors."""
    grad = parameter.grad
    return grad is not None and (type(grad) is not Tensor or grad.layout != torch.strided or bool(grad.any()))
