"""The sample pictures of the bundled model's package: held-out scenes and mosaics. `python -m scenes.samples`."""

from __future__ import annotations

from pathlib import Path

import click
from PIL import Image

from parchgrad.errors import ModelError
from parchgrad.versions import resolve_version
from scenes.demo import MOSAICS, ROOT, SCENES
from scenes.generator import mosaic, sample

SIZE = 128  # of a scene, as in the demonstration; a mosaic has twice that


@click.command()
@click.option("--models-dir", type=click.Path(path_type=Path), default=ROOT / "models", show_default=True)
def main(models_dir: Path) -> None:
    """Write them beside the newest version of the bundled model."""
    folder = resolve_version(models_dir / "scenes", "model.yaml", ModelError) / "samples"
    folder.mkdir(exist_ok=True)
    pictures = {f"scene_{i}": sample("test", i, SIZE).image for i in SCENES}
    pictures |= {f"mosaic_{i}": mosaic(i, "test", SIZE).image for i in MOSAICS}
    for name, pixels in pictures.items():
        Image.fromarray(pixels).save(folder / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
