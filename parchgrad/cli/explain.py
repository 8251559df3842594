"""`parchgrad explain`: predictions and overlays of image files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from parchgrad.cli.shared import DEVICE, FOLDER, MODELS_DIR, TABLES_DIR, ListParameter, load_named_model, named


@click.command("explain")
@click.argument("model")
@click.argument("images", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--table", help="Selection table.  [default: the one of the model's name and version]")
@click.option("--target", multiple=True, help="Class index, name or id; once, or once an image.  [default: predicted]")
@click.option(
    "--method", default="gradient", show_default=True,
    help="gradient, input_x_gradient, integrated_gradients, smoothgrad or guided_backprop.",
)  # fmt: skip
@click.option("--quantile", type=float, help="[default: the table's]")
@click.option("--alpha", type=float, help="Select by p-value instead.")
@click.option("--gamma", type=float, help="[default: the table's]")
@click.option("--conserve", help="independent, exact or none.  [default: the table's]")
@click.option("--selection", help="class or instance.  [default: the table's]")
@click.option("--layers", type=ListParameter(str), help="Glob patterns.  [default: the table's]")
@click.option("--plain", is_flag=True, help="Without the rule: the plain method.")
@click.option("--out", type=FOLDER, default=Path("out"), show_default=True, help="Where the overlays go.")
@click.option("--colormap", default="inferno", show_default=True, help="As matplotlib calls it: viridis, turbo, ...")
@click.option(
    "--smooth", type=click.FloatRange(min=0), default=1.0, show_default=True, help="Blur of the drawn map, pixels."
)
@click.option("--overlay", "mode", default="original", show_default=True, help="none, original, grayscale, mask_black.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object an image instead of the table.")
@DEVICE
@MODELS_DIR
@TABLES_DIR
def explain(
    model: str, images: tuple[Path, ...], table: str | None, target: tuple[str, ...], method: str,
    quantile: float | None, alpha: float | None, gamma: float | None, conserve: str | None,
    selection: str | None, layers: tuple[str, ...] | None, plain: bool, out: Path, colormap: str, smooth: float,
    mode: str, as_json: bool, device: str, models_dir: Path, tables_dir: Path,
) -> None:  # fmt: skip
    """Predict and explain IMAGES; writes an overlay PNG for each.

    An unreadable image is reported and the others are explained; the exit code is then 1.
    """
    from parchgrad.errors import DataError
    from parchgrad.evaluation.maps import gini
    from parchgrad.explainer import Explainer
    from parchgrad.preprocessing import read_image
    from parchgrad.render import overlay, png
    from parchgrad.tables import load_table

    if target and len(target) not in (1, len(images)):
        raise click.UsageError(f"--target is given {len(target)} times; expected once, or once for each image.")
    loaded = load_named_model(model, models_dir)
    explainer = Explainer(
        loaded, load_table(named(table or f"{loaded.name}/{loaded.version}", tables_dir), loaded), device
    )
    out.mkdir(parents=True, exist_ok=True)
    names = _distinct([path.stem for path in images])
    targets = [None if t == "predicted" else loaded.class_index(t) for t in target] or [None]
    unreadable = 0
    for number, path in enumerate(images):
        try:
            pixels, placement = loaded.preprocessing.apply(read_image(path))
        except DataError as error:
            unreadable += 1
            click.echo(f"Error: {error}", err=True)
            continue
        e = explainer.explain(
            pixels[None], targets[number % len(targets)], method=method, rule=not plain, quantile=quantile,
            alpha=alpha, gamma=gamma, conserve=conserve, selection=selection,
            layers=None if layers is None else list(layers),
        )  # fmt: skip
        saliency = e.saliency()[0].cpu().numpy()
        written = out / f"{names[number]}.overlay.png"
        drawn = overlay(loaded.preprocessing.restore(pixels), saliency, colormap=colormap, mode=mode, smooth=smooth)
        written.write_bytes(png(drawn))
        index, probabilities = int(e.targets[0]), e.probabilities()[0]
        best = int(probabilities.argmax())
        result = {
            "image": str(path),
            "prediction": {"index": best, "label": loaded.labels[best], "probability": float(probabilities[best])},
            "target": {"index": index, "label": loaded.labels[index], "probability": float(probabilities[index])},
            "identity_layers": int(e.identity_layers[0]),
            "gini": gini(saliency),
            "crop_box": list(placement.crop_box),
            "overlay": str(written),
        }
        click.echo(json.dumps(result, ensure_ascii=False) if as_json else _explained_line(result))
    if unreadable:
        sys.exit(1)


def _distinct(names: list[str]) -> list[str]:
    """The names, numbered where one comes twice."""
    return [name if names.count(name) == 1 else f"{name}_{number}" for number, name in enumerate(names)]


def _explained_line(result: dict[str, Any]) -> str:
    prediction, target = result["prediction"], result["target"]
    return (
        f"{result['image']}: {prediction['label']} ({prediction['probability']:.3f}); "
        f"explained {target['label']} ({target['probability']:.3f}) in {result['overlay']}"
    )
