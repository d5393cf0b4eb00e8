"""Confidence intervals by resampling prompts, of a benchmark's figures and of their differences.

Pictures of one prompt are alike, so that prompts are what is drawn again (Efron, 1979): a resample
is how often each of them occurs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

Figure = Callable[[np.ndarray], np.ndarray]
"""A benchmark's figure as a function of its prompts' weights, (.., P) to (..); at ones its value.

It is given all resamples at once, as some figures share much of their work."""


class Estimate(NamedTuple):
    """A figure and the ends of its confidence interval."""

    value: float
    low: float
    high: float


def ratio(totals: np.ndarray, counts: np.ndarray, scale: float = 1.0) -> Figure:
    """A mean over pictures or questions, of which prompts may have different numbers.

    Args:
      totals: (P,), of each prompt.
      counts: (P,), of what is summed in them.
      scale: factor.

    Returns:
      A figure; NaN where no prompt of weight has any.
    """
    totals, counts = np.asarray(totals, np.float64), np.asarray(counts, np.float64)

    def figure(weights: np.ndarray) -> np.ndarray:
        count = weights @ counts
        return scale * (weights @ totals) / np.where(count, count, np.nan)

    return figure


def mean_of(figures: Sequence[Figure]) -> Figure:
    """The mean of several figures."""
    return lambda weights: np.mean([figure(weights) for figure in figures], axis=0)


def resamples(groups: Sequence[Hashable], count: int, seed: int) -> np.ndarray:
    """How often each prompt is drawn, (count, P): with replacement within its group."""
    rng = np.random.default_rng(seed)
    labels = np.unique([repr(group) for group in groups], return_inverse=True)[1]
    weights = np.zeros((count, len(labels)))
    for label in range(labels.max() + 1):
        members = np.flatnonzero(labels == label)
        shares = np.full(len(members), 1 / len(members))
        weights[:, members] = rng.multinomial(len(members), shares, size=count)
    return weights


def estimate(
    figure: Figure,
    groups: Sequence[Hashable],
    *,
    level: float = 0.95,
    count: int = 1000,
    seed: int = 0,
) -> Estimate:
    """A figure with its confidence interval.

    The interval is the value plus quantiles of resampled figures, taken from their own mean: a
    resample repeats pictures, which makes distances of sets too large, all of them alike. A group
    of a single prompt adds nothing to the width. Intervals of distances between sets that hardly
    differ are too wide, as their errors are not those of means. Ends may lie beyond what a figure
    can be, such as above 100: whoever shows them cuts them there.

    Args:
      figure: as function of weights.
      groups: P labels; prompts are resampled within those of one label.
      level: share of intervals that hold the mean of the figure over all such sets of prompts.
      count: of resamples.
      seed: of them; the same for all figures, which are then resampled alike.

    Raises:
      ValueError: there are no prompts, or a level or a count that says nothing.
    """
    if not len(groups):
        raise ValueError("an interval needs prompts, and there are none")
    if not 0 < level < 1 or count < 2:
        raise ValueError(f"level {level} is not between 0 and 1, or count {count} is below 2")
    value = float(figure(np.ones(len(groups))))
    drawn = figure(resamples(groups, count, seed))
    drawn = drawn[~np.isnan(drawn)]  # of a category that few prompts have and a resample has not
    if not len(drawn):
        return Estimate(value, np.nan, np.nan)
    ends = np.quantile(drawn - drawn.mean(), [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, *(float(value + end) for end in ends))


def estimates(
    figures: Mapping[str, Figure], groups: Sequence[Hashable], **settings
) -> dict[str, Estimate]:
    """Each of several figures with its interval, see `estimate`."""
    return {name: estimate(figure, groups, **settings) for name, figure in figures.items()}


def differences(
    first: Mapping[str, Figure],
    second: Mapping[str, Figure],
    groups: Sequence[Hashable],
    **settings,
) -> dict[str, Estimate]:
    """What the second model has more than the first, paired: both with the same prompts drawn.

    The intervals are narrower than those of two models apart, since a hard prompt is hard for both.

    Raises:
      ValueError: one of them has a figure that the other lacks; or as `estimate`.
    """
    if lacking := sorted(first.keys() ^ second.keys()):
        where = "first" if lacking[0] in second else "second"
        raise ValueError(f"the {where} model has no figure {lacking[0]!r}; give both the same ones")

    def difference(name: str) -> Figure:
        return lambda weights: second[name](weights) - first[name](weights)

    return {name: estimate(difference(name), groups, **settings) for name in first}
