"""What seeds can tell: means, paired differences, the smallest effect resolved, power-law fits."""

import functools
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

POWER, LEVEL = 0.8, 0.05
"""How often an effect is to be found, and how often one that is not there may be."""
MOST_SEEDS = 10_000_000


@dataclass(frozen=True)
class Summary:
    """A mean over seeds. With one seed there is no standard deviation."""

    n: int
    mean: float
    sd: float | None  # of one run: n − 1 in the denominator

    @property
    def standard_error(self) -> float | None:
        """Of the mean."""
        return None if self.sd is None else self.sd / math.sqrt(self.n)


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences with its 95 % interval (Student's t)."""

    n: int
    mean: float
    sd: float | None  # of one difference
    low: float | None
    high: float | None
    p: float | None  # two-sided, of no difference


@dataclass(frozen=True)
class Noise:
    """A standard deviation pooled over groups, with its 95 % interval (chi-square)."""

    sd: float
    freedom: int
    low: float
    high: float


@dataclass(frozen=True)
class PowerLaw:
    """y = floor + scale · (x/x₀)^(−exponent), x₀ the geometric mean of x."""

    floor: float
    scale: float
    exponent: float
    middle: float  # x₀
    errors: tuple[float, float, float] | None  # standard errors of floor, scale, exponent
    residuals: tuple[float, ...]  # y − fit, as the points were given
    rms: float  # of the residuals, by the degrees of freedom left

    @property
    def is_determined(self) -> bool:
        """Whether scale and exponent differ from 0 by two standard errors: else y may be flat."""
        if self.errors is None:
            return False
        return self.scale > 2 * self.errors[1] and self.exponent > 2 * self.errors[2]

    def at(self, x: float) -> float:
        """The fitted y."""
        return float(self.floor + self.scale * (x / self.middle) ** -self.exponent)


@dataclass(frozen=True)
class LogPlane:
    """log y = constant + Σ slopes · log x: how y falls with several sizes at once."""

    constant: float
    slopes: tuple[float, ...]
    errors: tuple[float, ...]  # standard errors of the slopes
    residuals: tuple[float, ...]  # y − fit
    rms: float


def summary(values: Sequence[float]) -> Summary:
    """Mean and standard deviation of at least one value."""
    assert values
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Summary(1, mean, None)
    spread = math.fsum((value - mean) ** 2 for value in values)
    return Summary(len(values), mean, math.sqrt(spread / (len(values) - 1)))


def paired(a: Mapping[int, float], b: Mapping[int, float]) -> Difference | None:
    """a − b over the seeds that both have; None where there are none.

    Runs of one seed see the same text in the same order, so that what this adds to both drops out.
    """
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        return None
    found = summary([a[seed] - b[seed] for seed in seeds])
    error = found.standard_error
    if error is None:
        return Difference(found.n, found.mean, None, None, None, None)
    half = float(stats.t.ppf(1 - LEVEL / 2, found.n - 1)) * error
    if error == 0:
        p = 1.0 if found.mean == 0 else 0.0
    else:
        p = float(2 * stats.t.sf(abs(found.mean) / error, found.n - 1))
    return Difference(found.n, found.mean, found.sd, found.mean - half, found.mean + half, p)


def pooled(groups: Sequence[Sequence[float]]) -> Noise | None:
    """The standard deviation within groups, all groups taken to have the same.

    None: no group has two values.
    """
    found = [summary(group) for group in groups if len(group) > 1]
    freedom = sum(one.n - 1 for one in found)
    if not freedom:
        return None
    squares = math.fsum((one.sd or 0.0) ** 2 * (one.n - 1) for one in found)
    low, high = (squares / float(stats.chi2.ppf(q, freedom)) for q in (0.975, 0.025))
    return Noise(math.sqrt(squares / freedom), freedom, math.sqrt(low), math.sqrt(high))


def detectable(sd: float, n: int, *, is_paired: bool) -> float:
    """The smallest true effect that n seeds resolve: two-sided t-test at 5 %, power 80 %.

    Args:
        sd: of one run; of one difference if `is_paired`.
        n: seeds of each of the two variants, at least 2.
        is_paired: a t-test of n differences, and not of two groups of n.
    """
    assert n >= 2
    freedom = n - 1 if is_paired else 2 * (n - 1)
    standard_error = sd * math.sqrt((1 if is_paired else 2) / n)
    return standard_error * _shift(freedom)


def seeds_needed(sd: float, effect: float, *, is_paired: bool) -> int:
    """The fewest seeds of each variant that resolve an effect, at least 2."""
    assert effect > 0
    low, high = 1, 2
    while detectable(sd, high, is_paired=is_paired) > effect:
        low, high = high, 2 * high
        if high > MOST_SEEDS:
            return MOST_SEEDS
    while high - low > 1:
        middle = (low + high) // 2
        if detectable(sd, middle, is_paired=is_paired) > effect:
            low = middle
        else:
            high = middle
    return high


@functools.cache
def _shift(freedom: int) -> float:
    """The effect, in standard errors, that the t-test finds with the power asked for.

    t under the effect is (Z + shift) / √(χ²/f); its tail is integrated over χ², as scipy's
    noncentral t is not reliable with few degrees of freedom.
    """
    critical = float(stats.t.ppf(1 - LEVEL / 2, freedom))
    grid = (np.arange(2000) + 0.5) / 2000
    scale = critical * np.sqrt(stats.chi2.ppf(grid, freedom) / freedom)

    def lacks(shift: float) -> float:
        found = stats.norm.sf(scale - shift) + stats.norm.cdf(-scale - shift)
        return float(found.mean()) - POWER

    return float(optimize.brentq(lacks, 0.0, 10 * critical + 10, xtol=1e-9))


def fit_power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw | None:
    """The least-squares power law with a floor; None with fewer than four different x.

    Three parameters: with four points one degree of freedom is left for the residuals.
    """
    if len(set(x)) < 4:
        return None
    middle = math.exp(math.fsum(map(math.log, x)) / len(x))
    xs, ys = np.asarray(x, float) / middle, np.asarray(y, float)

    def curve(x: np.ndarray, floor: float, scale: float, exponent: float) -> np.ndarray:
        return floor + scale * x**-exponent

    low, high = float(ys.min()), float(ys.max())
    spread = max(high - low, 1e-12)
    best = None
    for exponent in (0.1, 0.3, 1.0):
        guess = (max(low - spread, 0.0), 1.5 * spread, exponent)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optimize.OptimizeWarning)
            try:
                found, covariance = optimize.curve_fit(
                    curve, xs, ys, p0=guess, bounds=([0, 0, 0], [np.inf, np.inf, 10])
                )
            except (RuntimeError, ValueError):
                continue
        residuals = ys - curve(xs, *found)
        squares = float(residuals @ residuals)
        if best is None or squares < best[0]:
            best = (squares, found, covariance, residuals)
    if best is None:
        return None
    squares, found, covariance, residuals = best
    errors = np.sqrt(np.diag(covariance))
    floor, scale, exponent = (float(value) for value in found)
    return PowerLaw(
        floor=floor,
        scale=scale,
        exponent=exponent,
        middle=middle,
        errors=(float(errors[0]), float(errors[1]), float(errors[2]))
        if np.isfinite(errors).all()
        else None,
        residuals=tuple(float(value) for value in residuals),
        rms=math.sqrt(squares / max(len(x) - 3, 1)),
    )


def fit_log_plane(sizes: Sequence[Sequence[float]], y: Sequence[float]) -> LogPlane | None:
    """The least-squares plane of log y over the logs of sizes; None where it is not determined.

    Args:
        sizes: per point, its sizes, in the same order.
        y: per point.

    Source: the form of "Unified scaling laws for routed language models", arXiv:2202.01169, Eq. 1,
    without the product of the logs, for which our points are too few.
    """
    ys = np.asarray(y, float)
    logs = np.log(np.asarray(sizes, float))
    design = np.column_stack([np.ones(len(ys)), logs])
    freedom = len(ys) - design.shape[1]
    if freedom < 1 or np.linalg.matrix_rank(design) < design.shape[1]:
        return None
    found, *_ = np.linalg.lstsq(design, np.log(ys), rcond=None)
    log_residuals = np.log(ys) - design @ found
    variance = float(log_residuals @ log_residuals) / freedom
    errors = np.sqrt(variance * np.diag(np.linalg.inv(design.T @ design)))
    residuals = ys - np.exp(design @ found)
    return LogPlane(
        constant=float(found[0]),
        slopes=tuple(float(value) for value in found[1:]),
        errors=tuple(float(value) for value in errors[1:]),
        residuals=tuple(float(value) for value in residuals),
        rms=math.sqrt(float(residuals @ residuals) / freedom),
    )
