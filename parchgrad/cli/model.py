"""`parchgrad model`: packages of architecture, weights, labels and preprocessing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click

from parchgrad.cli.shared import MODELS_DIR, ListParameter, load_named_model


@click.group("model")
def model_group() -> None:
    """Model packages: architecture, weights, labels and preprocessing."""


@model_group.command("add")
@click.argument("name")
@click.option("--arch", required=True, help="torchvision model name, or module:factory of your own.")
@click.option("--weights", required=True, type=click.Path(exists=True, dir_okay=False), help=".safetensors or .pth.")
@click.option(
    "--labels", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Text file, one class a line in index order: a name, id<tab>name, or ImageNet's 'n01440764 tench'.",
)  # fmt: skip
@click.option("--size", default=224, show_default=True, help="Side of the square input, pixels.")
@click.option("--rule", type=click.Choice(["shorter_side", "stretch", "native"]), default="shorter_side",
              show_default=True, help="How an image is brought to size; native keeps its own.")  # fmt: skip
@click.option("--resize", type=int, help="Shorter side before the centre crop.  [default: size * 256 / 224]")
@click.option("--mean", type=ListParameter(float, 3), default="0.485,0.456,0.406", show_default=True)
@click.option("--std", type=ListParameter(float, 3), default="0.229,0.224,0.225", show_default=True)
@click.option("--interpolation", type=click.Choice(["bilinear", "bicubic"]), default="bilinear", show_default=True)
@click.option("--argument", "arguments", multiple=True, metavar="KEY=JSON", help="Extra argument of the architecture.")
@click.option("--version", type=int, help="Version number.  [default: the next]")
@MODELS_DIR
def model_add(
    name: str, arch: str, weights: str, labels: Path, size: int, rule: str, resize: int | None,
    mean: tuple[float, float, float], std: tuple[float, float, float], interpolation: str,
    arguments: tuple[str, ...], version: int | None, models_dir: Path,
) -> None:  # fmt: skip
    """Import a model as package NAME; weights are checked against the architecture first."""
    from parchgrad.models import add_model, read_lines
    from parchgrad.preprocessing import Preprocessing

    if resize is None and rule == "shorter_side":
        resize = round(size * 256 / 224)
    folder = add_model(
        name,
        architecture=arch,
        weights=weights,
        labels=read_lines(labels),
        preprocessing=Preprocessing((size, size), rule, resize, mean, std, interpolation),
        arguments=dict(_key_value(text) for text in arguments),
        models_dir=models_dir,
        version=version,
    )
    click.echo(f"Added {folder}")


@model_group.command("list")
@MODELS_DIR
def model_list(models_dir: Path) -> None:
    """Names and versions of the packages in the model repository."""
    from parchgrad.versions import is_version

    folders = [path.parent for path in models_dir.glob("*/*/model.yaml")]
    found = sorted((f.parent.name, int(f.name)) for f in folders if is_version(f.name))
    for name, version in found:
        click.echo(f"{name} {version}")
    if not found:
        click.echo(f"No model packages in '{models_dir}'.", err=True)


@model_group.command("show")
@click.argument("model")
@MODELS_DIR
def model_show(model: str, models_dir: Path) -> None:
    """What package MODEL holds, after checking it."""
    from parchgrad.layers import convolutions

    loaded = load_named_model(model, models_dir)
    convs = convolutions(loaded.module)
    click.echo(f"name            {loaded.name}, version {loaded.version}")
    click.echo(f"architecture    {loaded.architecture}")
    click.echo(f"parameters      {sum(p.numel() for p in loaded.module.parameters()):,}")
    click.echo(f"convolutions    {len(convs)}, {sum(convs.values()):,} channels")
    click.echo(f"classes         {len(loaded.labels)}: {', '.join(loaded.labels[:4])} ...")
    click.echo(f"preprocessing   {loaded.preprocessing}")
    click.echo(f"weights_sha256  {loaded.weights_sha256}")


def _key_value(text: str) -> tuple[str, Any]:
    match = re.fullmatch(r"(\w+)=(.+)", text)
    try:
        if match:
            return match.group(1), json.loads(match.group(2))
    except ValueError:
        pass
    raise click.UsageError(f"--argument is {text!r}; expected KEY=JSON, such as transform_input=false.")
