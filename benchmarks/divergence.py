"""Divergence of activations, on clean images and under the faults of watch.py: in how many layers it is beyond chance.

The counts of the clean first half are the reference. Of each condition 20 images, 60 and all are compared with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

import parchgrad
from benchmarks.watch import BATCH, Picture, conditions, normalised, parser_of, subject
from parchgrad.activation_histograms import chance, counts, divergence

SIZES = (20, 60)


def histograms(explainer: parchgrad.Explainer, pictures: Sequence[Picture]) -> NDArray[np.int64]:
    """`(images, layers, BINS)`, each image in the likeliest class that has a row."""
    assert isinstance(explainer.model, parchgrad.Model)
    tensors = [normalised(picture, explainer.model.preprocessing) for picture in pictures]
    found = []
    for start in range(0, len(tensors), BATCH):
        images = torch.stack(tensors[start : start + BATCH])
        without = explainer.table.row_of_class < 0
        classes = explainer.predict(images).masked_fill(without, -torch.inf).argmax(dim=1)
        found += [[counts(layer.z) for layer in drift.values()] for drift in explainer.drift(images, classes)]
    return np.array(found)


def beside(seen: NDArray[np.int64], reference: NDArray[np.int64]) -> str:
    """Layers beyond chance, and the median over the layers of the divergence and of its mean by chance, in bits."""
    total, squares = seen.sum(0), (seen**2).sum(0)
    bits = divergence(total, reference)
    by_chance = chance(total, squares, np.full(len(total), len(seen)), reference)
    beyond = int((bits > by_chance.bound).sum())
    return f"{beyond} ({np.median(bits):.3f}; {np.median(by_chance.expected):.3f})"


def main(arguments: Sequence[str] | None = None) -> None:
    given = parser_of(__doc__).parse_args(arguments)
    explainer, _, samples = subject(given)
    first, others = conditions(samples)
    reference = histograms(explainer, first).sum(0)
    print(f"{given.model}: {len(reference)} layers, {len(first)} images in the clean half")
    print(f"| images | {' | '.join(map(str, SIZES))} | all |\n| --- |{' --- |' * (len(SIZES) + 1)}")
    for name, pictures in others.items():
        seen = histograms(explainer, pictures)
        cells = [beside(seen[:size], reference) if size <= len(seen) else "" for size in (*SIZES, len(seen))]
        print(f"| {name} ({len(seen)}) | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
