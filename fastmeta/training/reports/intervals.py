"""Means, deviations and intervals over seeds."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% interval; ``low`` and ``high`` are None for fewer than two values."""

    mean: float
    low: float | None
    high: float | None


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (``n - 1``); the latter None for a single value.

    >>> mean_and_deviation([1.0, 3.0])
    (2.0, 1.4142135623730951)
    """
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def t_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Student's interval of the mean, ``mean +- t_{(1 + level) / 2, n-1} s / sqrt(n)``.

    >>> interval = t_interval([1.0, 2.0, 3.0])
    >>> round(interval.low, 3), round(interval.high, 3)
    (-0.484, 4.484)
    """
    mean, deviation = mean_and_deviation(values)
    if deviation is None:
        return Interval(mean, None, None)
    from scipy.stats import t  # comes with scikit-learn

    reach = float(t.ppf((1 + level) / 2, len(values) - 1)) * deviation / math.sqrt(len(values))
    return Interval(mean, mean - reach, mean + reach)


def error_interval(errors: int, images: int) -> tuple[float, float]:
    """Wilson's 95% interval of an error rate, of ``errors`` wrong ones among ``images``.

    It is about the images, as a sample of all images of their kind; another seed is another matter.

    >>> low, high = error_interval(5, 100)
    >>> round(low, 3), round(high, 3)
    (0.022, 0.112)
    """
    from scipy.stats import binomtest  # comes with scikit-learn

    interval = binomtest(errors, images).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)
