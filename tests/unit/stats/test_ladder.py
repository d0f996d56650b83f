"""The ladder against plain loops over micro-batches in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bnprobe.stats import ladder
from bnprobe.stats.composition import Images, _orders, analyse, draw, false_discovery_rates, regrouped_batches
from bnprobe.stats.intervals import REPLICATES, jackknife_each
from bnprobe.stats.ladder import BatchSums
from bnprobe.stats.moments import pool_moments
from bnprobe.stats.segments import Segments

EPS = 1e-3
CHANNELS = 3


class Data:
    """Images of one channel set, in a unit of running statistics that fit them badly."""

    def __init__(self, images: int, positions: int, size: int, sorted_: bool = False, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        level = rng.normal(size=(images, 1, CHANNELS))
        if sorted_:
            level = np.sort(level, axis=0)
        self.x = 0.7 * level + rng.gamma(2.0, size=(images, positions, CHANNELS))
        self.size, self.positions = size, positions
        self.running_mean, self.running_var = np.array([1.5, 2.0, 2.5]), np.array([1.0, 2.0, 4.0])
        self.scale = np.sqrt(self.running_var + EPS)
        self.batches = self.x.reshape(-1, size * positions, CHANNELS)

    def sums(self) -> tuple[BatchSums, torch.Tensor, Images]:
        """As probing gathers them."""
        values = torch.from_numpy(self.x)
        d = (values.mean(1) - torch.from_numpy(self.running_mean)) / torch.from_numpy(self.scale)
        variance = values.var(1, correction=0) / torch.from_numpy(self.scale**2)
        batch_d, batch_v = pool_moments(d, variance, self.size)
        eps = torch.from_numpy(EPS / (self.running_var + EPS))
        rho = batch_v / (batch_v + eps)
        rho_r = rho * (batch_v + eps).sqrt()
        n = self.size * self.positions
        unbiased = batch_v * n / (n - 1) if n > 1 else batch_v
        index = torch.arange(len(batch_d)) % REPLICATES
        counts = torch.bincount(index, minlength=REPLICATES).double()

        def summed(values: torch.Tensor) -> torch.Tensor:
            return torch.zeros(REPLICATES, CHANNELS, dtype=torch.float64).index_add_(0, index, values)

        sums = BatchSums(
            segments=Segments(torch.tensor([CHANNELS])),
            counts=counts[:, None],
            d=summed(batch_d),
            d_squared=summed(batch_d.square()),
            rho=summed(rho),
            rho_r=summed(rho_r),
            variance=summed(batch_v),
            unbiased=summed(unbiased),
            eps=eps,
        )
        squares = summed(d.square().unflatten(0, (-1, self.size)).sum(1))
        replicate = index.repeat_interleave(self.size)
        return sums, squares, Images((d - d.mean(0)).float(), variance.float(), replicate)


def side_by_side(parts: list[BatchSums]) -> BatchSums:
    """The sums of several layers."""
    wide = {name: torch.cat([getattr(part, name) for part in parts], -1) for name in (*ladder.SUMS, "eps", "counts")}
    return BatchSums(Segments(torch.cat([part.segments.sizes for part in parts])), **wide)


def mismatch_by_loop(batches: np.ndarray, mean: np.ndarray, std: np.ndarray) -> float:
    """Mean over micro-batches, channels and values of (z_train - z_test)^2."""
    found = []
    for batch in batches:
        z_train = (batch - batch.mean(0)) / np.sqrt(batch.var(0) + EPS)
        z_test = (batch - mean) / std
        found.append(((z_train - z_test) ** 2).mean())
    return float(np.mean(found))


def test_mismatch_against_any_reference_is_that_of_a_loop() -> None:
    data = Data(64, 5, 4)
    means = data.sums()[0].means()
    rng = np.random.default_rng(3)
    for _ in range(5):
        mean, std = rng.normal(2, 1, CHANNELS), rng.uniform(0.3, 3, CHANNELS)
        reference = ladder.Reference(
            torch.from_numpy((mean - data.running_mean) / data.scale)[None], torch.from_numpy(std / data.scale)[None]
        )
        found = ladder.mismatch(means, reference)[0]
        assert float(found) == pytest.approx(mismatch_by_loop(data.batches, mean, std), rel=1e-12)


def test_settled_statistics_are_where_an_ema_goes() -> None:
    data = Data(512, 5, 4)
    layer = torch.nn.BatchNorm1d(CHANNELS, eps=EPS, momentum=None).double()
    for batch in data.batches:
        layer(torch.from_numpy(batch))
    means = data.sums()[0].means()
    found = ladder.settled(means, torch.tensor([20]), torch.zeros(1 + REPLICATES, 1))
    mean = data.running_mean + data.scale * found.mean[0].numpy()
    np.testing.assert_allclose(mean, layer.running_mean.numpy(), rtol=1e-12)
    np.testing.assert_allclose((found.std[0].numpy() * data.scale) ** 2 - EPS, layer.running_var.numpy(), rtol=1e-12)
    pooled = ladder.settled(means, torch.tensor([20]), torch.ones(1 + REPLICATES, 1))
    np.testing.assert_allclose((pooled.std[0].numpy() * data.scale) ** 2 - EPS, data.x.reshape(-1, 3).var(0))


def test_rows_without_a_replicate_are_what_a_loop_without_it_gives() -> None:
    data = Data(36 * 4, 5, 4)  # 36 micro-batches: 2 or 3 in a replicate
    means = data.sums()[0].means()
    found = ladder.mismatch(means, ladder.settled(means, torch.tensor([20]), torch.zeros(1 + REPLICATES, 1)))
    for replicate in range(REPLICATES):
        kept = data.batches[np.arange(36) % REPLICATES != replicate]
        mean, var = kept.mean((0, 1)), kept.var(1, ddof=1).mean(0)
        expected = mismatch_by_loop(kept, mean, np.sqrt(var + EPS))
        assert float(found[1 + replicate]) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("positions", "size"), [(5, 4), (1, 4), (5, 2), (1, 2), (3, 16)])
def test_batches_drawn_at_random_are_those_of_many_shuffles(positions: int, size: int) -> None:
    data = Data(512, positions, size, sorted_=True)
    sums, squares, pool = data.sums()
    means = sums.means()
    drawn = draw(means, sums.counts, squares, pool, size, seed=0)
    way = torch.zeros(1 + REPLICATES, 1, dtype=torch.float64)
    found = float(ladder.mismatch_drawn(means, drawn, torch.tensor([size * positions]), way)[0])
    rng, shuffled = np.random.default_rng(5), []
    for _ in range(40):
        batches = data.x[rng.permutation(512)].reshape(-1, size * positions, CHANNELS)
        mean, var = batches.mean((0, 1)), batches.var(1, ddof=1).mean(0)
        shuffled.append(mismatch_by_loop(batches, mean, np.sqrt(var + EPS)))
    # A loop fits its reference to its own 512 / size micro-batches, and finds that much less.
    assert found == pytest.approx(np.mean(shuffled), rel=0.02 + size / 512)


@pytest.mark.parametrize(("images", "pooled"), [(192, 192), (512, 128)])
def test_the_noise_of_images_and_pool_is_stated(images: int, pooled: int) -> None:
    way = torch.zeros(1 + REPLICATES, 1, dtype=torch.float64)
    figures, stated = [], []
    for seed in range(120):
        sums, squares, pool = Data(images, 3, 4, seed=seed).sums()
        some = torch.randperm(images, generator=torch.Generator().manual_seed(seed))[:pooled]
        chosen = Images(pool.mean[some], pool.variance[some], pool.replicate[some])
        means = sums.means()
        drawn = draw(means, sums.counts, squares, chosen, 4, seed)
        [found] = jackknife_each(ladder.mismatch_drawn(means, drawn, torch.tensor([12]), way), sums.counts)
        figures.append(found.value)
        stated.append(found.variance + float(drawn.chance))
    assert np.sqrt(np.mean(stated)) == pytest.approx(np.std(figures), rel=0.3)


def test_a_shift_between_two_samples_of_one_population_is_nothing() -> None:
    values = []
    for seed in range(40):
        one, other = (Data(128, 5, 4, seed=seed + offset).sums()[0] for offset in (0, 1000))
        [estimate] = ladder.shift(one, other)
        low, high = estimate.interval()
        values.append((estimate.value, low <= 0 <= high))
    assert abs(np.mean([value for value, _ in values])) < 0.002
    assert np.mean([covered for _, covered in values]) > 0.85


def test_a_shift_is_the_distance_of_the_populations() -> None:
    one, other = Data(4096, 5, 4, seed=1), Data(4096, 5, 4, seed=2)
    other.x = 1.5 * other.x + 0.5
    other.batches = other.x.reshape(-1, 20, CHANNELS)
    here, there = (data.x.reshape(-1, CHANNELS) for data in (other, one))
    s, reference = np.sqrt(here.var(0) + EPS), np.sqrt(there.var(0) + EPS)
    rho = here.var(0) / (here.var(0) + EPS)
    expected = (((here.mean(0) - there.mean(0)) ** 2 + rho * (s - reference) ** 2) / reference**2).mean()
    [found] = ladder.shift(other.sums()[0], one.sums()[0])
    assert found.value == pytest.approx(expected, rel=0.01)


def test_analysis_of_variance_is_scipys() -> None:
    from scipy.stats import f_oneway

    for sorted_ in (False, True):
        data = Data(80, 3, 5, sorted_=sorted_)
        sums, squares, _ = data.sums()
        found = analyse(sums, squares, 5)
        expected = f_oneway(*data.x.mean(1).reshape(16, 5, CHANNELS), axis=0)
        np.testing.assert_allclose(found.p_value.numpy(), expected.pvalue, rtol=1e-6, atol=1e-300)
        assert bool((found.intraclass_correlation > 0.4).all()) == sorted_


@pytest.mark.parametrize("ties", [False, True])
def test_adjusted_p_values_are_scipys(ties: bool) -> None:
    from scipy.stats import false_discovery_control

    p_values = torch.rand(500, dtype=torch.float64).pow(4)
    if ties:
        p_values = (p_values * 20).round() / 20
    expected = false_discovery_control(p_values.numpy())
    np.testing.assert_allclose(false_discovery_rates(p_values).numpy(), expected, rtol=1e-14)


def test_constant_image_means_are_no_evidence() -> None:
    data = Data(64, 1, 4)
    data.x[:] = 3.0
    sums, squares, _ = data.sums()
    found = analyse(sums, squares, 4)
    assert found.p_value.tolist() == [1.0] * CHANNELS
    assert found.intraclass_correlation.tolist() == [0.0] * CHANNELS


def test_p_values_are_uniform_for_batches_drawn_at_random() -> None:
    p_values = torch.cat([analyse(*Data(128, 3, 4, seed=seed).sums()[:2], 4).p_value for seed in range(200)])
    assert float((p_values < 0.05).double().mean()) == pytest.approx(0.05, abs=0.025)
    assert float((p_values < 0.5).double().mean()) == pytest.approx(0.5, abs=0.06)


VALUES = torch.tensor([20, 1, 20])
"""Values per channel of three layers that are evaluated side by side."""


def three_layers() -> tuple[list[Data], list[tuple[BatchSums, torch.Tensor, Images]]]:
    """Of the same samples, but of data that differ."""
    layers = [Data(96, positions, 4, seed=seed) for seed, positions in enumerate((5, 1, 5))]
    return layers, [layer.sums() for layer in layers]


def test_the_rungs_of_layers_side_by_side_are_those_of_each_alone() -> None:
    _, layers = three_layers()
    sums = [layer[0] for layer in layers]
    sums[1] = BatchSums(**{**vars(sums[1]), "counts": sums[1].counts.clone()})
    sums[1].counts[3] = 0.0  # a replicate without micro-batches
    found = _rungs(side_by_side(sums), VALUES)
    for layer, (own, values) in enumerate(zip(sums, VALUES.split(1), strict=True)):
        for one, alone in zip(found, _rungs(own, values), strict=True):
            torch.testing.assert_close(one[:, layer], alone[:, 0], rtol=1e-13, atol=1e-15)


def _rungs(sums: BatchSums, values: torch.Tensor) -> list[torch.Tensor]:
    means = sums.means()
    way = ladder.blend(means, values)
    known = ladder.settled(means, values, way)
    return [
        way,
        ladder.distance(means, known),
        ladder.mismatch(means, ladder.running(means)),
        ladder.mismatch(means, known),
        ladder.shift_between(means, means.whole()),
        ladder.mismatch(sums.whole(), ladder.running(sums.whole())),
    ]


@pytest.mark.parametrize("chunk", [2**17, 96 * 2, 1])
def test_batches_drawn_for_layers_side_by_side_are_those_of_each_alone(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, layers = three_layers()
    sums, squares, pools = zip(*layers, strict=True)
    alone = [_drawn(*layer, values) for layer, values in zip(layers, VALUES.split(1), strict=True)]
    monkeypatch.setattr("bnprobe.stats.composition._CHUNK_VALUES", chunk)
    pool = Images(
        torch.cat([one.mean for one in pools], 1), torch.cat([one.variance for one in pools], 1), pools[0].replicate
    )
    found = _drawn(side_by_side(list(sums)), torch.cat(squares, 1), pool, VALUES)
    for layer, own in enumerate(alone):
        for one, expected in zip(found, own, strict=True):
            torch.testing.assert_close(one[..., layer], expected[..., 0], rtol=1e-12, atol=1e-15)


def _drawn(sums: BatchSums, squares: torch.Tensor, pool: Images, values: torch.Tensor) -> list[torch.Tensor]:
    means = sums.means()
    drawn = draw(means, sums.counts, squares, pool, 4, seed=0)
    floor = ladder.mismatch_drawn(means, drawn, values, ladder.blend(means, values))
    return [floor, drawn.change, drawn.chance, drawn.excess, drawn.pooled]


def test_the_noise_of_the_orders_is_that_of_loops() -> None:
    """Over orders, groups and samples, as the docstrings say it."""
    data, size, images = Data(48, 3, 4), 4, 48
    sums, squares, pool = data.sums()
    means = sums.means()
    drawn = draw(means, sums.counts, squares, pool, size, seed=0)
    orders, eps = _orders(images, size, 0).numpy(), sums.eps.numpy()
    mean, variance = pool.mean.double().numpy(), pool.variance.double().numpy()
    v = np.array([[mean[group].var(0) + variance[group].mean(0) for group in order] for order in orders])
    s, rho = np.sqrt(v + eps), v / (v + eps)
    pooled, root, exact = v.mean((0, 1)), (rho * s).mean((0, 1)), drawn.variance[0].numpy()
    slope = -2 * np.sqrt(exact / pooled) / np.sqrt(exact + eps)
    effects = (slope * (rho * s - root / (2 * pooled) * v) + rho).mean(2)  # of each group on D, linearized
    parts = np.zeros((len(orders), images))
    for number, order in enumerate(orders):
        for group, effect in zip(order, effects[number], strict=True):
            parts[number, group] = effect
    own, replicate = parts.mean(0) - parts.mean(), pool.replicate.numpy()
    for each in range(REPLICATES):
        left = (replicate != each).sum()
        expected = -size * own[replicate == each].sum() / left
        assert float(drawn.change[1 + each, 0]) == pytest.approx(expected, rel=1e-9)
    noise, groups = parts.var(0, ddof=1).mean() / len(orders), len(set(replicate))
    assert float(drawn.chance[0]) == pytest.approx(effects.var(ddof=1) / effects.size, rel=1e-9)
    assert float(drawn.excess[0]) == pytest.approx(size**2 * noise / images * groups / (groups - 1) / 2, rel=1e-9)


def test_the_analysis_of_layers_side_by_side_is_that_of_each_alone() -> None:
    _, layers = three_layers()
    sums, squares, _ = zip(*layers, strict=True)
    found = analyse(side_by_side(list(sums)), torch.cat(squares, 1), 4)
    alone = [analyse(own, square, 4) for own, square in zip(sums, squares, strict=True)]
    torch.testing.assert_close(found.p_value, torch.cat([each.p_value for each in alone]))
    torch.testing.assert_close(found.intraclass_correlation, torch.cat([each.intraclass_correlation for each in alone]))


def test_shifts_of_layers_side_by_side_are_those_of_each_alone() -> None:
    _, layers = three_layers()
    here = [layer[0] for layer in layers]
    there = [Data(64, positions, 4, seed=9).sums()[0] for positions in (5, 1, 5)]
    found = ladder.shift(side_by_side(here), side_by_side(there))
    for one, *pair in zip(found, here, there, strict=True):
        [alone] = ladder.shift(*pair)
        assert vars(one) == pytest.approx(vars(alone), rel=1e-9)


def test_samples_as_batches_are_those_of_loops() -> None:
    data = Data(40, 3, 4)
    sums, _, pool = data.sums()
    d = (data.x.mean(1) - data.running_mean) / data.scale
    found = sums.by_sample(torch.from_numpy(d), pool.variance).means()
    v = pool.variance.double().numpy()
    scale = v + sums.eps.numpy()
    for name, rows in {"d": d, "d_squared": d**2, "rho": v / scale, "rho_r": v / scale**0.5, "variance": v}.items():
        np.testing.assert_allclose(getattr(found, name)[0].numpy(), rows.mean(0), rtol=1e-12)
        for replicate in range(REPLICATES):
            kept = rows[np.arange(40) % REPLICATES != replicate]
            np.testing.assert_allclose(getattr(found, name)[1 + replicate].numpy(), kept.mean(0), rtol=1e-10)


def test_number_of_regrouped_batches() -> None:
    assert regrouped_batches(1024, 2) == 4 * 512
    assert regrouped_batches(64, 8) == 16 * 8
    assert regrouped_batches(100, 64) == 16
    assert regrouped_batches(10, 64) == 0
    assert regrouped_batches(32, 1) == _orders(32, 1, seed=0).shape[:2].numel() == 32
