"""The spec: everything that a user can set, as validated sections; and the syntax of targets."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from bnprobe.config.frameworks import framework_named_in
from bnprobe.config.nodes import is_node_target
from bnprobe.config.targets import AUTO, DEFAULT_TARGET, TARGETS, nearest_target
from bnprobe.errors import reason_of
from bnprobe.paths import is_folder
from bnprobe.records import DEFAULT_THRESHOLD, Goal
from bnprobe.wording import nearest


def split_target(target: str) -> tuple[str, str | None]:
    """Split ``"dir/model.py:Net"`` into ("dir/model.py", "Net"); ignore the colon of a Windows drive."""
    location, colon, symbol = target.rpartition(":")
    if not colon or not location or re.search(r"[/\\]", symbol):
        return target, None
    return location, symbol or None


def is_file_target(target: str) -> bool:
    """Whether a target names a file rather than a module or a project of a framework."""
    if framework_named_in(target) is not None:
        return False
    location, _ = split_target(target)
    return location.endswith((".py", *TENSOR_FILES)) or is_node_target(target) or bool(re.search(r"[/\\]", location))


TENSOR_FILES = (".pt", ".pth", ".npz", ".npy", ".safetensors")
"""Ends of the names of files whose tensors are data."""


def with_location(target: str, moved: Callable[[str], str]) -> str:
    """The same target with its path, where it has one, replaced."""
    framework = framework_named_in(target)
    if framework is not None and framework.is_path:
        return f"{framework.prefix}:{moved(target.partition(':')[2])}"
    if not is_file_target(target):
        return target
    location, symbol = split_target(target)
    return moved(location) + (f":{symbol}" if symbol else "")


def nearest_file(path: Path) -> str:
    """What to do about a missing file, as a sentence: suggests the file in its folder with the nearest name."""
    if not is_folder(path.parent):
        return f"The folder {path.parent} does not exist."
    try:
        names = [entry.name for entry in path.parent.iterdir() if not entry.name.startswith(".")]
    except OSError:  # the folder may be searched, but not listed
        names = []
    close = nearest(path.name, names)
    return f"Did you mean {path.with_name(close)}?" if close else "Check the path."


def why_missing(path: Path) -> str | None:
    """Why a path leads to no file or folder, the end of a sentence that names it, and what to do; None if it does."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            return f"is a link to {path.readlink()}, which does not exist."
        return f"does not exist. {nearest_file(path)}"
    except (OSError, ValueError) as error:
        return f"cannot be read: {reason_of(error)}."
    return None


def _numbers(value: object) -> object:
    """Turn ``"1,2,4"`` into (1, 2, 4); leave anything else to validation."""
    if isinstance(value, str) and re.fullmatch(r"\s*\d{1,18}\s*(,\s*\d{1,18}\s*)*,?\s*", value):
        return tuple(int(part) for part in value.split(",") if part.strip())
    return value


def _shapes(value: object) -> object:
    """Accept one shape or several: ``"3,224,224"``, ``[3, 224, 224]`` or ``[[3, 224, 224], [10]]``."""
    value = _numbers(value)
    if isinstance(value, list | tuple) and value and all(isinstance(part, int) for part in value):
        return (tuple(value),)
    return value


def as_thresholds(value: object) -> object:
    """Turn a plain number into the threshold of every layer."""
    return value if isinstance(value, Mapping) else {"*": value}


def matches_any(glob: str, names: Iterable[str]) -> bool:
    """Whether a layer-name glob matches one of the names; case counts."""
    return any(fnmatchcase(name, glob) for name in names)


Count = Annotated[int, Field(ge=1, le=10**9)]
Passes = Annotated[int, Field(ge=1, le=10**6)]  # more would not end within weeks
Runs = Annotated[int, Field(ge=1, le=1000)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # the range that numpy accepts
Fraction = Annotated[float, Field(ge=0, le=1)]
Globs = Annotated[tuple[str, ...], Field(strict=False)]
Shape = Annotated[tuple[Count, ...], Field(strict=False, min_length=1), BeforeValidator(_numbers)]
Shapes = Annotated[tuple[Shape, ...], Field(strict=False), BeforeValidator(_shapes)]
BatchSizes = Annotated[
    tuple[Count, ...],
    Field(strict=False),
    AfterValidator(lambda sizes: tuple(sorted(set(sizes)))),
    BeforeValidator(_numbers),
]
Thresholds = Annotated[
    dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]],
    AfterValidator(lambda given: {"*": DEFAULT_THRESHOLD} | given),  # "*" has the lowest priority wherever it stands
    BeforeValidator(as_thresholds),
]


class _Section(BaseModel):
    # Not built by itself: most are only ever read as parts of a ``Spec``.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True)


class NormClass(_Section):
    """A norm of the user's own: which buffers of the class hold its statistics.

    Attributes:
        mean: The buffer with the running mean.
        variance, std, log_variance, log_std: The buffer with the running variance, in one of these forms.
        eps: Added to the variance before the square root; None: found out by running the class.
    """

    mean: str
    variance: str | None = None
    std: str | None = None
    log_variance: str | None = None
    log_std: str | None = None
    eps: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def _one_form(self) -> NormClass:
        if len(self._forms()) != 1:
            raise PydanticCustomError("one_form", "a mean and one of {forms}", {"forms": ", ".join(_FORMS)})
        return self

    def _forms(self) -> list[str]:
        return [form for form in _FORMS if getattr(self, form) is not None]

    @property
    def form(self) -> str:
        """In which form the variance is kept."""
        return self._forms()[0]

    @property
    def kept(self) -> str:
        """The buffer that holds it."""
        name: str = getattr(self, self.form)
        return name


_FORMS = ("variance", "std", "log_variance", "log_std")


class ScanSpec(_Section):
    """How a scan runs, independent of the data.

    Attributes:
        max_batches: Upper limit on the micro-batches when their number is not fixed.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        autocast: Dtype for running the forward passes under autocast; None: no autocast.
        physical_batch: Samples that run through the model at once; None: chosen by available memory.
        batch_sizes: Further batch sizes at which the eval path is evaluated; sorted, without duplicates.
        emulate: Whether several micro-batches may run as one batch, with statistics per micro-batch.
        what_if: Whether to measure what each remedy that needs no training would gain, larger batches too; None: only
            where something may be wrong, and without larger batches.
        train_steps: Training steps to run on a copy of the model; None: none.
        gradients: Whether to measure the noise of the backward pass.
        thorough: Whether what layers do to the output may take as long as the scan itself, and more; else a tenth. It
            also lifts the limits on the samples and the time of trials of remedies.
    """

    max_batches: Passes = 256
    device: str = "auto"
    autocast: Literal["bfloat16", "float16"] | None = None
    physical_batch: Count | None = None
    batch_sizes: BatchSizes = ()
    emulate: bool = True
    what_if: bool | None = None
    train_steps: Passes | None = None
    gradients: bool = False
    thorough: bool = False


class RuleExemption(_Section):
    """Rules that are not to judge some layers, and why.

    Attributes:
        layers: Glob of layer names.
        rules: Codes, or their beginnings.
        reason: Why; the JSON report keeps it.
    """

    layers: str
    rules: Globs
    reason: Annotated[str, Field(min_length=1)]


class RulesSpec(_Section):
    """Which rules judge, by code or prefix of a code.

    Attributes:
        select: Only these; none: all.
        ignore: Not these.
        exempt: Layers that some rules leave out.
    """

    select: Globs = ()
    ignore: Globs = ()
    exempt: Annotated[tuple[RuleExemption, ...], Field(strict=False)] = ()


PLAIN: dict[str, Any] = {"what_if": False, "train_steps": None, "gradients": False, "thorough": False}
"""Settings of a scan that measures only the mismatch: what else can be asked for is switched off."""


class ScanSettings(ScanSpec):
    """All settings of the measurement, apart from model and data.

    Attributes:
        batch_size: Samples in a micro-batch; None: the loader's own.
        batches: Exact number of micro-batches to measure; None: until every layer is decided.
        seed: Seed of torch, numpy and random.
        thresholds: Maps a glob of layer names to the equivalent batch size below which a layer is flagged.
        include, exclude: Globs of layer names; an empty ``include`` means all.
        rules: Which rules apply to which layers.
        goal: Whether a larger or a smaller metric is better.
        norms: Norms of the user's own, by the name of their class.
    """

    batch_size: Count | None = None
    batches: Passes | None = None
    seed: Seed = 0
    goal: Goal = "max"
    thresholds: Thresholds = Field(default_factory=lambda: {"*": DEFAULT_THRESHOLD})
    include: Globs = ()
    exclude: Globs = ()
    rules: RulesSpec = RulesSpec()
    norms: dict[str, NormClass] = Field(default_factory=dict)

    @property
    def goal_is_known(self) -> bool:
        """Whether the user said which metric is better."""
        return "goal" in self.model_fields_set

    def threshold_of(self, *names: str) -> float:
        """The threshold of a layer: that of the last glob that matches one of its names."""
        return [n_eq for glob, n_eq in self.thresholds.items() if matches_any(glob, names)][-1]

    def is_selected(self, *names: str) -> bool:
        """Whether to measure the layer with these names: one of them is included, and none is excluded."""
        included = not self.include or any(matches_any(glob, names) for glob in self.include)
        return included and not any(matches_any(glob, names) for glob in self.exclude)


class ModelSpec(_Section):
    """Where the model comes from.

    Attributes:
        target: ``FILE.py:SYMBOL``, ``package.module:SYMBOL``, a node of a configuration (``config.yaml:NODE``), or what
            a framework reads, e.g. ``timm:NAME``.
        args: Keyword arguments of the class or function.
    """

    target: str
    args: dict[str, Any] = Field(default_factory=dict)


class CheckpointSpec(_Section):
    """Which weights go into it.

    Attributes:
        path: A safetensors file, or a state dict for ``torch.load``; None: the model as it is built.
        key: Where the state dict is inside the file, if not at the top.
        strip_prefix: A prefix to remove from all keys; None: ``module.`` and ``_orig_mod.`` where they stand.
        strict: Whether every key must fit. Running statistics must be there in any case.
        unsafe_load: Let the file run pickled code, with your rights.
    """

    path: str | None = None
    key: str | None = None
    strip_prefix: str | None = None
    strict: bool = True
    unsafe_load: bool = False


class EvalDataSpec(_Section):
    """The held-out data.

    Attributes:
        target: A function of the batch size, a loader, a dataset or a data module; None: that of the model file. The
            name of a file of tensors goes to ``tensors``.
        tensors: Instead, a file of tensors with one row for each sample: .pt (a tensor, a tuple or a dictionary of
            tensors), .npz, .npy or .safetensors.
        args: Further keyword arguments of the function.
        batch_size: Samples in a micro-batch; None: the loader's own, or for a function that of the training data.
        batches: Micro-batches to measure exactly; None: as many as the scan needs.
        batch_size_of: A function of a batch that gives its number of samples; None: that of the model file, if any.
        seed: Seed of torch, numpy and random.
    """

    target: str | None = None
    tensors: str | None = None
    args: dict[str, Any] = Field(default_factory=dict)
    batch_size: Count | None = None
    batches: Passes | None = None
    batch_size_of: str | None = None
    seed: Seed = 0

    @property
    def is_named(self) -> bool:
        """Whether the user says where the data comes from."""
        return self.target is not None or self.tensors is not None

    @model_validator(mode="after")
    def _one_source(self) -> EvalDataSpec:
        if self.tensors is not None and (self.target is not None or self.args):
            other = "target" if self.target is not None else "args"
            raise PydanticCustomError("one_source", "either tensors or {other}", {"other": other})
        return self


class DataSpec(EvalDataSpec):
    """Where the training batches come from.

    Attributes:
        input_shape: Shape of one synthetic sample, instead of data; a list of shapes for several inputs.
    """

    input_shape: Shapes = ()


class OptimizerSpec(_Section):
    """Which optimizer trains.

    Attributes:
        target: A class of torch.optim (``SGD`` or ``torch.optim.SGD``), or ``FILE.py:FUNCTION``.
        args: Its keyword arguments.
    """

    target: str = "SGD"
    args: dict[str, Any] = Field(default_factory=lambda: {"lr": 0.01})


class ScheduleSpec(_Section):
    """Which learning rate schedule; it advances once per optimizer step.

    Attributes:
        target: A class of torch.optim.lr_scheduler, or ``FILE.py:FUNCTION``.
        args: Its keyword arguments.
    """

    target: str
    args: dict[str, Any] = Field(default_factory=dict)


class TrainSpec(_Section):
    """How ``--finetune`` trains; ``--train-steps`` uses only the optimizer.

    Attributes:
        schedule: Learning rate schedule; None: constant.
        steps, epochs: Length of a run in optimizer steps or in passes over the data; if neither is set, 500 steps.
        batch_size: Samples in a micro-batch of one process, over which BN normalizes; None: that of the data.
        accumulate: Micro-batches per optimizer step.
        clip_norm: Upper limit on the L2 norm of the gradient; None: not clipped.
        evaluate_every: Optimizer steps between evaluations; None: a tenth of the run.
        patience: Stop after this many evaluations without improvement; None: run to the end.
        save_every: Optimizer steps between saved states, from which ``--resume`` continues.
    """

    optimizer: OptimizerSpec = OptimizerSpec()
    schedule: ScheduleSpec | None = None
    steps: Count | None = None
    epochs: Count | None = None
    batch_size: Count | None = None
    accumulate: Count = 1
    clip_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    evaluate_every: Count | None = None
    patience: Count | None = None
    save_every: Count = 100


class RenormSpec(_Section):
    """Limits of Batch Renorm during fine-tuning, scheduled as in Ioffe 2017, section 4. Times are fractions of the run.

    Attributes:
        r_max, d_max: Final limits of r and d.
        warmup: Until then the limits are 1 and 0, as in plain BN.
        r_ramp, d_ramp: When r_max and d_max are reached; the limits grow linearly until then.
        momentum: Weight of the new batch in the running statistics; None: the layer's own.
    """

    r_max: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 3.0
    d_max: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5.0
    warmup: Fraction = 5 / 130
    r_ramp: Fraction = 40 / 130
    d_ramp: Fraction = 25 / 130
    momentum: Annotated[float, Field(gt=0, le=1)] | None = 0.01


def _known_target(name: str) -> str:
    """Check the name of a repair target: one of ``TARGETS``, or "auto"."""
    if name == AUTO or name in TARGETS:
        return name
    known = ", ".join((*TARGETS.names(), AUTO))
    raise PydanticCustomError(
        "unknown_target", "one of {known} (the nearest is {nearest})", {"known": known, "nearest": nearest_target(name)}
    )


RepairName = Annotated[str, AfterValidator(_known_target)]


class RepairSpec(_Section):
    """What ``bnprobe convert`` changes, and which requirements must hold.

    Attributes:
        to: What the layers become, a name of ``bnprobe.config.targets.TARGETS``; "auto": the target that does best in
            a short training run.
        layers: Globs of layer names; none: the layers that the scan or ``report`` flags.
        report: A saved JSON report that says which layers are flagged, in place of a scan.
        recalibrate: Begin with recalibrated running statistics.
        groups: Group norm: the largest number of groups. A layer gets the largest divisor of its channels up to this
            that leaves two channels in a group.
        blend: Gated layers: initial weight of the batch statistics. Instance renorm and example weighing: weight of the
            sample's own statistics.
        virtual_batch_size: Ghost batch norm: most samples in one of the parts of a batch that are normalized by
            themselves.
        window: Moving average and cross-iteration batch norm: batches whose statistics are averaged; by the former in
            the backward pass, too.
        burn_in: Cross-iteration batch norm: batches to begin with for which its layers are BN.
        domains: Statistics per domain: the number of domains that the model file names by ``bnprobe.nn.domain``.
        renorm: Limits of Batch Renorm.
        seeds: Runs of every arm, with consecutive seeds that begin with the spec's.
        require: Requirements on the repaired model, e.g. "metric>=0.97"; see ``bnprobe.config.requirements``.
        goal: Whether a larger or a smaller metric is better.
    """

    to: RepairName = DEFAULT_TARGET
    layers: Globs = ()
    report: str | None = None
    recalibrate: bool = True
    groups: Count = 32
    blend: Fraction = 0.5
    virtual_batch_size: Count = 32
    window: Count = 16
    burn_in: Annotated[int, Field(ge=0, le=10**9)] = 0
    domains: Count = 2
    renorm: RenormSpec = RenormSpec()
    seeds: Runs = 1
    require: Globs = ()
    goal: Goal = "max"

    @property
    def assumes_goal(self) -> bool:
        """Whether the user did not say which metric is better."""
        return "goal" not in self.model_fields_set


class LayersSpec(_Section):
    """Which layers are measured, by globs of their names.

    Attributes:
        include: Only layers that match one of these; none: all layers.
        exclude: No layer that matches one of these.
        norms: Norms of your own by the name of their class, with the buffers that hold their statistics; none: those
            of ``norm_classes`` in the model file.
    """

    include: Globs = ()
    exclude: Globs = ()
    norms: dict[str, NormClass] = Field(default_factory=dict)


class Spec(_Section):
    """Everything a user can say about a scan or a repair.

    Attributes:
        forward: ``FILE.py:FUNCTION`` of (model, batch): how a batch goes through the model; None: that of the model
            file, else the first element of the batch is the input.
        loss: ``FILE.py:FUNCTION`` of (model, batch); None: that of the model file, if there is one.
        metric: ``FILE.py:FUNCTION`` of (model, batch); None: that of the model file, if there is one.
        thresholds: Layer-name glob to the equivalent batch size below which a layer is flagged; the last match wins.
    """

    model: ModelSpec
    checkpoint: CheckpointSpec = CheckpointSpec()
    data: DataSpec = DataSpec()
    eval_data: EvalDataSpec = EvalDataSpec()
    forward: str | None = None
    loss: str | None = None
    metric: str | None = None
    thresholds: Thresholds = Field(default_factory=lambda: {"*": DEFAULT_THRESHOLD})
    layers: LayersSpec = LayersSpec()
    scan: ScanSpec = ScanSpec()
    rules: RulesSpec = RulesSpec()
    train: TrainSpec = TrainSpec()
    repair: RepairSpec = RepairSpec()

    def recorded(self) -> dict[str, Any]:
        """The sections that a repair depends on, as JSON types."""
        return self.model_dump(mode="json", exclude={"rules"})

    def files(self) -> list[str]:
        """Names of the user's files that the spec reads: code, weights, a report."""
        targets = [self.model.target, self.data.target, self.eval_data.target, self.forward, self.loss, self.metric]
        code = [split_target(target)[0] for target in targets if target and is_file_target(target)]
        others = (self.checkpoint.path, self.repair.report, self.data.tensors, self.eval_data.tensors)
        return [*code, *(path for path in others if path)]

    def settings(self) -> ScanSettings:
        """The settings of the measurement."""
        stated: dict[str, Any] = {} if self.repair.assumes_goal else {"goal": self.repair.goal}
        return ScanSettings(
            batch_size=self.data.batch_size,
            batches=self.data.batches,
            seed=self.data.seed,
            **stated,
            thresholds=self.thresholds,
            include=self.layers.include,
            exclude=self.layers.exclude,
            norms=self.layers.norms,
            rules=self.rules,
            **self.scan.model_dump(),
        )
