"""Many mixed requests to one worker, and what they leave behind: `python -m benchmarks.soak --requests 20000`.

Every route and form of answer, several sizes and formats of pictures, and a tenth of requests that are wrong in some
way. After each block of requests the worker's memory, open files, threads and temporary files are counted; after a
warm-up none of them may grow. Exit status 1 if one does, or if a request is not answered as it must be.
"""

from __future__ import annotations

import base64
import json
import os
import random
import struct
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import click
import httpx
from rich.console import Console
from rich.table import Table
from scipy import stats

from benchmarks.load_clients import HUNG_UP, Reply, Request, each_once, in_process_of_its_own, wire
from benchmarks.served import Subject, multipart, open_inference, picture, subject_options
from tests.service.serving import Server

CLIENTS = 8
BLOCK = 200  # requests between two samples
BAD_SHARE = 0.1
WARM_UP = 0.25  # of the blocks
SETTLE_TRIES = 50  # times a tenth of a second
OK = frozenset({200})
REFUSED_IMAGE = frozenset({400, 413, 415})
LARGE_HEADER = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + struct.pack(">IIBBBBB", 65535, 65535, 8, 2, 0, 0, 0)


@dataclass(frozen=True)
class Sample:
    """One moment between two blocks; memory in bytes, `temporary` files and folders of the whole service."""

    requests: int
    resident: int
    private: int
    files: int
    threads: int
    temporary: int


@dataclass(frozen=True)
class Growth:
    """Bytes a thousand requests, with the standard error of a straight line through the samples."""

    slope: float
    error: float

    @classmethod
    def of(cls, numbers: Sequence[float], requests: Sequence[int]) -> Growth:
        line = stats.linregress(requests, numbers)
        return cls(1000 * float(line.slope), 1000 * float(line.stderr))


def good_requests(subject: Subject, url: str) -> list[Request]:
    """Every route and form of answer, once or more."""
    sizes = {"JPEG": (500, 375), "PNG": (160, 120), "WEBP": (640, 480), "GIF": (96, 128), "BMP": (300, 200),
             "TIFF": (257, 129)}  # fmt: skip
    images = [picture(seed, size, format) for seed, (format, size) in enumerate(sizes.items())]
    large = picture(20, (2000, 1400), "PNG")  # more than body.py keeps in memory
    anyone = {"selection": "instance"}  # a picture needs a map, and a table need not cover every class
    made: list[tuple[str, httpx.Request]] = []
    for number, image in enumerate(images):
        made.append((f"predict {number}", multipart(url, "predict", [image])))
        made.append((f"explain {number}", multipart(url, "explain", [image], data={"target": str(number)})))
    made.append(("predict large", multipart(url, "predict", [large])))
    for saliency in ("none", "float16", "float32", "png", "list"):
        made.append((f"saliency={saliency}", multipart(url, "explain", images[:1], data={"saliency": saliency})))
    for target in ("predicted", "top:3"):
        made.append((f"target={target}", multipart(url, "explain", images[1:2], data={"target": target})))
    made += [
        ("several images", multipart(url, "explain", images[:5], data={"gamma": ["inf", "3", "1", "0", "2"]})),
        ("picture", multipart(url, "explain", images[:1], data=anyone, headers={"Accept": "image/png"})),
        ("arrays", multipart(url, "explain", images[:3], headers={"Accept": "application/x-npz"})),
        ("explain_when", multipart(url, "explain", images[:2], data={"explain_when": "confidence<0.5;sample:0.1"})),
        ("raw", httpx.Request("POST", f"{url}/predict", content=images[0], headers={"Content-Type": "image/jpeg"})),
        ("v2 bytes", open_inference(url, subject.model, "explain", images[:1] * 2)),
        ("v2 tensors", open_inference(url, subject.model, "explain", subject.tensors()[:2])),
        ("v2 predict", open_inference(url, subject.model, "predict", subject.tensors()[:1])),
        ("v1 predict", open_inference_v1(url, subject.model, "predict", images[0])),
        ("v1 explain", open_inference_v1(url, subject.model, "explain", images[0])),
    ]
    pages = ("/models", f"/models/{subject.model}", "/metrics", "/docs.json", "/v2", f"/v2/models/{subject.model}")
    made += [(page, httpx.Request("GET", url + page)) for page in (*pages, "/livez", "/readyz", "/v2/health/ready")]
    return [Request(name, wire(request), OK) for name, request in made]


def open_inference_v1(url: str, model: str, verb: str, image: bytes) -> httpx.Request:
    instances = [{"image": {"b64": base64.b64encode(image).decode()}}]
    return httpx.Request("POST", f"{url}/v1/models/{model}:{verb}", json={"instances": instances})


def bad_requests(subject: Subject, url: str, bad_images: Path | None) -> list[Request]:
    """Wrong images, options, models and bodies, and callers that hang up."""
    image = picture(0, (500, 375), "JPEG")
    wrong_images = {
        "empty": b"",
        "page": b"<html>",
        "cut": image[:2000],
        "cut early": image[:30],
        "large": LARGE_HEADER,
    }
    made = [
        Request(f"image {name}", wire(multipart(url, "explain", [data])), REFUSED_IMAGE)
        for name, data in wrong_images.items()
    ]
    for path in sorted(bad_images.glob("*.*")) if bad_images else ():
        content = wire(multipart(url, "explain", [path.read_bytes()]))
        made.append(Request(path.name, content, REFUSED_IMAGE | OK))  # some are only odd
    options = {"quantile": "7", "gamma": "-1", "target": "no such class", "layers": "nothing", "no_such_field": "1"}
    for name, value in options.items():
        made.append(Request(name, wire(multipart(url, "explain", [image], data={name: value})), frozenset({422})))
    late = multipart(url, "explain", [image] * 4, data={"timeout_ms": "1"})
    unknown_model = multipart(url, "predict", [image], data={"model": "no_such_model"})
    unknown_v2 = open_inference(url, "no_such_model", "predict", [image])
    not_multipart = httpx.Request(
        "POST", f"{url}/predict", content=image, headers={"Content-Type": "multipart/form-data; boundary=x"}
    )
    text = httpx.Request("POST", f"{url}/predict", content=image, headers={"Content-Type": "text/plain"})
    made += [
        Request("too late", wire(late), frozenset({504})),
        Request("unknown model", wire(unknown_model), frozenset({404})),
        Request("v2 unknown model", wire(unknown_v2), frozenset({404})),
        Request("v2 no tensors", wire(httpx.Request("POST", f"{url}/v2/models/{subject.model}/infer", json={})),
                frozenset({400})),
        Request("v1 no instances", wire(httpx.Request("POST", f"{url}/v1/models/{subject.model}:predict", json={})),
                frozenset({400})),
        Request("no multipart", wire(not_multipart), frozenset({400})),
        Request("text", wire(text), frozenset({415})),
        Request("nowhere", wire(httpx.Request("GET", f"{url}/nowhere")), frozenset({404})),
    ]  # fmt: skip
    whole = wire(multipart(url, "explain", [image] * 2))
    for name, after in (("head", 40), ("body", len(whole) // 2), ("answer", len(whole))):
        made.append(Request(f"hangs up before the end of the {name}", whole, frozenset({HUNG_UP}), after))
    return made


def mixed(good: Sequence[Request], bad: Sequence[Request], count: int) -> list[Request]:
    """`count` requests in random order, always the same, BAD_SHARE of them bad; each kind as often as the others."""
    chosen = random.Random(0)
    number = round(BAD_SHARE * count)
    requests = [bad[i % len(bad)] for i in range(number)] + [good[i % len(good)] for i in range(count - number)]
    chosen.shuffle(requests)
    return requests


@contextmanager
def own_temporary_folder() -> Iterator[Path]:
    """Where a server started meanwhile puts its temporary files, so that they can be counted."""
    with TemporaryDirectory() as folder, mock.patch.dict(os.environ, {"TMPDIR": folder}):
        yield Path(folder)


def sample(server: Server, temporary: Path, requests: int) -> Sample:
    (worker,) = server.workers()
    memory = worker.memory_full_info()
    return Sample(
        requests, memory.rss, memory.uss, worker.num_fds(), worker.num_threads(), len(list(temporary.rglob("*")))
    )


def settled(server: Server, temporary: Path, requests: int, before: Sample | None) -> Sample:
    """A sample once connections are closed and who hung up is gone: when no more is open than before, or in the end."""
    for _ in range(SETTLE_TRIES):
        found = sample(server, temporary, requests)
        if before is None or (found.files, found.temporary) <= (before.files, before.temporary):
            break
        time.sleep(0.1)
    return found


def soak(server: Server, temporary: Path, requests: Sequence[Request], block: int) -> tuple[list[Sample], list[Reply]]:
    """Samples before the first block and after each, and one reply a request, in order."""
    samples, replies = [sample(server, temporary, 0)], list[Reply]()
    with in_process_of_its_own() as callers:
        for start in range(0, len(requests), block):
            replies += callers.submit(each_once, server.url, requests[start : start + block], CLIENTS).result()
            samples.append(settled(server, temporary, len(replies), samples[-1] if start else None))
    return samples, replies


def wrong_answers(requests: Sequence[Request], replies: Sequence[Reply]) -> Counter[str]:
    """How often which request was not answered as it must be."""
    pairs = zip(requests, replies, strict=True)
    return Counter(
        f"{one.name}: {reply.status} {reply.body[:200]!r}" for one, reply in pairs if reply.status not in one.right
    )


def left_behind(samples: Sequence[Sample]) -> dict[str, int]:
    """By how much open files, threads and temporary files pass the most there were in the warm-up.

    The fewest of the last quarter count: threads come and go, what is left behind stays.
    """
    warm, last = samples[: warm_blocks(samples) + 1], samples[-warm_blocks(samples) :]
    return {
        kind: min(getattr(one, kind) for one in last) - max(getattr(one, kind) for one in warm)
        for kind in ("files", "threads", "temporary")
    }


def warm_blocks(samples: Sequence[Sample]) -> int:
    return max(1, round(WARM_UP * (len(samples) - 1)))


@click.command(help="Send many mixed requests and print what grew.")
@click.option("--requests", "count", type=click.IntRange(200), default=20_000, show_default=True)
@click.option(
    "--bad-images",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Files to send among the bad ones.",
)
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False))
@subject_options
def main(subject: Subject, count: int, bad_images: Path | None, json_file: Path | None) -> None:
    with own_temporary_folder() as temporary, subject.server() as server:
        good, bad = good_requests(subject, server.url), bad_requests(subject, server.url, bad_images)
        requests = mixed(good, bad, count)
        begun = time.perf_counter()
        samples, replies = soak(server, temporary, requests, BLOCK)
        seconds = time.perf_counter() - begun
        complaints = [line for line in server.log.read_text().splitlines() if "Traceback" in line]
    wrong, left = wrong_answers(requests, replies), left_behind(samples)
    after = samples[warm_blocks(samples) :]
    console = Console(width=120)
    view = Table(
        "after", "resident MiB", "private MiB", "open files", "threads", "temporary files",
        title=f"{subject.model}: {len(good)} kinds of good requests, {len(bad)} of bad ones",
    )  # fmt: skip
    for one in samples[:: max(1, (len(samples) - 1) // 10)]:
        view.add_row(
            str(one.requests), f"{one.resident / 2**20:.1f}", f"{one.private / 2**20:.1f}", str(one.files),
            str(one.threads), str(one.temporary),
        )  # fmt: skip
    console.print(view)
    statuses = Counter(reply.status for reply in replies)
    console.print(
        f"{len(replies)} requests in {seconds:.0f} s; statuses: {dict(sorted(statuses.items()))}, {HUNG_UP}: hung up"
    )
    grown = {kind: Growth.of([getattr(one, kind) for one in after], [one.requests for one in after])
             for kind in ("resident", "private")}  # fmt: skip
    for kind, growth in grown.items():
        console.print(
            f"{kind} memory after warm-up: {growth.slope / 1024:+.1f} ± {growth.error / 1024:.1f} KiB a 1000 requests"
        )
    console.print(f"left behind after warm-up: {left}; tracebacks in the log: {len(complaints)}")
    for line, number in wrong.most_common(20):
        console.print(f"WRONG {number} x {line}", markup=False)
    if json_file is not None:
        figures = {"samples": [asdict(one) for one in samples], "statuses": statuses, "seconds": seconds}
        json_file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if wrong or complaints or any(number > 0 for number in left.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
