"""A child never outlives the process that started it, however that one ended."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

PARENT_VARIABLE = "TUTELAGE_DIES_WITH"
_TORCHRUN_VARIABLE = "TORCHELASTIC_RUN_ID"
_PR_SET_PDEATHSIG = 1


def follow_parent() -> None:
    """Arrange for SIGKILL when the process named by the environment dies; no-op without one.

    A rank follows its torchrun: ranks that outlive it would train on beside those of the next start.

    SIGKILL and not SIGTERM: whoever started this process is gone and nobody is left to insist.
    Every process of the system is built to be killed at any instant.
    """
    parent = os.environ.pop(PARENT_VARIABLE, None)
    if parent is None and _TORCHRUN_VARIABLE in os.environ:
        parent = str(os.getppid())
    if parent is None:
        return
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    else:
        threading.Thread(target=_watch, args=(int(parent),), daemon=True).start()
    # The parent may have died before the line above took effect.
    if os.getppid() != int(parent):
        os.kill(os.getpid(), signal.SIGKILL)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)
