"""What a user is told on the terminal, and the signals by which a run is stopped."""

from __future__ import annotations

import contextlib
import errno
import signal
import sys
from collections.abc import Iterator

from tqdm import tqdm

# of a disk that refuses to write; EIO also of a terminal that has gone
DISK_REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type's name where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def stop_signals() -> list[signal.Signals]:
    """Ctrl-C, SIGTERM, and the hangup of a closed terminal, but for those that this process ignores (`nohup`)."""
    kinds = (getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP"))  # Windows has no SIGHUP
    return [kind for kind in kinds if kind is not None and signal.getsignal(kind) is not signal.SIG_IGN]


def warn(message: str, end: str = "\n") -> None:
    """Print a line to stderr, at once and above a progress bar; it is lost where stderr cannot be written."""
    with contextlib.suppress(OSError, ValueError):  # a log on a full disk, a terminal that has gone; a closed file
        tqdm.write(message, file=sys.stderr, end=end)
        sys.stderr.flush()


@contextlib.contextmanager
def despite_lost_output() -> Iterator[None]:
    """Continue if a full disk, or a terminal that has gone, refuses what is printed or drawn, and say so."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_REFUSED:
            raise
        warn(f"an output could not be written ({error.strerror}); nothing else is affected")
