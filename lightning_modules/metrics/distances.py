"""Distances between two sets of features, in float64, each with its derivative by the weight of every row.

The derivatives are of the statistic when row i counts w_i times, at w = 1; `bootstrap` makes intervals of them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 2048  # rows of a kernel matrix at a time


def frechet_distance(x: Tensor, y: Tensor) -> Tensor:
    """Squared Frechet distance of Gaussians fitted to features x (n, d) and y (m, d); a float64 scalar >= 0.

        || mu_x - mu_y ||^2 + Tr S_x + Tr S_y - 2 Tr (S_x S_y)^{1/2},   covariances with divisor n - 1

    The last trace is the nuclear norm || X Y^T ||_* / sqrt((n-1)(m-1)) of the centred features: no matrix
    square root, so it holds for n < d too. Raises ValueError for fewer than two rows or unequal d.
    """
    mean, x, y = centred(x, y)
    # X = Q R with orthonormal Q leaves the norm to R: at most d x d, however many clips there are.
    r_x, r_y = (torch.linalg.qr(z, mode="r").R for z in (x, y))
    cross = torch.linalg.svdvals(r_x @ r_y.T).sum()
    return (mean.square().sum() + x.square().sum() + y.square().sum() - 2 * cross).clamp(min=0)  # rounding: -1e-13


def frechet_influences(x: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The distance, and its derivatives by the weights of the rows of x (n,) and y (m,).

    With X Y^T = U s V^T, a row's weight moves the nuclear norm by half its share of it, (U s U^T)_ii / 2.
    """
    n, m = len(x), len(y)
    mean, x, y = centred(x, y)
    (q_x, r_x), (q_y, r_y) = (torch.linalg.qr(z) for z in (x, y))
    u, s, vh = torch.linalg.svd(r_x @ r_y.T, full_matrices=False)
    distance = (mean.square().sum() + x.square().sum() + y.square().sum() - 2 * s.sum()).clamp(min=0)
    by_x = x.square().sum(1) - (q_x @ u).square() @ s + 2 / n * (n - 1) ** 0.5 * (x @ mean)
    by_y = y.square().sum(1) - (q_y @ vh.T).square() @ s - 2 / m * (m - 1) ** 0.5 * (y @ mean)
    return distance, [by_x, by_y]


def centred(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """mu_x - mu_y, and both features without their means, divided by the root of n - 1."""
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"Features must be (n, d) and (m, d), not {tuple(x.shape)} and {tuple(y.shape)}.")
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise ValueError(f"A Frechet distance needs at least two clips of each kind, and there are {n} and {m}.")
    x, y = x.double(), y.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    return mean_x - mean_y, (x - mean_x) / (n - 1) ** 0.5, (y - mean_y) / (m - 1) ** 0.5


@dataclass
class Moments:
    """A Gaussian by its sums: of n rows, what a stream of frames leaves behind."""

    n: int
    mean: Tensor  # (d,)
    root: Tensor  # (d, r), S = root root^T
    inverse: Tensor  # (r, d), of the root
    trace: Tensor

    @classmethod
    def of_sums(cls, n: int, total: Tensor, outer: Tensor) -> "Moments":
        """From n, the sum of rows (d,) and the sum of their outer products (d, d), float64."""
        mean = total / n
        values, vectors = torch.linalg.eigh((outer - n * torch.outer(mean, mean)) / (n - 1))
        # the rest is rounding, as where there are fewer rows than features
        keep = values > (1e-12 * values[-1]).clamp(min=torch.finfo(values.dtype).tiny)
        values, vectors = values[keep], vectors[:, keep]
        return cls(n, mean, vectors * values.sqrt(), (vectors / values.sqrt()).T, values.sum())


def frechet_of_moments(x: Moments, y: Moments) -> Tensor:
    """`frechet_distance` from moments."""
    cross = torch.linalg.svdvals(x.root.T @ y.root).sum()
    return ((x.mean - y.mean).square().sum() + x.trace + y.trace - 2 * cross).clamp(min=0)


def moment_influences(x: Moments, y: Moments, rows_x: Tensor, rows_y: Tensor) -> list[Tensor]:
    """`frechet_influences` from moments, by the weights of some of the rows (n, d) and (m, d) they were made of."""
    u, s, vh = torch.linalg.svd(x.root.T @ y.root, full_matrices=False)
    return [moment_influence(rows_x, x, y, u, s), moment_influence(rows_y, y, x, vh.T, s)]


def moment_influence(rows: Tensor, own: Moments, other: Moments, u: Tensor, s: Tensor) -> Tensor:
    rows = rows.double() - own.mean
    shares = (rows @ own.inverse.T @ u).square() @ s
    return 2 / own.n * (rows @ (own.mean - other.mean)) + (rows.square().sum(1) - shares) / (own.n - 1)


def kernel_distance(x: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Unbiased MMD^2 of x (n, d) and y (m, d) with the kernel (x.y / d + 1)^3, and its derivatives by weights.

    Unbiased: the mean over pairs leaves out a row with itself, so the distance of equal distributions scatters about
    zero and may be negative (arXiv 1801.01401). In blocks: the n x m kernel is never whole in memory.
    """
    n, m = len(x), len(y)
    x, y = x.double(), y.double()
    within_x, within_y = ((kernel_sums(z, z) - diagonal(z)) / (len(z) - 1) for z in (x, y))
    across_x, across_y = kernel_sums(x, y) / m, kernel_sums(y, x) / n
    distance = within_x.mean() + within_y.mean() - 2 * across_x.mean()
    by_x, by_y = 2 / n * (within_x - across_x), 2 / m * (within_y - across_y)
    return distance, [by_x - by_x.mean(), by_y - by_y.mean()]


def diagonal(x: Tensor) -> Tensor:
    """k(x_i, x_i)."""
    return (x.square().sum(1) / x.shape[1] + 1) ** 3


def kernel_sums(x: Tensor, y: Tensor) -> Tensor:
    """sum_j k(x_i, y_j) for each row of x."""
    return torch.cat([((part @ y.T / x.shape[1] + 1) ** 3).sum(1) for part in x.split(BLOCK)])
