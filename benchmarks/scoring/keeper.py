"""Runs a command in this process group and ends the whole group when its parent or the command ends.

A killed vLLM server leaves its engine processes behind, so the group has a keeper: whoever holds the
other end of its standard input is the parent, however that one ends. It imports nothing of ours and
starts at once.
"""

import os
import signal
import subprocess
import sys
import threading


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    subprocess.run(sys.argv[1:], stdin=subprocess.DEVNULL, close_fds=False, check=False)
    os.killpg(0, signal.SIGKILL)
