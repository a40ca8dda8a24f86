"""Histograms for those experiment trackers of `report_to` that have such a thing; the others get scalars alone."""

from collections.abc import Iterable

import numpy as np
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback


def report_histogram(
    callbacks: Iterable[TrainerCallback], name: str, counts: np.ndarray, edges: np.ndarray, step: int
) -> None:
    """Send a histogram to the trackers among a trainer's callbacks, on the main process.

    Args:
        name: as it is shown.
        counts: [bins].
        edges: [bins + 1] of the bins.
        step: of training.
    """
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            centres = (edges[1:] + edges[:-1]) / 2
            callback.tb_writer.add_histogram_raw(
                name,
                min=float(edges[0]),
                max=float(edges[-1]),
                num=float(counts.sum()),
                sum=float(counts @ centres),
                sum_squares=float(counts @ centres**2),
                bucket_limits=edges[1:].tolist(),
                bucket_counts=counts.tolist(),
                global_step=step,
            )
            callback.tb_writer.flush()
        elif isinstance(callback, WandbCallback | TrackioCallback):
            tracker = callback._wandb if isinstance(callback, WandbCallback) else callback._trackio
            if hasattr(tracker, "Histogram"):
                tracker.log({name: tracker.Histogram(np_histogram=(counts, edges)), "train/global_step": step})


def finish_reports(callbacks: Iterable[TrainerCallback]) -> None:
    """End the run of a tracker that would go on with the next trainer of this process, so that each has its own."""
    for callback in callbacks:
        if isinstance(callback, WandbCallback) and callback._initialized:
            callback._wandb.finish()
            callback._initialized = False
