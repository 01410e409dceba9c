"""This process's output, and its end."""

import atexit
import contextlib
import errno
import io
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from fastvideo.errors import launch_rank


class _Lasting(io.FileIO):
    """Once nobody reads any more, what is written goes nowhere, also what libraries write past Python."""

    def write(self, data) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self.fileno())
            return len(data)


def outlive_readers() -> None:
    """From here on a closed terminal, a broken ssh connection, the end of `| tee` ends no run that prints."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        buffer = getattr(stream, "buffer", None)  # python -u has none between text and file
        if type(getattr(buffer, "raw", buffer)) is not io.FileIO:
            continue
        stream.flush()
        lasting = _Lasting(stream.fileno(), "w", closefd=False)
        settings = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
        buffer = lasting if type(buffer) is io.FileIO else io.BufferedWriter(lasting)
        setattr(sys, name, io.TextIOWrapper(buffer, stream.encoding, stream.errors, **settings))


def end_with(function: Callable[[], int]) -> NoReturn:
    """Call `function` and end the process with the exit code that it gives; 1 after an exception and its traceback.

    As the interpreter does, but without taking itself apart at the end: gloo's threads may still hold tensors, and would then abort the
    process with exit code 134.
    """
    outlive_readers()
    try:
        code = function()
    except SystemExit as left:  # by a mistake on the command line, or a reward
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
        if code and not isinstance(left.code, int):
            print(left.code, file=sys.stderr)
        if code == 2 and launch_rank() != 0:  # a mistake on the command line, of all: rank 0 tells it, unless the launcher ends it before
            time.sleep(60)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with contextlib.suppress(OSError, ValueError):  # a full disk under the log does not change what the code says
            stream.flush()
    os._exit(code & 0xFF)
