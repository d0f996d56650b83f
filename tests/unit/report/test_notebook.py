"""Documents in Python: printed, in one line, as a fragment of a page, in files, as a frame, and as charts."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import fabricated_causes as causes
import fabricated_reports as fabricated
import pytest
from fabricated_documents import CASES, document

from bnprobe.errors import UsageError
from bnprobe.records import Document, LintReport, MonitorLog, Report, SweepReport, Verification
from bnprobe.report import RenderOptions, render
from bnprobe.report.page import as_call
from bnprobe.report.repair import RepairReport

ELEMENTS = {"div", "p", "b", "br", "code", "table", "thead", "tbody", "tr", "th", "td", "details", "summary", "pre"}
HOSTILE = '<script>alert("x")</script> & \x1b[2J'


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_print_shows_what_the_terminal_shows_and_repr_is_one_line(kind: str, name: str) -> None:
    made = document(kind, name)
    assert isinstance(made, Document)
    stream = io.StringIO()
    with redirect_stdout(stream):
        print(made.text(width=80))
    unicode = stream.getvalue().isascii()
    assert stream.getvalue() == render(made, "terminal", RenderOptions(width=80, unicode=not unicode, python=True))
    assert repr(made).startswith(f"<{type(made).__name__}: ")
    assert len(repr(made).splitlines()) == 1


def test_repr_names_the_model_the_layers_and_the_verdict() -> None:
    expected = "<Report: sample_configs/digits/model.py:load_model, 6 of 9 layers flagged, 2 errors: batches too small>"
    assert repr(fabricated.flagged()) == expected


def test_a_record_is_a_line_that_names_the_records_in_it() -> None:
    layer = causes.lag().layers[1]
    text = repr(layer)
    assert text.startswith(f"Layer(name='{layer.name}', aliases=(), kind='BatchNorm2d'")
    assert "eval=PathMeasurement(...)" in text
    assert len(text) < 1000
    assert len(repr(layer.train.r)) < 600  # type: ignore[union-attr]
    verdict = causes.lag().verdicts[0]
    assert all(repr(value) in repr(verdict) for value in asdict(verdict).values())  # so that a failed test shows it all
    assert "<tuple of 20>" in repr(replace(layer, aliases=tuple("abcdefghijklmnopqrst")))


def test_str_is_the_short_form_and_the_whole_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "70")
    report = fabricated.flagged()
    assert str(report) == report.text()
    assert max(map(len, str(report).splitlines())) <= 70
    assert len(report.text(verbose=True)) > 2 * len(str(report))


class Elements(HTMLParser):
    """The elements of a fragment, which must be closed in order, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.words = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert {name for name, _ in attrs} <= {"style"}
        self.seen.add(tag)
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_fragment_is_well_formed_and_runs_nothing(kind: str, name: str) -> None:
    parser = Elements()
    parser.feed(document(kind, name)._repr_html_())  # type: ignore[attr-defined]
    assert parser.open == []
    assert parser.seen <= ELEMENTS


def test_hostile_text_is_shown_in_a_fragment() -> None:
    base = causes.lag()
    layers = tuple(replace(layer, name=f"{HOSTILE}{index}") for index, layer in enumerate(base.layers))
    diagnosis = replace(base.diagnoses[0], message=HOSTILE, layers=(f"{HOSTILE}3",))
    report = replace(base, layers=layers, diagnoses=(diagnosis,), scan=replace(base.scan, model=HOSTILE))
    parser = Elements()
    parser.feed(report._repr_html_())
    assert "script" not in parser.seen
    assert '<script>alert("x")</script> & \\x1b[2J3' in parser.words
    assert "\x1b" not in parser.words
    assert repr(report).count("\\x1b") == 1


@pytest.mark.parametrize(
    ("command", "call"),
    [
        (
            "bnprobe scan model.py --batch-size 2 --batch-sizes 2,4,8 --batches 12",
            "bnprobe.scan(model, batches, batch_size=2, batch_sizes=[2, 4, 8], num_batches=12)",
        ),
        ("bnprobe scan model.py --format json --output report.json", "report.save('report.json')"),
        ("bnprobe recalibrate model.py -o x.safetensors", "bnprobe.recalibrate(model, batches)"),
        (
            "bnprobe convert model.py --to instance-renorm --blend 1 --layers a --layers 'b.*' -o x.safetensors",
            "bnprobe.convert(model, ['a', 'b.*'], to='instance-renorm', blend=1)",
        ),
        ("bnprobe convert model.py --to frozen --finetune -o x.safetensors", None),  # there is no such function
        ("bnprobe explain BN202", None),
    ],
)
def test_the_next_command_is_a_call(command: str, call: str | None) -> None:
    assert as_call(command) == call


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_document_in_python_names_no_option_that_shows_the_rest(kind: str, name: str) -> None:
    made = document(kind, name)
    assert isinstance(made, Document)
    assert "--all" not in made.text(width=100)
    assert "shows all." not in made.text(width=100, verbose=True)


def test_a_report_in_python_speaks_of_python() -> None:
    text = " ".join(fabricated.flagged().text(width=120).split())
    assert "print(report.text(verbose=True)) shows every layer" in text
    assert text.endswith("bnprobe.scan(model, batches, batch_sizes=[2, 4, 8, 16, 32, 64])")


# --- Good or not ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name", "ok"),
    [
        ("scan", "healthy", True),
        ("scan", "flagged", False),
        ("lint", "clean", True),
        ("lint", "findings", False),
        ("sweep", "sizes", False),
        ("verify", "passed", True),
        ("verify", "failed", False),
        ("export", "agrees", True),
        ("export", "refused", False),
        ("log", "healthy", True),
        ("log", "found", False),
        ("plan", "convert", True),
        ("plan", "refused", False),
        ("repair", "better", True),
        ("repair", "diverged", False),
    ],
)
def test_ok_is_the_exit_code(kind: str, name: str, ok: bool) -> None:
    assert document(kind, name).ok is ok  # type: ignore[attr-defined]


# --- Files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name", "type_"),
    [
        ("scan", "lag", Report),
        ("sweep", "momentum", SweepReport),
        ("lint", "findings", LintReport),
        ("verify", "failed", Verification),
        ("log", "found", MonitorLog),
    ],
)
def test_what_is_saved_is_loaded(tmp_path: Path, kind: str, name: str, type_: type[Document]) -> None:
    made = document(kind, name)
    made.save(tmp_path / "saved.json")  # type: ignore[attr-defined]
    assert type_.load(tmp_path / "saved.json") == made
    made.save(str(tmp_path / "saved.json"))  # type: ignore[attr-defined]  # replaced


def test_the_record_of_a_repair_is_loaded(tmp_path: Path) -> None:
    made = document("repair", "better")
    assert isinstance(made, RepairReport)
    made.save(tmp_path / "out.record.json")
    assert RepairReport.load(tmp_path / "out.record.json").record == made.record


def test_the_ending_says_the_format_unless_it_is_given(tmp_path: Path) -> None:
    report = fabricated.healthy()
    report.save(tmp_path / "report.txt")
    assert (tmp_path / "report.txt").read_text(encoding="utf-8").startswith("bnprobe 0.1.0: scan of ")
    report.save(tmp_path / "report.dat", format="terminal")
    assert (tmp_path / "report.dat").read_bytes() == (tmp_path / "report.txt").read_bytes()
    with pytest.raises(UsageError, match='"pdf"'):
        report.save(tmp_path / "report.pdf", format="pdf")
    with pytest.raises(UsageError, match=r'No format has the ending "\.pdf"'):
        report.save(tmp_path / "report.pdf")
    report.save(tmp_path / "report")
    assert Report.load(tmp_path / "report") == report
    beginnings = {
        "out.md": "### bnprobe",
        "OUT.JUNIT.XML": "<?xml",
        "v1.2.sarif": "{",
        "a.github.txt": "::",
        "b.csv": "layer",
    }
    for name, beginning in beginnings.items():
        report.save(tmp_path / name)
        assert (tmp_path / name).read_text(encoding="utf-8").startswith(beginning), name


def test_what_is_no_report_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"missing\.json"):
        Report.load(tmp_path / "missing.json")
    (tmp_path / "bad.json").write_text("{}", encoding="utf-8")
    for type_ in (Report, SweepReport, LintReport):
        with pytest.raises(UsageError, match=r"bad\.json"):
            type_.load(tmp_path / "bad.json")


# --- Layers, frames and charts ----------------------------------------------------------------------------------------


def test_a_layer_is_found_by_its_name_or_alias() -> None:
    report = fabricated.shared()
    shared = next(layer for layer in report.layers if layer.aliases)
    assert report[shared.name] is shared
    assert report[shared.aliases[0]] is shared
    assert shared.name in report
    assert shared.aliases[0] in report
    assert "discriminator.bm" not in report
    assert list(report) == [layer.name for layer in report.layers]
    assert report._ipython_key_completions_() == [layer.name for layer in report.layers]
    with pytest.raises(KeyError, match=rf"no layer 'discriminator.bm'; the nearest is '{shared.name}'"):
        report["discriminator.bm"]


def test_a_frame_has_a_row_for_each_layer_and_path() -> None:
    report = causes.lag()
    frame = report.to_frame()
    assert list(frame["layer"][:2]) == [report.layers[0].name] * 2
    assert (len(frame), list(frame["mode"][:2])) == (2 * len(report.layers), ["train", "eval"])
    row = frame[(frame["layer"] == "layer2.0.bn1") & (frame["mode"] == "eval")].iloc[0]
    layer = report["layer2.0.bn1"]
    assert (row["mismatch"], row["r_std"]) == (layer.eval.mismatch, layer.eval.r.std)
    assert row["share_lag"] == layer.shares.lag
    sweep = document("sweep", "sizes")
    assert len(sweep.to_frame()) == sum(len(each.train) + len(each.eval) for each in sweep.layers)  # type: ignore[attr-defined]
    verified = document("verify", "failed")
    assert len(verified.to_frame()) == len(verified.layers)  # type: ignore[attr-defined]


def _first_data(chart: Any) -> list[dict[str, Any]]:
    spec = chart.to_dict()
    found: list[dict[str, Any]] = spec["datasets"][spec["layer"][0]["data"]["name"]]
    return found


def test_charts_show_the_figures_of_the_report() -> None:
    report = fabricated.batch_sizes()
    rows = _first_data(report.plot.shares())
    assert {row["layer"] for row in rows} == {layer.name for layer in report.layers}
    total = sum(row["D"] for row in rows if row["layer"] == "bn1")
    assert total == pytest.approx(report["bn1"].eval.mismatch, rel=1e-6)
    assert _first_data(report.plot.depth().hconcat[0])[0]["median"] == report.layers[0].train.r.quantiles["0.5"]
    assert "log" in str(report.plot.batch_sizes().to_dict())
    assert "log" in str(document("sweep", "sizes").plot.batch_sizes().to_dict())  # type: ignore[attr-defined]


def test_a_chart_of_what_was_not_measured_says_how_to_measure_it() -> None:
    with pytest.raises(UsageError, match=r"scan\(\.\.\., batch_sizes=\[1, 2, 4, 8\]\)"):
        fabricated.healthy().plot.batch_sizes()
    with pytest.raises(UsageError, match=r"plot\.batch_sizes\(\)"):
        document("sweep", "sizes").plot.shares()  # type: ignore[attr-defined]


@pytest.mark.parametrize(("package", "use"), [("pandas", "to_frame"), ("altair", "plot")])
def test_a_package_that_is_missing_is_named_with_its_extra(
    package: str, use: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bnprobe.registry.find_spec", lambda name: None)
    extra = {"pandas": "pandas", "altair": "plot"}[package]
    with pytest.raises(UsageError, match=rf'needs {package}: pip install "bnprobe\[{extra}\]"'):
        getattr(fabricated.healthy(), use)() if use == "to_frame" else fabricated.healthy().plot
