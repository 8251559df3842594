"""Files and folders written whole or not at all: whatever happens in between, the old one stands, and no scraps."""

import errno
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from parchgrad import files
from parchgrad.files import copy_or_link, new_folder, write_tensors, write_text

EXCHANGES = pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "renames"])


@pytest.fixture(autouse=True)
def control_c():
    """A shell starts what runs in the background with Control-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def exchange_or_not(monkeypatch):
    """Called with False: as on a system that cannot exchange two paths."""

    def choose(exchange):
        if not exchange:
            monkeypatch.setattr(files, "_exchange", lambda one, other: False)

    return choose


def tree(folder):
    """{relative path: bytes} of every file, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def fill(folder, text, names=("a.txt", "deep/b.txt")):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text + name)


@EXCHANGES
def test_a_new_folder_takes_the_old_ones_place(tmp_path, exchange, exchange_or_not):
    exchange_or_not(exchange)
    fill(tmp_path / "table", "old", ["a.txt", "gone.txt"])
    with new_folder(tmp_path / "table") as staged:
        fill(staged, "new")
        assert tree(tmp_path / "table") == {"a.txt": b"olda.txt", "gone.txt": b"oldgone.txt"}
    assert tree(tmp_path / "table") == {"a.txt": b"newa.txt", "deep/b.txt": b"newdeep/b.txt"}
    assert os.listdir(tmp_path) == ["table"]


def test_this_system_exchanges(tmp_path):
    """Otherwise the tests of the exchange would test the renames twice."""
    fill(tmp_path / "one", "1")
    fill(tmp_path / "other", "2")
    if not files._exchange(tmp_path / "one", tmp_path / "other"):
        pytest.skip("this system or file system cannot exchange two paths")
    assert (tmp_path / "one" / "a.txt").read_text() == "2a.txt"
    assert not files._exchange(tmp_path / "one", tmp_path / "absent")


def test_a_place_that_was_empty_is_filled_and_its_parents_made(tmp_path):
    with new_folder(tmp_path / "deep" / "er" / "table") as staged:
        fill(staged, "new")
        assert not (tmp_path / "deep" / "er" / "table").exists()
    assert tree(tmp_path / "deep" / "er") == {"table/a.txt": b"newa.txt", "table/deep/b.txt": b"newdeep/b.txt"}
    assert os.listdir(tmp_path / "deep" / "er") == ["table"]


@EXCHANGES
@pytest.mark.parametrize("before", [True, False], ids=["replaced", "new"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=str)
def test_an_error_in_the_block_changes_nothing(tmp_path, exchange, exchange_or_not, before, error):
    exchange_or_not(exchange)
    if before:
        fill(tmp_path / "table", "old")
    was = tree(tmp_path)
    with pytest.raises(type(error)), new_folder(tmp_path / "table") as staged:  # noqa: PT012  # the block is the test
        fill(staged, "half", ["a.txt"])
        raise error
    assert tree(tmp_path) == was
    assert os.listdir(tmp_path) == (["table"] if before else [])


@EXCHANGES
def test_a_crash_in_the_block_leaves_the_old_folder(tmp_path, exchange, exchange_or_not):
    """The process ends there; what it had begun lies beside under a hidden name, and the next one is not hindered."""
    exchange_or_not(exchange)
    fill(tmp_path / "table", "old")
    was = tree(tmp_path / "table")
    child = os.fork()
    if child == 0:
        with new_folder(tmp_path / "table") as staged:
            fill(staged, "half", ["a.txt"])
            os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert tree(tmp_path / "table") == was
    assert all(name == "table" or name.startswith(".table.") for name in os.listdir(tmp_path))
    with new_folder(tmp_path / "table") as staged:
        fill(staged, "new")
    assert tree(tmp_path / "table") == {"a.txt": b"newa.txt", "deep/b.txt": b"newdeep/b.txt"}


@pytest.mark.parametrize("step", ["before", "between", "after"])
@pytest.mark.parametrize("kind", ["error", "interrupt"])
def test_without_the_exchange_a_failed_rename_puts_the_old_folder_back(
    tmp_path, monkeypatch, exchange_or_not, step, kind
):
    """An error or Control-C before the first rename, between the two and after the second."""
    exchange_or_not(False)
    fill(tmp_path / "table", "old")
    rename, calls = type(tmp_path).rename, []

    def failing(self, target):
        calls.append(self.name)
        at = len(calls)
        if (step, at) in (("before", 1), ("between", 2)):
            fail()
        rename(self, target)
        if (step, at) == ("after", 2):
            fail()

    def fail():
        if kind == "interrupt":
            signal.raise_signal(signal.SIGINT)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(type(tmp_path), "rename", failing)
    with pytest.raises((OSError, KeyboardInterrupt)), new_folder(tmp_path / "table") as staged:
        fill(staged, "new")
    there = b"newa.txt" if step == "after" else b"olda.txt"
    assert (tmp_path / "table" / "a.txt").read_bytes() == there
    assert os.listdir(tmp_path) == ["table"]


def test_an_interrupt_right_after_the_first_rename_puts_the_old_folder_back(tmp_path, monkeypatch, exchange_or_not):
    exchange_or_not(False)
    fill(tmp_path / "table", "old")
    rename, calls = type(tmp_path).rename, []

    def interrupted(self, target):
        rename(self, target)
        calls.append(target)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(type(tmp_path), "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "table") as staged:
        fill(staged, "new")
    assert tree(tmp_path) == {"table/a.txt": b"olda.txt", "table/deep/b.txt": b"olddeep/b.txt"}


def test_readers_of_the_old_folder_go_on_reading_it(tmp_path):
    (tmp_path / "table").mkdir()
    write_tensors(tmp_path / "table" / "x.safetensors", {"x": torch.arange(5)})
    mapped = load_file(tmp_path / "table" / "x.safetensors")["x"]
    with new_folder(tmp_path / "table") as staged:
        write_tensors(staged / "x.safetensors", {"x": torch.zeros(5)})
    assert mapped.tolist() == [0, 1, 2, 3, 4]


def test_others_may_read_the_new_folder(tmp_path):
    """A temporary folder is its owner's alone; a service often runs as another user."""
    with new_folder(tmp_path / "table") as staged:
        write_tensors(staged / "x.safetensors", {"x": torch.zeros(5)})
        write_text(staged / "x.json", "{}")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "table").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "table" / "x.safetensors").stat().st_mode & 0o444 == 0o444


# Single files


@pytest.mark.parametrize("write", [
    lambda path: write_text(path, "new"),
    lambda path: write_tensors(path, {"x": torch.ones(3)}),
], ids=["text", "tensors"])  # fmt: skip
@pytest.mark.parametrize("step", ["_flush", "os.replace"])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch, write, step):
    path = tmp_path / "file"
    write(path)
    assert os.listdir(tmp_path) == ["file"]
    path.write_bytes(b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(f"parchgrad.files.{step}", full)
        with pytest.raises(OSError, match="No space left"):
            write(path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]
    write(path)
    assert path.read_bytes() != b"old"


def test_what_the_system_said_of_a_tensors_file_is_an_os_error_with_the_files_name(tmp_path):
    (tmp_path / ".file.tmp").write_text("")  # in the way of the temporary folder
    with pytest.raises(OSError, match="file"):
        write_tensors(tmp_path / "file", {"x": torch.ones(3)})
    with pytest.raises(OSError, match=r"No such file or directory.*absent/.file.tmp'"):
        write_tensors(tmp_path / "absent" / "file", {"x": torch.ones(3)})


def test_tensors_that_share_memory_are_written_each(tmp_path):
    x = torch.arange(6.0).reshape(2, 3)
    write_tensors(tmp_path / "x", {"a": x, "b": x[:, 1], "c": x, "d": torch.empty(0), "e": torch.empty(0, 4)}, {})
    found = load_file(tmp_path / "x")
    assert (found["b"].tolist(), found["c"].tolist()) == ([1.0, 4.0], x.tolist())
    assert (found["d"].shape, found["e"].shape) == ((0,), (0, 4))


def test_a_second_name_or_a_copy(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("text")
    copy_or_link(tmp_path / "a", tmp_path / "b")

    def unknown(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(type(tmp_path), "hardlink_to", unknown)
    copy_or_link(tmp_path / "a", tmp_path / "c")
    assert [(tmp_path / name).read_text() for name in "bc"] == ["text", "text"]
    assert os.path.samefile(tmp_path / "a", tmp_path / "b")
    assert not os.path.samefile(tmp_path / "a", tmp_path / "c")
