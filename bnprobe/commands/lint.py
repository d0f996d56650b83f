"""``bnprobe lint``: judge the norm layers of a model as it is written and saved, without data or a forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from bnprobe._version import __version__
from bnprobe.analysis.diagnosis import diagnose, judge
from bnprobe.config.load import settings_from
from bnprobe.config.spec import RulesSpec, ScanSettings, Spec
from bnprobe.errors import NothingToProbeError
from bnprobe.loading.arguments import require_model
from bnprobe.loading.model import unwrapped
from bnprobe.loading.workload import load_model_only
from bnprobe.measure.exploration import possible_norms
from bnprobe.measure.layers import LayerSet, anatomy, find_layers, require_layers
from bnprobe.measure.restore import preserved_process, preserved_random_state, seed_everything
from bnprobe.records import LintReport, SkippedLayer, Tool
from bnprobe.rules.facts import Facts
from bnprobe.rules.selection import codes, model_rules
from bnprobe.wording import from_python


@from_python
def lint(model: nn.Module, *, select: Sequence[str] = (), ignore: Sequence[str] = ()) -> LintReport:
    """Judge the BN layers of ``model`` as they are now; nothing is run and nothing is changed.

    Args:
        model: Any module.
        select: Only rules of these codes or prefixes, e.g. "BN1"; none: all rules that need the model alone.
        ignore: No rules of these codes or prefixes.

    Raises:
        NothingToProbeError: The model has no BN layer that its class gives away.
        UsageError: No rule of a code exists, or no rule selected can judge a model alone.

    Example:
        >>> # model and loader are made as in help(bnprobe)
        >>> found = bnprobe.lint(model)
        >>> found.ok
        True
        >>> found.diagnoses
        ()
    """
    require_model(model)
    inner, _ = unwrapped(model)
    rules = RulesSpec(select=codes(select), ignore=codes(ignore))
    with preserved_process():
        return _judged(inner, type(inner).__name__, rules, settings_from({}))


def lint_spec(spec: Spec) -> LintReport:
    """Load the model that a spec names, and judge it.

    Raises:
        BnprobeError: See ``bnprobe.errors`` for the tree.
    """
    model_rules(spec.rules)  # a code that does not exist is said before anything is loaded
    with preserved_random_state():
        seed_everything(spec.data.seed)
        loaded = load_model_only(spec)
        return replace(
            _judged(loaded.model, loaded.name, spec.rules, spec.settings(), loaded.undone), notes=loaded.notes
        )


def _judged(
    model: nn.Module, name: str, rules: RulesSpec, settings: ScanSettings, undone: Mapping[str, str] | None = None
) -> LintReport:
    found = find_layers(model, settings.is_selected, required=False)
    possible = possible_norms(model, found)
    _require_known(model, found, possible)
    facts = Facts(anatomy(found, model), undone=undone or {})
    verdicts = judge(facts, rules, model_rules(rules))
    return LintReport(
        tool=Tool("bnprobe", __version__),
        model=name,
        layers=len(found.selected),
        verdicts=verdicts,
        diagnoses=diagnose(verdicts, facts),
        skipped=(*found.skipped, *possible),
    )


def _require_known(model: nn.Module, found: LayerSet, possible: Sequence[SkippedLayer]) -> None:
    """Refuse a model in which there is nothing to judge; says what only a scan can see.

    Raises:
        NothingToProbeError: No layer is known by its class, or none is selected.
    """
    if found.layers:
        require_layers(model, found)
        return
    kind, unjudged = type(model).__name__, [*found.skipped, *possible]
    what = f"{kind} has no Batch Normalization layer of a class that lint knows."
    if unjudged:
        first, more = unjudged[0], len(unjudged) - 1
        rest = f" ({more} more like it)" if more else ""
        what = f"lint can judge no layer of {kind}. The first is {first.name} ({first.kind}): {first.reason}{rest}."
    raise NothingToProbeError(
        f"{what} lint does not run the model; bnprobe scan does, and finds norms by what they do."
    )
