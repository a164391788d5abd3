"""What a comparison could show: McNemar's test, standard errors, the smallest difference seen, noise of seeds.

Prompts are the clusters and tags the strata, as in `statistics`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from tritflow.evaluation.statistics import StatisticsError, table_of, z_of


@dataclass(frozen=True)
class McNemar:
    """Exact McNemar test of two paired yes/no series: `only_first` passed in the first alone, `only_second`
    in the second alone; `p_value` is two-sided and treats pictures as independent."""

    only_first: int
    only_second: int
    p_value: float


def mcnemar(first: ArrayLike, second: ArrayLike) -> McNemar:
    """Exact two-sided McNemar test (binomial with p = 1/2 over the discordant pairs)."""
    from scipy.stats import binomtest

    a, b = np.asarray(first, dtype=bool).ravel(), np.asarray(second, dtype=bool).ravel()
    if a.shape != b.shape:
        raise StatisticsError(f"paired series have {a.size} and {b.size} observations")
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    p = binomtest(only_a, only_a + only_b, 0.5).pvalue if only_a + only_b else 1.0
    return McNemar(only_a, only_b, float(p))


def standard_error(values: ArrayLike, clusters: Sequence[str], strata: Sequence[str] | None = None) -> float:
    """Cluster-robust standard error of the (stratified) mean; NaN when a stratum has a single prompt."""
    table = table_of([values], clusters, strata)
    variance = 0.0
    for s in range(table.strata):
        rows = table.stratum == s
        sums, counts = table.sums[rows, 0], table.counts[rows]
        c = len(counts)
        if c < 2:
            return math.nan
        mean = sums.sum() / counts.sum()
        variance += c / (c - 1) * float(((sums - mean * counts) ** 2).sum()) / counts.sum() ** 2
    return math.sqrt(variance) / table.strata


def minimum_detectable_difference(
    differences: ArrayLike,
    clusters: Sequence[str],
    strata: Sequence[str] | None = None,
    *,
    power: float = 0.8,
    confidence: float = 0.95,
) -> float:
    """The smallest true difference that this run would have called significant with probability `power`:
    (z_{1 - alpha/2} + z_{power}) times the standard error of the paired differences."""
    from scipy.stats import norm

    z = z_of(confidence) + float(norm.ppf(power))
    return z * standard_error(differences, clusters, strata)


def seed_noise(values: ArrayLike, clusters: Sequence[str], strata: Sequence[str] | None = None) -> float:
    """How far two seed sets of one model lie apart: the standard deviation of the difference of two runs over
    the same prompts, from the spread between one prompt's pictures.

    Var = 2 * mean over strata of sum_c(n_c s_c^2) / N^2, s_c^2 the sample variance inside prompt c. NaN when
    no prompt has two pictures.
    """
    x = np.asarray(values, dtype=np.float64).ravel()
    table = table_of([x, x * x], clusters, strata)
    variance = 0.0
    for s in range(table.strata):
        rows = table.stratum == s
        sums, counts = table.sums[rows], table.counts[rows]
        several = counts > 1
        if not several.any():
            return math.nan
        n, first, second = counts[several], sums[several, 0], sums[several, 1]
        inside = np.maximum(second - first**2 / n, 0.0) / (n - 1)
        # Prompts with one picture borrow the mean spread of the others.
        spread = np.full(len(counts), float(inside.mean()))
        spread[several] = inside
        variance += float((counts * spread).sum()) / counts.sum() ** 2
    return math.sqrt(2 * variance) / table.strata
