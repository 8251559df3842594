"""Environment (`PARCHGRAD_*`) -> one frozen, validated `Settings`, read once when the service module is imported."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from parchgrad.versions import versions_of
from service.images import PILLOW_WARNS_ABOVE, ImageLimits

PREFIX = "PARCHGRAD_"
PROJECT_ROOT = Path(__file__).resolve().parent.parent  # the checkout, or `src` inside a built bento
NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
LINE = r"[^\n]*"
KEYS = "NAME:SHA256[:PER_MINUTE], comma-separated"
ENTRY = rf"{NAME}(/[1-9][0-9]*)?"
DIGEST = r"[0-9a-f]{64}"
DIGESTS = rf"{NAME}/[1-9][0-9]*(:{DIGEST}){{1,3}}"
GRAPH_FILE = "model.onnx"  # of a version folder, as Triton has it


class SettingsError(Exception):
    """A variable that does not hold what it must: names the variable, the value and what is allowed."""

    def __init__(self, variable: str, value: str, allowed: str) -> None:
        super().__init__(f"{variable}={value!r}: expected {allowed}{'' if allowed.endswith('?') else '.'}")


def _within(default: Any, low: float, high: float, help: str) -> Any:
    return field(default=default, metadata={"low": low, "high": high, "help": help})


def _matching(default: str, pattern: str, allowed: str, help: str) -> Any:
    return field(default=default, metadata={"pattern": pattern, "allowed": allowed, "help": help})


def _switch(default: bool, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One field a variable: `max_images` is `PARCHGRAD_MAX_IMAGES`. Relative folders start at the project root."""

    models_dir: Path = field(default=PROJECT_ROOT / "models", metadata={"help": "folder of model packages"})
    tables_dir: Path = field(default=PROJECT_ROOT / "selection_tables", metadata={"help": "folder of selection tables"})
    graphs_dir: Path = field(
        default=PROJECT_ROOT / "onnx_graphs",
        metadata={"help": "folder of exported graphs, a Triton repository: NAME/VERSION/model.onnx"},
    )
    runtime: str = _matching(
        "auto", "auto|torch|onnx", "auto, torch or onnx",
        "what runs the models; auto: torch on a GPU, else a version's graph where there is one, else torch",
    )  # fmt: skip
    model: str = _matching("scenes", ENTRY, "NAME or NAME/VERSION", "model that answers where none is named")
    models: str = _matching(
        "", rf"|\*|{ENTRY}(,{ENTRY})*", "NAME[/VERSION],..., or *", "further models to serve; * = every one there is"
    )
    versions: str = _matching("latest", "latest|all", "latest or all", "which of a model's versions to serve")
    digests: str = _matching(
        "", rf"|{DIGESTS}(,{DIGESTS})*", "NAME/VERSION:WEIGHTS_SHA256[:TABLE_SHA256[:GRAPH_SHA256]], comma-separated",
        "SHA-256 that what is loaded must have; nothing else is loaded. None: no such check",
    )  # fmt: skip
    map_tables: bool = _switch(False, "map tables into memory instead of copying them: less memory, on files that stay")
    device: str = _matching("cpu", r"cpu|cuda(:[0-9]+)?", "cpu, cuda or cuda:N", "where the model runs")
    backward: str = _matching(
        "auto", "auto|pruned|dense", "auto, pruned or dense", "backward pass of maps; auto: pruned where it can be"
    )
    threads: int = _within(0, 0, 1024, "threads of the runtime in a device thread; 0 leaves its own choice")
    workers: int = _within(1, 1, 64, "worker processes, each with its own model and batcher")
    self_test: bool = _switch(True, "ready only after the golden image's map matched")
    max_image_bytes: int = _within(20_000_000, 1, 2**31, "largest encoded image, bytes")
    max_image_pixels: int = _within(50_000_000, 1, PILLOW_WARNS_ABOVE, "largest image, width x height")
    max_images: int = _within(16, 1, 1000, "images a request may carry")
    max_batch: int = _within(32, 1, 4096, "most images in one device call")
    max_batch_pixels: int = _within(
        0, 0, 2**31, "most input pixels in one device call of several images; 0: 400,000 on a CPU, 2,000,000 on a GPU"
    )
    max_queue: int = _within(256, 1, 1_000_000, "most images admitted and not yet answered; more get 429")
    shed_above: int = _within(0, 0, 1_000_000, "images admitted above which maps are left out; 0: half of MAX_QUEUE")
    max_delay_ms: float = _within(0.0, 0.0, 1000.0, "how long a free device waits for a fuller batch")
    decode_workers: int = _within(2, 1, 64, "threads that decode images")
    timeout_ms: int = _within(30_000, 1, 3_600_000, "deadline of a request that names none")
    max_timeout_ms: int = _within(120_000, 1, 3_600_000, "longest deadline a request may name")
    max_bodies_bytes: int = _within(
        1_000_000_000, 1, 2**40, "bodies not yet answered, in memory and on disk; more get 429"
    )
    head_timeout_ms: int = _within(10_000, 1, 3_600_000, "time a request's head has to arrive")
    body_timeout_ms: int = _within(30_000, 1, 3_600_000, "time a request's body has to arrive")
    answer_timeout_ms: int = _within(30_000, 1, 3_600_000, "time in which a caller must take something of its answer")
    drain_ms: int = _within(1000, 0, 600_000, "how long a stopping worker says 503 on /readyz and still accepts")
    api_keys: str = _matching("", LINE, KEYS, "keys that may call; none: everybody may")
    api_keys_file: str = _matching("", LINE, "a file", "the same, one key a line")
    admin_keys: str = _matching("", LINE, KEYS, "keys that may load and unload models; none: nobody may")
    admin_keys_file: str = _matching("", LINE, "a file", "the same, one key a line")
    allow_anonymous: bool = _switch(False, "answer without keys although bound to more than loopback")
    guard_metrics: bool = _switch(False, "/metrics and /docs.json need a key as well")
    audit_log: str = _matching("", LINE, "a file", "JSON lines, one for each image answered; none by default")
    audit_required: bool = _switch(
        False, "503 audit_unavailable where the audit log cannot be written; else the answer goes out"
    )
    traces_url: str = _matching(
        "", r"|https?://[^\s@/?#]+(/[^\s@?#]*)?", "http(s)://HOST:PORT[/PATH], without a key in it",
        "collector that traces are sent to, by OTLP over HTTP; none: there are none",
    )  # fmt: skip
    traces_sample: float = _within(
        1.0, 0.0, 1.0, "share of requests to trace, of those whose caller has not decided by a traceparent"
    )
    log_format: str = _matching("text", "text|json", "text or json", "lines of the log; json: an object each")
    watch_rate: float = _within(0.01, 0.0, 1.0, "share of the images looked at once answered; 0: none")
    watch_classes: int = _within(
        10, 0, 1000, "classes of a version that metrics tell apart, the same in all workers; the rest are 'other'"
    )
    attacks: bool = _switch(False, "answer POST /attack, and show the page's Attack view")
    grpc_port: int = _within(0, 0, 65535, "port of the Open Inference Protocol over gRPC; 0: it is off")

    def __post_init__(self) -> None:
        if self.max_queue < self.max_images:
            raise SettingsError(
                f"{PREFIX}MAX_QUEUE", str(self.max_queue), f"at least {PREFIX}MAX_IMAGES={self.max_images}"
            )
        if self.timeout_ms > self.max_timeout_ms:
            raise SettingsError(
                f"{PREFIX}TIMEOUT_MS", str(self.timeout_ms), f"at most {PREFIX}MAX_TIMEOUT_MS={self.max_timeout_ms}"
            )
        if self.shed_above > self.max_queue:
            raise SettingsError(
                f"{PREFIX}SHED_ABOVE", str(self.shed_above), f"at most {PREFIX}MAX_QUEUE={self.max_queue}"
            )

        versions = [entry.partition(":")[0] for entry in self.digests.split(",")]
        if twice := {version for version in versions if versions.count(version) > 1}:
            raise SettingsError(f"{PREFIX}DIGESTS", ", ".join(sorted(twice)), "one entry for a version")

    @property
    def batch_pixels(self) -> int:
        """Most input pixels in one device call. On a CPU larger ones cost more an image: their activations, above
        malloc's 32 MiB, are mapped and cleared anew each time."""
        return self.max_batch_pixels or (400_000 if self.device == "cpu" else 2_000_000)

    @property
    def shed_bound(self) -> int:
        """Images admitted and not yet answered above which maps are left out."""
        return self.shed_above or self.max_queue // 2

    @property
    def entries(self) -> list[tuple[str, str | None]]:
        """What to serve: (name, version or None), the default model first. `*` is looked up in the folders."""
        texts = [self.model, *filter(None, self.models.split(","))]
        if self.models == "*":
            texts = [self.model, *self.names_there]
        chosen: dict[str, str | None] = {}
        for text in texts:
            name, _, version = text.partition("/")
            chosen.setdefault(name, version or None)
        return list(chosen.items())

    def digests_of(self, name: str, version: str) -> dict[str, str] | None:
        """SHA-256 of `weights`, `table` and `graph`, as far as the settings name them; None without any for this."""
        for entry in filter(None, self.digests.split(",")):
            given, *digests = entry.split(":")
            if given == f"{name}/{version}":
                return dict(zip(("weights", "table", "graph"), digests, strict=False))
        return None

    @property
    def runs_torch(self) -> bool:
        """Whether model packages may be run. Imports nothing: the supervisor asks it too."""
        return self.runtime == "torch" or (self.runtime == "auto" and is_installed("torch"))

    @property
    def runs_graphs(self) -> bool:
        """Whether exported graphs may be run."""
        return self.runtime == "onnx" or (self.runtime == "auto" and is_installed("onnxruntime"))

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where versions of models are looked for."""
        return (*([self.models_dir] * self.runs_torch), *([self.graphs_dir] * self.runs_graphs))

    @property
    def names_there(self) -> list[str]:
        """The models of `folders`: what in them holds a version."""
        names = {p.name for folder in self.folders for p in folder.glob("*") if re.fullmatch(NAME, p.name)}
        return sorted(name for name in names if self.versions_there(name))

    def versions_there(self, name: str) -> list[str]:
        """Versions of a model in `folders`, newest first."""
        packages = versions_of(self.models_dir / name) if self.runs_torch else []
        graphs = versions_of(self.graphs_dir / name) if self.runs_graphs else []
        return sorted({*packages, *(one for one in graphs if self.graph(name, one).is_file())}, key=int, reverse=True)

    def graph(self, name: str, version: str) -> Path:
        """Where the exported graph of a version lies, if there is one."""
        return self.graphs_dir / name / version / GRAPH_FILE

    @property
    def image_limits(self) -> ImageLimits:
        return ImageLimits(self.max_image_bytes, self.max_image_pixels)

    @property
    def max_body_bytes(self) -> int:
        """Images times bytes, plus a little for part headers and option fields; never more than all bodies may have."""
        return min(self.max_images * (self.max_image_bytes + 4096) + 65536, self.max_bodies_bytes)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Settings":
        """Raises `SettingsError` on a value out of range and on a `PARCHGRAD_` variable that is no setting."""
        known = {PREFIX + item.name.upper(): item for item in fields(cls)}
        given = {name: text for name, text in environment.items() if name.startswith(PREFIX)}
        for name in given:
            if name not in known:
                # Without the prefix, by which all of them are near.
                nearest = difflib.get_close_matches(
                    name.removeprefix(PREFIX), [n.removeprefix(PREFIX) for n in known], 1
                )
                question = f"; did you mean {PREFIX}{nearest[0]}?" if nearest else ""
                raise SettingsError(name, given[name], f"one of the settings {', '.join(sorted(known))}{question}")
        return cls(**{known[name].name: _parse(name, text, known[name]) for name, text in given.items()})


def is_installed(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    return find_spec(package) is not None


def _parse(variable: str, text: str, item: Any) -> Any:
    rules = item.metadata
    if item.type is bool:
        try:
            return {"true": True, "1": True, "false": False, "0": False}[text]
        except KeyError:
            raise SettingsError(variable, text, "true, false, 1 or 0") from None
    if item.type is Path:
        if not text:
            raise SettingsError(variable, text, "a folder")
        return PROJECT_ROOT / text
    if item.type is str:
        if not re.fullmatch(rules["pattern"], text):
            raise SettingsError(variable, text, rules["allowed"])
        return text
    allowed = f"{'an integer' if item.type is int else 'a number'} from {rules['low']} to {rules['high']}"
    try:
        value = item.type(text)
    except ValueError:
        raise SettingsError(variable, text, allowed) from None
    if not rules["low"] <= value <= rules["high"]:
        raise SettingsError(variable, text, allowed)
    return value
