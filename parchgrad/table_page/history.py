"""How a table was built, from its manifest: terms and lines for people to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# A table may have left out thousands of unreadable images; these many stand by name.
NAMED_BAD = 5
LONGEST = 400  # characters of a value that this page has no form for

TERMS = {
    "by": "built by",
    "data": "images from",
    "images_sha256": "sha256 of the list of images",
    "bad_images": "unreadable images left out",
    "layer_patterns": "layers chosen by",
    "feature": "feature of a channel",
    "normality": "normality test",
}


def in_words(values: Mapping[str, Any]) -> str:
    """'quantile 0.1; layers a*, b*': options on one line."""
    return "; ".join(f"{name.replace('_', ' ')} {_plain(value)}" for name, value in values.items())


def history(built: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Terms with their lines, in the manifest's order."""
    return [(TERMS.get(key, key.replace("_", " ")), _lines(key, value)) for key, value in built.items()]


def _lines(key: str, value: Any) -> list[str]:
    if key == "bad_images" and isinstance(value, list):
        more = [f"and {len(value) - NAMED_BAD:,} more"] if len(value) > NAMED_BAD else []
        return [f"{len(value):,}" if value else "none", *(": ".join(bad) for bad in value[:NAMED_BAD]), *more]
    if key == "data" and isinstance(value, list):
        return [_source(entry) for entry in value]
    if key == "normality":
        return ["none"] if value is None else [f"{value['images']:,} images, drawn with seed {value['seed']}"]
    if isinstance(value, Mapping):
        return [_cut(f"{name.replace('_', ' ')}: {_plain(part)}") for name, part in value.items()]
    return [_cut(_plain(value))]


def _source(entry: Mapping[str, Any]) -> str:
    """'train: 1,000 images (fingerprint f764...)': what the builder notes of one place images came from."""
    rest = {name: part for name, part in entry.items() if name not in ("root", "images")}
    images = f"{entry['images']:,} images" if "images" in entry else "images not counted"
    return f"{entry.get('root', 'unknown')}: {images}" + (f" ({_plain(rest)})" if rest else "")


def _plain(value: Any) -> str:
    """Any value of a manifest without JSON's punctuation."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name.replace('_', ' ')} {_plain(part)}" for name, part in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        # Lists in lists keep their brackets, or nobody could tell where one ends.
        return ", ".join(f"[{_plain(part)}]" if isinstance(part, list) else _plain(part) for part in value) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:,}" if isinstance(value, int) else str(value)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text):,} characters)"
