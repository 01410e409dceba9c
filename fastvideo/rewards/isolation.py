"""What a reward may change of the process that it runs in: nothing that lasts."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def undisturbed() -> Iterator[None]:
    """Afterwards the global settings of torch and the working folder are what they were before.

    Not so the global random states, on which nothing of a run depends: restored, they would hide from the preflight a reward that draws.
    A call of `sys.exit` inside raises RuntimeError instead.
    """
    here = os.open(".", os.O_RDONLY)
    grad, dtype, threads = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()
    device, precision = torch.get_default_device(), torch.get_float32_matmul_precision()
    deterministic, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        yield
    except SystemExit as error:
        raise RuntimeError(f"it called sys.exit({error.code!r})") from error
    finally:
        os.fchdir(here)
        os.close(here)
        torch.set_grad_enabled(grad)
        torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:
            torch.set_default_device(device)
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
