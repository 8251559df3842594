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
@click.option(
    "--arch",
    help="torchvision model, timm/NAME, module:factory of your own, or 'program' for an exported program.  "
    "[default: NAME; program where --weights is a .pt2]",
)
@click.option(
    "--weights", type=click.Path(exists=True, dir_okay=False),
    help=".safetensors, .pth or .pt2.  [default: the published ones, downloaded or from the download cache]",
)  # fmt: skip
@click.option(
    "--pretrained",
    help="Which of torchvision's published weights, such as IMAGENET1K_V1; with --weights FILE, only "
    "whose labels and preprocessing.  [default: DEFAULT; with FILE, those published under its name]",
)
@click.option(
    "--labels", type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Text file, one class a line in index order: a name, id<tab>name, or ImageNet's 'n01440764 tench'.  "
    "[default: the published ones]",
)  # fmt: skip
@click.option("--size", type=int, help="Side of the square input, pixels.  [default: the published one, else 224]")
@click.option("--rule", type=click.Choice(["shorter_side", "stretch", "native"]),
              help="How an image is brought to size; native keeps its own.  [default: the published one, else "
              "shorter_side]")  # fmt: skip
@click.option("--resize", type=int, help="Shorter side before the centre crop.  [default: the published one, in "
              "proportion to --size; else size * 256 / 224]")  # fmt: skip
@click.option("--mean", type=ListParameter(float, 3), help="[default: the published one, else 0.485,0.456,0.406]")
@click.option("--std", type=ListParameter(float, 3), help="[default: the published one, else 0.229,0.224,0.225]")
@click.option("--interpolation", type=click.Choice(["bilinear", "bicubic"]),
              help="[default: the published one, else bilinear]")  # fmt: skip
@click.option("--argument", "arguments", multiple=True, metavar="KEY=JSON", help="Extra argument of the architecture.")
@click.option("--version", type=int, help="Version number.  [default: the next]")
@MODELS_DIR
def model_add(
    name: str, arch: str | None, weights: str | None, pretrained: str | None, labels: Path | None,
    size: int | None, rule: str | None, resize: int | None, mean: tuple[float, float, float] | None,
    std: tuple[float, float, float] | None, interpolation: str | None,
    arguments: tuple[str, ...], version: int | None, models_dir: Path,
) -> None:  # fmt: skip
    """Import a model as package NAME; weights are checked against the architecture first.

    With nothing but NAME, a torchvision model: its published weights, labels and preprocessing. Each option
    replaces one of these; with --weights FILE nothing is downloaded.
    """
    from parchgrad.layers import convolutions
    from parchgrad.models import add_model, load_model, read_lines

    given = {
        "size": None if size is None else (size, size), "rule": rule, "resize": resize, "mean": mean, "std": std,
        "interpolation": interpolation,
    }  # fmt: skip
    folder = add_model(
        name,
        architecture=arch,
        weights=weights,
        labels=None if labels is None else read_lines(labels),
        preprocessing={key: value for key, value in given.items() if value is not None},
        pretrained=pretrained,
        arguments=dict(_key_value(text) for text in arguments),
        models_dir=models_dir,
        version=version,
    )
    click.echo(f"Added {folder}")
    found = convolutions(load_model(folder).module)
    if len(found) == 1:
        click.echo(
            f"Note: its only convolution is '{next(iter(found))}'; the rule acts there and nowhere else.", err=True
        )


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
    click.echo(f"weights         {loaded.weights_source or 'unknown source'}")
    click.echo(f"weights_sha256  {loaded.weights_sha256}")


def _key_value(text: str) -> tuple[str, Any]:
    match = re.fullmatch(r"(\w+)=(.+)", text)
    try:
        if match:
            return match.group(1), json.loads(match.group(2))
    except ValueError:
        pass
    raise click.UsageError(f"--argument is {text!r}; expected KEY=JSON, such as transform_input=false.")
