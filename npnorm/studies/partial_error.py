"""By how much pRMSNorm errs: of the RMS and of the gradient, for normal features in theory, and measured.

R = RMS_k^2 / RMS^2, of k of n normal features, is n / k times a Beta(k / 2, (n - k) / 2). With the gamma function G,

    E R^q = (n / k)^q G(k/2 + q) G(n/2) / (G(k/2) G(n/2 + q))  for q > -k/2, else infinite

Let z = x / RMS_k, and m(z) = z where it is measured, 0 elsewhere. RMSNorm has k = n and m(z) = z. Backward,

    dx = (dz - m(z) sum(dz z) / k) / RMS_k

where both the factor and the second term err. With t = RMS / RMS_k = R^(-1/2), and noise as dz, the mean squares of the
relative errors are

    of the RMS         2 - 2 E sqrt(R)                                              about (1 - p) / (2 k)
    of the gradient    ((n - 2) E (t - 1)^2 + n / k E t^4 - 2 E t + 1) / (n - 1)    about 3 (1 - p) / (2 k)

The latter is infinite for k <= 4. What a gradient that is no noise can meet is worse: I - m(z) z^T / k is a projection,
orthogonal for RMSNorm and so of norm 1, but oblique for k < n, of norm |m(z)| |z| / k. So a gradient can grow by

    gain = t^2 sqrt(n / k)

in units of 1 / RMS. That of dz = z - m(z) does. Its mean over rows is infinite for k = 1 and 2.
"""

import math

import numpy as np

from npnorm import norms


def moment(q: float, k: float, n: int) -> float:
    """Return E R^q, by the formula above.

    Examples
    --------
    >>> round(moment(1, 8, 128), 12), moment(-1, 2, 128)
    (1.0, inf)
    """
    if k / 2 + q <= 0:
        return math.inf
    g = math.lgamma
    return (n / k) ** q * math.exp(g(k / 2 + q) + g(n / 2) - g(k / 2) - g(n / 2 + q))


def error_of_rms(k: float, n: int) -> float:
    """Return the root mean square of RMS_k / RMS - 1 for normal features.

    Examples
    --------
    >>> round(error_of_rms(8, 128), 3), round(math.sqrt((1 - 8 / 128) / (2 * 8)), 3)
    (0.24, 0.242)
    """
    return math.sqrt(max(0.0, 2 - 2 * moment(0.5, k, n)))


def error_of_gradient(k: float, n: int) -> float:
    """Return the root mean square of |dx_k - dx| beside that of |dx|, for normal features and noise as dz.

    Examples
    --------
    >>> round(error_of_gradient(64, 128), 3), round(math.sqrt(3 * (1 - 64 / 128) / (2 * 64)), 3)
    (0.113, 0.108)
    >>> error_of_gradient(4, 128)
    inf
    """
    if k <= 4:
        return math.inf
    t, t2, t4 = (moment(q, k, n) for q in (-0.5, -1, -2))
    square = ((n - 2) * (t2 - 2 * t + 1) + n / k * t4 - 2 * t + 1) / (n - 1)
    return math.sqrt(max(0.0, square))


def gain(k: int, n: int, ratio: np.ndarray) -> np.ndarray:
    """Return the largest gain of a gradient, in units of 1 / RMS, where `ratio` is RMS_k / RMS.

    Examples
    --------
    >>> gain(8, 128, np.array([1.0, 0.5]))
    array([ 4., 16.])
    """
    return math.sqrt(n / k) / ratio**2


def errors(x: np.ndarray, dy: np.ndarray, k: int, rng: np.random.Generator | None) -> dict[str, float]:
    """Return the errors of the RMS and of the gradient over all rows, and the median of the largest gains.

    Parameters
    ----------
    x, dy : arrays of shape (draws, rows, n)
        Features, and upstream gradients.
    rng : numpy.random.Generator or None
        Draws a part for each [rows, n]; None: the first k.
    """
    n = x.shape[-1]
    partial, whole = norms.PartialRMSNorm(p=k / n, eps=0), norms.RMSNorm(eps=0)
    ratios, squares = [], np.zeros(2)
    for rows, upstream in zip(x, dy, strict=True):
        saved, saved_whole = partial.forward(rows, rng)[1], whole.forward(rows)[1]
        dx, dx_whole = partial.backward(upstream, saved)[0], whole.backward(upstream, saved_whole)[0]
        ratios.append(saved_whole.rstd / saved.rstd)
        squares += np.sum((dx - dx_whole) ** 2), np.sum(dx_whole**2)
    ratio = np.array(ratios)
    return {
        "RMS": float(np.sqrt(np.mean((ratio - 1) ** 2))),
        "gradient": float(np.sqrt(squares[0] / squares[1])),
        "gain": float(np.median(gain(k, n, ratio))),
    }
