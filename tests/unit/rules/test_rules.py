"""What holds for every rule: it is listed, documented and tested."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import bnprobe.rules
from bnprobe.rules import BUILT_IN, RULES, Rule
from bnprobe.rules.docs import manual, pages
from bnprobe.rules.interface import SECTIONS

REPOSITORY = Path(__file__).parents[3]
FAMILY = {"1": {"model"}, "2": {"data", "held-out data"}, "3": {"training steps", "gradients", "several processes"}}

every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)


def test_every_rule_that_is_written_is_listed() -> None:
    modules = [
        importlib.import_module(f"bnprobe.rules.{found.name}") for found in pkgutil.iter_modules(bnprobe.rules.__path__)
    ]
    classes = {value for module in modules for value in vars(module).values() if isinstance(value, type)}
    written = {kind for kind in classes if issubclass(kind, Rule) and not inspect.isabstract(kind)}
    assert written == set(BUILT_IN)


def test_codes_are_sorted_and_every_cause_has_one_rule() -> None:
    codes = [rule.code for rule in RULES]
    assert codes == sorted(set(codes))
    assert len({rule.cause for rule in RULES}) == len({rule.title for rule in RULES}) == len(RULES)


def test_rules_refer_to_causes_that_exist() -> None:
    causes = {rule.cause for rule in RULES}
    assert {link.cause for rule in RULES for link in (*rule.follows_from, *rule.explains)} <= causes
    places = [rule.upstream_order for rule in RULES if rule.upstream_order is not None]
    assert len(set(places)) == len(places)


@every_rule
def test_a_rule_is_a_file_of_its_own_with_a_test(rule: Rule) -> None:
    module = type(rule).__module__.rpartition(".")[2]
    test = Path(__file__).with_name(f"test_{module}.py")
    assert test.is_file(), f"{rule.code} has no test: write {test.name}"
    assert f'run_rule("{rule.code}"' in test.read_text(encoding="utf-8")
    assert rule.needs in FAMILY[rule.code[2]]


@every_rule
def test_a_manual_is_complete(rule: Rule) -> None:
    text = manual(rule)
    assert tuple(heading for heading, _ in text.sections) == SECTIONS
    assert all(paragraph.endswith((".", '".')) for _, paragraph in text.sections)
    assert text.summary.endswith(".")
    assert "section" in dict(text.sections)["Reference"] or "PyTorch" in dict(text.sections)["Reference"]


def test_the_committed_pages_are_those_of_the_docstrings() -> None:
    """``make rules`` writes them again; they are committed so that links work in a clone."""
    folder = REPOSITORY / "docs" / "rules"
    assert {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()} == pages()


def test_every_rule_has_a_page_that_the_list_links() -> None:
    found = pages()
    assert found.keys() == {"README.md", *(f"{rule.code}.md" for rule in RULES)}
    for rule in RULES:
        page = found[f"{rule.code}.md"]
        assert page.startswith(f"# {rule.code}: {rule.title}\n")
        assert all(f"\n## {heading}\n" in page for heading in SECTIONS)
        assert f"[{rule.code}]({rule.code}.md) | {rule.title} | `{rule.cause}`" in found["README.md"]


def test_rules_import_neither_torch_nor_rich() -> None:
    code = "import sys, bnprobe.rules; print({'torch', 'rich', 'scipy', 'numpy', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True, timeout=60)
    assert done.stdout.strip() == "set()"
