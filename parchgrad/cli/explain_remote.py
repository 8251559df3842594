"""`parchgrad explain --url`: the same command, explained by a service; only the overlays are drawn here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from parchgrad.cli.shared import progress_bar

if TYPE_CHECKING:
    from parchgrad.answers import Result
    from parchgrad.cli.explain import Drawing


def explained_remotely(
    url: str, api_key_file: Path | None, model: str, images: list[Path], target: tuple[str, ...],
    options: dict[str, Any], drawing: Drawing,
) -> Iterator[dict[str, Any] | str]:  # fmt: skip
    """What there is to say of each image, or why it failed. `model` is a name, or NAME/VERSION."""
    from parchgrad.client import Client

    if any(one.startswith("top:") for one in target):
        raise click.UsageError("--target is top:k, which is several maps an image; expected one class.")
    name, _, version = model.partition("/")
    key = None if api_key_file is None else _key(api_key_file)
    drawing.out.mkdir(parents=True, exist_ok=True)
    # Lines on a terminal are progress enough, and a bar below them would be torn.
    bar = nullcontext(None) if sys.stdout.isatty() else progress_bar("explaining", "images")
    with Client(url, api_key=key, model=name, version=version or None) as client, bar as progress:
        chosen = list(target) if len(target) > 1 else target[0] if target else None
        results = client.explain_each(
            images,
            chosen,
            progress=None if progress is None else lambda done, _: progress(done, len(images)),
            **options,
        )
        for number, (path, result) in enumerate(zip(images, results, strict=True)):
            yield _row(number, path, result, drawing)


def _key(file: Path) -> str:
    """The file's one word. Raises ClickException, without a word of what it holds."""
    words = file.read_text(encoding="utf-8-sig", errors="replace").split()
    if len(words) != 1:
        held = "more than one word" if words else "nothing"
        raise click.ClickException(f"API key file '{file}' holds {held}; it must hold the token alone.")
    return words[0]


def _row(number: int, path: Path, result: Result, drawing: Drawing) -> dict[str, Any] | str:
    import numpy as np

    if result.error is not None:
        return f"Image '{path}': {result.error.message}"
    made = result.explanation
    if made is None or made.target is None or made.transform is None or made.quality is None:
        reason = "no explanation" if made is None else made.error.message if made.error else made.reason
        return f"Image '{path}' has a prediction, {result.predictions[0].label}, and no map: {reason}"
    saliency = made.saliency
    assert isinstance(saliency, np.ndarray)  # as it was asked for
    return {
        "image": str(path),
        "prediction": asdict(result.predictions[0]),
        "target": asdict(made.target),
        "identity_layers": made.quality.identity_layers,
        "gini": made.quality.gini,
        "crop_box": list(made.transform.crop_box),
        "overlay": str(drawing.written(number, _seen(path, made.transform.crop_box, saliency.shape), saliency)),
    }


def _seen(path: Path, box: tuple[float, float, float, float], shape: tuple[int, ...]) -> Any:
    """What the model saw of the image, uint8 `(h, w, 3)`: the map's part of it, in the map's size."""
    import numpy as np
    from PIL.Image import Resampling

    from parchgrad.preprocessing import read_image

    return np.asarray(read_image(path).resize((shape[1], shape[0]), Resampling.BILINEAR, box=box))
