"""What exists because there may be several processes: how they leave their process group."""

from __future__ import annotations

import atexit
import contextlib
import gc
import sys
from collections.abc import Iterator

from torch import distributed

_is_in_step = True  # False while training, and after an error ended it


@contextlib.contextmanager
def leave_group_at_exit() -> Iterator[None]:
    """Destroy the process group that accelerate creates inside this block, when the interpreter exits.

    accelerate creates the group of a launched run (`torchrun`, `accelerate launch`) and destroys it nowhere. The
    threads of gloo then run on while the interpreter is torn down, and every so often one of them aborts the process
    of a finished run; NCCL prints a warning.

    It is not destroyed at the end of the block, because the script may train again or use the group itself, and a
    second group cannot be created with the launcher's store, which holds the addresses of the first. A group that
    existed before the block belongs to the script that created it.
    """
    global _is_in_step
    creates = not distributed.is_initialized()
    _is_in_step = False
    try:
        yield
        _is_in_step = True
    finally:
        if creates and distributed.is_initialized():
            atexit.register(_leave_group)


def _leave_group() -> None:
    """Destroy the group and join its threads.

    After an error the other processes may be in a collective that this one never enters. Destroying a gloo group
    waits for nobody: its connections close, and the collective fails. Destroying an NCCL group would wait for the
    others, so after an error it is left alone, and the end of the process aborts it.
    """
    if not distributed.is_initialized():
        return
    error = getattr(sys, "last_value", None)
    if (error is not None or not _is_in_step) and distributed.get_backend() != "gloo":
        return
    distributed.destroy_process_group()
    sys.last_traceback = None
    while error is not None:  # the frames of a traceback hold the run
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
    gc.collect()  # the threads end with the last reference to the group; the wrapped model has one, and is in a cycle
