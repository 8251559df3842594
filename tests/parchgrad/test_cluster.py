"""The Ray engine: whatever the workers and whatever becomes of them, the evidence of the local pass to the last bit."""

import dataclasses
import hashlib
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import nn

from parchgrad import cluster
from parchgrad.build import Local, Reader, Work, gather, note_of, subject_of
from parchgrad.checkpoint import Checkpoint
from parchgrad.cluster import Ray, fan_in, units_of
from parchgrad.defaults import Defaults
from parchgrad.errors import ClusterError, OptionError, ParchGradError, UnsupportedModelError
from parchgrad.evidence import Evidence
from parchgrad.models import Model
from parchgrad.preprocessing import Preprocessing
from parchgrad.sources import ParquetImages, open_source
from tests.parchgrad.factories import Small

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install parchgrad[ray]")
pytest.importorskip("ray.data", reason="Ray Data is not installed: pip install parchgrad[ray]")

# Ray's own: it sets options of its own that it has deprecated, and leaves files and processes to the interpreter.
pytestmark = [
    pytest.mark.filterwarnings(r"ignore:`\w+` is deprecated:DeprecationWarning"),
]

CLASSES = ("cat", "dog", "tree", "bus")
BATCH_SIZE = 2


class Watched(Small):
    """Leaves the number of each process that runs it in `folder`, and does what files there say.

    'wait n': it waits until n processes have come; 'do x': it does that, once, amid the work.
    """

    def __init__(self, folder):
        super().__init__(len(CLASSES), 6)
        self.folder = str(folder)
        self.passes = 0

    def forward(self, images):
        folder = Path(self.folder)
        (folder / f"pid {os.getpid()}").touch()
        self.passes += 1
        for together in folder.glob("wait *"):
            while len(list(folder.glob("pid *"))) < int(together.name.split()[1]):
                time.sleep(0.02)
        for order in folder.glob("do *"):
            if self.passes >= 3 and taken(order):
                act(order.name)
        return super().forward(images)


def taken(order):
    """Whether this process is the one that carries out an order."""
    try:
        order.unlink()
    except FileNotFoundError:
        return False
    return True


def act(order):
    if order == "do die":
        os.kill(os.getpid(), signal.SIGKILL)
    if order == "do refuse":
        raise UnsupportedModelError("Layer 'second' cannot be explained, expected another.")
    if order == "do fail":
        raise RuntimeError("no such kernel")
    if order == "do strange":
        raise StrangeError("the abacus", "made of wood")
    if order == "do decline":
        raise OptionError("device", "abacus", "cpu or cuda")


class StrangeError(ParchGradError):
    """An error that pickles and cannot be made again from it."""

    def __init__(self, thing, found):
        super().__init__(f"Strange that {thing} is {found}.")


@pytest.fixture(scope="module")
def running():
    """A cluster on this machine for all tests; a GPU of it is made up."""
    handler = signal.getsignal(signal.SIGTERM)
    ray.init("local", num_cpus=4, num_gpus=1, include_dashboard=False, object_store_memory=200 << 20,
             log_to_driver=False, logging_level="ERROR")  # fmt: skip
    signal.signal(signal.SIGTERM, handler)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three of the four classes; batches of two hold images of two classes now and then."""
    root = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for name, count in (("cat", 15), ("tree", 20), ("bus", 9)):
        (root / name).mkdir()
        for i in range(count):
            pixels = generator.integers(0, 200, 3) + generator.integers(0, 56, (14 + i % 2, 15, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i:02}.png")
    return root


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    (tmp_path / "watched").mkdir()
    module = Watched(tmp_path / "watched").eval().requires_grad_(False)
    return Model(
        name="net", version="1", architecture="none", weights_sha256="", labels=CLASSES, class_ids=(),
        preprocessing=Preprocessing(size=(12, 12), resize=14), module=module, folder=Path(),
    )  # fmt: skip


def work_on(model, source):
    """A pass whose sample for the normality test does not hold all images."""
    subject = dataclasses.replace(subject_of(model), sample_images=12)
    return Work(model, subject, Reader(source, model.preprocessing, BATCH_SIZE), note_of(source))


@pytest.fixture
def work(model, data):
    made = work_on(model, open_source(data, model))
    for mark in Path(model.module.folder).iterdir():
        mark.unlink()  # of finding the layers
    return made


def order(work, what):
    (Path(work.model.module.folder) / what).touch()


def processes(work):
    return {int(mark.name.split()[1]) for mark in Path(work.model.module.folder).glob("pid *")}


def digest(evidence, folder):
    """sha256 of all that is in the evidence's file, and of every number of its table."""
    evidence.save(folder / "evidence.safetensors")
    held, numbers = hashlib.sha256(), hashlib.sha256()
    with safe_open(folder / "evidence.safetensors", framework="np") as file:
        # Not of the file's bytes: safetensors writes what describes the tensors in any order.
        held.update(repr(sorted(file.metadata().items())).encode())
        for key in sorted(file.keys()):
            held.update(file.get_tensor(key).tobytes())
    for layer in evidence.table(Defaults()).layers.values():
        for value in (layer.log_p, layer.rank, layer.mean, layer.std, layer.normality_p):
            numbers.update(np.ascontiguousarray(value).tobytes())
    return held.hexdigest(), numbers.hexdigest()


@pytest.fixture
def expected(work, tmp_path):
    """Of the local pass."""
    found = digest(gather(work, Local()), tmp_path)
    for mark in Path(work.model.module.folder).iterdir():
        mark.unlink()
    return found


# Units


@pytest.mark.parametrize(("images", "takers"), [(44, 1), (44, 3), (5000, 2), (100_000, 1)])
def test_units_hold_every_batch_once_in_order_and_are_enough_for_all(work, images, takers):
    source = work.reader.source.take(np.resize(np.arange(44), images))
    reader = dataclasses.replace(work.reader, source=source)
    batches = np.delete(np.arange(len(reader)), [1, 5])
    units = units_of(reader, batches, takers)
    assert [number for unit in units for number in unit] == batches.tolist()
    lengths = [len(unit) for unit in units]
    assert max(lengths) <= cluster.UNIT_BATCHES
    assert len(units) >= min(len(batches), takers * cluster.UNITS_PER_WORKER)
    assert set(lengths[:-1]) <= {lengths[0]}


def test_units_begin_where_a_run_does_or_are_as_long_as_may_be(work):
    class Grouped:
        run_starts = np.array([0, 7, 20, 21, 90, 400])

        def __len__(self):
            return 500

    reader = dataclasses.replace(work.reader, source=Grouped())
    units = units_of(reader, np.arange(len(reader)), 1000)
    # Batches of two: those that hold a run's start are 0, 3, 10 (twice), 45 and 200.
    assert [unit[0] for unit in units] == [0, 3, 10, 45, 109, 173, 200]
    assert [number for unit in units for number in unit] == list(range(250))


def test_few_units_go_to_the_caller_as_they_are_and_many_are_added_up():
    assert [fan_in(n) for n in (1, cluster.PIECES, cluster.PIECES + 1, 10 * cluster.PIECES)] == [1, 1, 2, 10]
    assert fan_in(10**6) == cluster.MAX_FAN_IN


# The same evidence


@pytest.mark.parametrize(("workers", "together"), [(1, 1), (2, 5), (4, 3)])
def test_evidence_and_table_are_the_local_ones(running, work, expected, tmp_path, monkeypatch, workers, together):
    monkeypatch.setattr(cluster, "PIECES", -(-22 // together))
    order(work, f"wait {workers}")
    seen = []
    evidence = gather(work, Ray(workers), progress=seen.append)
    assert digest(evidence, tmp_path) == expected
    assert len(processes(work)) == workers
    assert os.getpid() not in processes(work)
    assert len(seen) - 1 == -(-22 // together)
    assert (seen[-1].done, seen[-1].total, seen[-1].classes) == (44, 44, 3)


def test_a_worker_killed_in_the_middle_changes_nothing(running, work, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "UNITS_PER_WORKER", 2)  # units of five batches: the third pass is amid one
    assert {len(unit) for unit in units_of(work.reader, np.arange(22), 2)} == {5, 2}
    order(work, "wait 2")
    order(work, "do die")
    evidence = gather(work, Ray(2))
    assert not list(Path(work.model.module.folder).glob("do *"))
    assert len(processes(work)) >= 2
    assert evidence.images == 44
    assert digest(evidence, tmp_path) == expected


def test_parquet_read_by_a_worker_of_several_threads_gives_what_the_files_give(
    running, work, expected, model, data, tmp_path, monkeypatch
):
    monkeypatch.setattr(Ray, "_room", lambda self: cluster._Room(workers=1, threads=3))
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    files = [path for name in ("cat", "tree", "bus") for path in sorted((data / name).iterdir())]
    columns = {"image": [path.read_bytes() for path in files], "label": [path.parent.name for path in files]}
    parquet.write_table(pa.table(columns), tmp_path / "images.parquet", row_group_size=7)
    source = open_source(tmp_path / "images.parquet", model)
    source.__class__ = OfOneThread
    rows = work_on(model, source)
    local, far = gather(rows, Local()), gather(rows, Ray())
    assert digest(far, tmp_path) == digest(local, tmp_path)
    assert digest(far, tmp_path)[1] == expected[1]
    assert len(processes(rows)) == 2  # this one and the worker


class OfOneThread(ParquetImages):
    """Holds its users to it; a copy may have another thread."""

    thread = None

    def read(self, indices):
        self.thread = self.thread or threading.get_ident()
        if self.thread != threading.get_ident():
            raise RuntimeError("A second thread reads from a source.")
        return super().read(indices)


def test_unreadable_images_are_counted(running, model, data, tmp_path):
    copied = tmp_path / "copied"
    for path in data.rglob("*.png"):
        (copied / path.parent.name).mkdir(parents=True, exist_ok=True)
        (copied / path.parent.name / path.name).write_bytes(path.read_bytes())
    (copied / "cat" / "03.png").write_bytes(b"no image")
    (copied / "bus" / "00.png").write_bytes(b"")
    work = work_on(model, open_source(copied, model))
    local, far = gather(work, Local(), max_bad=0.1), gather(work, Ray(1), max_bad=0.1)
    assert [name for name, _ in far.bad] == ["bus/00.png", "cat/03.png"]
    assert digest(far, tmp_path) == digest(local, tmp_path)


# Interruptions


@pytest.mark.parametrize(("first", "second"), [(Ray(1), Local()), (Local(), Ray(1))])
def test_what_one_engine_left_another_goes_on_with(running, work, expected, tmp_path, first, second):
    def interrupt(now):
        if now.done >= 10:
            raise KeyboardInterrupt

    checkpoint = Checkpoint(tmp_path / "unfinished", work.key(), every=1e9)
    with pytest.raises(KeyboardInterrupt):
        gather(work, first, checkpoint=checkpoint, progress=interrupt)
    done = Evidence.load(tmp_path / "unfinished")[0].images
    assert 10 <= done < 44
    seen = []
    evidence = gather(work, second, checkpoint=checkpoint, progress=seen.append)
    assert seen[0].done == done
    assert digest(evidence, tmp_path) == expected


def test_nothing_left_to_do_starts_nothing(work):
    assert list(Ray(1, address="127.0.0.1:1").observe(work, np.empty(0, np.int64))) == []


# Errors


def test_what_a_worker_raises_reaches_the_caller_as_it_is(running, work, monkeypatch):
    monkeypatch.setattr(cluster, "PIECES", 4)  # through the tasks that add up
    order(work, "do refuse")
    with pytest.raises(UnsupportedModelError) as refused:
        gather(work, Ray(1))
    assert str(refused.value) == "Layer 'second' cannot be explained, expected another."


def test_an_error_of_another_kind_keeps_its_place(running, work):
    order(work, "do fail")
    with pytest.raises(RuntimeError, match=r"^no such kernel") as failed:
        gather(work, Ray(1))
    assert "in act" in failed.value.__notes__[0]


def test_an_error_that_cannot_travel_keeps_its_sentence(running, work):
    order(work, "do strange")
    with pytest.raises(ClusterError, match=r"^Strange that the abacus is made of wood\.$"):
        gather(work, Ray(1))


def test_a_refused_option_comes_as_one(running, work):
    order(work, "do decline")
    with pytest.raises(OptionError) as failed:
        gather(work, Ray(1))
    assert (failed.value.option, failed.value.value, failed.value.allowed) == ("device", "abacus", "cpu or cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="This machine has a GPU; the test is of one that has none.")
def test_a_worker_without_its_gpu_says_so(running, work):
    with pytest.raises(OptionError, match="Option 'device' is 'cuda'"):
        gather(work, Ray(1, gpus_per_worker=1.0))


def test_a_model_that_cannot_be_loaded_there_is_an_error(running, work):
    module = nn.Sequential(work.model.module)
    module.unknown = Lost()
    lost = dataclasses.replace(work, model=dataclasses.replace(work.model, module=module))
    with pytest.raises(ClusterError, match=r"A worker cannot load the model.*a_module_of_another_machine"):
        gather(lost, Ray(1))


class Lost:
    """Comes out of a pickle only where a module is that is nowhere."""

    def __reduce__(self):
        return __import__, ("a_module_of_another_machine",)


def test_a_cluster_without_room_is_an_error(running, work, monkeypatch):
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"memory": 1.0}}])
    with pytest.raises(ClusterError, match="The cluster has no CPU for a worker, expected at least 1"):
        gather(work, Ray(1))
    with pytest.raises(ClusterError, match=r"The cluster has 0 GPUs, expected 0\.5 for a worker"):
        gather(work, Ray(1, gpus_per_worker=0.5))


@pytest.mark.parametrize(
    ("nodes", "engine", "workers", "threads"),
    [
        ([{"CPU": 8.0}, {"CPU": 4.0}], Ray(), 12, 1),
        ([{"CPU": 8.0}], Ray(3), 3, 1),
        ([{"CPU": 16.0, "GPU": 2.0}, {"CPU": 64.0}], Ray(gpus_per_worker=1), 2, 8),
        ([{"CPU": 16.0, "GPU": 2.0}, {"CPU": 3.0, "GPU": 1.0}], Ray(gpus_per_worker=0.5), 6, 1),
        ([{"CPU": 96.0, "GPU": 1.0}], Ray(gpus_per_worker=1), 1, 16),
    ],
)
def test_workers_are_as_many_as_there_is_room_for(monkeypatch, nodes, engine, workers, threads):
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": node} for node in nodes])
    assert engine._room() == cluster._Room(workers, threads)


@pytest.mark.parametrize("wrong", [{"workers": 0}, {"gpus_per_worker": -1.0}, {"gpus_per_worker": 2.0}])
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(OptionError):
        Ray(**wrong)


def test_without_ray_the_extra_is_named(work, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(ClusterError, match=r"pip install parchgrad\[ray\]"):
        gather(work, Ray(1))


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_cluster_that_nobody_serves_is_an_error(work, monkeypatch, scheme):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"{scheme}127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(ClusterError, match=f"^The cluster at '{address}' cannot be reached: "):
            gather(work, Ray(1, address=address))


def test_a_port_where_no_cluster_answers_is_an_error(work, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster, "JOIN_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        with pytest.raises(
            ClusterError, match=f"^The cluster at '{address}' cannot be reached: no answer within 0.5 s"
        ):
            gather(work, Ray(1, address=address))


@pytest.mark.parametrize("address", ["somewhere", "host:port", "ray://"])
def test_an_address_that_is_none_is_an_error(work, monkeypatch, address):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(ClusterError, match="expected 'auto', 'host:port' or 'ray://host:port'"):
        gather(work, Ray(1, address=address))


# Whose cluster


OWN = """
import json, pickle, signal, sys
import ray
from pathlib import Path
from parchgrad.build import gather
from parchgrad.cluster import Ray
from tests.parchgrad.test_cluster import digest

def handler(number, frame): pass
signal.signal(signal.SIGTERM, handler)
work = pickle.loads(Path(sys.argv[1], "work").read_bytes())
found = []
for address in (sys.argv[2], None):
    clusters = set()
    look = lambda now: ray.is_initialized() and clusters.add(ray.get_runtime_context().gcs_address)
    evidence = gather(work, Ray(1, address=address), progress=look)
    own = signal.getsignal(signal.SIGTERM) is handler
    found.append([digest(evidence, Path(sys.argv[1])), ray.is_initialized(), own, sorted(clusters)])
print(json.dumps(found))
"""


def test_a_cluster_is_joined_or_started_and_left_as_it_was(running, work, expected, tmp_path):
    (tmp_path / "work").write_bytes(pickle.dumps(work))
    done = subprocess.run(
        [sys.executable, "-c", OWN, str(tmp_path), running], capture_output=True, text=True, check=True,
        env={**os.environ, "RAY_ADDRESS": "127.0.0.1:1", "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    joined, started = json.loads(done.stdout)
    assert joined == [list(expected), False, True, [running]]
    assert started[:3] == [list(expected), False, True]
    assert len(started[3]) == 1
    assert started[3] != [running]
    assert ray.nodes()[0]["Alive"]
