"""`parchgrad explain`: predictions and overlays of image files; by a service with `--url`, again with `--replay`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from parchgrad.cli.shared import DEVICE, FOLDER, MODELS_DIR, TABLES_DIR, ListParameter, load_named_model, named

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
TOLERANCE = click.FloatRange(min=0)

POLARITIES = ("both", "positive", "negative")  # those of parchgrad.render, which takes too long to load for --help

# What each way of explaining has no use for; the words say why.
LOCAL_ONLY = ("table", "device", "models_dir", "tables_dir")
OF_REPLAY = ("arguments", "replay", "tolerance", "as_json", "device", "models_dir", "tables_dir")


@dataclass(frozen=True)
class Drawing:
    """Where the overlays go and how they look; one name for each image."""

    out: Path
    colormap: str
    smooth: float
    mode: str
    outline: bool
    opacity: float
    names: list[str]

    def written(self, number: int, backdrop: NDArray[np.uint8], saliency: NDArray[np.float32]) -> Path:
        """The overlay of image `number`, both `(h, w)`, as a file."""
        from parchgrad.render import overlay, png

        path = self.out / f"{self.names[number]}.overlay.png"
        drawn = overlay(
            backdrop, saliency, colormap=self.colormap, mode=self.mode, smooth=self.smooth, outline=self.outline,
            opacity=self.opacity,
        )  # fmt: skip
        path.write_bytes(png(drawn))
        return path


@click.command("explain")
@click.argument("arguments", nargs=-1, required=True, metavar="[MODEL] IMAGE...")
@click.option("--table", help="Selection table.  [default: the one of the model's name and version]")
@click.option("--target", multiple=True, help="Class index, name or id; once, or once an image.  [default: predicted]")
@click.option(
    "--method", default="gradient", show_default=True,
    help="gradient, input_x_gradient, integrated_gradients, smoothgrad, guided_backprop or grad_cam (has no rule).",
)  # fmt: skip
@click.option("--quantile", type=float, help="[default: the table's]")
@click.option("--alpha", type=float, help="Select by p-value instead.")
@click.option("--gamma", type=float, help="[default: the table's]")
@click.option("--conserve", help="independent, exact or none.  [default: the table's]")
@click.option("--selection", help="class or instance.  [default: the table's]")
@click.option("--layers", type=ListParameter(str), help="Glob patterns.  [default: the table's]")
@click.option("--steps", type=int, help="Points of integrated_gradients.  [default: 25]")
@click.option("--samples", type=int, help="Noisy copies of smoothgrad.  [default: 25]")
@click.option("--plain", is_flag=True, help="Without the rule: the plain method.")
@click.option(
    "--polarity", type=click.Choice(POLARITIES), default="both", show_default=True,
    help="What the map shows: the positive or the negative part of the attribution, or its magnitude.",
)  # fmt: skip
@click.option("--out", type=FOLDER, default=Path("out"), show_default=True, help="Where the overlays go.")
@click.option("--colormap", default="inferno", show_default=True, help="As matplotlib calls it: viridis, turbo, ...")
@click.option(
    "--smooth", type=click.FloatRange(min=0), default=1.0, show_default=True, help="Blur of the drawn map, pixels."
)
@click.option("--overlay", "mode", default="original", show_default=True, help="none, original, grayscale, mask_black.")
@click.option("--outline", is_flag=True, help="Draw outlines of the regions that matter most, not pixels.")
@click.option(
    "--opacity", type=click.FloatRange(0, 1), default=1.0, show_default=True,
    help="How much of the drawing lies over the image itself.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object an image instead of the table.")
@click.option("--url", help="Explain through the service at this address; MODEL is one of its models.")
@click.option("--api-key-file", type=FILE, help="File that holds the key for the service, and nothing else.")
@click.option("--replay", type=FILE, help="Make the maps of this saved /explain answer again and compare; no MODEL.")
@click.option("--tolerance", type=TOLERANCE, help="Of --replay: relative L2 allowed.  [default: by the software]")
@DEVICE
@MODELS_DIR
@TABLES_DIR
@click.pass_context
def explain(
    context: click.Context, arguments: tuple[str, ...], table: str | None, target: tuple[str, ...], method: str,
    quantile: float | None, alpha: float | None, gamma: float | None, conserve: str | None,
    selection: str | None, layers: tuple[str, ...] | None, steps: int | None, samples: int | None, plain: bool,
    polarity: str, out: Path, colormap: str, smooth: float, mode: str, outline: bool, opacity: float, as_json: bool,
    url: str | None, api_key_file: Path | None, replay: Path | None, tolerance: float | None, device: str,
    models_dir: Path, tables_dir: Path,
) -> None:  # fmt: skip
    """Predict and explain the image files with MODEL; writes an overlay PNG for each.

    An image that fails is reported and the others are explained; the exit code is then 1.

    With --url a service does the work. With --replay a saved answer of /explain is made again from the same images:
    exit code 0 where every map is the same, 1 where one differs, 3 where answer, images and model do not belong
    together.
    """
    if replay is not None:
        from parchgrad.cli.explain_replay import replay_answer

        others = [p.name for p in context.command.params if p.name is not None and p.name not in OF_REPLAY]
        _refuse(context, others, "--replay takes every option from the answer")
        replay_answer(replay, _files(context, arguments), tolerance, as_json, device, models_dir, tables_dir)
        return
    if len(arguments) < 2:
        raise click.UsageError("Missing argument: expected MODEL and one or more image files.")
    model, images = arguments[0], _files(context, arguments[1:])
    _refuse(context, ["tolerance"], "it is an option of --replay")
    if target and len(target) not in (1, len(images)):
        raise click.UsageError(f"--target is given {len(target)} times; expected once, or once for each image.")
    drawing = Drawing(out, colormap, smooth, mode, outline, opacity, _distinct([path.stem for path in images]))
    options = {
        "method": method, "rule": False if plain else None, "quantile": quantile, "alpha": alpha, "gamma": gamma,
        "conserve": conserve, "selection": selection, "layers": None if layers is None else list(layers),
        "steps": steps, "samples": samples,
    }  # fmt: skip
    if url is None:
        _refuse(context, ["api_key_file"], "it is an option of --url")
        rows = _explained(model, images, target, options, polarity, drawing, table, device, models_dir, tables_dir)
    else:
        from parchgrad.cli.explain_remote import explained_remotely

        _refuse(context, LOCAL_ONLY, "the service at --url chooses that")
        rows = explained_remotely(url, api_key_file, model, images, target, options | {"polarity": polarity}, drawing)
    printed_to, failed = sys.stdout, False  # a progress bar redirects what is printed
    for row in rows:
        if isinstance(row, str):
            failed = True
            click.echo(f"Error: {row}", err=True)
        else:
            click.echo(json.dumps(row, ensure_ascii=False) if as_json else _explained_line(row), file=printed_to)
    if failed:
        sys.exit(1)


def _files(context: click.Context, paths: tuple[str, ...]) -> list[Path]:
    argument = context.command.params[0]
    return [FILE.convert(path, argument, context) for path in paths]


def _refuse(context: click.Context, names: list[str] | tuple[str, ...], why: str) -> None:
    """Usage error for the first of these parameters that the command line gives."""
    for parameter in context.command.params:
        given = parameter.name in names and context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
        if given:
            raise click.UsageError(f"{parameter.opts[0]} does not go with this: {why}.")


def _explained(
    model: str, images: list[Path], target: tuple[str, ...], options: dict[str, Any], polarity: str,
    drawing: Drawing, table: str | None, device: str, models_dir: Path, tables_dir: Path,
) -> Iterator[dict[str, Any] | str]:  # fmt: skip
    """What there is to say of each image, or why it cannot be read."""
    from parchgrad.errors import DataError
    from parchgrad.evaluation.maps import gini
    from parchgrad.explainer import Explainer
    from parchgrad.preprocessing import read_image
    from parchgrad.render import REDUCTION_OF_POLARITY
    from parchgrad.tables import load_table

    loaded = load_named_model(model, models_dir)
    explainer = Explainer(
        loaded, load_table(named(table or f"{loaded.name}/{loaded.version}", tables_dir), loaded), device
    )
    drawing.out.mkdir(parents=True, exist_ok=True)
    targets = [None if t == "predicted" else loaded.class_index(t) for t in target] or [None]
    for number, path in enumerate(images):
        try:
            pixels, placement = loaded.preprocessing.apply(read_image(path))
        except DataError as error:
            yield str(error)
            continue
        e = explainer.explain(pixels[None], targets[number % len(targets)], **options)
        saliency = e.saliency(REDUCTION_OF_POLARITY[polarity])[0].cpu().numpy()
        index, probabilities = int(e.targets[0]), e.probabilities()[0]
        best = int(probabilities.argmax())
        yield {
            "image": str(path),
            "prediction": {"index": best, "label": loaded.labels[best], "probability": float(probabilities[best])},
            "target": {"index": index, "label": loaded.labels[index], "probability": float(probabilities[index])},
            "identity_layers": int(e.identity_layers[0]),
            "gini": gini(saliency),
            "crop_box": list(placement.crop_box),
            "overlay": str(drawing.written(number, loaded.preprocessing.restore(pixels), saliency)),
        }


def _distinct(names: list[str]) -> list[str]:
    """The names, numbered where one comes twice."""
    return [name if names.count(name) == 1 else f"{name}_{number}" for number, name in enumerate(names)]


def _explained_line(result: dict[str, Any]) -> str:
    prediction, target = result["prediction"], result["target"]
    return (
        f"{result['image']}: {prediction['label']} ({prediction['probability']:.3f}); "
        f"explained {target['label']} ({target['probability']:.3f}) in {result['overlay']}"
    )
