"""What a reward may change of the process that it runs in: nothing that lasts. And what is told of one that fails."""

import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

CALLERS = [str(Path(__file__).with_name(name)) for name in ("__init__.py", "plugins.py", "isolation.py")]  # of rewards
SETTINGS: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [  # how to read and to write them
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device, torch.set_default_device),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda modes: torch.use_deterministic_algorithms(modes[0], warn_only=modes[1]),
    ),
    (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    *(
        (lambda kind=kind: torch.is_autocast_enabled(kind), lambda enabled, kind=kind: torch.set_autocast_enabled(kind, enabled))
        for kind in ("cpu", "cuda")
    ),
    (
        lambda: torch.cuda.current_device() if torch.cuda.is_initialized() else None,
        lambda index: index is None or torch.cuda.set_device(index),
    ),
]


@contextmanager
def undisturbed() -> Iterator[None]:
    """Afterwards the global settings of torch, the handlers of signals and the working folder are what they were before.

    Not so the global random states, on which nothing of a run depends: restored, they would hide from the preflight a reward that draws.
    A call of `sys.exit` inside raises RuntimeError instead.
    """
    here = os.open(".", os.O_RDONLY)
    before = [read() for read, _ in SETTINGS]
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    try:
        yield
    except SystemExit as error:
        raise RuntimeError(f"it called sys.exit({error.code!r})") from error
    finally:
        os.fchdir(here)
        os.close(here)
        for (read, write), value in zip(SETTINGS, before):
            if read() != value:
                write(value)
        if threading.current_thread() is threading.main_thread():  # no other may set them
            for number, handler in handlers.items():
                if signal.getsignal(number) is not handler and handler is not None:
                    signal.signal(number, handler)


def told(error: Exception) -> str:
    """Of what kind the error of a reward is, what it says, and where: the last line of the reward's own file, or of one beside it, rather
    than of a library that it called."""
    kind, message = type(error).__name__, str(error)
    if isinstance(error, SyntaxError):
        return f"{kind}: {error.msg} ({error.filename}, line {error.lineno})"
    if isinstance(error.__cause__, SystemExit):
        error = error.__cause__
    frames, torch_folder = traceback.extract_tb(error.__traceback__), Path(torch.__file__).parent  # torch.no_grad wraps rewards
    own = [frame for frame in frames if frame.filename not in CALLERS and torch_folder not in Path(frame.filename).parents]
    folder = Path((own or frames)[0 if own else -1].filename).parent
    last = [frame for frame in frames if Path(frame.filename).parent == folder][-1]
    return f"{kind}: {message} ({last.filename}, line {last.lineno})"
