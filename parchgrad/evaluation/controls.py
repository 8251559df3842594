"""Tables that mean nothing: the same model with its channels drawn at random, or given to other classes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from parchgrad.errors import OptionError
from parchgrad.explainer import Explainer
from parchgrad.tables import SelectionTable


def random_control(explainer: Explainer, seed: int) -> Explainer:
    """The same model and table but for each class's order of channels, drawn from `seed`.

    What is tested is the order alone: features, defaults and layers are the table's.
    """
    table = explainer.table
    absent = (*table.idle_layers, *table.left_out)
    random = SelectionTable.random(explainer.model, table.classes, seed, absent, table.labels)
    layers = {n: replace(table.layers[n], rank=r.rank, log_p=r.log_p) for n, r in random.layers.items()}
    control = replace(table, name=random.name, built=random.built, layers=layers, table_sha256="", folder=None)
    return Explainer(explainer.model, control, explainer.device)


def shuffled_classes(explainer: Explainer, seed: int) -> Explainer:
    """The same model and table, but each class has the rows of another, drawn from `seed`; none keeps its own."""
    table = explainer.table
    if len(table.classes) < 2:
        raise OptionError("classes", list(table.classes), "a table of at least two classes, to shuffle them")
    order = np.random.default_rng(seed).permutation(len(table.classes))
    of = np.empty_like(order)
    of[order] = np.roll(order, 1)  # one cycle through all classes
    rows = torch.from_numpy(of)
    layers = {n: replace(layer, rank=layer.rank[rows], log_p=layer.log_p[rows]) for n, layer in table.layers.items()}
    control: SelectionTable = replace(
        table,
        name="shuffled classes",
        built={"by": "shuffled classes", "seed": seed},
        layers=layers,
        images_per_class=tuple(table.images_per_class[row] for row in of),
        table_sha256="",
        folder=None,
    )
    return Explainer(explainer.model, control, explainer.device)
