"""A reward of a user's own: a function in a Python file of his, of which nothing here needs to know."""

import functools
import inspect
import os
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

from fastvideo.errors import UserError
from fastvideo.rewards.isolation import told, undisturbed


def load_function(file: str, name: str) -> Callable:
    """The loader that the function `name` of `file` is, called as those of the library: `load(path, device, **options)`.

    One of (media, rows, options) is a reward already; its loader, which takes no path, is made here.
    Raises UserError for a file or function that isn't there, a file that fails when it is run, and another signature.
    """
    path = Path(os.path.expanduser(file)).resolve()
    if not path.is_file():
        raise UserError(f"--rewards: there is no file {file} to take {name} from")
    module = _run(path)
    function = getattr(module, name, None)
    if not callable(function):
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__ and callable(value)]
        raise UserError(f"--rewards: {file} has no function {name!r}; its own are {', '.join(own) or 'none'}")
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (ValueError, TypeError):  # as builtins have it
        parameters = []
    first = tuple(parameter.name for parameter in parameters[:2])
    if first not in (("media", "rows"), ("path", "device")):
        raise UserError(
            f"--rewards: the first parameters of {name} in {file} must be media and rows, of a reward, or path and device, of its loader, "
            f"not {' and '.join(first) or 'none'}"
        )
    for option in parameters[2:]:
        if not isinstance(option.default, (int, float, str)):
            raise UserError(f"--rewards: {name} in {file} needs a number, a string or a bool as default of its option {str(option)!r}")
    return _loader(file, name, function) if first == ("media", "rows") else function


@functools.cache
def _run(path: Path) -> ModuleType:
    """The file as a module, once in a process. Files beside it can be imported by it, if nothing else has their names."""
    module = ModuleType(f"reward_{zlib.crc32(os.fsencode(path)):08x}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # where dataclasses and pickle look for it
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    try:
        with undisturbed():
            exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
    except Exception as error:
        raise UserError(f"--rewards: {path} cannot be run: {told(error)}") from error
    return module


def _loader(file: str, name: str, reward: Callable) -> Callable:
    def load(path: str | None, device: torch.device, **options) -> Callable:
        if path is not None:
            raise UserError(f"--rewards: {name} in {file} takes no path, but was given {name}={path}")
        given = functools.partial(reward, **options)
        vars(given).update(vars(reward))  # its check_rows
        return given

    load.__signature__ = inspect.signature(reward)  # whose options are the loader's
    return load
