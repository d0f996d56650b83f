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
    format_: options.ReportFormat = options.TERMINAL,
    output: options.Output = None,
    force: options.ForceReport = False,
    show_all: Annotated[bool, options.option(options.REPORT, "--all", "List every layer of a finding.")] = False,
    exit_zero: options.ExitZero = False,
) -> None:
    """Check the BN layers of a model from its code and weights alone: no data, no forward pass, done in seconds.

    Exit codes: 0 clean, 1 findings, 2 error in usage, spec or your code, 3 no BN layer.
    """
    from bnprobe.analysis.diagnosis import lint_has_findings
    from bnprobe.cli.console import check_output, deliver
    from bnprobe.config.load import build_spec
    from bnprobe.files import refuse_input
    from bnprobe.records import LintReport
    from bnprobe.report import renderer
    from bnprobe.report.lint import one_line
    from bnprobe.rules.selection import model_rules

    render = renderer(format_, LintReport)
    check_output(output, force, format_)
    given = options.overrides(context)
    spec = build_spec(target, given)
    if output is not None:
        refuse_input(output, [target, *spec.files()])
    model_rules(spec.rules)  # report a wrong code before torch is imported
    with importing():
        from bnprobe.commands.lint import lint_spec
    report = lint_spec(spec)
    deliver(report, render, output, show_all, one_line(report), force)
    raise typer.Exit(EXIT_FINDINGS if lint_has_findings(report) and not exit_zero else EXIT_CLEAN)
