"""Small made-up findings of an evaluation, for tests of what is made of them."""

import numpy as np

from parchgrad.evaluation.cost import Cost
from parchgrad.evaluation.methods import Unavailable
from parchgrad.evaluation.results import MeanCurve, Results, Row, Shown

GROUP = {"random map": "baseline", "gradient": "gradient", "SmoothGrad": "gradient", "Grad-CAM": "peer"}


def group_of(name):
    if name in GROUP:
        return GROUP[name]
    return ("control" if "random channels" in name else "parchgrad") if name.startswith("ParchGrad") else "peer"


def row(name, cost=2.0, **fields):
    price = None if cost is None else Cost(cost, cost - 0.1, cost + 0.1)
    given = {"words": f"What {name} is.", "source": "Somebody 2017", "library": "parchgrad", "options": {}} | fields
    return Row(name=name, group=group_of(name), cost=price, **given)


def picture(index, kind="mosaic", label="fish", probability=0.5, **fields):
    given = {"name": f"{kind} {index}", "group": f"photograph {index}", "target": index % 3, "predicted": True} | fields
    return Shown(kind=kind, label=label, probability=probability, **given)


def results(values, costs=None, pictures=None, shown=None, **fields):
    """`values[measure][method]` are lists, one value a picture; methods are in the order they are first named."""
    values = {key: {name: np.array(one, float) for name, one in found.items()} for key, found in values.items()}
    names = dict.fromkeys(name for found in values.values() for name in found)
    most = max((len(one) for found in values.values() for one in found.values()), default=0)
    shown = tuple(picture(i) for i in range(most)) if shown is None else tuple(shown)
    given = {
        "settings": {"model": "net"},
        "rows": tuple(row(name, (costs or {}).get(name, 2.0)) for name in names),
        "unavailable": (),
        "resamples": 199,
    } | fields
    indices = {key: tuple(range(len(next(iter(found.values()))))) for key, found in values.items()}
    return Results(shown=shown, pictures=indices | (pictures or {}), values=values, **given)


def curves(names, images=4):
    steps = np.linspace(0, 1, 5)
    return {name: MeanCurve(steps, steps / (place + 1), images) for place, name in enumerate(names)}


__all__ = ["Unavailable", "curves", "picture", "results", "row"]
