"""What is watched of explanations, on clean images and under faults: how far each figure moves, and its cost.

Two halves of the same images; the first is clean. The second is clean too (the null: what chance moves), and then
blurred, noisy, watermarked at the border, darkened, or of few classes only. Every figure is compared with the first
half's: median, shift of the mean in standard deviations of the clean half, Kolmogorov-Smirnov distance and its p.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from scipy.stats import ks_2samp

import parchgrad
from benchmarks.measuring import interleaved, ratios
from parchgrad.evaluation.maps import agreement, figures
from parchgrad.preprocessing import read_image

ROOT = Path(__file__).resolve().parents[1]
BATCH = 10
SEED = 7
CHANCE = 0.01  # p-value below which a shift is called one

Picture = Image.Image
Fault = Callable[[Picture, int], Picture]


def blurred(picture: Picture, seed: int) -> Picture:
    """Gaussian, its radius 1.5 % of the side."""
    return picture.filter(ImageFilter.GaussianBlur(0.015 * picture.width))


def noisy(picture: Picture, seed: int) -> Picture:
    """Normal noise of standard deviation 25 of 255 on every value."""
    noise = np.random.default_rng((SEED, seed)).normal(0, 25, (picture.height, picture.width, 3))
    return Image.fromarray((np.asarray(picture) + noise).round().clip(0, 255).astype(np.uint8))


def watermarked(picture: Picture, seed: int) -> Picture:
    """White letters on black along the lower edge, 8 % of the height."""
    marked = picture.copy()
    draw, height = ImageDraw.Draw(marked), round(0.08 * picture.height)
    top = picture.height - height
    draw.rectangle((0, top, picture.width, picture.height), fill=(0, 0, 0))
    text = "(C) PICTURE AGENCY - SAMPLE - "
    draw.text((0, top), text * 8, fill=(255, 255, 255), font_size=height * 0.8)
    return marked


def darkened(picture: Picture, seed: int) -> Picture:
    """Every value times 0.4: the exposure of a camera gone wrong."""
    return picture.point(lambda value: round(0.4 * value))


FAULTS: dict[str, Fault] = {"blur": blurred, "noise": noisy, "watermark": watermarked, "dark": darkened}


@dataclass(frozen=True)
class Sample:
    """A picture as the model sees it, uint8, and its class's name where it lies in a folder of its own."""

    picture: Picture
    group: str


def photographs(folder: Path, preprocessing: Any, most: int) -> list[Sample]:
    """The images of `folder`, in folders by class, cut and scaled as the model has them, as many of each class."""
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg", ".png"))
    groups: dict[str, list[Path]] = {}
    for file in files:
        groups.setdefault(file.parent.name, []).append(file)
    each = max(1, most // len(groups))
    samples = []
    for name, members in groups.items():
        for file in members[:each]:
            image = read_image(file)
            _, placement = preprocessing.apply(image)
            left, top, right, bottom = placement.crop_box
            size = preprocessing.size[1], preprocessing.size[0]
            box = (max(0.0, left), max(0.0, top), min(image.width, right), min(image.height, bottom))
            samples.append(Sample(image.resize(size, Image.Resampling.BILINEAR, box=box, reducing_gap=3.0), name))
    return samples


def scenes(preprocessing: Any, most: int) -> list[Sample]:
    """The bundled model's own: generated scenes that neither network nor table has seen."""
    from scenes.generator import sample

    made = (sample("test", index, preprocessing.size[0]) for index in range(most))
    return [Sample(Image.fromarray(one.image), str(one.label)) for one in made]


def normalised(picture: Picture, preprocessing: Any) -> torch.Tensor:
    mean, std = (np.array(part, np.float32) for part in (preprocessing.mean, preprocessing.std))
    array = (np.asarray(picture, np.float32) / 255 - mean) / std
    return torch.from_numpy(array.transpose(2, 0, 1).copy())


def watched(explainer: parchgrad.Explainer, images: torch.Tensor) -> Iterator[dict[str, float]]:
    """The figures of each image, explained for the likeliest of the classes that have a row in the table."""
    logits = explainer.predict(images)
    confidence = logits.softmax(dim=1).amax(dim=1).tolist()
    has_row = explainer.table.row_of_class >= 0
    without = ~has_row[logits.argmax(dim=1)]
    predicted = logits.masked_fill(~has_row, -torch.inf).argmax(dim=1)
    explanation = explainer.explain(images, predicted)
    plain = explainer.explain(images, predicted, rule=False).saliency().numpy()
    drifts = explainer.drift(images, predicted)
    for number, (map_, drift) in enumerate(zip(explanation.saliency().numpy(), drifts, strict=True)):
        of_map = figures(map_)
        distances = [one.distance for one in drift.values()]
        shifts = [one.shift for one in drift.values()]
        pair = np.stack([map_.ravel(), plain[number].ravel()])
        yield {
            "class": int(predicted[number]),
            "gini": of_map.gini,
            "border share": of_map.border_share,
            "centroid x": of_map.x,
            "centroid y": of_map.y,
            "identity share": float(explanation.identity_layers[number] / explanation.layers_used[number]),
            "agreement (Spearman)": agreement(map_, plain[number]),
            "agreement (Pearson)": float(np.corrcoef(pair)[0, 1]),
            "distance, mean of layers": float(np.mean(distances)),
            "distance, first layer": distances[0],
            "distance, last layer": distances[-1],
            "shift, mean of layers": float(np.mean(shifts)),
            "shift, first layer": shifts[0],
            "shift, last layer": shifts[-1],
            "confidence": confidence[number],
            "without a row": float(without[number]),
        }


@dataclass(frozen=True)
class Moved:
    """A figure under a fault beside the same on the clean first half."""

    clean: float  # median
    clean_mean: float
    deviation: float  # standard, of the clean half
    median: float
    mean: float
    effect: float  # shift of the mean in standard deviations of the clean half
    distance: float  # Kolmogorov-Smirnov
    p: float


def moved(clean: NDArray[np.float64], here: NDArray[np.float64]) -> Moved:
    deviation = float(clean.std(ddof=1))
    effect = float(here.mean() - clean.mean()) / deviation if deviation > 0 else 0.0
    test = ks_2samp(clean, here, method="asymp")
    return Moved(
        clean=float(np.median(clean)),
        clean_mean=float(clean.mean()),
        deviation=deviation,
        median=float(np.median(here)),
        mean=float(here.mean()),
        effect=effect,
        distance=float(test.statistic),
        p=float(test.pvalue),
    )


def values(rows: Sequence[dict[str, float]], name: str) -> NDArray[np.float64]:
    found = np.array([row[name] for row in rows], np.float64)
    kept: NDArray[np.float64] = found[np.isfinite(found)]
    return kept


def class_distance(first: Sequence[dict[str, float]], second: Sequence[dict[str, float]]) -> float:
    """Total variation distance of the predicted classes' shares, 0..1."""
    shares = [Counter(row["class"] for row in rows) for rows in (first, second)]
    return sum(abs(shares[0][c] / len(first) - shares[1][c] / len(second)) for c in {*shares[0], *shares[1]}) / 2


def conditions(samples: list[Sample]) -> tuple[list[Picture], dict[str, list[Picture]]]:
    """The clean first half, and what it is compared with."""
    order = np.random.default_rng(SEED).permutation(len(samples))
    first, second = ([samples[i] for i in half] for half in np.array_split(order, 2))
    pictures = [one.picture for one in second]
    few = sorted({one.group for one in second})[:2]
    others = {"clean": pictures}
    for name, fault in FAULTS.items():
        others[name] = [fault(picture, seed) for seed, picture in enumerate(pictures)]
    others["two classes"] = [one.picture for one in second if one.group in few]
    return [one.picture for one in first], others


def cost(explainer: parchgrad.Explainer, images: torch.Tensor, runs: int) -> dict[str, float]:
    """Median CPU time of each part of a watch over an explanation of one image with its figures not among it."""
    one, target = images[:1], explainer.predict(images[:1]).argmax(dim=1)
    target[:] = explainer.table.classes[0]
    map_ = explainer.explain(one, target).saliency()[0].numpy()
    calls: dict[str, Callable[[], object]] = {
        "explanation": lambda: explainer.explain(one, target),
        "figures of the map": lambda: figures(map_),
        "plain gradient": lambda: explainer.explain(one, target, rule=False),
        "agreement": lambda: agreement(map_, map_.T),
        "activation drift": lambda: explainer.drift(one, target),
    }
    seconds = interleaved(calls, runs)
    found = {name: float(np.median(ratios(each, seconds["explanation"]))) for name, each in seconds.items()}
    found["explanation, CPU ms"] = 1000 * float(np.median(seconds["explanation"]))
    found["figures of the map, CPU ms"] = 1000 * float(np.median(seconds["figures of the map"]))
    return found


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """With the options that say which model and which images."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--models-dir", type=Path, default=ROOT / "models")
    parser.add_argument("--tables-dir", type=Path, default=ROOT / "selection_tables")
    parser.add_argument("--model", default="scenes")
    parser.add_argument("--pictures", type=Path, help="photographs in folders by class; default: generated scenes")
    parser.add_argument("--images", type=int, default=300, help="in both halves together")
    return parser


def subject(given: argparse.Namespace) -> tuple[parchgrad.Explainer, Any, list[Sample]]:
    """What those options name, on one thread of the processor."""
    torch.set_num_threads(1)
    model = parchgrad.load_model(given.models_dir / given.model)
    explainer = parchgrad.Explainer(model, parchgrad.load_table(given.tables_dir / given.model, model), device="cpu")
    if given.pictures is None:
        return explainer, model.preprocessing, scenes(model.preprocessing, given.images)
    return explainer, model.preprocessing, photographs(given.pictures, model.preprocessing, given.images)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--runs", type=int, default=15, help="rounds of the cost")
    parser.add_argument("--out", type=Path, help="JSON of all that is printed")
    given = parser.parse_args(arguments)
    explainer, preprocessing, samples = subject(given)
    first, others = conditions(samples)

    def rows(pictures: Sequence[Picture]) -> list[dict[str, float]]:
        tensors = [normalised(picture, preprocessing) for picture in pictures]
        return [
            row
            for start in range(0, len(tensors), BATCH)
            for row in watched(explainer, torch.stack(tensors[start : start + BATCH]))
        ]

    clean = rows(first)
    found = {name: rows(pictures) for name, pictures in others.items()}
    report = compared(clean, found)
    print(f"{given.model}: {len(clean)} images in the clean half")
    print(text(report, found))
    parts = cost(explainer, torch.stack([normalised(first[0], preprocessing)]), given.runs)
    print("\nCPU time over an explanation of one image, one thread, medians:")
    for name, value in parts.items():
        print(f"  {name}: {value:.3g}")
    if given.out:
        given.out.write_text(json.dumps({"figures": report, "cost": parts}, indent=1) + "\n", encoding="utf-8")


def compared(
    clean: Sequence[dict[str, float]], found: dict[str, list[dict[str, float]]]
) -> dict[str, dict[str, dict[str, float]]]:
    """Figure -> condition -> its `Moved`."""
    names = list(clean[0])
    report: dict[str, dict[str, dict[str, float]]] = {}
    for name in names:
        if name not in ("class", "without a row"):
            first = values(clean, name)
            report[name] = {case: vars(moved(first, values(rows, name))) for case, rows in found.items()}
    report["predicted classes"] = {
        case: {"total_variation": class_distance(clean, rows)} for case, rows in found.items()
    }
    report["prediction without a row"] = {
        case: {"share": float(values(rows, "without a row").mean())} for case, rows in found.items()
    }
    return report


def text(report: dict[str, dict[str, dict[str, float]]], found: dict[str, list[dict[str, float]]]) -> str:
    """A Markdown table: median of the clean half, then for each condition `median (effect; KS)`, * where p is small."""
    lines = [f"| figure | clean half | {' | '.join(f'{name} ({len(rows)})' for name, rows in found.items())} |"]
    lines.append("| --- | --- |" + " --- |" * len(found))
    for name, cases in report.items():
        if not all("p" in case for case in cases.values()):
            line = " | ".join(f"{next(iter(case.values())):.3f}" for case in cases.values())
            lines.append(f"| {name} | | {line} |")
            continue
        cells = []
        for case in cases.values():
            mark = "**" if case["p"] < CHANCE else ""
            cells.append(f"{mark}{case['median']:.3f} ({case['effect']:+.1f}; {case['distance']:.2f}){mark}")
        lines.append(f"| {name} | {next(iter(cases.values()))['clean']:.3f} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
