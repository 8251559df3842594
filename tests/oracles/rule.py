"""The gradient rule of method.md section 2, one image and one channel at a time, in plain float64 Python."""

import math

import numpy as np

from tests.oracles.tolerance import array

DEGENERATE = 1e-12


def moment(first, second):
    """Population covariance over the positions of two (h, w) maps; the mean product where there is one position."""
    first, second = [float(v) for v in first.ravel()], [float(v) for v in second.ravel()]
    positions = len(first)
    if positions == 1:
        return first[0] * second[0]
    # Shifting changes no covariance, and makes that of a constant map exactly 0.
    first, second = [v - first[0] for v in first], [v - second[0] for v in second]
    mean_first, mean_second = math.fsum(first) / positions, math.fsum(second) / positions
    return math.fsum((a - mean_first) * (b - mean_second) for a, b in zip(first, second, strict=True)) / positions


def image_moments(grad, selected):
    """M, N and K of one image: grad (channels, *spatial) float64, selected (channels,) bool."""
    sum_selected = np.zeros(grad.shape[1:])
    sum_unselected = np.zeros(grad.shape[1:])
    for channel in range(grad.shape[0]):
        if selected[channel]:
            sum_selected = sum_selected + grad[channel]
        else:
            sum_unselected = sum_unselected + grad[channel]
    return (
        moment(sum_selected, sum_selected),
        moment(sum_unselected, sum_unselected),
        moment(sum_selected, sum_unselected),
    )


def image_factors(grad, selected, gamma, conserve):
    """(factor of selected channels, factor of unselected channels), or None where the gradient passes unchanged."""
    grad = array(grad)
    selected = [bool(v) for v in selected]
    if not any(selected) or all(selected):
        return None
    size = float(np.abs(grad).max())
    if size == 0.0:
        return None
    m, n, k = image_moments(grad / size, selected)  # the factors do not know the gradient's scale
    if m <= DEGENERATE * (m + n):
        return None
    if math.isinf(gamma):
        if conserve == "none":
            return 1.0, 0.0
        if conserve == "independent":
            return math.sqrt((m + n) / m), 0.0
        if conserve == "exact":
            if m + n + 2 * k <= DEGENERATE * (m + n):
                return None
            return math.sqrt((m + n + 2 * k) / m), 0.0
        raise ValueError(conserve)
    if n <= DEGENERATE * (m + n):
        return None
    a = gamma * math.sqrt(n / m)
    if conserve == "none":
        b = 1.0
    elif conserve == "independent":
        b = math.sqrt((m + n) / (a * a * m + n))
    elif conserve == "exact":
        before, after = m + n + 2 * k, a * a * m + n + 2 * a * k
        if before <= DEGENERATE * (m + n) or after <= DEGENERATE * (a * a * m + n):
            return None
        b = math.sqrt(before / after)
    else:
        raise ValueError(conserve)
    return b * a, b


def scale_image(grad, selected, gamma, conserve):
    """One image's gradient (channels, *spatial) after the rule, as float64 numpy."""
    grad = array(grad)
    factors = image_factors(grad, selected, gamma, conserve)
    if factors is None:
        return grad.copy()
    scaled = np.empty_like(grad)
    for channel in range(grad.shape[0]):
        scaled[channel] = grad[channel] * (factors[0] if selected[channel] else factors[1])
    return scaled


def scale_batch(grad, selected, gammas, conserves):
    """`scale_image` for each image of a batch; `gammas` and `conserves` are lists of the batch's length."""
    return np.stack([scale_image(g, s, y, c) for g, s, y, c in zip(grad, selected, gammas, conserves, strict=True)])
