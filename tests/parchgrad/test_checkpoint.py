"""Checkpoints: a pass that is killed, interrupted or out of disk anywhere goes on, and counts every image once."""

import contextlib
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from parchgrad import checkpoint as checkpoint_module
from parchgrad.build import Local, Reader, Work, gather, note_of, subject_of
from parchgrad.checkpoint import Checkpoint
from parchgrad.errors import DataError, EvidenceError
from parchgrad.evidence import Evidence
from parchgrad.models import add_model, build_network, load_model
from parchgrad.preprocessing import Preprocessing
from parchgrad.sources import open_source
from parchgrad.statistics import ClassMoments

LABELS = ["cat", "dog", "tree", "bus"]
FACTORY = "tests.parchgrad.factories:small"
FILES = ("table.safetensors", "evidence.safetensors", "images.tsv.gz", "manifest.json")


@pytest.fixture(autouse=True)
def control_c():
    """A shell starts what runs in the background with Control-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    add_model(
        "net", architecture=FACTORY, weights=build_network(FACTORY, 4).state_dict(), labels=LABELS,
        preprocessing=Preprocessing(size=(12, 12), resize=14), models_dir=root,
    )  # fmt: skip
    return root


@pytest.fixture(scope="module")
def model(models):
    return load_model(models / "net")


def write_images(root, counts, size=(15, 16), seed=0):
    generator = np.random.default_rng(seed)
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = generator.integers(0, 200, 3) + generator.integers(0, 56, (*size, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{seed}-{i:03}.png", compress_level=1)
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = write_images(tmp_path_factory.mktemp("data"), {"cat": 9, "dog": 5, "bus": 7})
    (root / "dog" / "zz.png").write_bytes(b"no image")
    return root


def work_on(model, data, batch_size=4, **options):
    source = open_source(data, model)
    return Work(model, subject_of(model, **options), Reader(source, model.preprocessing, batch_size), note_of(source))


def gathered(work, path=None, max_bad=0.5, every=0.0, **options):
    checkpoint = Checkpoint(path, work.key(), every) if path else None
    return gather(work, Local(), max_bad=max_bad, checkpoint=checkpoint, **options)


def saved(evidence, path):
    evidence.save(path)
    return path.read_bytes()


@pytest.fixture
def whole(model, data, tmp_path):
    """The file of the uninterrupted pass."""
    return saved(gathered(work_on(model, data)), tmp_path / "whole")


# Interrupted anywhere


def interrupting(calls, monkeypatch, owner, name, *, at, after):
    """Control-C arrives in the `at`-th call of a function, before or after what it does."""
    function = getattr(owner, name)

    def interrupted(*arguments, **options):
        calls.append(name)
        mine = len(calls) == at
        if mine and not after:
            signal.raise_signal(signal.SIGINT)
        result = function(*arguments, **options)
        if mine and after:
            signal.raise_signal(signal.SIGINT)
        return result

    monkeypatch.setattr(owner, name, interrupted)


PLACES = {
    "moments": (ClassMoments, "update"),
    "sample": ("parchgrad.evidence._Sample", "observe"),
    "names": (Evidence, "_note"),
    "evidence": (Evidence, "observe"),
    "rows": (Evidence, "_rows"),
    "checkpoint": (Checkpoint, "save"),
    "file": ("parchgrad.checkpoint", "torch.from_numpy"),
    "network": ("parchgrad.build", "observed"),
    "readable": ("parchgrad.build", "_require_readable"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("at", [1, 3, 6])
def test_control_c_in_any_step_of_a_batch_costs_and_doubles_nothing(
    model, data, tmp_path, whole, monkeypatch, place, after, at
):
    owner, name = PLACES[place]
    if isinstance(owner, str):
        module, _, rest = owner.partition("._")
        owner = sys.modules[module]
        owner = getattr(owner, "_" + rest) if rest else owner
    if "." in name:
        first, name = name.split(".")
        owner = getattr(owner, first)
    work, path, calls = work_on(model, data), tmp_path / "unfinished", []
    monkeypatch.setattr(checkpoint_module, "SHARE_OF_TIME", 1e9)  # a file after each batch
    with monkeypatch.context() as patched:
        interrupting(calls, patched, owner, name, at=at, after=after)
        with contextlib.suppress(KeyboardInterrupt):
            gathered(work, path)
            raise AssertionError("nothing was interrupted")
    evidence, done = Checkpoint(path, work.key()).restore() or (None, np.zeros(6, bool))
    if evidence is not None:
        assert evidence.images + len(evidence.bad) == sum(len(work.reader.indices(n)) for n in np.flatnonzero(done))
        assert evidence.moments.count.sum() == evidence.images
    assert saved(gathered(work, path), tmp_path / "resumed") == whole


def test_control_c_within_a_batch_waits_for_its_end(model, data, tmp_path, monkeypatch):
    """So nothing is lost, however long ago the last file was written."""
    work, path, calls = work_on(model, data), tmp_path / "unfinished", []
    with monkeypatch.context() as patched:
        interrupting(calls, patched, ClassMoments, "update", at=3, after=False)
        with pytest.raises(KeyboardInterrupt):
            gathered(work, path, every=3600.0)
    evidence, done = Checkpoint(path, work.key()).restore()
    assert (evidence.images, done.tolist()) == (12, [True] * 3 + [False] * 3)


def test_the_callers_signal_handlers_are_put_back(model, data):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    gathered(work_on(model, data))
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_a_pass_runs_in_another_thread_too(model, data, tmp_path, whole):
    """Signals are the main thread's alone; setting a handler elsewhere is an error."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        evidence = pool.submit(gathered, work_on(model, data), tmp_path / "unfinished").result()
    assert saved(evidence, tmp_path / "e") == whole


@pytest.mark.parametrize("stop", range(1, 7))
@pytest.mark.parametrize("where", ["engine", "evidence"])
def test_an_error_in_any_batch_goes_on_from_the_whole_batches_before(
    model, data, tmp_path, whole, monkeypatch, stop, where
):
    """A worker process that dies; or an error halfway through a batch, whose traces no checkpoint may hold."""
    work, path, calls = work_on(model, data), tmp_path / "unfinished", []
    name = "observed" if where == "engine" else "observe"
    owner = sys.modules["parchgrad.build"] if where == "engine" else sys.modules["parchgrad.evidence"]._Sample
    function = getattr(owner, name)

    def failing(*arguments):
        calls.append(name)
        if len(calls) == stop:
            raise RuntimeError("a worker died")
        return function(*arguments)

    monkeypatch.setattr(checkpoint_module, "SHARE_OF_TIME", 1e9)  # a file after each batch
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, failing)
        with pytest.raises(RuntimeError, match="a worker died"):
            gathered(work, path, every=0.0 if where == "evidence" else 3600.0)
    restored = Checkpoint(path, work.key()).restore()
    assert (0 if restored is None else restored[1].sum()) == stop - 1
    seen = []
    assert saved(gathered(work, path, progress=seen.append), tmp_path / "resumed") == whole
    assert seen[0].done == 4 * (stop - 1)
    assert seen[-1].done == seen[-1].total == 22


def test_a_finished_pass_takes_no_image_again(model, data, tmp_path, whole, monkeypatch):
    work, path = work_on(model, data), tmp_path / "unfinished"
    monkeypatch.setattr(checkpoint_module, "SHARE_OF_TIME", 1e9)
    gathered(work, path)
    with monkeypatch.context() as patched:
        patched.setattr(Reader, "__getitem__", lambda self, number: pytest.fail("an image was read again"))
        assert saved(gathered(work, path), tmp_path / "again") == whole


def test_too_many_bad_images_stop_the_pass_which_goes_on_with_more_allowed(model, data, tmp_path, whole):
    work, path = work_on(model, data), tmp_path / "unfinished"
    with pytest.raises(DataError, match=r"1 of 22 images cannot be read, more than the 1.00% allowed. Image 'dog/zz"):
        gathered(work, path, max_bad=0.01)
    assert path.is_file()
    assert saved(gathered(work, path), tmp_path / "resumed") == whole


# Refusals


def changed(model, data, tmp_path):
    """Works that differ from the first in one thing each."""
    more = write_images(tmp_path / "more", {"cat": 9, "dog": 5, "bus": 8})
    fewer = open_source(data, model).take(np.arange(21))
    import dataclasses

    squeezed = dataclasses.replace(model, preprocessing=Preprocessing(size=(12, 12), rule="stretch"))
    plain = work_on(model, data)
    return {
        "data": work_on(model, more),
        "a part of the data": dataclasses.replace(plain, reader=dataclasses.replace(plain.reader, source=fewer)),
        "batch size": work_on(model, data, batch_size=5),
        "seed": work_on(model, data, seed=1),
        "layers": work_on(model, data, layers=("second",)),
        "statistics point": work_on(model, data, statistics_point="activation"),
        "no normality": work_on(model, data, normality=False),
        "preprocessing": work_on(squeezed, data),
        "known images": dataclasses.replace(plain, reader=dataclasses.replace(plain.reader, known=frozenset({b"1"}))),
        "another version of the model": work_on(dataclasses.replace(model, version="2"), data),
        "other weights": work_on(dataclasses.replace(model, weights_sha256="00"), data),
    }


def test_a_checkpoint_of_other_work_is_refused_with_the_way_out(model, data, tmp_path):
    path = tmp_path / "unfinished"
    work = work_on(model, data)
    Checkpoint(path, work.key()).save(Evidence(work.subject, (0, 1, 3)), np.zeros(6, bool))
    before = path.read_bytes()
    works = changed(model, data, tmp_path)
    assert len({w.key() for w in works.values()} | {work.key()}) == len(works) + 1
    for what, other in works.items():
        with pytest.raises(EvidenceError, match=r"of other images or with other options; .* --restart\.$"):
            gathered(other, path)
        assert path.read_bytes() == before, what
    assert work_on(model, data).key() == work.key()


def test_a_model_that_is_not_the_subjects_is_refused_before_any_image_is_read(model, data, monkeypatch):
    """As where a table is extended, and its model's folder holds something else by now."""
    import dataclasses

    monkeypatch.setattr(Reader, "__getitem__", lambda self, number: pytest.fail("an image was read"))
    work = work_on(model, data)
    for what, value in {
        "weights_sha256": "00",
        "labels": ("cat", "dog", "tree", "tram"),
        "preprocessing": Preprocessing(size=(12, 12), rule="stretch"),
    }.items():
        other = dataclasses.replace(work, model=dataclasses.replace(model, **{what: value}))
        with pytest.raises(EvidenceError, match=what):
            gathered(other)


def test_a_damaged_checkpoint_is_refused_with_the_way_out(model, data, tmp_path):
    path, work = tmp_path / "unfinished", work_on(model, data)
    Checkpoint(path, work.key()).save(Evidence(work.subject, (0, 1, 3)), np.zeros(6, bool))
    whole = path.read_bytes()
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["evidence"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no mapping
    older, undone = tmp_path / "older", tmp_path / "undone"
    save_file(tensors, older, {"evidence": json.dumps({**header, "format_version": 0})})
    del tensors["done"]
    save_file(tensors, undone, {"evidence": json.dumps(header)})
    for damaged in (b"", whole[:100], whole[:-1], b"x" * 400, older.read_bytes(), undone.read_bytes()):
        path.write_bytes(damaged)
        with pytest.raises(EvidenceError, match=r"unfinished' .*--restart") as found:
            gathered(work, path)
        assert "\n" not in str(found.value)
    Checkpoint(path, work.key()).clear()
    assert Checkpoint(path, work.key()).restore() is None


# Writing


def test_a_full_disk_leaves_the_checkpoint_before(model, data, tmp_path, whole, monkeypatch):
    work, path = work_on(model, data), tmp_path / "unfinished"
    written = []

    def full(*arguments, **options):
        written.append(path.read_bytes() if path.is_file() else None)
        if len(written) >= 3:
            Path(arguments[1]).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return save_file(*arguments, **options)

    monkeypatch.setattr(checkpoint_module, "SHARE_OF_TIME", 1e9)
    with monkeypatch.context() as patched:
        patched.setattr("safetensors.torch.save_file", full)
        with pytest.raises(OSError, match="No space left on device"):
            gathered(work, path)
    assert path.read_bytes() == written[-1]
    assert sorted(os.listdir(tmp_path)) == ["unfinished", "whole"]
    assert saved(gathered(work, path), tmp_path / "resumed") == whole


def test_files_are_written_no_more_often_than_asked_nor_than_their_cost_allows(tmp_path, monkeypatch, model, data):
    now, cost, writes = [0.0], [0.1], []

    def slow(self, path, *rest):
        now[0] += cost[0]
        writes.append(now[0])

    monkeypatch.setattr(checkpoint_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(Evidence, "save", slow)
    work = work_on(model, data)
    evidence, done = Evidence(work.subject, (0,)), np.zeros(1, bool)
    checkpoint = Checkpoint(tmp_path / "c", "key", every=10.0)
    for _ in range(1000):
        now[0] += 0.5
        checkpoint.save_if_due(evidence, done)
    assert min(np.diff(writes)) >= 9.9
    assert len(writes) > 40
    cost[0], begun = 5.0, len(writes)
    for _ in range(1000):
        now[0] += 0.5
        checkpoint.save_if_due(evidence, done)
    assert min(np.diff(writes[begun:])) >= 5.0 / checkpoint_module.SHARE_OF_TIME


# Killed

# Imports once, then forks: each line it is given is the arguments of one `parchgrad` command, run in a process of its
# own; it answers with that process's number and, when it has ended, with its exit status.
NURSERY = """
import json, os, signal, sys
import torch
import parchgrad.checkpoint, parchgrad.cli.table_build, parchgrad.build, parchgrad.store, parchgrad.sources.folder
torch.set_num_threads(1)
parchgrad.checkpoint.SHARE_OF_TIME = 0.5  # short builds, so that many files are written in them
signal.signal(signal.SIGINT, signal.default_int_handler)

def observed(network, batch, observed=parchgrad.build.observed):
    print("batch", batch.number, flush=True)
    return observed(network, batch)

parchgrad.build.observed = observed
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        order = json.loads(line)
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(log, stream)
        sys.argv = ["parchgrad", *order["arguments"]]
        from parchgrad.cli import main
        try:
            main()
        except SystemExit as end:
            code = end.code
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Nursery:
    """Commands in processes of their own, without the seconds that importing takes each time."""

    def __init__(self, log):
        self.log = log
        self._process = subprocess.Popen(
            [sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=Path(__file__).parents[2], env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def start(self, *arguments):
        self.log.unlink(missing_ok=True)
        print(json.dumps({"arguments": [str(a) for a in arguments], "log": str(self.log)}), file=self._process.stdin,
              flush=True)  # fmt: skip
        return psutil.Process(int(self._process.stdout.readline()))

    def ended(self):
        """Exit status of the command: waits for its end."""
        return int(self._process.stdout.readline())

    def run(self, *arguments):
        self.start(*arguments)
        return self.ended()

    def close(self):
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    made = Nursery(tmp_path_factory.mktemp("nursery") / "log")
    yield made
    made.close()


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Images large enough that reading them takes longer than starting: kills fall in the work."""
    root = write_images(tmp_path_factory.mktemp("many"), {"cat": 70, "dog": 50, "bus": 60}, size=(400, 500), seed=1)
    (root / "dog" / "zz.png").write_bytes(b"no image")
    return root


BATCHES = 46  # of four images


def build(models, data, tables, *more):
    where = ("--models-dir", models, "--tables-dir", tables)
    options = ("--batch-size", 4, "--checkpoint-every", 0, "--max-bad", 0.02, "--device", "cpu", "--force")
    return ("table", "build", "net", "--data", data, *options, *where, *more)


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()} if folder.is_dir() else None


def state_of(path):
    """Changes whenever the file is replaced."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def wait_until(condition, process):
    """Until it holds (True), or the process has ended (False)."""
    while not condition():
        if not alive(process):
            return False
        time.sleep(0.002)
    return True


def alive(process):
    try:
        return process.is_running() and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def killed(nursery, process, helpers):
    """Kills it, and notes its worker processes; whether it was not too late."""
    with contextlib.suppress(psutil.NoSuchProcess):
        helpers += process.children(recursive=True)
        process.send_signal(signal.SIGKILL)
    return nursery.ended() == -signal.SIGKILL


def done_in(path):
    with safe_open(path, framework="pt") as file:
        return int(file.get_tensor("done").sum())


def staged(folder):
    """What a killed process had begun to write beside the table's folder."""
    return [path for path in folder.parent.glob(f".{folder.name}.*.new") if path.is_dir()]


@pytest.fixture(scope="module")
def expected(models, many, nursery, tmp_path_factory):
    """The table of one uninterrupted build."""
    root = tmp_path_factory.mktemp("whole")
    assert nursery.run(*build(models, many, root, "--workers", 0)) == 0, nursery.log.read_text()
    return {name: contents(root / "net" / "1")[name] for name in FILES}


@pytest.mark.parametrize("workers", [1, 0])
def test_killed_at_random_points_the_build_goes_on_and_counts_every_image_once(
    models, many, nursery, expected, tmp_path, workers
):
    """Ten kills within the pass, in each of the two ways to read, and more while the table is made and written."""
    chance = random.Random(workers)
    folder = tmp_path / "tables" / "net" / "1"
    unfinished = folder.with_name(".1.unfinished.safetensors")
    command = build(models, many, tmp_path / "tables", "--workers", workers)
    # What stood there before is of other options, so of other bytes.
    assert nursery.run(*build(models, many, tmp_path / "tables", "--workers", 0, "--seed", 7, "--no-normality")) == 0
    standing = contents(folder)
    helpers, progress, finishing = [], [], 0
    while len(progress) < 10 or finishing < 4:
        before, was = staged(folder), state_of(unfinished)
        process = nursery.start(*command)
        if len(progress) < 10:
            reached = wait_until(lambda was=was: state_of(unfinished) != was, process)
            time.sleep(chance.uniform(0, 0.12) if reached else 0)
        else:
            reached = wait_until(lambda before=before: set(staged(folder)) - set(before), process)
            time.sleep(chance.uniform(0, 0.03) if reached else 0)
        in_time = killed(nursery, process, helpers)
        if in_time and set(staged(folder)) - set(before):
            finishing += 1
        elif in_time and unfinished.exists() and (count := done_in(unfinished)) < BATCHES:
            progress.append(count)
        found = contents(folder)
        if found != standing:
            assert {name: found[name] for name in FILES} == expected, "the old table or the new one, never half a one"
            standing = found
    assert nursery.run(*command) == 0, nursery.log.read_text()
    found = contents(folder)
    for name in FILES:
        assert found[name] == expected[name], name
    assert [path.name for path in folder.parent.iterdir()] == ["1"]
    assert len(set(progress)) > 5, "the kills were at many points"
    _, left = psutil.wait_procs([process for process in helpers if alive(process)], timeout=60)
    assert not [process for process in left if alive(process)], "a worker process outlived its parent"


# Interrupted by a signal


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("whom", ["process", "group"])
def test_a_signal_ends_the_build_in_order(models, many, nursery, expected, tmp_path, workers, number, whom):
    """Control-C reaches every process of a terminal, and a service manager's SIGTERM every process of a service."""
    command = build(models, many, tmp_path, "--workers", workers, "--checkpoint-every", 3600)
    unfinished = tmp_path / "net" / ".1.unfinished.safetensors"
    process = nursery.start(*command)
    assert wait_until(lambda: nursery.log.exists() and b"batch 7" in nursery.log.read_bytes(), process)
    helpers = process.children(recursive=True)
    assert len(helpers) >= workers
    if whom == "group":
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    assert nursery.ended() == 130, nursery.log.read_text()
    said = nursery.log.read_text()
    assert f"Interrupted; '{unfinished}' keeps what is done, the same command goes on from there.\n" in said
    # A worker that the signal ended may make its loader complain while that is thrown away, to no effect.
    assert "Traceback" not in said or (whom, number, workers) == ("group", signal.SIGTERM, 1)
    assert 7 <= done_in(unfinished) < BATCHES
    _, left = psutil.wait_procs(helpers, timeout=60)
    assert not [helper for helper in left if alive(helper)]
    count = done_in(unfinished)
    assert nursery.run(*command) == 0
    assert f"Going on after {4 * count} of 181 images." in nursery.log.read_text()
    found = contents(tmp_path / "net" / "1")
    assert {name: found[name] for name in FILES} == expected
    assert [path.name for path in (tmp_path / "net").iterdir()] == ["1"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_while_the_table_is_written_leaves_no_scraps(models, many, nursery, expected, tmp_path, number):
    command = build(models, many, tmp_path, "--workers", 0)
    folder = tmp_path / "net" / "1"
    process = nursery.start(*command)
    assert wait_until(lambda: staged(folder), process)
    process.send_signal(number)
    code = nursery.ended()
    said = nursery.log.read_text()
    if not folder.exists():  # else it was too late
        assert (code, said.count("Interrupted; ")) == (130, 1), said
        assert [path.name for path in folder.parent.iterdir()] == [".1.unfinished.safetensors"]
    if code:
        assert nursery.run(*command) == 0
    found = contents(folder)
    assert {name: found[name] for name in FILES} == expected
    assert [path.name for path in folder.parent.iterdir()] == ["1"]
