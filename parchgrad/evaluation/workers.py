"""Processes that do pieces of work on what they inherit: a subject of closures, which cannot be sent to them."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from parchgrad.errors import WorkerError

Piece = TypeVar("Piece")
# Pieces to what is found, in the order in which they are done.
Do = Callable[[Sequence[Piece]], Iterator[tuple[Piece, Any]]]

_work: Callable[[Any], Any] | None = None  # in a worker: what it does with a piece


@contextmanager
def workers(count: int, work: Callable[[Piece], Any]) -> Iterator[Do[Piece]]:
    """`count` forked processes of one thread each that do `work`; one is this process itself, as it is.

    They are forked at the first pieces: until then this process may not have used torch with several threads, whose
    pool a fork breaks, nor CUDA. Processes of one thread use a processor better than threads do: a map has much that
    does not run in threads. Ended with the block, whatever they are at. Raises what `work` raises, and WorkerError
    where a process is killed, as for want of memory.
    """
    if count <= 1:
        yield lambda pieces: ((piece, work(piece)) for piece in pieces)
        return
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(count, context, _begin, (work,))

    def do(pieces: Sequence[Piece]) -> Iterator[tuple[Piece, Any]]:
        futures = {pool.submit(_do, piece): piece for piece in pieces}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise WorkerError(
                "A process of the evaluation was ended from outside; too little memory is the usual reason, and "
                "fewer --workers the remedy."
            ) from error

    try:
        yield do
    finally:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        pool.shutdown(cancel_futures=True)


def _begin(work: Callable[[Any], Any]) -> None:
    """In a worker. Control-C is its parent's affair."""
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    _work = work


def _do(piece: Any) -> Any:
    if _work is None:
        raise WorkerError("A process that was not begun as a worker was given work.")
    return _work(piece)
