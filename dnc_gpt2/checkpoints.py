"""Whole checkpoints and half-written ones: a manifest, written last, tells them apart."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME

from .report import replacing, versions

MANIFEST = "manifest.json"


def close(folder: str | os.PathLike, **facts: Any) -> None:
    """Make a checkpoint a whole one: its files reach the disk, then a manifest with their sizes appears at once.

    Args:
        facts: what else the manifest is to say, beside the versions.
    """
    folder = Path(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    for path in (*files, *{path.parent for path in files}):
        _sync(path)
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    with replacing(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps({"files": sizes, **facts, "versions": versions()}, indent=2) + "\n")
        _sync(temporary)
    for path in (folder, folder.parent):
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fault(folder: str | os.PathLike) -> str | None:
    """Why a checkpoint is not whole, `None` where it is."""
    folder = Path(folder)
    try:
        sizes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {folder / name: int(size) for name, size in sizes.items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}, which is written last"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    for path, size in expected.items():
        if not path.is_file():
            return f"{path.name} is missing"
        if path.stat().st_size != size:
            return f"{path.name} has {path.stat().st_size} bytes instead of {size}"
    return None if folder / TRAINER_STATE_NAME in expected else f"its {MANIFEST} names no {TRAINER_STATE_NAME}"


def numbered(run: str | os.PathLike) -> list[Path]:
    """The checkpoint-<step> folders of a run, the newest first, whole or not."""
    steps = {}
    if Path(run).is_dir():
        for path in Path(run).iterdir():
            if path.is_dir() and (match := re.fullmatch(r"checkpoint-(\d+)", path.name)):
                steps[path] = int(match[1])
    return sorted(steps, key=steps.__getitem__, reverse=True)


def newest_whole(run: str | os.PathLike) -> tuple[Path | None, dict[Path, str]]:
    """The newest whole checkpoint of a run, `None` if there is none, and why newer ones are not taken."""
    skipped: dict[Path, str] = {}
    for path in numbered(run):
        reason = fault(path)
        if reason is None:
            return path, skipped
        skipped[path] = reason
    return None, skipped


@contextmanager
def reading(checkpoint: str | os.PathLike) -> Iterator[None]:
    """Turn whatever goes wrong while a checkpoint is read into one error that names it and the remedy."""
    try:
        yield
    except Exception as error:  # depends on the damage: OSError, RuntimeError, UnpicklingError, KeyError, ...
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, ValueError) and str(checkpoint) in reason:
            raise
        raise ValueError(
            f"{checkpoint} cannot be resumed from: {reason[:500]}. Name another checkpoint-<step> folder with "
            "--resume_from_checkpoint, or start anew in another --output_dir; the sizes of the model must be those of "
            "the run."
        ) from error


@contextmanager
def saving(folder: str | os.PathLike, run: str | os.PathLike) -> Iterator[None]:
    """Turn what a full disk or a folder that may not be written to causes into one error that names the remedy.

    Raises:
        OSError: `folder` could not be saved; naming the newest whole checkpoint of `run`.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if not is_failed_write(error):
            raise
        last, _ = newest_whole(run)
        kept = "no earlier checkpoint is there" if last is None else f"{last} is whole"
        raise OSError(
            f"{folder} could not be saved ({' '.join(str(error).split())[:300]}); {kept}. Make room or make the folder "
            "writable, then go on with --resume_from_checkpoint true."
        ) from error


def is_failed_write(error: BaseException) -> bool:
    """Whether an error says that a file could not be written; torch's writer raises general errors."""
    torch_writer = any(part in str(error) for part in ("PytorchStreamWriter", "inline_container", "file write"))
    return isinstance(error, OSError | SafetensorError) or torch_writer


def check_versions(checkpoint: str | os.PathLike) -> Mapping[str, tuple[str, str]]:
    """Package -> (version that wrote the checkpoint, version now), where they differ."""
    written = json.loads((Path(checkpoint) / MANIFEST).read_text(encoding="utf-8")).get("versions", {})
    return {name: (written[name], now) for name, now in versions().items() if written.get(name, now) != now}
