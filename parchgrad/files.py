"""Files of ours: their digest, and tensors written whole or not at all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file beside its place, then rename it: a crash leaves the old file or none."""
    temporary = path.with_name(f".{path.name}.tmp")
    # Cloned: safetensors refuses tensors that share memory, as the state dicts of tied weights do.
    owned = {key: value.contiguous().clone() for key, value in tensors.items()}
    save_file(owned, temporary, metadata=dict(metadata) if metadata else None)
    # safetensors creates files only their owner can read; a service often runs as another user.
    temporary.chmod(0o644)
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file beside its place, then rename it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
