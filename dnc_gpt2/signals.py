"""Ctrl-C and SIGTERM: training ends after the step under way, with a checkpoint."""

import logging
import signal
import threading
import time
from types import FrameType

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

STOPPING = (signal.SIGINT, signal.SIGTERM)
# A launcher passes on to its processes what the terminal has sent to them as well.
ECHO_SECONDS = 2.0


class StopOnSignal(TrainerCallback):
    """While entered, the first SIGINT or SIGTERM lets the step end, a checkpoint be saved and training stop.

    A signal that comes later than the echo of the first ends the process at once. Of several processes all stop after
    the same step, whichever was told.

    Attributes:
        signal: the one that has ended training, `None` as long as none has.
    """

    def __init__(self):
        self.signal: signal.Signals | None = None
        self._received: signal.Signals | None = None
        self._group: dist.ProcessGroup | None = None

    def __enter__(self) -> "StopOnSignal":
        self._previous = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere Python lets no one handle signals
            self._previous = {number: signal.signal(number, self._receive) for number in STOPPING}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None and time.monotonic() - self._since > ECHO_SECONDS:
            raise KeyboardInterrupt
        if self._received is None:
            self._received, self._since = signal.Signals(number), time.monotonic()
            logger.warning("%s: saving a checkpoint after this step; once more ends at once.", self._received.name)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object):
        if args.world_size > 1 and self._group is None:
            self._group = dist.new_group(backend="gloo")  # on the processor: no accelerator waits for a signal

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object):
        number = torch.tensor(self._received or 0)
        if self._group is not None:
            dist.all_reduce(number, dist.ReduceOp.MAX, self._group)
        if number:
            self.signal = signal.Signals(int(number))
            control.should_save = control.should_training_stop = True

    on_train_end = on_step_end  # the signal came while the last step's model was evaluated

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object):
        if self.signal is not None:  # the epoch has not ended, it was left
            control.should_log = control.should_evaluate = control.should_save = False
