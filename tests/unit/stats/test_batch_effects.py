"""Batch effects in tables: the fit against least squares written out, tests against SciPy, simulated truth, ComBat."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bnprobe.stats.adjustment import adjust
from bnprobe.stats.batch_effects import Covariate, Design, _cells, figures, fit, judge, projected, test_features
from bnprobe.stats.theory import equivalent_batch_size, mismatch_iid

Array = np.ndarray
test_features.__test__ = False  # type: ignore[attr-defined]

REFERENCE = json.loads((Path(__file__).parent / "combat.json").read_text())


def design(batch: Array, *covariates: Covariate) -> Design:
    return Design("plate", tuple(f"P{number}" for number in range(batch.max() + 1)), batch, covariates)


def drawn(rows: int, features: int, batches: int, seed: int = 0) -> tuple[Array, Array, np.random.Generator]:
    random = np.random.default_rng(seed)
    return random.normal(size=(rows, features)), np.arange(rows) % batches, random


def measured(values: Array, found_design: Design) -> Any:
    found = fit(values, found_design)
    tests = test_features(found, found_design)
    judged = judge(values, found_design, found.known)
    return found, tests, judged, figures(found, tests, judged, found_design)


# --- The fit and the tests --------------------------------------------------------------------------------------------


def _least_squares(values: Array, columns: Array) -> tuple[Array, float]:
    found, *_ = np.linalg.lstsq(columns, values, rcond=None)
    return found, float(np.square(values - columns @ found).sum())


@pytest.mark.parametrize("gaps", [False, True])
def test_the_fit_is_least_squares_of_each_feature(gaps: bool) -> None:
    values, batch, random = drawn(30, 6, 3)
    age, sex = random.uniform(20, 80, 30), random.integers(0, 3, 30)
    values = values * 1e-3 + 1e6  # no cancellation
    if gaps:
        values[random.random(values.shape) < 0.15] = np.nan
    of = design(batch, Covariate("age", age), Covariate("sex", sex, ("a", "b", "c")))
    found, tests = fit(values, of), test_features(fit(values, of), of)
    beside = np.column_stack([age, sex == 1, sex == 2])
    beside = beside - beside.mean(0)
    for feature in range(values.shape[1]):
        there = ~np.isnan(values[:, feature])
        y = values[there, feature] - 1e6
        local = beside[there] - beside[there].mean(0)
        _, full = _least_squares(y, np.column_stack([batch[there, None] == np.arange(3), local]).astype(float))
        _, null = _least_squares(y, np.column_stack([np.ones(there.sum()), local]))
        freedom = there.sum() - 6
        ratio = ((null - full) / 2) / (full / freedom)
        assert found.squares[:, feature].sum() == pytest.approx(full, rel=1e-5)
        assert tests.location[feature] == pytest.approx(stats.f.sf(ratio, 2, freedom), rel=1e-4)
        assert np.isnan(found.residual[:, feature]).tolist() == (~there).tolist()


def test_without_covariates_the_tests_are_those_of_scipy() -> None:
    values, batch, random = drawn(37, 8, 4)
    values[batch == 1] *= random.uniform(0.5, 2, 8)
    of = design(batch)
    tests = test_features(fit(values, of), of)
    groups = [values[batch == number] for number in range(4)]
    np.testing.assert_allclose(tests.location, stats.f_oneway(*groups).pvalue, rtol=1e-9)
    levene = [stats.levene(*(group[:, feature] for group in groups)).pvalue for feature in range(8)]
    np.testing.assert_allclose(tests.scale, levene, rtol=1e-9)
    either = np.minimum(2 * np.minimum(tests.location, tests.scale), 1)
    np.testing.assert_allclose(tests.rate, stats.false_discovery_control(either), rtol=1e-12)


def test_two_rows_say_nothing_of_the_scale() -> None:
    """Both are as far from their median, so that such batches have no variance within and differ for certain."""
    values, batch, _ = drawn(44, 6, 10)
    pairs = np.repeat(np.arange(10), 2)
    of = design(pairs)
    assert test_features(fit(values[:20], of), of).scale.tolist() == [1.0] * 6
    batch = np.concatenate([np.repeat([0, 1, 2], 8), 3 + pairs])
    of = design(batch)
    tests = test_features(fit(values, of), of)
    levene = [stats.levene(*(values[batch == number, feature] for number in range(3))).pvalue for feature in range(6)]
    np.testing.assert_allclose(tests.scale, levene, rtol=1e-9)


def test_a_scale_that_differs_is_found_beside_batches_without_values() -> None:
    values, batch, _ = drawn(120, 6, 4)
    values[batch == 0, 2] = 8 * (values[batch == 0, 2] - values[batch == 0, 2].mean())
    values[batch == 3, 2] = np.nan
    *_, found = measured(values, design(batch))
    assert np.flatnonzero(found.differs[0]).tolist() == [2]


def test_values_without_squares_are_not_known() -> None:
    values, batch, _ = drawn(12, 4, 3)
    values[:, 0], values[:, 1], values[:, 2] = values[:, 0] * 1e-200, values[:, 1] * 1e-155, values[:, 2] * 1e-120
    assert fit(values, design(batch)).known.tolist() == [False, False, True, True]


def test_constant_and_missing_features_are_not_known() -> None:
    values, batch, _ = drawn(12, 4, 3)
    values[:, 0], values[:, 1], values[2:, 2] = 0.1, np.nan, np.nan
    found = fit(values, design(batch))
    assert found.known.tolist() == [False, False, False, True]
    tests = test_features(found, design(batch))
    assert tests.location[:3].tolist() == tests.rate[:3].tolist() == [1, 1, 1]


# --- Confounding ------------------------------------------------------------------------------------------------------


def _levels(text: str) -> Covariate:
    names = tuple(sorted(set(text)))
    return Covariate("site", np.array([names.index(each) for each in text]), names)


SIX = np.array([0, 0, 1, 1, 2, 2])


@pytest.mark.parametrize(
    ("covariates", "why"),
    [
        ([_levels("aabbcc")], "site is the same as plate (P0: a, P1: b, P2: c)"),
        ([_levels("aaaabb")], "site has one value in each plate (P0: a, P1: a, P2: b)"),
        ([_levels("ababcd")], "site is c, d in plate P2 and nowhere else"),
        ([Covariate("day", np.array([1.0, 1, 2, 2, 4, 4]))], "day has one value in each plate"),
        ([Covariate("day", np.full(6, 3.0))], "day has one value in all rows"),
        ([_levels("aaaaaa")], "site has one value in all rows"),
        (
            [Covariate("dose", np.array([0.0, 1, 0, 1, 0, 1])), Covariate("mg", np.array([0.0, 9, 0, 9, 0, 9]))],
            "mg follows from dose",
        ),
        (
            [Covariate("x", np.array([0.0, 1, 0, 1, 0, 1])), Covariate("y", np.array([5.0, 6, 7, 8, 0, 1]))],
            "y follows from plate and x",
        ),
    ],
)
def test_a_confounded_design_is_said_in_words(covariates: Sequence[Covariate], why: str) -> None:
    assert why in str(design(SIX, *covariates).confounding())


def test_a_design_that_can_be_told_apart_is_let_pass() -> None:
    rows = np.tile(SIX, 2)
    assert design(rows, _levels("ababababababab"[:12]), Covariate("day", np.arange(12.0))).confounding() is None
    assert "too few" in str(
        design(
            SIX, Covariate("x", np.arange(6.0) ** 2), _levels("abbaab"), Covariate("z", np.array([1.0, 5, 2, 2, 9, 4]))
        ).confounding()
    )


def test_what_is_left_of_a_covariate_is_what_least_squares_leaves() -> None:
    _, batch, random = drawn(60, 1, 6)
    age, dose = random.normal(size=60) + batch, random.normal(size=60)
    dose += 2 * age
    beside = (batch[:, None] == np.arange(6)).astype(float)
    found = design(batch, Covariate("age", age), Covariate("dose", dose)).left_over()
    for (name, part), own, other in zip(found, (age, dose), (dose, age), strict=True):
        _, left = _least_squares(own, np.column_stack([beside, other]))
        assert part == pytest.approx(left / np.square(own - own.mean()).sum(), rel=1e-9), name


def test_a_level_that_all_but_follows_from_the_batch_is_seen_and_a_rare_one_is_none() -> None:
    batch = np.repeat(np.arange(3), 20)
    rare = _levels(("abcbc" + "bcbcb" * 3) + "bcbcb" * 8)
    ((_, part),) = design(batch, rare).left_over()
    assert part > 0.9
    almost = _levels("a" * 19 + "b" + "bc" * 10 + "cb" * 10)
    ((_, part),) = design(batch, almost).left_over()
    assert part == pytest.approx(0.07, abs=0.02)
    again = Covariate(almost.name, 2 - almost.values, almost.levels)  # whichever is the first
    assert design(batch, again).left_over()[0][1] == pytest.approx(part)


# --- Which batches are off --------------------------------------------------------------------------------------------


def test_figures_are_those_of_the_equations() -> None:
    values, batch, _ = drawn(60, 3, 4)
    _, _, judged, found = measured(values, design(batch))
    assert judged.population.all()
    for number in range(4):
        part = values[batch == number]
        normalized = (part - part.mean(0)) / part.std(0)
        population = (part - values.mean(0)) / values.std(0)
        np.testing.assert_allclose(population, found.r[number] * normalized + found.d[number], atol=1e-10)
        np.testing.assert_allclose(found.mismatch[number], np.square(normalized - population).mean(0), rtol=1e-9)


def test_planted_batches_and_features_are_found() -> None:
    """Of 8 plates 3 are off, in a tenth of 400 features; D of the others is what chance gives."""
    values, batch, random = drawn(400, 400, 8)
    hit = np.arange(400) < 40
    truth = np.zeros((8, 400))
    truth[[1, 4, 6]] = random.normal(0, 2, (3, 400)) * hit
    values += truth[batch]
    values[batch == 4] *= np.where(hit, 1.8, 1.0)
    _, tests, judged, found = measured(values, design(batch))
    assert np.flatnonzero(judged.off).tolist() == [1, 4, 6]
    assert judged.agree
    assert (tests.rate <= 0.05)[hit].mean() > 0.95
    assert (tests.rate <= 0.05)[~hit].mean() < 0.02
    np.testing.assert_allclose(found.d[1, hit], truth[1, hit], atol=0.6)
    assert np.median(found.r[4, hit]) == pytest.approx(1.8, rel=0.05)
    sizes = [equivalent_batch_size(found.mismatch[number].mean(), 250) for number in (0, 2, 3, 5, 7)]
    assert sizes == pytest.approx([50] * 5, rel=0.1)
    assert found.differs[np.abs(truth) > 1].mean() > 0.95
    assert not found.differs[:, ~hit].mean() > 0.002


@pytest.mark.parametrize(
    ("kind", "missing"),
    [
        ("plain", ""),
        ("correlated", ""),
        ("heavy tails", ""),
        ("covariate that follows the batch", ""),
        ("correlated", "at random"),
        ("plain", "in one batch"),
        ("covariate that follows the batch", "half of the features in one batch"),
    ],
)
def test_batches_that_are_alike_are_let_pass(kind: str, missing: str) -> None:
    """In 40 tables, of which 5% may have a batch called off."""
    alarms = differing = 0
    for seed in range(40):
        features = 10 if missing else 30
        values, batch, random = drawn(60, features, 5, seed)
        covariates = []
        if kind == "heavy tails":
            values = random.standard_t(3, values.shape)
        if kind == "correlated":
            values += 2 * random.normal(size=(60, 2)) @ random.normal(size=(2, features))
        if kind.startswith("covariate"):
            age = random.normal(size=60) + batch
            values += np.outer(age, random.normal(size=features))
            covariates = [Covariate("age", age)]
        gaps = {"at random": random.random(values.shape) < 0.3, "in one batch": random.random(values.shape) < 0.6}
        if missing in gaps:
            values[gaps[missing] & ((batch == 0)[:, None] | (missing == "at random"))] = np.nan
        if missing.startswith("half"):
            values[batch == 0, :5] = np.nan
        _, tests, judged, _ = measured(values, design(batch, *covariates))
        alarms += judged.off.any()
        differing += (tests.rate <= 0.05).any()
    assert alarms <= 6
    assert differing <= 6


def _dealt_slowly(values: Array, of: Design) -> tuple[Array, Array]:
    """P-values of batches, and 95% of D where rows are dealt at random: each feature by itself, by least squares."""
    batches = len(of.batches)
    age = of.columns

    def residual(y: Array, columns: Array) -> Array:
        left = np.full_like(y, np.nan)
        there = ~np.isnan(y)
        effects, *_ = np.linalg.lstsq(columns[there], y[there], rcond=None)
        left[there] = y[there] - columns[there, -age.shape[1] :] @ effects[-age.shape[1] :]
        return left - np.nanmean(left)

    left = np.column_stack([residual(y, np.column_stack([np.ones(len(y)), age])) for y in values.T])
    order = np.lexsort((left[:, ~np.isnan(values).any(0)][:, 0], of.batch))
    left, age, batch = left[order], age[order], of.batch[order]
    one_hot = (batch[:, None] == np.arange(batches)).astype(float)

    def by_chance(y: Array, each: int) -> float:
        """The variance of d, and about that of r."""
        there = ~np.isnan(y)
        sizes = one_hot[there].sum(0)
        inverse = np.linalg.pinv(np.column_stack([one_hot, age])[there])
        contrast = np.append((np.arange(batches) == each) - sizes / sizes.sum(), np.zeros(age.shape[1]))
        return float(np.square(contrast @ inverse).sum() + 0.5 / sizes[each] - 0.5 / sizes.sum())

    has = np.array([[(~np.isnan(y[batch == each])).sum() for y in left.T] for each in range(batches)])
    usual = [
        [by_chance(y, each) if size else np.nan for y, size in zip(left.T, row, strict=True)]
        for each, row in enumerate(has)
    ]
    random, tables = np.random.default_rng(0), []
    for table in range(200):
        dealt = left[random.permutation(len(left))] if table else left
        parts: list[list[tuple[float, int]]] = [[] for _ in range(batches)]
        for feature, y in enumerate(dealt.T):
            z = residual(y, np.column_stack([one_hot, age]))
            for each in np.flatnonzero(has[:, feature]):
                own = z[batch == each]
                own = own[~np.isnan(own)]
                if len(own):
                    d, r = (own.mean() - np.nanmean(z)) / np.nanstd(z), own.std() / np.nanstd(z)
                    chance = by_chance(y, each)  # 0 where no other batch has values
                    mismatch = (d**2 + (r > 0) * (1 - r) ** 2) * usual[each][feature] / chance if chance > 1e-9 else 0.0
                    parts[each].append((mismatch, has[each, feature]))
        tables.append([np.average([one for one, _ in part], weights=[size for _, size in part]) for part in parts])
    relative = (np.array(tables) / np.mean(tables[1:], axis=0) - 1) * np.sqrt((has > 0).mean(1))
    largest = relative[1:].max(1)
    p_values = (1 + (largest >= relative[0][:, None]).sum(1)) / 200
    return p_values, np.quantile(tables[1:], (0.025, 0.975), axis=0).T


def test_tables_with_gaps_are_dealt_feature_by_feature() -> None:
    """Some values are missing in most features, most in one, and a batch has none of another."""
    values, batch, random = drawn(30, 5, 3)
    age = random.normal(size=30) + batch
    values += np.outer(age, random.normal(size=5))
    values[:, 1:][random.random((30, 4)) < 0.2] = np.nan
    values[8:, 2] = np.nan
    values[batch == 1, 4] = np.nan
    of = design(batch, Covariate("age", age))
    judged = judge(values, of, np.ones(5, bool))
    assert not judged.off.any()
    p_values, interval = _dealt_slowly(values, of)
    np.testing.assert_allclose(judged.p_value, p_values, rtol=1e-9)
    np.testing.assert_allclose(judged.interval, interval, rtol=1e-6)


@pytest.mark.parametrize("missing", ["one value of each but one", "a fifth"])
def test_a_batch_that_is_off_is_found_where_values_are_missing(missing: str) -> None:
    """As it is without gaps; before, features without gaps alone were looked at."""
    whole, some = [], []
    for seed in range(10):
        values, batch, random = drawn(60, 10, 5, seed)
        values[batch == 2, :5] += 1.2
        whole.append(judge(values, design(batch), np.ones(10, bool)).off.tolist())
        if missing == "a fifth":
            values[random.random(values.shape) < 0.2] = np.nan
        else:
            values[random.integers(0, 60, 9), range(9)] = np.nan
        some.append(judge(values, design(batch), np.ones(10, bool)).off.tolist())
    assert np.mean(whole, axis=0)[2] == 1
    assert np.mean(some, axis=0)[2] >= 0.9
    assert np.mean(some, axis=0)[[0, 1, 3, 4]].max() <= 0.2


def test_where_values_are_missing_a_batch_is_compared_at_the_covariates_of_those_it_has() -> None:
    values, batch, random = drawn(60, 4, 3)
    age = random.normal(size=60) + (batch == 0)
    values[:, 0] += age
    values[(batch == 0) & (age > 0.5), 0] = np.nan
    of = design(batch, Covariate("age", age))
    rows = ~np.isnan(values[:, 0])
    alone = design(batch[rows], Covariate("age", age[rows]))
    found, there = fit(values, of), fit(values[rows], alone)
    judged = judge(values, of, found.known)
    p_values, expected = _cells(found, judged, of), _cells(there, judged, alone)
    np.testing.assert_allclose(p_values[:, 0], expected[:, 0], rtol=1e-9)


def test_where_no_half_of_the_batches_agree_all_that_differ_are_off() -> None:
    values, batch, random = drawn(200, 50, 4)
    values += random.normal(0, 3, (4, 50))[batch]
    *_, judged, _ = measured(values, design(batch))
    assert (judged.agree, judged.off.all(), judged.population.all()) == (False, True, True)
    two = drawn(80, 50, 2)
    *_, judged, _ = measured(two[0] + 2 * two[1][:, None], design(two[1]))
    assert (judged.agree, judged.off.tolist()) == (False, [True, True])


def test_a_batch_of_one_row_and_a_flat_batch() -> None:
    values, batch, _ = drawn(21, 4, 4)
    batch = np.where(batch == 3, 2, batch)
    batch[0] = 3
    values[batch == 1, 2] = 0.5
    _, _, _, found = measured(values, design(batch))
    assert np.isnan(found.r[3]).all()
    np.testing.assert_allclose(found.mismatch[3], found.d[3] ** 2)
    assert found.r[1, 2] < 1e-5
    np.testing.assert_allclose(found.mismatch[1, 2], found.d[1, 2] ** 2)


def test_features_that_vary_in_the_batch_that_is_off_alone() -> None:
    values, batch, _ = drawn(40, 3, 4)
    values[batch != 2] = 0.0
    *_, judged, found = measured(values, design(batch))
    assert np.flatnonzero(judged.off).tolist() == [2]
    assert np.isnan(found.d).all()  # the population has no spread


def test_a_batch_that_is_part_of_the_population_has_less_mismatch() -> None:
    values, batch, _ = drawn(24, 4000, 3)
    *_, found = measured(values, design(batch))
    assert found.mismatch.mean() == pytest.approx(mismatch_iid(8, 24), rel=0.02)
    assert mismatch_iid(8, 24) < mismatch_iid(8)
    assert equivalent_batch_size(mismatch_iid(8, 24), 24) == pytest.approx(8)
    assert equivalent_batch_size(0.0, 24) == pytest.approx(24)
    assert mismatch_iid(8, 1e12) == pytest.approx(mismatch_iid(8))


@settings(max_examples=20)
@given(st.floats(1e-6, 1e6), st.floats(-1e3, 1e3), st.integers(0, 1000))
def test_units_and_the_order_of_rows_do_not_matter(factor: float, shift: float, seed: int) -> None:
    values, batch, random = drawn(36, 5, 3, seed)
    values[batch == 2] += 1.5
    age = random.uniform(20, 80, 36)
    order = random.permutation(36)
    _, tests, judged, shown = measured(values, design(batch, Covariate("age", age)))
    again = measured((values * factor + shift * factor)[order], design(batch[order], Covariate("age", 12 * age[order])))
    for name in ("r", "d", "mismatch", "differs"):
        np.testing.assert_allclose(getattr(again[3], name), getattr(shown, name), rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(again[1].rate, tests.rate, rtol=1e-5)
    assert again[2].off.tolist() == judged.off.tolist()
    assert again[2].p_value.tolist() == judged.p_value.tolist()
    adjusted = adjust(values, design(batch, Covariate("age", age))).values
    other = adjust((values * factor + shift * factor)[order], design(batch[order], Covariate("age", age[order]))).values
    np.testing.assert_allclose(other / factor - shift, adjusted[order], rtol=1e-6, atol=1e-6)


# --- Adjusting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", REFERENCE["cases"], ids=lambda case: f"{case['library']}-{case['reference']}-{case['mean_only']}"
)
def test_adjusted_values_are_those_of_combat(case: dict[str, Any]) -> None:
    values, batch, sex, age = (np.array(REFERENCE[name]) for name in ("values", "batch", "sex", "age"))
    covariates = [Covariate("sex", sex, ("f", "m"))]
    if case["library"] == "neuroCombat":
        covariates.append(Covariate("age", age))
    correction = 1 if case["library"] == "neuroCombat" else 0
    found = adjust(values, design(batch, *covariates), case["reference"], case["mean_only"], correction)
    np.testing.assert_allclose(found.values, case["adjusted"], atol=1e-6, rtol=0)


def test_known_effects_are_recovered_and_those_of_covariates_kept() -> None:
    values, batch, random = drawn(240, 300, 4)
    dose = random.normal(size=240) + 0.5 * batch  # unbalanced: batch means hold effects of the dose
    slope = random.normal(size=300)
    shift, scale = random.normal(0, 1.5, (4, 300)), np.sqrt(random.gamma(10, 0.1, (4, 300)))
    clean = values + np.outer(dose, slope)
    table = np.outer(dose, slope) + shift[batch] + scale[batch] * values
    of = design(batch, Covariate("dose", dose))
    found = adjust(table, of)
    std = np.sqrt(fit(table, of).squares.sum(0) / 240)
    between = shift - shift.mean(0)
    assert np.corrcoef((found.location * std).ravel(), between.ravel())[0, 1] > 0.98
    raw = np.sqrt(fit(table, of).squares / 59) / std
    assert np.square(found.scale - scale / std).mean() < np.square(raw - scale / std).mean()
    centred = dose - dose.mean()
    kept = centred @ (found.values - found.values.mean(0)) / (centred @ centred)
    np.testing.assert_allclose(kept, slope, atol=0.25)
    assert np.corrcoef(kept, slope)[0, 1] > 0.99
    away = np.abs(found.values - shift.mean(0) - clean).mean()
    assert away < 0.3 * np.abs(table - shift.mean(0) - clean).mean()
    again = test_features(fit(found.values, of), of)
    assert (again.rate <= 0.05).sum() == 0
    assert ((test_features(fit(table, of), of)).rate <= 0.05).mean() > 0.95


def test_the_reference_batch_stays_and_the_others_come_to_it() -> None:
    values, batch, _ = drawn(90, 20, 3)
    values[batch == 1] = 3 + 2 * values[batch == 1]
    found = adjust(values, design(batch), reference=0)
    assert (found.values[batch == 0] == values[batch == 0]).all()
    np.testing.assert_allclose(found.values[batch == 1].mean(), values[batch == 0].mean(), atol=0.05)
    np.testing.assert_allclose(found.values[batch == 1].std(), values[batch == 0].std(), rtol=0.05)


def test_what_cannot_be_adjusted_stays_as_it_is() -> None:
    """Constant features, flat batches, missing values, a batch of one row, one feature alone."""
    values, batch, _ = drawn(40, 6, 3)
    batch[batch == 2] = 1
    batch[0] = 2
    values[:, 0], values[batch == 0, 1] = 7.0, 0.25
    values[5:9, 2] = np.nan
    found = adjust(values, design(batch))
    assert found.left.tolist() == [True, True, False, False, False, False]
    assert found.mean_only.tolist() == [False, False, True]
    assert (found.values[:, :2] == values[:, :2]).all()
    assert np.isnan(found.values).tolist() == np.isnan(values).tolist()
    assert np.isfinite(found.values[:, 3:]).all()
    assert (found.scale[2] == 1).all()
    alone = adjust(values[1:, 3:4], design(np.minimum(batch[1:], 1)))
    assert not alone.shrunk
    means = [alone.values[batch[1:] == number].mean() for number in (0, 1)]
    assert means[0] == pytest.approx(means[1])


def test_a_feature_that_is_constant_in_a_batch_stays_beside_covariates_too() -> None:
    values, batch, random = drawn(40, 4, 3)
    values[batch == 1, 2] = 1.0
    found = adjust(values, design(batch, Covariate("age", random.normal(size=40))))
    assert found.left.tolist() == [False, False, True, False]
    assert (found.values[:, 2] == values[:, 2]).all()


def test_a_missing_value_changes_no_other_feature_before_shrinkage_and_little_after() -> None:
    values, batch, _ = drawn(60, 50, 3)
    values[batch == 1] += 2
    holed = values.copy()
    holed[:6, 0] = np.nan
    whole, some = adjust(values, design(batch)), adjust(holed, design(batch))
    np.testing.assert_allclose(some.values[:, 1:], whole.values[:, 1:], atol=0.02)
    rows = np.arange(60) >= 6
    alone = adjust(values[rows], design(batch[rows]))
    np.testing.assert_allclose(some.values[rows, 0], alone.values[:, 0], atol=0.1)


def test_the_projection_is_that_of_the_principal_components() -> None:
    values, batch, _ = drawn(40, 8, 2)
    values[:, :4] += 4 * batch[:, None]
    (before, after), explained = projected(values, [values])
    scaled = (values - values.mean(0)) / values.std(0)
    sizes = np.linalg.svd(scaled, compute_uv=False) ** 2
    assert explained == pytest.approx(tuple(sizes[:2] / sizes.sum()))
    np.testing.assert_allclose(np.square(before).sum(0), sizes[:2])
    np.testing.assert_allclose(before, after)
    assert math.isclose(abs(np.corrcoef(before[:, 0], batch)[0, 1]), 1, abs_tol=0.1)
