"""Functions run in processes of their own, forked from one that has imported the package and trained nothing: a start costs no import."""

import multiprocessing
import os
import traceback
from collections.abc import Callable


def start(function: Callable, *arguments, **variables: str) -> tuple[multiprocessing.Process, object]:
    """The process at work on function(*arguments), with these environment variables; and the end of the pipe on which its outcome comes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["recsys_importance.training"])
    outcome, inside = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(inside, variables, function, arguments))
    process.start()
    inside.close()
    return process, outcome


def _run(pipe, variables: dict, function: Callable, arguments: tuple) -> None:
    os.environ.update(variables)
    try:
        pipe.send((function(*arguments), None))
    except BaseException:
        pipe.send((None, traceback.format_exc()))


def apart(function: Callable, *arguments, patience: float = 120, **variables: str):
    """What function(*arguments) returns in a process of its own. An exception there is an AssertionError with its traceback here."""
    process, outcome = start(function, *arguments, **variables)
    found = outcome.recv() if outcome.poll(patience) else (None, f"no outcome within {patience} s")
    process.join(5)
    if process.is_alive():
        process.kill()
    assert found[1] is None, found[1]
    return found[0]
