"""Independent pieces of work in worker processes, with events to the parent and an orderly end on Ctrl-C."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import BaseContext
from typing import Any, TypeVar

import torch

from mmc_fast._util.numbers import shown
from mmc_fast.errors import InputError

from .training import Interrupted

_MOST_WORKERS = 1024
# A fork server imports what every worker needs once; workers start from it in milliseconds, without the parent's threads.
_START = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
_PRELOADED = ["mmc_fast.experiments.compare.runs", "sklearn.metrics", "torch._dynamo"]
Work = TypeVar("Work")
Emit = Callable[[Any], None]


class WorkerLost(RuntimeError):
    """A worker process died, by a signal or by the system."""


def run_pool(
    jobs: Sequence[Work], work: Callable[[Work, Emit], None], *, workers: int, on_event: Callable[[Any], None]
) -> None:
    """Call ``work(job, emit)`` for every job, ``workers`` at a time, each with one torch thread.

    ``work`` is a function of a module and jobs and events can be pickled. What a job passes to ``emit`` reaches
    ``on_event`` in this process. One worker means this process itself. The first error of a job ends the others and is
    raised. Ctrl-C lets every job in progress finish its step and save, then raises ``Interrupted``; a second one ends
    the workers at once.
    """
    check_workers(workers)
    if workers == 1 or len(jobs) < 2:
        with _one_thread():
            for job in jobs:
                work(job, on_event)
        return
    context = multiprocessing.get_context(_START)
    if _START == "forkserver":
        context.set_forkserver_preload(_PRELOADED)
    events: Any = context.Queue()
    stop = context.Event()
    executor, futures = _start(context, jobs, work, min(workers, len(jobs)), events, stop)
    try:
        _follow(futures, events, stop, on_event)
    except BrokenProcessPool as error:
        raise WorkerLost(
            "a worker process died; there may be too little memory for so many workers: give fewer and repeat the command, "
            "which takes over what is finished"
        ) from error
    except BaseException:
        if stop.is_set():
            for process in multiprocessing.active_children():
                process.terminate()
        raise
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
        events.close()


def check_workers(workers: int, name: str = "workers") -> None:
    """Raise ``InputError`` for no worker and for too many; ``name``: what the caller calls them."""
    if not 1 <= workers <= _MOST_WORKERS:
        raise InputError(f"{name} is {shown(workers)}; it must be at least 1 and at most {_MOST_WORKERS}")


def _start(
    context: BaseContext,
    jobs: Sequence[Work],
    work: Callable[[Work, Emit], None],
    workers: int,
    events: Any,
    stop: Any,
) -> tuple[ProcessPoolExecutor, list[Future[None]]]:
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(events, stop))
    # Workers inherit the ignored signal, so that Ctrl-C cannot break them while they start.
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return executor, [executor.submit(_call, work, job) for job in jobs]
    finally:
        signal.signal(signal.SIGINT, previous)


def _follow(futures: list[Future[None]], events: Any, stop: Any, on_event: Callable[[Any], None]) -> None:
    """Pass events on until all futures are done; raises the first error, or ``Interrupted`` after Ctrl-C."""
    failure: BaseException | None = None
    pending = set(futures)
    while pending:
        try:
            _drain(events, on_event, 0.1)
            done, pending = wait(pending, timeout=0, return_when=FIRST_COMPLETED)
        except KeyboardInterrupt as error:
            if stop.is_set():
                raise
            failure = Interrupted("interrupted")
            failure.__cause__ = error
            _end(stop, pending)
            continue
        for future in done:
            error_here = None if future.cancelled() else future.exception()
            if error_here is not None and failure is None:
                failure = error_here
                _end(stop, pending)
    _drain(events, on_event, 0.1)
    if failure is not None:
        raise failure


def _end(stop: Any, pending: set[Future[None]]) -> None:
    stop.set()
    for future in pending:
        future.cancel()


def _drain(events: Any, on_event: Callable[[Any], None], timeout: float) -> None:
    with contextlib.suppress(queue.Empty):
        while True:
            on_event(events.get(timeout=timeout))
            timeout = 0.01


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# What follows runs in the workers.

_worker: dict[str, Any] = {}


def _begin(events: Any, stop: Any) -> None:
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # Ctrl-C in a terminal reaches only the parent, which passes it on once
    torch.set_num_threads(1)
    _worker.update(events=events, stop=stop)


def _call(work: Callable[[Any, Emit], None], job: Any) -> None:
    if _worker["stop"].is_set():
        raise Interrupted("interrupted before the job started")
    work(job, _emit)


def _emit(event: Any) -> None:
    parent = multiprocessing.parent_process()
    if parent is None or not parent.is_alive():
        os._exit(1)  # nobody is left to work for
    _worker["events"].put(event)
    if _worker["stop"].is_set() and not _worker.get("asked"):
        _worker["asked"] = True
        signal.raise_signal(signal.SIGINT)  # the run's own handler ends it in order; ignored outside of a run
