"""Jobs in processes of their own, for what several of them share.

In: a function without arguments. Out: a process id, then an exit code: 0 when the function returned, 1 when it raised.
"""

from __future__ import annotations

import os
from collections.abc import Callable


def fork(job: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        job()
        os._exit(0)
    finally:
        os._exit(1)


def wait(pid: int) -> int:
    """Its exit code; negative: the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
