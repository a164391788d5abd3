"""Intervals and tests for pictures that share prompts.

Pictures of one prompt rise and fall together, so the prompt is the unit that is resampled (a cluster), never
the picture. An overall score is the mean of its tags' means, as GenEval defines it; `strata` holds each
observation's tag and prompts are resampled within their tag. Everything is seeded and vectorised: a bootstrap
of 4,000 resamples is one multinomial draw and one matrix product a tag.

Shapes: n observations (pictures), C clusters (prompts), B resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 4000

Floats = NDArray[np.float64]


class StatisticsError(ValueError):
    """The observations cannot be compared as asked; the message says what does not match."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval.

    Attributes:
        value: the estimate.
        low: lower end (NaN when one prompt alone gives no interval).
        high: upper end.
        n: observations (pictures).
        clusters: prompts.
        method: how the interval came about.
        confidence: two-sided coverage aimed at.
    """

    value: float
    low: float
    high: float
    n: int
    clusters: int
    method: str
    confidence: float = 0.95

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; a number that does not exist (NaN, infinite) becomes null."""

        def number(x: float) -> float | None:
            return round(float(x), 6) if math.isfinite(x) else None

        return {
            "value": number(self.value),
            "low": number(self.low),
            "high": number(self.high),
            "n": self.n,
            "prompts": self.clusters,
            "method": self.method,
            "confidence": self.confidence,
        }


def z_of(confidence: float) -> float:
    """Quantile of the standard normal that bounds the middle `confidence`."""
    from scipy.stats import norm

    return float(norm.ppf(0.5 + confidence / 2))


def wilson(successes: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (E. B. Wilson 1927, JASA 22, p. 209).

    `n` may be an effective sample size and need not be whole. Returns (low, high); n = 0 gives (0, 1).
    """
    if n <= 0:
        return 0.0, 1.0
    z = z_of(confidence)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(max(p * (1 - p) / n + z * z / (4 * n * n), 0.0))
    # At p = 0 and p = 1 the end is exact; rounding must not move it.
    low = 0.0 if successes <= 0 else max(0.0, centre - half)
    high = 1.0 if successes >= n else min(1.0, centre + half)
    return low, high


@dataclass(frozen=True)
class Table:
    """Per-cluster sums: `sums` [C, m] over m measures, `counts` [C], `stratum` [C], S strata in all."""

    sums: Floats
    counts: Floats
    stratum: NDArray[np.int64]
    strata: int

    @property
    def clusters(self) -> int:
        return len(self.counts)

    def estimate(self) -> Floats:
        """[m]: the mean of the strata's means."""
        means = [self.sums[self.stratum == s].sum(0) / self.counts[self.stratum == s].sum() for s in range(self.strata)]
        return np.mean(means, axis=0)

    def replicates(self, resamples: int, seed: int) -> Floats:
        """[B, m]: `estimate` over resampled clusters, all measures with the same draws, hence paired.

        Deviations are widened by sqrt(C / (C - 1)) per stratum: a bootstrap of C clusters has the variance
        of the population formula, which is too small by that factor (Efron & Tibshirani 1993, ch. 5).
        """
        rng = np.random.default_rng(seed)
        total = np.zeros((resamples, self.sums.shape[1]))
        for s in range(self.strata):
            rows = self.stratum == s
            sums, counts = self.sums[rows], self.counts[rows]
            c = len(counts)
            draws = rng.multinomial(c, np.full(c, 1.0 / c), size=resamples).astype(np.float64)
            means = (draws @ sums) / (draws @ counts)[:, None]
            centre = sums.sum(0) / counts.sum()
            widen = math.sqrt(c / (c - 1)) if c > 1 else math.nan
            total += centre + (means - centre) * widen
        return total / self.strata


def table_of(columns: Sequence[ArrayLike], clusters: Sequence[str], strata: Sequence[str] | None) -> Table:
    values = np.stack([np.asarray(c, dtype=np.float64).ravel() for c in columns], axis=1)
    if len(values) == 0:
        raise StatisticsError("there are no observations to average")
    if len(values) != len(clusters) or (strata is not None and len(strata) != len(values)):
        raise StatisticsError(
            f"{len(values)} observations but {len(clusters)} prompt names"
            + ("" if strata is None else f" and {len(strata)} tags")
        )
    if not np.isfinite(values).all():
        raise StatisticsError("an observation is NaN or infinite; leave such pictures out first")
    groups = list(strata) if strata is not None else [""] * len(values)
    names, stratum_of = np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)
    cluster_names, cluster_of = np.unique(np.asarray(clusters, dtype=object).astype(str), return_inverse=True)
    c = len(cluster_names)
    sums = np.zeros((c, values.shape[1]))
    np.add.at(sums, cluster_of, values)
    stratum = np.zeros(c, dtype=np.int64)
    stratum[cluster_of] = stratum_of
    if (stratum[cluster_of] != stratum_of).any():
        bad = cluster_names[cluster_of[np.flatnonzero(stratum[cluster_of] != stratum_of)[0]]]
        raise StatisticsError(f"prompt '{bad}' appears under two tags; ids must be unique")
    return Table(sums, np.bincount(cluster_of, minlength=c).astype(np.float64), stratum, len(names))


def _percentiles(replicates: Floats, confidence: float) -> tuple[float, float]:
    if np.isnan(replicates).any():
        return math.nan, math.nan
    low, high = np.quantile(replicates, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)


def clustered_proportion(passed: ArrayLike, clusters: Sequence[str], confidence: float = 0.95) -> Interval:
    """A pass rate with Wilson's interval at the effective sample size of clustered pictures.

    n_eff = p (1 - p) / v with v the cluster-robust variance of p (ratio estimator), kept between C and n
    (Korn & Graubard 1998, Survey Methodology 24, with Wilson's interval for Clopper-Pearson's). Unlike a
    bootstrap it does not collapse to a point when every picture passes.
    """
    table = table_of([passed], clusters, None)
    sums, counts = table.sums[:, 0], table.counts
    n, c = counts.sum(), table.clusters
    p = sums.sum() / n
    variance = c / max(c - 1, 1) * float(((sums - p * counts) ** 2).sum()) / n**2
    if p in (0.0, 1.0) or c == 1:
        effective = float(c)
    else:
        effective = float(n) if variance == 0 else min(max(p * (1 - p) / variance, float(c)), float(n))
    low, high = wilson(p * effective, effective, confidence)
    return Interval(float(p), low, high, int(n), c, "Wilson, effective n by prompt", confidence)


def stratified_proportion(
    passed: ArrayLike, clusters: Sequence[str], strata: Sequence[str], confidence: float = 0.95
) -> Interval:
    """The mean of the strata's pass rates, from the strata's own intervals (`clustered_proportion`).

    low = mean(p_s) - sqrt(sum (p_s - low_s)^2) / S and high alike: the method of variance estimates recovery
    (Zou & Donner 2008, Statistics in Medicine 27, p. 1693). It stays inside [0, 1] and does not collapse when a
    stratum passes everywhere, as a bootstrap does.
    """
    x = np.asarray(passed, dtype=np.float64).ravel()
    names, prompts = np.asarray(strata, dtype=object).astype(str), np.asarray(clusters, dtype=object).astype(str)
    table = table_of([x], clusters, strata)
    parts = [clustered_proportion(x[names == s], list(prompts[names == s]), confidence) for s in np.unique(names)]
    value = float(np.mean([p.value for p in parts]))
    below = math.sqrt(sum((p.value - p.low) ** 2 for p in parts)) / len(parts)
    above = math.sqrt(sum((p.high - p.value) ** 2 for p in parts)) / len(parts)
    method = "Wilson by tag, effective n by prompt"
    return Interval(value, value - below, value + above, len(x), table.clusters, method, confidence)


def clustered_mean(
    values: ArrayLike,
    clusters: Sequence[str],
    strata: Sequence[str] | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The mean (with `strata`: the mean of the strata's means) with a bootstrap interval over clusters."""
    table = table_of([values], clusters, strata)
    low, high = _percentiles(table.replicates(resamples, seed)[:, 0], confidence)
    return Interval(
        float(table.estimate()[0]),
        low,
        high,
        len(clusters),
        table.clusters,
        "bootstrap by prompt",
        confidence,
    )


_NONE_DIFFERS = "exact bound, no picture differs"


def _no_difference_bound(clusters: int, confidence: float) -> float:
    """How often a prompt could differ although none of C did: 1 - ((1 - confidence) / 2)^(1/C); scores in [0, 1]."""
    return float(1 - ((1 - confidence) / 2) ** (1 / clusters))


def paired_difference(
    first: ArrayLike,
    second: ArrayLike,
    clusters: Sequence[str],
    strata: Sequence[str] | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """first - second of paired observations, with a bootstrap interval over clusters.

    When no picture differs a bootstrap would claim certainty; then see `_no_difference_bound`.
    """
    a, b = np.asarray(first, dtype=np.float64).ravel(), np.asarray(second, dtype=np.float64).ravel()
    if a.shape != b.shape:
        raise StatisticsError(f"paired series have {a.size} and {b.size} observations")
    table = table_of([a - b], clusters, strata)
    if (a == b).all():
        bound = _no_difference_bound(table.clusters, confidence)
        return Interval(0.0, -bound, bound, len(a), table.clusters, _NONE_DIFFERS, confidence)
    low, high = _percentiles(table.replicates(resamples, seed)[:, 0], confidence)
    return Interval(
        float(table.estimate()[0]),
        low,
        high,
        len(a),
        table.clusters,
        "paired bootstrap by prompt",
        confidence,
    )


def score_kept(
    student: ArrayLike,
    teacher: ArrayLike,
    clusters: Sequence[str],
    strata: Sequence[str] | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """student / teacher of the (stratified) means, both resampled with the same prompts.

    A teacher that scores 0 has no ratio: value and interval are NaN.
    """
    a, b = np.asarray(student, dtype=np.float64).ravel(), np.asarray(teacher, dtype=np.float64).ravel()
    if a.shape != b.shape:
        raise StatisticsError(f"paired series have {a.size} and {b.size} observations")
    table = table_of([a, b], clusters, strata)
    s, t = table.estimate()
    if t > 0 and (a == b).all():
        bound = _no_difference_bound(table.clusters, confidence) / float(t)
        return Interval(1.0, 1 - bound, 1 + bound, len(a), table.clusters, _NONE_DIFFERS, confidence)
    replicates = table.replicates(resamples, seed)
    method = "paired bootstrap by prompt"
    if t <= 0 or (replicates[:, 1] <= 0).any():
        value = float(s / t) if t > 0 else math.nan
        return Interval(value, math.nan, math.nan, len(a), table.clusters, method, confidence)
    low, high = _percentiles(replicates[:, 0] / replicates[:, 1], confidence)
    return Interval(float(s / t), low, high, len(a), table.clusters, method, confidence)


def clustered_median(
    values: ArrayLike,
    clusters: Sequence[str],
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """The median over pictures with a bootstrap interval over clusters (lower median, as a weighted one)."""
    x = np.asarray(values, dtype=np.float64).ravel()
    table = table_of([x], clusters, None)
    order = np.argsort(x, kind="stable")
    _, cluster_of = np.unique(np.asarray(clusters, dtype=object).astype(str), return_inverse=True)
    ranked, cluster_of = x[order], cluster_of[order]
    c = table.clusters
    low = high = math.nan
    if c > 1:
        rng = np.random.default_rng(seed)
        medians = np.empty(resamples)
        chunk = max(1, 4_000_000 // len(x))
        for start in range(0, resamples, chunk):
            draws = rng.multinomial(c, np.full(c, 1.0 / c), size=min(chunk, resamples - start))
            weight = np.cumsum(draws[:, cluster_of], axis=1)
            at = (weight * 2 < weight[:, -1:]).sum(axis=1)
            medians[start : start + len(at)] = ranked[at]
        low, high = _percentiles(medians, confidence)
    return Interval(float(np.median(x)), low, high, len(x), c, "bootstrap by prompt", confidence)
