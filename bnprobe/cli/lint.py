"""``bnprobe lint``."""

from __future__ import annotations

from typing import Annotated

import typer

from bnprobe.cli import options
from bnprobe.cli.processes import importing
from bnprobe.errors import EXIT_CLEAN, EXIT_FINDINGS


def lint(
    context: typer.Context,
    target: options.Target,
    checkpoint: options.Checkpoint = None,
    key: options.Key = None,
    strip_prefix: options.StripPrefix = None,
    model_arg: options.ModelArg = None,
    unsafe_load: options.UnsafeLoad = False,
    select: options.Select = None,
    ignore: options.Ignore = None,
    format_: options.ReportFormat = None,
    output: options.Output = None,
    output_dir: options.OutputDir = None,
    baseline: options.KnownFindings = None,
    write_baseline: options.WriteBaseline = None,
    force: options.ForceReport = False,
    show_all: Annotated[bool, options.option(options.REPORT, "--all", "List every layer of a finding.")] = False,
    exit_zero: options.ExitZero = False,
) -> None:
    """Check the BN layers of a model from its code and weights alone: no data, no forward pass, done in seconds.

    Exit codes: 0 clean, 1 findings, 2 error in usage, spec or your code, 3 no BN layer.
    """
    from bnprobe.analysis.diagnosis import lint_has_findings
    from bnprobe.cli.baselines import Baselines
    from bnprobe.cli.delivery import Delivery
    from bnprobe.config.load import build_spec
    from bnprobe.records import LintReport
    from bnprobe.rules.selection import model_rules

    delivery = Delivery("lint", LintReport, format_, output=output, folder=output_dir, force=force, show_all=show_all)
    baselines = Baselines(baseline, write_baseline)
    delivery.check(baselines.read, baselines.written)
    given = options.overrides(context)
    spec = build_spec(target, given)
    delivery.check([*baselines.read, target, *spec.files()], baselines.written)
    model_rules(spec.rules)  # report a wrong code before torch is imported
    with importing():
        from bnprobe.commands.lint import lint_spec
    narrowed = bool(spec.rules.select or spec.rules.ignore)
    report = lint_spec(spec)
    report = baselines.deliver(report, narrowed, delivery)
    raise typer.Exit(EXIT_FINDINGS if lint_has_findings(report) and not exit_zero else EXIT_CLEAN)
