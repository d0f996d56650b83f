"""The command that a scan suggests has the user's options that the other command takes too."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import get_args

import pytest
import typer

from bnprobe.cli.app import app
from bnprobe.cli.options import DATA, MODEL, REPORT
from bnprobe.config import PathChoice
from bnprobe.config.targets import TARGETS
from bnprobe.records import FreeRemedy, Remedy, Score
from bnprobe.report.next_step import CARRIED, EXPORTED, FLAGS, REPORTING
from bnprobe.rules import RULES, effect
from bnprobe.testing import make_scan

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def options_of(command: str) -> dict[str, typer.core.TyperOption]:
    return {
        name: parameter
        for parameter in COMMANDS[command].params
        for name in (*parameter.opts, *parameter.secondary_opts)
        if isinstance(parameter, typer.core.TyperOption)
    }


@pytest.mark.parametrize("command", ["scan", "recalibrate", "convert"])
def test_every_option_that_is_carried_over_is_one_of_the_command(command: str) -> None:
    assert set(options_of(command)) >= CARRIED


def test_an_export_gets_what_chooses_model_and_data_but_not_how_the_old_weights_were_read() -> None:
    options, panels = options_of("export"), options_of("recalibrate")
    about_weights = {"--checkpoint", "--key", "--strip-prefix", "--unsafe-load"}
    shared = {name for name in set(options) & set(panels) if panels[name].rich_help_panel in (MODEL, DATA)}
    assert shared - about_weights == EXPORTED
    assert not any(options[name].is_flag for name in EXPORTED)


def test_what_chooses_model_and_data_is_carried_over_wherever_it_can_be() -> None:
    shared = set(options_of("scan")) & set(options_of("recalibrate")) & set(options_of("convert"))
    panels = {name: option.rich_help_panel for name, option in options_of("scan").items()}
    assert {name for name in shared if panels[name] in (MODEL, DATA)} <= CARRIED


def test_the_flags_are_those_of_the_commands_that_a_suggestion_is_made_of() -> None:
    known = (options_of(command).items() for command in ("scan", "sweep", "recalibrate", "convert"))
    assert {name for options in known for name, option in options if option.is_flag} - {"--help"} == FLAGS


def test_what_says_what_becomes_of_a_report_is_known() -> None:
    assert {name for name, option in options_of("scan").items() if option.rich_help_panel == REPORT} == REPORTING


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.commands], ids=lambda rule: rule.code)
def test_the_command_of_a_rule_is_named_by_one_of_its_remedies_and_exists(rule: object) -> None:
    source = Path(inspect.getfile(type(rule))).read_text().replace('"\n    "', "")
    for arguments in rule.commands:  # type: ignore[attr-defined]
        assert f"bnprobe {arguments}" in source
        name, *words = arguments.split()
        options = options_of(name)
        assert all(word in options for word in words if word.startswith("--"))


@pytest.mark.parametrize("name", effect.ADVISED)
def test_the_command_of_what_is_advised_exists(name: FreeRemedy) -> None:
    how = {"domains": 2} if name == "statistics per call" else {"blend": 0.5}
    remedy = Remedy(name, (), Score(None, 0.4), Score(None, 0.9), None, 8, "", **how)  # type: ignore[arg-type]
    command, option, value, *setting = effect.arguments_of(remedy, make_scan()).split()
    assert {option, setting[0]} <= options_of(command).keys()
    if command == "convert":
        assert set(how) <= set(TARGETS[value].settings)
    else:
        assert value in get_args(PathChoice)
