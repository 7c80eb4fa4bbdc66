"""Key hygiene: what a process of ours keeps from core dumps, debuggers and the swap.

    protect_process()         no core dump, no debugger of the same user           RLIMIT_CORE, PR_SET_DUMPABLE
    lock(secret)              the pages of one secret: no swap                     mlock
    lock_process()            every page of the process: no swap                   mlockall
    forget_variables(error)   an error's frames show no keys to whoever prints them

The command line and its worker processes protect themselves, and lock data keys, root key and key
material while they hold them; ``kms serve`` locks itself whole, where the limit on locked memory
allows it.  Importing the package changes nothing: a process that is not ours keeps its debugger.  A
program that wants the same calls ``protect_process()`` at its start.

What this cannot give.  Python and OpenSSL copy bytes, into key schedules, pipes and parsers; those copies
are neither locked nor wiped, only short-lived.  Content keys of single messages are not locked: there are
as many as files.  Root reads all memory, whatever is asked here.  What the system refuses (a container
without the call, a limit that is used up) is left out without a word: none of it is what the encryption
rests on.

Source: prctl(2), setrlimit(2), mlock(2).
"""

from __future__ import annotations

import contextlib
import sys
from typing import Final

from streamcrypt.system import c_call

_PR_SET_DUMPABLE: Final = 4
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4

_protected = False


def protect_process() -> None:
    """No core dump of this process and its children, and no debugger of the same user on it (Linux).

    From then on ``lock`` locks.  Call it before the first key is read; it cannot be taken back.
    """
    global _protected
    import resource

    if sys.platform == "linux":
        # The limit does not hold where the kernel pipes dumps to a program; this does.
        c_call("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    _protected = True


def lock(secret: bytes) -> None:
    """Keep the pages where ``secret`` lies out of the swap, if this process is protected (Linux).

    They stay locked: other secrets may lie on them.  A ``bytes`` object never moves, so this holds for the
    object itself, and for no copy of it.
    """
    if _protected and sys.platform == "linux":
        c_call("mlock", secret, len(secret))  # Linux takes any address on the first page


def lock_process() -> bool:
    """Keep this whole process out of the swap, now and later; whether the system allowed it.

    For a small process that lives long.  It needs a limit on locked memory of none (``ulimit -l
    unlimited``) or the privilege to exceed it: otherwise a later allocation would fail.
    """
    if sys.platform != "linux":
        return False
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    # Under a limit of nothing the call succeeds for the privileged alone (CAP_IPC_LOCK).
    for limit in (0, resource.RLIM_INFINITY) if hard == resource.RLIM_INFINITY else (0,):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, hard))
        locked = c_call("mlockall", _MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT) == 0
        if locked and limit:
            return True
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, hard))
        if locked:
            return True
    return False


def forget_variables(error: BaseException) -> None:
    """Empty the frames through which ``error`` and its causes came.

    For errors from where keys are bare: error trackers, debuggers and pytest show a traceback together
    with the variables of its frames.
    """
    cause: BaseException | None = error
    while cause is not None:
        step = cause.__traceback__
        while step is not None:
            with contextlib.suppress(RuntimeError):  # it still runs: a caller's
                step.tb_frame.clear()
            step = step.tb_next
        cause = cause.__cause__
