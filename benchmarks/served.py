"""What the benchmarks of the service send it and read from it: pictures, requests, CPU time of threads, counters.

The server itself is a real `bentoml serve`, started and stopped by tests/service/serving.py.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import httpx
import numpy as np
import torch
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from torch import Tensor

import parchgrad
from service.settings import Settings
from tests.service.serving import Server, serving

MADE_UP = 16  # pictures, where no folder of photographs is given


@dataclass(frozen=True)
class Subject:
    """A model with its table, and the encoded pictures to send."""

    models_dir: Path
    tables_dir: Path
    model: str
    pictures: Path | None = None  # a folder of JPEG files

    @contextmanager
    def server(self, **settings: object) -> Iterator[Server]:
        """One worker with one torch thread: what a request costs is then the time of known threads."""
        chosen = {"models_dir": self.models_dir, "tables_dir": self.tables_dir, "model": self.model, "threads": 1}
        with TemporaryDirectory() as home, serving(Path(home), settings={**chosen, **settings}) as running:
            yield running

    def explainer(self) -> parchgrad.Explainer:
        model = parchgrad.load_model(self.models_dir / self.model)
        return parchgrad.Explainer(model, parchgrad.load_table(self.tables_dir / self.model, model))

    def files(self) -> list[bytes]:
        """Encoded pictures; made up ones are smooth JPEG files of 500 x 375."""
        if self.pictures is not None:
            files = [path.read_bytes() for path in sorted(self.pictures.glob("*.[jJ][pP]*[gG]"))]
            if not files:
                raise click.BadParameter(f"{self.pictures} holds no JPEG files.", param_hint="--pictures")
            return files
        return [picture(seed, (500, 375), "JPEG") for seed in range(MADE_UP)]

    def tensors(self) -> Tensor:
        """The pictures as the model takes them, (n, 3, h, w)."""
        preprocessing = parchgrad.load_model(self.models_dir / self.model).preprocessing
        decoded = (Image.open(io.BytesIO(data)).convert("RGB") for data in self.files())
        return torch.stack([preprocessing.apply(image)[0] for image in decoded])


def picture(seed: int, size: tuple[int, int], format: str) -> bytes:
    """A smooth coloured picture of `size` (width, height), encoded."""
    noise = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(buffer, format)
    return buffer.getvalue()


def multipart(url: str, kind: str, images: Sequence[bytes], **request: Any) -> httpx.Request:
    """POST /predict or /explain with `images`; `request` goes to httpx (data, headers)."""
    parts = [("image", (str(number), data)) for number, data in enumerate(images)]
    return httpx.Request("POST", f"{url}/{kind}", files=parts, **request)


def open_inference(url: str, model: str, kind: str, images: Tensor | Sequence[bytes]) -> httpx.Request:
    """POST …/infer with normalised tensors (n, 3, h, w) or encoded files, asked and answered in binary."""
    from tritonclient import http as triton

    if isinstance(images, Tensor):
        given = triton.InferInput("images", list(images.shape), "FP32")
        given.set_data_from_numpy(images.numpy())
    else:
        given = triton.InferInput("image_bytes", [len(images)], "BYTES")
        given.set_data_from_numpy(np.array(images, dtype=object))
    names = ["probabilities"] if kind == "predict" else ["probabilities", "saliency"]
    wanted = [triton.InferRequestedOutput(name) for name in names]
    body, length = triton.InferenceServerClient.generate_request_body([given], outputs=wanted)
    headers = {"Inference-Header-Content-Length": str(length)}
    return httpx.Request("POST", f"{url}/v2/models/{model}/infer", content=body, headers=headers)


@dataclass(frozen=True)
class Usage:
    """CPU seconds of the worker's threads since it started."""

    by_thread: dict[int, float]
    loop_thread: int

    @classmethod
    def of(cls, server: Server) -> Usage:
        (worker,) = server.workers()
        return cls({thread.id: thread.user_time + thread.system_time for thread in worker.threads()}, worker.pid)

    def since(self, earlier: Usage) -> Usage:
        spent = {thread: used - earlier.by_thread.get(thread, 0.0) for thread, used in self.by_thread.items()}
        return Usage(spent, self.loop_thread)

    @property
    def total(self) -> float:
        return sum(self.by_thread.values())

    @property
    def loop(self) -> float:
        return self.by_thread[self.loop_thread]

    @property
    def device(self) -> float:
        """The busiest thread beside the loop's: under load that is the model's."""
        return max(used for thread, used in self.by_thread.items() if thread != self.loop_thread)


class Counters:
    """All samples of /metrics at one moment, or the difference of two moments."""

    def __init__(self, samples: dict[tuple[str, frozenset[tuple[str, str]]], float]) -> None:
        self._samples = samples

    @classmethod
    def of(cls, server: Server) -> Counters:
        families = text_string_to_metric_families(server.client.get("/metrics").text)
        samples = (sample for family in families for sample in family.samples)
        return cls({(one.name, frozenset(one.labels.items())): one.value for one in samples})

    def since(self, earlier: Counters) -> Counters:
        return Counters({key: value - earlier._samples.get(key, 0.0) for key, value in self._samples.items()})

    def total(self, name: str, **labels: str) -> float:
        """The sum over the samples that carry `labels`."""
        wanted = labels.items()
        return sum(value for (one, carried), value in self._samples.items() if one == name and wanted <= set(carried))

    def mean(self, name: str, **labels: str) -> float:
        """Of a histogram; not a number where nothing was observed."""
        count = self.total(f"{name}_count", **labels)
        return self.total(f"{name}_sum", **labels) / count if count else float("nan")

    def above(self, name: str, bound: float) -> int:
        """Observations of a histogram above `bound`, which is one of its buckets'."""
        return round(self.total(f"{name}_count") - self.total(f"{name}_bucket", le=str(bound)))


def subject_options(command: Callable[..., None]) -> Callable[..., None]:
    """--models-dir, --tables-dir, --model and --pictures, given to the command as one `subject`."""
    defaults = Settings()
    folder = click.Path(exists=True, file_okay=False, path_type=Path)

    @click.option("--models-dir", type=folder, default=defaults.models_dir, help="The project's by default.")
    @click.option("--tables-dir", type=folder, default=defaults.tables_dir, help="The project's by default.")
    @click.option("--model", default=defaults.model, show_default=True)
    @click.option("--pictures", type=folder, help="JPEG files to send; made up by default.")
    @functools.wraps(command)
    def with_subject(models_dir: Path, tables_dir: Path, model: str, pictures: Path | None, **others: Any) -> None:
        command(subject=Subject(models_dir.resolve(), tables_dir.resolve(), model, pictures), **others)

    return with_subject
