"""What the comparison of two reports says."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from bnprobe.commands.verify import verify
from bnprobe.records import LayerComparison, Verification
from bnprobe.report import RenderOptions, renderer
from bnprobe.report.verify import NO_SCORES, one_line
from bnprobe.testing import make_layer, make_shares
from support import repairs
from unit.report.fabricated_parts import report

WIDE = RenderOptions(width=400)
render = renderer("terminal", Verification)


def test_what_has_become_of_every_flag() -> None:
    rows = re.findall(r"(?m)^(.)  (\S+) +(\S+) +→ (\S+) *(.*)$", render(repairs.not_verified(), WIDE))
    assert rows == [
        ("✗", "bn1", "0.017", "0.081", "newly flagged"),
        ("✓", "layer1.0.bn1", "0.025", "0.025", ""),
        ("✓", "layer2.0.bn1", "0.127", "0.033", "no longer flagged"),
        ("✗", "layer3.0.bn1", "38.9", "0.412", "still flagged"),
        ("✓", "layer3.0.bn2", "–", "0.011", "no longer flagged"),
    ]


def test_a_layer_that_was_not_measured_is_not_called_fine() -> None:
    found = repairs.verified()
    lost = replace(found.layers[1], after=None)
    text = render(replace(found, layers=(found.layers[0], lost)), WIDE)
    assert re.search(r"\n–  layer2.0.bn1 +0.300 → +–  not measured\n", text)


def test_a_flagged_layer_that_was_not_measured_again_proves_nothing() -> None:
    found = repairs.verified()
    lost = replace(found.layers[1], after=None, lost=True)
    problem = "1 of 9 flagged layers was not measured again, so its mismatch is not known: layer1.0.bn1."
    found = replace(found, passed=False, problems=(problem,), layers=(found.layers[0], lost))
    text = render(found, WIDE)
    assert "1 of 2 layers flagged before, none after and 1 not measured" in text
    assert f"\n? The repair is not proved.\n  {problem}\n" in text
    assert one_line(found) == "failed: 1 of 2 layers flagged before, none after and 1 not measured"


def test_a_layer_that_is_undecided_now_is_not_called_fine() -> None:
    found = repairs.verified()
    unsure = replace(found.layers[1], undecided_after=True)
    text = render(replace(found, layers=(found.layers[0], unsure)), WIDE)
    assert re.search(r"\n\?  layer2.0.bn1 .*  undecided now\n", text)
    assert "none after and 1 undecided" in text
    assert "? The repair holds: no layer is flagged (1 undecided)" in text


def test_why_a_repair_does_not_hold() -> None:
    text = render(repairs.not_verified(), WIDE)
    end = text.partition("✗ The repair does not hold.\n")[2]
    assert " ".join(end.split()) == " ".join([*repairs.not_verified().problems, NO_SCORES])
    assert "  only before: head.bn\n  only after: head.gn\n" in text
    assert "  38% → 41%\n" in text
    assert "  The batch sizes differ: 2 before, 4 after.\n" in text


def test_outputs_that_were_not_measured_are_not_claimed_to_agree() -> None:
    outputs = "and the outputs in training and at inference are no farther apart than before."
    assert f"✓ The repair holds: no layer is flagged, {outputs}" in " ".join(render(repairs.verified(), WIDE).split())
    assert "✓ The repair holds: no layer is flagged.\n" in render(replace(repairs.verified(), output_after=None), WIDE)
    assert "  38% → –\n" in render(replace(repairs.verified(), output_after=None), WIDE)


def test_a_large_network_is_folded_without_all() -> None:
    found = repairs.many_verified()
    assert render(found, WIDE).count("\n✓  features") == 12
    assert render(found, WIDE).count("no longer flagged\n") == 9
    assert render(found, replace(WIDE, show_all=True)).count("\n✓  features") == 60


def test_reports_without_a_common_layer_have_no_table() -> None:
    found = replace(repairs.not_verified(), layers=())
    assert "D of the worse path" not in render(found, WIDE)


def test_as_json_it_is_the_record() -> None:
    document = json.loads(renderer("json", Verification)(repairs.not_verified(), RenderOptions()))
    assert document["schema_version"] == 1
    assert document["layers"][0] == {
        "name": "bn1",
        "before": 0.0173,
        "after": 0.0812,
        "flagged_before": False,
        "flagged_after": True,
        "undecided_after": False,
        "lost": False,
    }
    assert (document["passed"], document["only_after"]) == (False, ["head.gn"])


def test_the_result_in_one_line() -> None:
    assert one_line(repairs.verified()) == "passed: 6 of 7 layers flagged before, none after"
    assert one_line(repairs.not_verified()) == "failed: 3 of 5 layers flagged before, 2 after"


ODD = st.one_of(
    st.text(min_size=1), st.sampled_from(["[red]", "a" * 300, "\x1b[2J", "two\nlines", "\u7d22\u5f15" * 30])
)


@settings(max_examples=30)
@given(
    names=st.lists(ODD, min_size=1, max_size=4, unique=True),
    figures=st.lists(st.one_of(st.none(), st.floats(0, 1e9)), min_size=2, max_size=2),
    width=st.integers(40, 120),
    unicode=st.booleans(),
)
def test_layers_of_any_name_fit(names: list[str], figures: list[float | None], width: int, unicode: bool) -> None:
    layers = tuple(LayerComparison(name, figures[0], figures[1], True, False) for name in names)
    found = Verification(
        repairs.TOOL, repairs.MODEL, False, tuple(names), layers, tuple(names), (), *figures, tuple(names)
    )
    text = render(found, RenderOptions(width=width, unicode=unicode))
    assert "\x1b" not in text
    assert unicode or text.isascii()
    assert max(map(cell_len, text.splitlines())) <= width


def _calls(work: Callable[[], object]) -> int:
    """How many functions a piece of work calls."""
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls


def test_the_work_grows_with_the_number_of_layers_and_not_faster() -> None:
    def work(layers: int) -> int:
        names = [f"stages.{number % 7}.blocks.{number}.{'x' * 80}.norm{number % 3}" for number in range(layers)]
        before = report([make_layer(name, make_shares(lag=0.3)) for name in names])
        after = report([make_layer(name, make_shares(lag=0.1)) for name in [*names[::2], *names[1::4]]])
        found: list[Verification] = []
        compared = _calls(lambda: found.append(verify(before, after)))
        options = (replace(WIDE, width=80, show_all=show_all) for show_all in (False, True))
        return compared + sum(_calls(lambda shown=shown: render(found[0], shown)) for shown in options)

    few, many = work(100), work(1000)
    assert many < 11 * few
