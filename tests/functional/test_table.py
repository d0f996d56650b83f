"""``bnprobe table``: batch effects in tables of measurements, and tables without them."""

from __future__ import annotations

import csv
import json
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bnprobe
from bnprobe.errors import DataError, UsageError
from functional.command import CLEAN, ERROR, FINDINGS, NOTHING, Workspace

pd = pytest.importorskip("pandas")

PLATE = ("--batch", "plate")


def frame(rows: int = 96, features: int = 12, plates: int = 4, shift: float = 2.0, seed: int = 0) -> Any:
    """Plates of which the last is shifted, in half of the features and with another scale; ids of digits."""
    random = np.random.default_rng(seed)
    plate = np.arange(rows) % plates
    dose = random.integers(0, 3, rows)
    values = random.normal(size=(rows, features)) + np.outer(dose, np.linspace(-2, 2, features))
    last = plate == plates - 1
    values[last] *= 1.4 if shift else 1.0
    values[last, : features // 2] += shift
    made = pd.DataFrame(values.round(4), columns=[f"IL{number}" for number in range(features)])
    made.insert(0, "sample", [f"{7 * row:05}" for row in range(rows)])
    made.insert(3, "plate", [f"P{number + 8}" for number in plate])
    made["dose"] = dose
    made["remark"] = np.where(plate == 1, 'said "no", twice', "")
    return made


@pytest.fixture
def table(workspace: Workspace) -> Workspace:
    """A folder with data.csv, in which the last of four plates is off."""
    frame().to_csv(workspace.folder / "data.csv", index=False)
    return workspace


def rows_of(text: str, delimiter: str = ",") -> list[dict[str, str]]:
    return list(csv.DictReader(StringIO(text), delimiter=delimiter))


def test_the_plate_that_is_off_is_found(table: Workspace) -> None:
    found = table.run("table", "data.csv", *PLATE, "--covariates", "dose")
    assert found.code == FINDINGS
    said = " ".join(found.stdout.split())
    assert "data.csv: 96 rows in 4 plates, 12 features; effects of dose taken into account" in said
    assert "1 of 4 plates is off" in said
    assert [line.split()[1] for line in found.stdout.splitlines() if line.startswith("✗ ") and " P" in line] == ["P11"]
    report = table.run("table", "data.csv", *PLATE, "--covariates", "dose", "--format", "json").report(FINDINGS)
    assert [batch["name"] for batch in report["batches"]] == ["P8", "P9", "P10", "P11"]
    assert [batch["off"] for batch in report["batches"]] == [False, False, False, True]
    assert report["population"] == ["P8", "P9", "P10"]
    off = report["batches"][3]
    assert np.mean(off["d"][:6]) == pytest.approx(2.0, abs=0.3)
    assert np.mean(off["r"]) == pytest.approx(1.4, rel=0.2)
    assert off["equivalent_batch_size"] < 4
    assert report["batches"][0]["equivalent_batch_size"] == pytest.approx(24, rel=0.4)
    assert {feature["name"] for feature in report["features"] if feature["differs"]} >= {f"IL{n}" for n in range(6)}
    assert table.run("table", "data.csv", *PLATE, "--covariates", "dose", "--exit-zero").code == CLEAN


def test_plates_that_are_alike_are_clean(workspace: Workspace) -> None:
    frame(shift=0.0).to_csv(workspace.folder / "data.csv", index=False)
    found = workspace.run("table", "data.csv", *PLATE, "--covariates", "dose")
    assert (found.code, "0 of 4 plates are off" in found.stdout) == (CLEAN, True)


def test_the_adjusted_table_is_the_same_but_for_its_features(table: Workspace) -> None:
    before = (table.folder / "data.csv").read_bytes()
    found = table.run("table", "data.csv", *PLATE, "--covariates", "dose", "--adjust", "out.csv")
    assert (found.code, "Adjusted table written to out.csv." in found.stderr) == (FINDINGS, True)
    assert (table.folder / "data.csv").read_bytes() == before
    old, new = (rows_of((table.folder / name).read_text()) for name in ("data.csv", "out.csv"))
    assert list(old[0]) == list(new[0])
    for one, other in zip(old, new, strict=True):
        for name in ("sample", "plate", "dose", "remark"):
            assert one[name] == other[name]
    again = table.run("table", "out.csv", *PLATE, "--covariates", "dose", "--format", "json").report(CLEAN)
    assert again["explained"] < 0.01
    values = np.array([[float(row[f"IL{n}"]) for n in range(12)] for row in new])
    dose = np.array([float(row["dose"]) for row in new]) - 1.0
    slope = dose @ (values - values.mean(0)) / (dose @ dose)
    np.testing.assert_allclose(slope, np.linspace(-2, 2, 12), atol=0.5)  # the effect of the covariate is kept


def test_the_adjusted_table_replaces_no_file(table: Workspace) -> None:
    assert "already exists" in table.run("table", "data.csv", *PLATE, "--adjust", "data.csv").error(ERROR)
    assert "this command reads" in table.run("table", "data.csv", *PLATE, "--adjust", "data.csv", "--force").error(
        ERROR
    )
    table.write("out.csv", "mine")
    assert "already exists" in table.run("table", "data.csv", *PLATE, "--adjust", "out.csv").error(ERROR)
    assert (table.folder / "out.csv").read_text() == "mine"
    assert table.run("table", "data.csv", *PLATE, "--adjust", "out.csv", "--force").code == FINDINGS
    assert "ends in" in table.run("table", "data.csv", *PLATE, "--adjust", "out.xlsx").error(ERROR)
    same = ("--adjust", "same.csv", "--format", "csv", "--output", "same.csv")
    assert "the file of the report, too" in table.run("table", "data.csv", *PLATE, *same).error(ERROR)
    assert "give --adjust FILE" in table.run("table", "data.csv", *PLATE, "--mean-only").error(ERROR)


def test_a_reference_plate_stays_as_it_is(table: Workspace) -> None:
    found = table.run("table", "data.csv", *PLATE, "--adjust", "out.tsv", "--reference", "P9", "--mean-only")
    assert "brought to those of plate P9" in " ".join(found.stdout.split())
    old = rows_of((table.folder / "data.csv").read_text())
    new = rows_of((table.folder / "out.tsv").read_text(), "\t")
    for one, other in zip(old, new, strict=True):
        same = all(float(one[f"IL{n}"]) == float(other[f"IL{n}"]) for n in range(12))
        assert same == (one["plate"] == "P9")
    assert 'did you mean "P9"' in table.run(
        "table", "data.csv", *PLATE, "--adjust", "o.csv", "--reference", "P99"
    ).error(ERROR)


def test_every_format(table: Workspace) -> None:
    formats = [part for name in ("json", "html", "markdown", "csv", "terminal") for part in ("--format", name)]
    assert table.run("table", "data.csv", *PLATE, *formats, "--output-dir", "out").code == FINDINGS
    cells = rows_of((table.folder / "out" / "table.csv").read_text())
    assert len(cells) == 4 * 13  # the dose is a feature where it is no covariate
    report = json.loads((table.folder / "out" / "table.json").read_text())
    for place, cell in enumerate(cells[:13]):
        d, r = report["batches"][0]["d"][place], report["batches"][0]["r"][place]
        assert (float(cell["d"]), float(cell["r"])) == (d, r)
        assert float(cell["mismatch"]) == pytest.approx(d * d + (1 - r) ** 2)
    assert "1 of 4 plates is off" in (table.folder / "out" / "table.md").read_text()
    shown = table.run("show", "out/table.json")
    assert shown.stdout.rstrip() == (table.folder / "out" / "table.txt").read_text().rstrip()


# --- What is refused --------------------------------------------------------------------------------------------------

CONFOUNDED = "is confounded: site is the same as plate (P8: b, P9: a, P10: b2, P11: a2)"


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        (None, ("--batch", "plat"), 'data.csv has no column "plat"; did you mean "plate"?'),
        (None, (*PLATE, "--covariates", "doze"), 'no column "doze"; did you mean "dose"?'),
        (None, (*PLATE, "--covariates", "plate"), "plate is the batch and a covariate"),
        (None, (*PLATE, "--ignore", "XY*"), 'no column "XY*"'),
        (None, (*PLATE, "--features", "remark"), 'column "remark" of --features holds no numbers'),
        (None, (*PLATE, "--ignore", "IL*,dose"), "has no column of numbers besides"),
        (None, (*PLATE, "--fdr", "2"), "a number between 0 and 1"),
        (None, (*PLATE, "--seed", "-1"), "at least 0"),
        (None, (*PLATE, "--features", "plate"), "the column is the batch or a covariate"),
        (lambda made: made.assign(IL3="9" * 400), PLATE,
         'line 2, column "IL3": the value is infinite. --ignore IL3 leaves the column as it is.'),
        (lambda made: made.assign(IL3=2e100, IL4=3e100), PLATE,
         'the value is beyond 1e+100, and such are in 1 more column. --ignore IL3 leaves'),
        (lambda made: made.assign(dose=made.dose.astype(object).where(made.index != 3, "high")),
         (*PLATE, "--covariates", "dose"), '"high" is no number, and most values of this column are. Empty cells and NA'
         " are missing values. --categorical dose takes it as categories."),
        (lambda made: made.assign(plate=made.plate.where(made.index != 5, "None")), PLATE,
         'line 7, column "plate" is "None", which is a missing value'),
        (None, ("--batch", "sample"), "another one in each row"),
        (lambda made: made.assign(plate="P1"), PLATE, "plate is P1 in all rows"),
        (lambda made: made.assign(IL3=made.IL3.astype(object).where(made.index != 14, "< 0.1")), PLATE,
         'data.csv, line 16, column "IL3": "< 0.1" is no number'),
        (lambda made: made.assign(IL3=made.IL3.where(made.index != 14, np.inf)), PLATE,
         'data.csv, line 16, column "IL3": the value is infinite'),
        (lambda made: made.assign(plate=made.plate.where(made.index != 5)), PLATE,
         'data.csv, line 7, column "plate" is empty'),
        (lambda made: made.assign(dose=made.dose.where(made.index > 1)), (*PLATE, "--covariates", "dose"),
         'line 2, column "dose" is empty (1 more row like it)'),
        (lambda made: made.assign(site=made.plate.map({"P8": "b", "P9": "a", "P10": "b2", "P11": "a2"})),
         (*PLATE, "--covariates", "site"), CONFOUNDED),
        (lambda made: made.assign(day=made.plate.str[1:].astype(int)), (*PLATE, "--covariates", "day"),
         "day has one value in each plate"),
        (lambda made: made.assign(mg=made.dose * 5), (*PLATE, "--covariates", "dose,mg"), "mg follows from dose"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_said(table: Workspace, change: Any, options: tuple[str, ...], said: str) -> None:
    if change is not None:
        change(frame()).to_csv(table.folder / "data.csv", index=False)
    assert said in table.run("table", "data.csv", *options).error(ERROR)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "data.csv is empty"),
        ("plate,a\n", "has no rows"),
        ("plate|a\nP1|1\n", 'has one column, "plate|a": neither commas nor semicolons nor tabs separate others'),
        ("plate,a,a\nP1,1,2\n", 'line 1: two columns are called "a"'),
        ("plate,a\nP1,1\nP2,2\nP1,3,4\n", "line 4: there are 3 fields, and the header has 2"),
        ("plate,a\nP1,1,2\nP2,2,3\nP1,3,4\n", "the rows have more fields than the header"),
        ("plate,a\nP1,\xff\n", "is no text of UTF-8"),
        ("plate;a\nP1;1\nP2;2\nP1;3,5;4\n", "line 4: there are 3 fields, and the header has 2"),
    ],
)
def test_files_that_are_no_table(workspace: Workspace, text: str, said: str) -> None:
    (workspace.folder / "data.csv").write_bytes(text.encode("latin-1"))
    assert said in workspace.run("table", "data.csv", *PLATE).error(ERROR)


def test_files_that_are_not_there_or_of_another_kind(table: Workspace) -> None:
    assert "does not exist. Did you mean data.csv?" in table.run("table", "dada.csv", *PLATE).error(ERROR)
    table.write("data.xlsx", "x")
    assert "a file that ends in .csv" in table.run("table", "data.xlsx", *PLATE).error(ERROR)


def test_a_table_of_constants_has_nothing_to_judge(workspace: Workspace) -> None:
    workspace.write("data.csv", "plate,a\nP1,1\nP1,1\nP2,1\nP2,1\n")
    assert "no feature can be judged. The first, a, is constant." in workspace.run("table", "data.csv", *PLATE).error(
        NOTHING
    )


def test_a_line_is_that_of_the_file(workspace: Workspace) -> None:
    """Also after a field of several lines and an empty one."""
    lines = ["plate,note,a", 'P1,"one\ntwo",1', "", "P2,x,2", "P1,x,3", "P2,x,oops", "P1,x,4"]
    workspace.write("data.csv", "\n".join(lines) + "\n")
    assert 'line 7, column "a": "oops"' in workspace.run("table", "data.csv", *PLATE).error(ERROR)


def test_cells_with_a_carriage_return_stay_one_cell(table: Workspace) -> None:
    frame().assign(remark="one\rtwo").to_csv(table.folder / "data.csv", index=False, lineterminator="\r\n")
    table.run("table", "data.csv", *PLATE, "--adjust", "out.csv")
    with (table.folder / "out.csv").open(newline="") as file:
        assert {row["remark"] for row in csv.DictReader(file)} == {"one\rtwo"}


# --- Other kinds of tables --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "separator", "decimal", "encoding", "noted"),
    [
        ("csv", ";", ",", "utf-8-sig", "Fields are separated by semicolons and numbers have decimal commas."),
        ("csv", ";", ".", "utf-8", "Fields are separated by semicolons."),
        ("txt", "\t", ",", "utf-16", "Numbers have decimal commas."),
        ("tsv", ",", ".", "utf-8", "Fields are separated by commas."),
        ("csv", "\t", ".", "utf-8-sig", "Fields are separated by tabs."),
    ],
)
def test_text_of_spreadsheets_says_the_same(
    table: Workspace, suffix: str, separator: str, decimal: str, encoding: str, noted: str
) -> None:
    """The adjusted table is written as the table was; as a comma cannot be both, semicolons separate decimal commas."""
    made = frame().assign(age=lambda each: each.index % 7 + 0.5)
    made.to_csv(table.folder / "data.csv", index=False)
    other = f"other.{suffix}"
    made.to_csv(table.folder / other, index=False, sep=separator, decimal=decimal, encoding=encoding)
    options = (*PLATE, "--covariates", "dose,age", "--format", "json", "--adjust")
    first = json.loads(table.run("table", "data.csv", *options, "plain.csv").stdout)
    second = json.loads(table.run("table", other, *options, f"same.{suffix}").stdout)
    assert second["batches"] == first["batches"]
    assert second["notes"] == [noted, *first["notes"]]
    plain = pd.read_csv(table.folder / "plain.csv", dtype={"sample": str})
    pd.testing.assert_frame_equal(
        pd.read_csv(table.folder / f"same.{suffix}", sep=separator, decimal=decimal, dtype={"sample": str}), plain
    )
    assert table.run("table", other, *options, "out.csv").code == FINDINGS
    kept = separator if suffix == "csv" else ";" if decimal == "," else ","
    pd.testing.assert_frame_equal(
        pd.read_csv(table.folder / "out.csv", sep=kept, decimal=decimal, dtype={"sample": str}), plain
    )


def test_commas_between_thousands_are_no_decimal_commas(workspace: Workspace) -> None:
    rows = [f"P{row % 2}\t{row % 5 + row / 7:.3f}\t{1 + row % 3},{row:03}" for row in range(20)]
    workspace.write("data.tsv", "\n".join(["plate\ta\tcells", *rows]) + "\n")
    report = workspace.run("table", "data.tsv", *PLATE, "--format", "json").report(CLEAN)
    assert [feature["name"] for feature in report["features"]] == ["a"]
    assert report["notes"] == ['"cells" holds text, dates, truth values or codes: it is kept as it is.']


def test_a_wide_header_is_no_field_that_is_too_long(workspace: Workspace) -> None:
    names = [f"feature {number:06}" for number in range(10_000)]
    for name, separator in (("data.csv", ","), ("other.csv", ";")):
        rows = [[f"P{row % 2}", *(f"{(row * place) % 7}" for place in range(len(names)))] for row in range(6)]
        text = "\n".join(separator.join(row) for row in (["plate", *names], *rows))
        workspace.write(name, text + "\n")
        assert workspace.run("table", name, *PLATE).code in (CLEAN, FINDINGS)


def test_tabs_and_parquet_say_the_same(table: Workspace) -> None:
    pytest.importorskip("pyarrow")
    made = frame()
    made.to_csv(table.folder / "data.tsv", sep="\t", index=False)
    made.to_parquet(table.folder / "data.parquet")
    reports = [
        json.loads(table.run("table", name, *PLATE, "--format", "json", "--adjust", f"out-{name}").stdout)
        for name in ("data.csv", "data.tsv", "data.parquet")
    ]
    for report in reports[1:]:
        assert report["batches"] == reports[0]["batches"]
    read = pd.read_parquet(table.folder / "out-data.parquet")
    assert list(read.columns) == list(made.columns)
    assert (read["sample"] == made["sample"]).all()
    text = pd.read_csv(table.folder / "out-data.csv")
    np.testing.assert_allclose(read["IL3"], text["IL3"], rtol=1e-12)


def test_a_damaged_parquet_file(workspace: Workspace) -> None:
    pytest.importorskip("pyarrow")
    workspace.write("data.parquet", "no parquet")
    assert "could not be read as Parquet" in workspace.run("table", "data.parquet", *PLATE).error(ERROR)


@pytest.mark.filterwarnings("ignore")  # anndata asks pandas for an option of old
def test_anndata(workspace: Workspace) -> None:
    anndata = pytest.importorskip("anndata")
    made = frame()
    names = [f"IL{number}" for number in range(12)]
    plates = pd.Index(sorted(made["plate"].unique()), dtype=object)  # of Arrow, not every AnnData writes them
    obs = made[["plate", "dose"]].assign(plate=pd.Categorical(made["plate"].astype(object), categories=plates))
    var = pd.DataFrame(index=pd.Index(names, dtype=object))
    data = anndata.AnnData(made[names].to_numpy(), obs.set_axis(obs.index.map(str).astype(object)), var)
    data.write_h5ad(workspace.folder / "data.h5ad")
    found = workspace.run("table", "data.h5ad", *PLATE, "--covariates", "dose", "--adjust", "out.h5ad")
    assert (found.code, "1 of 4 plates is off" in found.stdout) == (FINDINGS, True)
    adjusted = anndata.read_h5ad(workspace.folder / "out.h5ad")
    frame_adjusted = bnprobe.adjust_table(made, batch="plate", covariates=["dose"])
    np.testing.assert_allclose(adjusted.X, frame_adjusted[names], rtol=1e-9)
    assert list(adjusted.obs["plate"]) == list(made["plate"])
    (workspace.folder / "data.h5ad").rename(workspace.folder / "DATA.H5AD")
    assert "ends in .h5ad" in workspace.run("table", "DATA.H5AD", *PLATE, "--adjust", "out.csv").error(ERROR)
    bnprobe.table(data, batch="plate", covariates="dose", adjust=workspace.folder / "again.h5ad")
    np.testing.assert_allclose(anndata.read_h5ad(workspace.folder / "again.h5ad").X, adjusted.X)
    with pytest.raises(UsageError, match='no column "IL99"; did you mean "IL9"'):
        bnprobe.table(data, batch="plate", features="IL99")
    data.var_names = ["IL1", *names[1:]]
    with pytest.raises(DataError, match='two features that are called "IL1"'):
        bnprobe.adjust_table(data, batch="plate")


def test_from_python() -> None:
    made = frame()
    report = bnprobe.table(made, batch="plate", covariates=["dose"])
    assert (report.ok, report.data, [batch.name for batch in report.batches if batch.off]) == (
        False,
        "The data frame",
        ["P11"],
    )
    assert str(report).startswith("The data frame: 96 rows")
    adjusted = bnprobe.adjust_table(made, batch="plate", covariates=["dose"])
    assert list(adjusted.columns) == list(made.columns)
    assert adjusted.drop(columns=[f"IL{n}" for n in range(12)]).equals(made.drop(columns=[f"IL{n}" for n in range(12)]))
    assert bnprobe.table(adjusted, batch="plate", covariates=["dose"]).ok
    with pytest.raises(UsageError, match="Leave it out of covariates"):
        bnprobe.table(made, batch="plate", covariates=["plate"])
    with pytest.raises(UsageError, match="mean_only=True says how to adjust: give adjust='FILE', too"):
        bnprobe.table(made, batch="plate", mean_only=True)
    with pytest.raises(UsageError, match="A table is a path"):
        bnprobe.table(3, batch="plate")
    with pytest.raises(DataError, match="two columns"):
        bnprobe.table(pd.concat([made, made[["IL1"]]], axis=1), batch="plate")


def test_only_numbers_are_measurements() -> None:
    """Neither categories, nor truth values with gaps, nor whole numbers that no float tells apart."""
    made = frame().assign(
        grade=lambda each: pd.Categorical(each.index % 5),
        smokes=lambda each: pd.Series([True, False, None] * 32, dtype=object),
        code=lambda each: 2**60 + each.index * 7919 % 96,
        phase=lambda each: each.IL1 + 1j,
    )
    adjusted = bnprobe.adjust_table(made, batch="plate", covariates="dose")
    for name in ("grade", "smokes", "code", "phase"):
        assert adjusted[name].equals(made[name])
    assert [name for name in made if not adjusted[name].equals(made[name])] == [f"IL{number}" for number in range(12)]


def test_names_of_rows_are_written_and_names_of_columns_are_no_patterns(tmp_path: Path) -> None:
    made = frame().rename(columns={"IL1": "IL[1]"})
    named = made.set_index(made["sample"].rename("name"))
    report = bnprobe.table(named, batch="plate", features=["IL[1]", "IL2*"], adjust=tmp_path / "out.csv")
    assert [feature.name for feature in report.features] == ["IL[1]", "IL2"]
    assert rows_of((tmp_path / "out.csv").read_text())[3]["name"] == "00021"


def test_names_that_hardly_differ_are_in_one_order_and_said() -> None:
    made = frame().assign(plate=lambda each: ["1", "01", "001", "p 1", "P 1 ", "P 1"] * 16)
    report = bnprobe.table(made, batch="plate")
    assert [batch.name for batch in report.batches][:3] == ["001", "01", "1"]
    assert '"P 1", "P 1 ", "p 1" differ in case or white space alone.' in report.notes


def test_covariates_that_hardly_differ_from_the_batch_are_said() -> None:
    made = frame().assign(day=lambda each: each.index % 4 + 0.1 * np.sin(each.index * 7.0))
    *_, note = bnprobe.table(made, batch="plate", covariates="day").notes
    assert note.startswith(
        "day all but follows from plate: 0.4% of its variance is left. The variance of its effect is 2"
    )
    assert not any("follows" in note for note in bnprobe.table(made, batch="plate", covariates="dose").notes)


def test_where_one_row_tells_a_covariate_from_the_batch_the_adjusted_table_says_so(table: Workspace) -> None:
    made = frame().assign(site=lambda each: np.where((each.plate == "P11") & (each.index > 3), "b", "a"))
    made.to_csv(table.folder / "data.csv", index=False)
    found = table.run("table", "data.csv", *PLATE, "--covariates", "site", "--adjust", "out.csv")
    said = " ".join(found.stdout.split())
    assert "site and plate are hardly told apart (see the notes): a shift of a plate may have been kept" in said
    assert (
        "site all but follows from plate: 5.5% of its variance is left. The variance of its effect is 18 times" in said
    )
    assert found.stderr == "Adjusted table written to out.csv; site and plate are hardly told apart: see the report.\n"


def test_features_that_cannot_be_judged_are_said_and_stay_as_they_are() -> None:
    """Among others one whose batches that agree lack it, and one of truth values, which is no measurement."""
    made = frame()
    last = made.plate == "P11"
    made = made.assign(
        blank=1.5, spare=np.nan, few=made.IL1.where(made.index < 2), late=made.IL2.where(last), flag=last
    )
    made = made.assign(small=made.IL2 * 1e-200, day=pd.Timestamp("2024-01-01"))
    report = bnprobe.table(made, batch="plate", covariates=["dose"])
    assert report.notes[0] == (
        '"sample", "remark", "flag", "day" hold text, dates, truth values or codes: they are kept as they are.'
    )
    assert {each.name: each.reason.partition(",")[0] for each in report.skipped} == {
        "blank": "is constant",
        "spare": "has no values",
        "few": "has 2 values",
        "late": "is constant in the batches that agree",
        "small": "differs by less than 1e-140",
    }
    assert len(report.features) == len(report.batches[0].d) == 12
    adjusted = bnprobe.adjust_table(made, batch="plate", covariates=["dose"])
    for name in ("blank", "spare", "few", "flag"):
        assert adjusted[name].equals(made[name])


def test_columns_that_count_rows_are_no_measurements_and_codes_can_be_categories() -> None:
    made = frame().assign(number=range(1, 97))
    report = bnprobe.table(made, batch="plate", covariates=["dose"], categorical=["dose"])
    assert "number" not in [feature.name for feature in report.features]
    assert report.notes[0] == (
        '"number" names the rows by numbers: it is kept as it is. features takes it as a measurement.'
    )
    asked = bnprobe.table(made, batch="plate", features=["number", "IL?"])
    assert [feature.name for feature in asked.features] == [*(f"IL{n}" for n in range(10)), "number"]
    assert made.assign(plate=made.plate.str[1:].astype(float)).pipe(
        lambda each: [batch.name for batch in bnprobe.table(each, batch="plate").batches]
    ) == ["8", "9", "10", "11"]
