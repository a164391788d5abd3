"""Intervals against closed forms, scipy, and their coverage in simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from tritflow.evaluation import significance
from tritflow.evaluation import statistics as st


def simulate(rng: np.random.Generator, prompts: int, pictures: int, mean: float) -> tuple[np.ndarray, list[str]]:
    """Beta-binomial pictures: prompts differ in how hard they are."""
    hardness = rng.beta(mean * 2, (1 - mean) * 2, size=prompts)
    passed = rng.random((prompts, pictures)) < hardness[:, None]
    return passed.astype(float).ravel(), [f"p{i}" for i in range(prompts) for _ in range(pictures)]


@pytest.mark.parametrize(("k", "n"), [(0, 10), (10, 10), (3, 17), (52, 100), (1, 1), (499, 553)])
def test_wilson_is_scipys(k: int, n: int) -> None:
    ours = st.wilson(k, n)
    theirs = binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert ours == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_wilson_of_nothing_says_nothing() -> None:
    assert st.wilson(0, 0) == (0.0, 1.0)


def test_proportion_with_one_picture_a_prompt_is_plain_wilson() -> None:
    values = np.array([1.0] * 30 + [0.0] * 70)
    got = st.clustered_proportion(values, [str(i) for i in range(100)])
    low, high = st.wilson(30, 100)
    # The cluster variance has C - 1 in its denominator, hence an effective n of 99.
    assert got.value == 0.3
    assert got.low == pytest.approx(low, abs=2e-3)
    assert got.high == pytest.approx(high, abs=2e-3)


def test_identical_pictures_of_a_prompt_count_once() -> None:
    prompts = np.array([1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0])
    four = st.clustered_proportion(np.repeat(prompts, 4), [str(i) for i in range(10) for _ in range(4)])
    assert (four.low, four.high) == pytest.approx(st.wilson(6, 10), abs=1e-9)


def test_all_passing_does_not_claim_certainty() -> None:
    got = st.clustered_proportion(np.ones(80), [str(i // 4) for i in range(80)])
    assert got.high == 1.0
    assert got.low == pytest.approx(st.wilson(20, 20)[0])


def test_bootstrap_matches_the_closed_form_standard_error() -> None:
    rng = np.random.default_rng(1)
    values, clusters = simulate(rng, 200, 4, 0.6)
    got = st.clustered_mean(values, clusters, resamples=8000)
    se = significance.standard_error(values, clusters)
    means = values.reshape(200, 4).mean(1)
    assert se == pytest.approx(means.std(ddof=1) / math.sqrt(200), rel=1e-12)
    assert (got.high - got.low) / (2 * 1.96) == pytest.approx(se, rel=0.04)


def test_stratified_mean_weighs_tags_alike() -> None:
    values = [1, 1, 1, 1, 1, 1, 0, 0]
    tags = ["a"] * 6 + ["b"] * 2
    got = st.clustered_mean(values, [str(i) for i in range(8)], tags)
    assert got.value == 0.5


@pytest.mark.parametrize(("method", "mean"), [("mean", 0.7), ("proportion", 0.7), ("proportion", 0.95)])
def test_coverage(method: str, mean: float) -> None:
    """Nominal 95 % intervals hold the truth in 92 to 98.5 % of 600 worlds of 25 prompts x 4 pictures."""
    rng = np.random.default_rng(7)
    hits = 0
    for _ in range(600):
        values, clusters = simulate(rng, 25, 4, mean)
        if method == "mean":
            got = st.clustered_mean(values, clusters, resamples=600)
        else:
            got = st.clustered_proportion(values, clusters)
        hits += got.low <= mean <= got.high
    assert 0.92 <= hits / 600 <= 0.985


def test_coverage_of_the_paired_difference_and_that_pairing_helps() -> None:
    rng = np.random.default_rng(3)
    hits, paired, unpaired = 0, [], []
    tags = [f"t{i // 80}" for i in range(240)]
    clusters = [f"p{i // 4}" for i in range(240)]
    for _ in range(400):
        hardness = np.repeat(rng.beta(2, 1, size=60), 4)
        noise = rng.random(240)
        teacher = (noise < hardness).astype(float)
        student = (noise < hardness * 0.9).astype(float)
        truth = -0.1 * 2 / 3
        got = st.paired_difference(student, teacher, clusters, tags, resamples=600)
        hits += got.low <= truth <= got.high
        paired.append(got.high - got.low)
        alone = st.clustered_mean(teacher, clusters, tags, resamples=200)
        unpaired.append(alone.high - alone.low)
    assert 0.92 <= hits / 400 <= 0.985
    assert np.mean(paired) < 0.8 * np.mean(unpaired)


def test_coverage_of_the_overall_score() -> None:
    """Three tags, one of them near 1: the joined intervals hold the truth, and stay inside [0, 1]."""
    rng = np.random.default_rng(13)
    means, hits = (0.97, 0.6, 0.1), 0
    for _ in range(500):
        parts = [simulate(rng, 20, 4, m)[0] for m in means]
        clusters = [f"p{i // 4}" for i in range(240)]
        got = st.stratified_proportion(np.concatenate(parts), clusters, [f"t{i // 80}" for i in range(240)])
        hits += got.low <= np.mean(means) <= got.high
    assert 0.93 <= hits / 500 <= 0.99
    nothing = st.stratified_proportion(np.zeros(8), list("aabbccdd"), list("xxxxyyyy"))
    assert nothing.low == 0.0
    assert 0.3 < nothing.high < 0.9


def test_one_stratum_is_the_proportion_itself() -> None:
    x, clusters = simulate(np.random.default_rng(1), 30, 4, 0.8)
    one = st.stratified_proportion(x, clusters, ["t"] * 120)
    plain = st.clustered_proportion(x, clusters)
    assert (one.value, one.low, one.high) == pytest.approx((plain.value, plain.low, plain.high))


def test_no_difference_keeps_an_interval() -> None:
    x = np.array([1.0, 0.0] * 30)
    got = st.paired_difference(x, x, [str(i // 2) for i in range(60)])
    assert got.value == 0.0
    assert got.high == -got.low == pytest.approx(1 - 0.025 ** (1 / 30))


def test_kept_is_one_for_the_teacher_itself_and_scales() -> None:
    rng = np.random.default_rng(5)
    teacher, clusters = simulate(rng, 80, 4, 0.8)
    same = st.score_kept(teacher, teacher, clusters)
    assert same.value == 1.0
    assert 1 - same.low == pytest.approx((1 - 0.025 ** (1 / 80)) / teacher.mean())
    half = st.score_kept(teacher / 2, teacher, clusters)
    assert (half.value, half.low, half.high) == pytest.approx((0.5, 0.5, 0.5))
    assert math.isnan(st.score_kept(teacher, teacher * 0, clusters).value)


def test_kept_agrees_with_the_delta_method() -> None:
    rng = np.random.default_rng(11)
    teacher, clusters = simulate(rng, 400, 4, 0.7)
    student = teacher * (rng.random(teacher.size) < 0.93)
    got = st.score_kept(student, teacher, clusters)
    ratio = student.mean() / teacher.mean()
    se = significance.standard_error(student - ratio * teacher, clusters) / teacher.mean()
    assert got.value == pytest.approx(ratio)
    assert got.low == pytest.approx(ratio - 1.96 * se, abs=0.003)
    assert got.high == pytest.approx(ratio + 1.96 * se, abs=0.003)


def test_median_against_numpy_and_ragged_clusters() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=301)
    clusters = [f"p{i % 37}" for i in range(301)]
    got = st.clustered_median(x, clusters)
    assert got.value == np.median(x)
    # Independent observations: close to the order-statistic interval of the median.
    ranks = np.sort(x)[[int(150 - 0.98 * math.sqrt(301)), int(150 + 0.98 * math.sqrt(301))]]
    assert got.low == pytest.approx(ranks[0], abs=0.08)
    assert got.high == pytest.approx(ranks[1], abs=0.08)


def test_mcnemar_against_the_binomial() -> None:
    a = np.array([1, 1, 1, 1, 1, 1, 0, 1, 0, 0], bool)
    b = np.array([0, 0, 0, 0, 0, 1, 1, 1, 0, 0], bool)
    got = significance.mcnemar(a, b)
    assert (got.only_first, got.only_second) == (5, 1)
    assert got.p_value == pytest.approx(2 * (1 + 6) / 2**6)
    assert significance.mcnemar(a, a).p_value == 1.0


def test_minimum_detectable_difference_is_found_with_the_stated_power() -> None:
    rng = np.random.default_rng(2)
    clusters = [str(i) for i in range(100)]
    d = rng.normal(size=100)
    mdd = significance.minimum_detectable_difference(d, clusters)
    assert mdd == pytest.approx((1.959964 + 0.841621) * d.std(ddof=1) / 10, rel=1e-5)
    true = 2.801585 / 10
    found = 0
    for _ in range(2000):
        x = rng.normal(true, 1.0, size=100)
        found += abs(x.mean()) / (x.std(ddof=1) / 10) > 1.96
    assert found / 2000 == pytest.approx(0.8, abs=0.03)


def test_seed_noise_predicts_what_two_seed_sets_do() -> None:
    rng = np.random.default_rng(4)
    hardness = rng.beta(2, 1, size=60)
    clusters = [str(i // 4) for i in range(240)]
    tags = ["a"] * 80 + ["b"] * 160
    gaps, predicted = [], []
    for _ in range(400):
        x, y = ((rng.random((60, 4)) < hardness[:, None]).astype(float).ravel() for _ in range(2))
        gaps.append(st.clustered_mean(x, clusters, tags, resamples=2).value)
        gaps[-1] -= st.clustered_mean(y, clusters, tags, resamples=2).value
        predicted.append(significance.seed_noise(x, clusters, tags))
    assert np.mean(predicted) == pytest.approx(np.std(gaps), rel=0.12)
    assert math.isnan(significance.seed_noise([1.0, 0.0], ["a", "b"]))


def test_one_prompt_gives_a_value_and_no_interval() -> None:
    got = st.clustered_mean([1.0, 0.0], ["p", "p"]).to_dict()
    assert (got["value"], got["low"], got["high"]) == (0.5, None, None)


def test_refusals_name_the_trouble() -> None:
    with pytest.raises(st.StatisticsError, match="no observations"):
        st.clustered_mean([], [])
    with pytest.raises(st.StatisticsError, match="2 observations but 1 prompt"):
        st.clustered_mean([1, 2], ["a"])
    with pytest.raises(st.StatisticsError, match="NaN"):
        st.clustered_mean([1, math.nan], ["a", "b"])
    with pytest.raises(st.StatisticsError, match="under two tags"):
        st.clustered_mean([1, 2], ["a", "a"], ["x", "y"])
    with pytest.raises(st.StatisticsError, match="2 and 1"):
        st.paired_difference([1, 2], [1], ["a", "b"])


def test_seeded() -> None:
    x = np.random.default_rng(0).random(40)
    c = [str(i // 4) for i in range(40)]
    assert st.clustered_mean(x, c) == st.clustered_mean(x, c)
    assert st.clustered_mean(x, c) != st.clustered_mean(x, c, seed=1)
