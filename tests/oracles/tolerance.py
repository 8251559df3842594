"""The one way tests compare numbers: relative to the size of what is expected, never absolute."""

import numpy as np
import torch


def array(values):
    """`values` (tensor, array, list or number) as a float64 numpy array."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().to(torch.float64).numpy()
    return np.asarray(values, dtype=np.float64)


def relative_l2(actual, expected):
    """||actual - expected|| / ||expected||; 0 where both vanish, inf where only `expected` does."""
    actual, expected = array(actual), array(expected)
    size = np.abs(expected).max(initial=0.0)
    if size == 0.0:
        return 0.0 if not np.any(actual) else float("inf")
    return float(np.linalg.norm((actual - expected) / size) / np.linalg.norm(expected / size))


def assert_close(actual, expected, relative=1e-8):
    """Same shape, same NaN places, and no entry further off than `relative` x the largest expected magnitude."""
    actual, expected = array(actual), array(expected)
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected), err_msg="NaN in other places")
    actual, expected = np.where(np.isnan(actual), 0.0, actual), np.where(np.isnan(expected), 0.0, expected)
    infinite = np.isinf(expected)
    np.testing.assert_array_equal(actual[infinite], expected[infinite])
    actual, expected = actual[~infinite], expected[~infinite]
    size = np.abs(expected).max(initial=0.0)
    worst = np.abs(actual - expected).max(initial=0.0)
    assert worst <= relative * size, f"off by {worst:.3e}, {worst / size if size else np.inf:.3e} of the largest"


def assert_each_close(actual, expected, relative=1e-8):
    """`assert_close` image by image (first axis), so that a large image cannot hide a wrong small one."""
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, relative)
