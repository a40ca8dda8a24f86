"""Runs of train.py in processes of their own that something happens to: what `test_faults.py` starts.

The processes are forked from one that has imported everything, so that each costs little more than its run.
"""

import functools
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from unittest.mock import patch

import safetensors.torch
import torch
from tiny_runs import command_line
from transformers import TrainerState

import dnc_gpt2.checkpoints
import dnc_gpt2.trainer
import train
from dnc_gpt2.options import one_line_errors
from dnc_gpt2.trainer import DNCTrainer

PROCESSES = multiprocessing.get_context("forkserver")


@functools.cache
def start_server() -> None:
    """Start the process to fork from, with this module loaded: before Python 3.13 it looks at PYTHONPATH alone."""
    PROCESSES.set_forkserver_preload(["fault_worker"])
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        forkserver.ensure_running()


def run_process(options: dict, fault: str | None = None, *, log: Path, ranks: int = 1, hit: int | None = None) -> list:
    """Train with these options in one process or several.

    Args:
        fault: what happens to process number `hit` (by default to each): see `FAULTS`.
        log: file of the standard error of all.

    Returns:
        The exit code of each process, minus the signal's number where one ended it.
    """
    start_server()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        PROCESSES.Process(
            target=_run, args=(options, fault if hit in (None, rank) else None, str(log), rank, ranks, port)
        )
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
        if process.is_alive():
            process.kill()
            raise TimeoutError(f"a process hangs: {log.read_text()[-3000:]}")
    return [process.exitcode for process in processes]


def _run(options: dict, fault: str | None, log: str, rank: int, ranks: int, port: int) -> None:
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if fault is not None:
        kind, _, where = fault.partition(" ")
        FAULTS[kind](where)
    with one_line_errors("train.py"):
        train.main(command_line(options))


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _before(owner: object, name: str, action: Callable) -> None:
    """Let `action` be called with the arguments of a function before it is."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args, **kwargs):
        action(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def _at_step(step: int, action: Callable) -> None:
    def in_step(trainer, *_, **__):
        if trainer.state.global_step == step:
            action()

    _before(DNCTrainer, "compute_loss", in_step)


def killed_in_step(step: str) -> None:
    """Killed before the loss of the step after this one."""
    _at_step(int(step), _die)


def killed_before(name: str) -> None:
    """Killed before a function of the trainer, the second time."""
    calls = []

    def second(*_, **__):
        calls.append(name)
        if len(calls) == 2:
            _die()

    _before(DNCTrainer, name, second)


def killed_writing(path: str) -> None:
    """Killed when half of a file is written: <folder>/<file>, whatever writes it."""

    def halved(original: Callable, path_of: Callable) -> Callable:
        @functools.wraps(original)
        def wrapped(*args, **kwargs):
            original(*args, **kwargs)
            written = Path(path_of(*args))
            if "/".join(written.parts[-2:]) == path:
                os.truncate(written, written.stat().st_size // 2)
                _die()

        return wrapped

    torch.save = halved(torch.save, lambda _, file: file)
    dnc_gpt2.trainer.save_file = halved(dnc_gpt2.trainer.save_file, lambda _, file: file)
    safe_save = "transformers.modeling_utils"
    sys.modules[safe_save].safe_save_file = halved(safetensors.torch.save_file, lambda _, file: file)
    TrainerState.save_to_json = halved(TrainerState.save_to_json, lambda _, file: file)


def killed_closing(folder: str) -> None:
    """Killed when all files of a checkpoint are written, but not yet its manifest."""

    def manifest(path):
        if path.parent.name == folder:
            _die()

    _before(dnc_gpt2.checkpoints, "replacing", manifest)


def killed_rotating(folder: str) -> None:
    """Killed when half of the files of an old checkpoint are removed."""
    original = shutil.rmtree

    def half(path, *args, **kwargs):
        if Path(path).name == folder:
            files = sorted(file for file in Path(path).iterdir() if file.is_file())
            for file in files[: len(files) // 2]:
                file.unlink()
            _die()
        original(path, *args, **kwargs)

    shutil.rmtree = half


def signalled(what: str) -> None:
    """Sent a signal within a step: "SIGTERM 3"."""
    name, step = what.split()
    _at_step(int(step), lambda: os.kill(os.getpid(), signal.Signals[name]))


def impatient(step: str) -> None:
    """Ctrl-C twice: the second time in the evaluation, long after the first."""
    _at_step(int(step), lambda: os.kill(os.getpid(), signal.SIGINT))

    def again(*_, **__):
        dnc_gpt2.signals.ECHO_SECONDS = 0.0
        os.kill(os.getpid(), signal.SIGINT)

    _before(DNCTrainer, "_save_checkpoint", again)


def full(what: str) -> None:
    """No file may grow beyond so many bytes from this step on: "2 20000"."""
    step, size = map(int, what.split())
    _at_step(step, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))


FAULTS: dict[str, Callable[[str], None]] = {
    function.__name__: function
    for function in (
        *(killed_in_step, killed_before, killed_writing, killed_closing, killed_rotating),
        *(signalled, impatient, full),
    )
}
