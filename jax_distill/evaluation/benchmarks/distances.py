"""Distances of sets of pictures by given features: CMMD, FID; and CLIP score. All in float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from jax_distill.evaluation.benchmarks.intervals import Figure, ratio

_SIGMA = 10.0
_SCALE = 1000.0
_BLOCK = 1024  # rows of a kernel matrix at a time


def cmmd(drawn: np.ndarray, real: np.ndarray) -> float:
    """CMMD, a distance of two sets of pictures by their CLIP embeddings.

    The squared maximum mean discrepancy for the kernel exp(-|x - y|^2 / (2 sigma^2)) with sigma 10,
    times 1000 (Jayasumana et al., 2024, arXiv:2401.09603). It is the biased form (Gretton et al.,
    2012, eq. 5): means are over all pairs, those of a picture with itself among them.

    Args:
      drawn: (n, d) embeddings; they are scaled to unit length.
      real: (m, d).

    Raises:
      ValueError: features are none, not finite, zero, or of different length.
    """
    return cmmd_figure(drawn, real, np.zeros(len(drawn), int))(np.ones(1))


def cmmd_figure(drawn: np.ndarray, real: np.ndarray, prompts: Sequence[int]) -> Figure:
    """CMMD as a function of the prompts' weights; the real pictures keep theirs.

    No matrix of all pairs of pictures, or of prompts, is kept: the kernel is computed block by
    block for all weights at once.

    Args:
      drawn, real: as of `cmmd`.
      prompts: n, the place of each picture's prompt, 0..P-1.
    """
    drawn, real = _pair(drawn, real, least=1)
    drawn, real = _unit(drawn, "drawn"), _unit(real, "real")
    places = _places(prompts, len(drawn))
    across = np.concatenate([kernel.mean(1) for _, kernel in _kernels(drawn, real)])
    among = sum(kernel.sum() for _, kernel in _kernels(real, real)) / len(real) ** 2

    def figure(weights: np.ndarray) -> np.ndarray:
        times = np.asarray(weights)[..., places]  # of each picture
        count = times.sum(-1)
        own = sum(
            (times[..., rows] @ kernel * times).sum(-1) for rows, kernel in _kernels(drawn, drawn)
        )
        return _SCALE * (own / count**2 + among - 2 * times @ across / count)

    return figure


def _kernels(first: np.ndarray, second: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Rows of the kernel's matrix less 1, and which they are.

    A constant falls out of the distance: less 1, kernels of near pictures lose no digits.
    """
    squares = [(each**2).sum(1) for each in (first, second)]
    for start in range(0, len(first), _BLOCK):
        rows = slice(start, start + _BLOCK)
        apart = squares[0][rows, None] + squares[1] - 2 * first[rows] @ second.T
        yield rows, np.expm1(-np.maximum(apart, 0) / (2 * _SIGMA**2))


def frechet(drawn: np.ndarray, real: np.ndarray) -> float:
    """The Fréchet distance of the Gaussians with the means and covariances of two sets: FID.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), the squared Wasserstein-2 distance of the Gaussians
    (Dowson and Landau, 1982), which is FID where the features are Inception's (Heusel et al., 2017,
    arXiv:1706.08500).

    The trace of the root is the sum of the singular values of A B^T, for S1 = A^T A and S2 = B^T B:
    no root of a small and perhaps negative eigenvalue is taken, so that it is as exact for singular
    covariances, as of fewer pictures than features.

    Of finite sets it comes out too large, by about a constant / n (Chong and Forsyth, 2020,
    arXiv:1911.07023): compare sets of the same sizes only, and of more pictures than features.

    Args:
      drawn: (n, d) features of independent pictures, n of at least 2.
      real: (m, d).

    Raises:
      ValueError: features are too few, not finite, or of different length.
    """
    return frechet_figure(drawn, real, np.zeros(len(drawn), int))(np.ones(1))


def frechet_figure(drawn: np.ndarray, real: np.ndarray, prompts: Sequence[int]) -> Figure:
    """The Fréchet distance as a function of the prompts' weights; the real pictures keep theirs.

    Args:
      drawn, real: as of `frechet`.
      prompts: n, the place of each picture's prompt, 0..P-1.
    """
    drawn, real = _pair(drawn, real, least=2)
    places = _places(prompts, len(drawn))
    real_mean, real_factor = _moments(real, np.ones(len(real)))

    def distance(weights: np.ndarray) -> float:
        mean, factor = _moments(drawn, weights[places])
        shift = mean - real_mean
        root = np.linalg.svd(factor @ real_factor.T, compute_uv=False).sum()
        variances = (factor**2).sum() + (real_factor**2).sum()
        return float(shift @ shift + variances - 2 * root)

    return lambda weights: np.apply_along_axis(distance, -1, weights)[()]


def _moments(values: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean (d,) of rows that occur so often, and A (k, d) with A^T A their covariance."""
    count = weights.sum()
    mean = weights @ values / count
    factor = np.sqrt(weights / (count - 1))[:, None] * (values - mean)
    return mean, factor if len(factor) <= factor.shape[1] else np.linalg.qr(factor, mode="r")


def clip_scores(pictures: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """CLIP score of each picture, (n,): 100 max(cos, 0) of its embedding and its text's.

    As Hessel et al. (2021, arXiv:2104.08718) define it, with the field's factor of 100 for their
    2.5. torchmetrics cuts only the mean at 0, which is the same where no cosine is negative.

    Args:
      pictures: (n, d) CLIP embeddings, of any length.
      texts: (n, d).

    Raises:
      ValueError: embeddings are none, not finite, zero, or of different numbers or length.
    """
    pictures, texts = _pair(pictures, texts, least=1, names=("pictures", "texts"))
    if len(pictures) != len(texts):
        raise ValueError(
            f"pictures, texts: {len(pictures)} and {len(texts)} embeddings; give a text's for each"
            " picture"
        )
    cosines = (_unit(pictures, "pictures") * _unit(texts, "texts")).sum(1)
    return 100 * np.maximum(cosines, 0)


def clip_figure(pictures: np.ndarray, texts: np.ndarray, prompts: Sequence[int]) -> Figure:
    """The mean of `clip_scores` over pictures as a function of the prompts' weights."""
    scores = clip_scores(pictures, texts)
    places = _places(prompts, len(scores))
    return ratio(np.bincount(places, scores), np.bincount(places))


def _pair(
    first: np.ndarray,
    second: np.ndarray,
    *,
    least: int,
    names: tuple[str, str] = ("drawn", "real"),
) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of features in float64, checked."""
    checked = []
    for values, name in zip((first, second), names):
        values = np.asarray(values, np.float64)
        if values.ndim != 2 or len(values) < least or not values.shape[1]:
            raise ValueError(
                f"{name}: features of shape {values.shape}; give a row of them for each of at"
                f" least {least} pictures"
            )
        if not np.isfinite(values).all():
            row = int(np.argmin(np.isfinite(values).all(1)))
            raise ValueError(f"{name}: features {row} are not finite; compute them again")
        checked.append(values)
    if checked[0].shape[1] != checked[1].shape[1]:
        raise ValueError(
            f"{names[0]}, {names[1]}: features of {checked[0].shape[1]} and"
            f" {checked[1].shape[1]} numbers; give those of one network"
        )
    return checked[0], checked[1]


def _unit(values: np.ndarray, name: str) -> np.ndarray:
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    if not lengths.all():
        raise ValueError(f"{name}: embedding {int(np.argmin(lengths))} is zero; compute it again")
    return values / lengths


def _places(prompts: Sequence[int], count: int) -> np.ndarray:
    """The place (n,) of each picture's prompt, checked."""
    places = np.asarray(prompts)
    known = np.unique(places)
    whole = places.dtype.kind in "iu" and np.array_equal(known, np.arange(len(known)))
    if places.shape != (count,) or not whole:
        raise ValueError(
            f"prompts: give the place of the prompt, a whole number from 0, for each of {count}"
            " pictures, and pictures of every prompt"
        )
    return places
