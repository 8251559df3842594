"""Selection tables and channel choice of method.md section 1, one class and one channel at a time, in float64."""

import math

import mpmath
import numpy as np
import scipy.stats

from tests.oracles.tolerance import array

NORMAL_P = 0.05


def gap_feature(z):
    """GAP feature of each channel of one image: z (channels, *spatial) -> (channels,), mean of ReLU."""
    z = array(z)
    return np.array([math.fsum(max(float(v), 0.0) for v in channel.ravel()) / channel.size for channel in z])


def log_t_sf(t, df, digits=60):
    """log P(T > t) of Student's t, in high precision so that it never underflows."""
    with mpmath.workdps(digits):
        t, df = mpmath.mpf(float(t)), mpmath.mpf(float(df))
        half_tail = mpmath.betainc(df / 2, mpmath.mpf(1) / 2, 0, df / (df + t * t), regularized=True) / 2
        return float(mpmath.log(half_tail if t >= 0 else 1 - half_tail))


def welch(features, labels, a_class):
    """(t (channels,), log_p (channels,)): is the class's mean above that of all other images?

    features (images, channels), labels (images,). Undefined tests (no spread on either side) are NaN.
    """
    features, labels = array(features), np.asarray(labels)
    inside, outside = features[labels == a_class], features[labels != a_class]
    t, log_p = [], []
    for channel in range(features.shape[1]):
        result = scipy.stats.ttest_ind(inside[:, channel], outside[:, channel], equal_var=False, alternative="greater")
        t.append(float(result.statistic))
        log_p.append(math.nan if math.isnan(result.statistic) else log_t_sf(result.statistic, result.df))
    return np.array(t), np.array(log_p)


def normality_p(features):
    """Shapiro-Wilk p-value of each column of features (images, channels)."""
    features = array(features)
    return np.array([scipy.stats.shapiro(features[:, channel]).pvalue for channel in range(features.shape[1])])


def order(log_p, t):
    """Channels from the most to the least significant: smaller log p, then larger t, then smaller index."""
    return sorted(range(len(log_p)), key=lambda channel: (float(log_p[channel]), -float(t[channel]), channel))


def ranks(log_p, t):
    """Place of each channel in `order` (channels,)."""
    places = [0] * len(log_p)
    for place, channel in enumerate(order(log_p, t)):
        places[channel] = place
    return places


def how_many(quantile, channels):
    """k = max(1, floor(q * channels))."""
    return max(1, math.floor(quantile * channels))


def passes_filter(normality, channel):
    """Whether the normality filter leaves the channel selectable: Shapiro-Wilk rejects normality."""
    return normality is None or float(normality[channel]) < NORMAL_P


def by_class(log_p, rank, *, quantile=None, alpha=None, normality=None):
    """One class's selected channels (channels,) bool from its log p row and its rank row."""
    channels = len(log_p)
    chosen = [False] * channels
    if alpha is None:
        for channel in sorted(range(channels), key=lambda c: int(rank[c]))[: how_many(quantile, channels)]:
            chosen[channel] = True
    else:
        for channel in range(channels):
            chosen[channel] = float(log_p[channel]) <= math.log(alpha) if alpha > 0 else False
    return [chosen[channel] and passes_filter(normality, channel) for channel in range(channels)]


def by_instance(gap, mean, std, *, quantile=None, alpha=None, normality=None):
    """One image's selected channels from its GAP features (channels,) and the table's mean and std (channels,)."""
    channels = len(gap)
    scores = {c: (float(gap[c]) - float(mean[c])) / float(std[c]) for c in range(channels) if float(std[c]) > 0}
    chosen = [False] * channels
    if alpha is None:
        for channel in sorted(scores, key=lambda c: (-scores[c], c))[: how_many(quantile, channels)]:
            chosen[channel] = True
    else:
        for channel, z in scores.items():
            chosen[channel] = float(scipy.stats.norm.sf(z)) <= alpha
    return [chosen[channel] and passes_filter(normality, channel) for channel in range(channels)]
