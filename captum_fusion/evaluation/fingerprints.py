"""Content hashes, to detect changes of pictures, weights, methods and metrics between runs."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import CellType
from typing import Any

import numpy as np
import torch
from captum.attr import Attribution
from torch import Tensor, nn

_PLAIN = (type(None), bool, int, float, complex, str, bytes, Path)
_DATA = (*_PLAIN, Tensor, np.ndarray, list, tuple, Attribution)


def fingerprint_of(*parts: Any) -> str:
    """Hash texts, bytes, tensors and arrays.

    Args:
        parts (str, bytes, Tensor or ndarray): What is hashed, in this order.

    Returns:
        str: 16 hexadecimal digits.

    Examples::

        >>> fingerprint_of("a", b"c") == fingerprint_of("a", b"c") != fingerprint_of("ac")
        True
        >>> fingerprint_of(torch.zeros(2, 3)) == fingerprint_of(torch.zeros(3, 2))
        False
    """
    digest = hashlib.sha256()
    for part in parts:
        content = _bytes_of(part)
        digest.update(f"{len(content)} ".encode() + content)
    return digest.hexdigest()[:16]


def fingerprint_of_file(path: str | Path) -> str:
    """Hash the content of a file.

    Returns:
        str: 16 hexadecimal digits.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not a regular file, or no file can have that name.
    """
    if not Path(path).is_file():  # a device or a pipe may have no end
        raise ValueError(f"{path} is not a file")
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]


def seed_of(*parts: str | int) -> int:
    """Derive the seed of a random generator from texts and numbers.

    Args:
        parts (str or int): What the seed depends on, in this order.

    Returns:
        int: 128 bits.

    Examples::

        >>> seed_of(0, "a") == seed_of(0, "a") != seed_of(0, "b")
        True
    """
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:16], "big")


def _bytes_of(part: Any) -> bytes:
    if isinstance(part, str):
        return part.encode(errors="surrogateescape")
    if isinstance(part, Tensor):  # also of dtypes that NumPy does not have
        plain = part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return f"{tuple(part.shape)} {part.dtype} ".encode() + plain.tobytes()
    if isinstance(part, np.ndarray):
        return f"{part.shape} {part.dtype} ".encode() + part.tobytes()
    return bytes(part)


def describe(value: Any, depth: int = 10) -> str:
    """Describe a function or object by its source text and its data.

    - numbers, texts, paths, tensors and arrays: their value; lists, tuples, sets and dicts: what they hold;
    - functions: qualified name, source text, defaults, and the values of variables that they enclose; methods and
      partials: the same, with what they are bound to;
    - classes: qualified name and source text;
    - attributions: class and all attributes;
    - modules: their name within the network of the attribution that holds them, otherwise their class;
    - other objects: class, and attributes that are numbers, texts, paths, tensors, arrays, lists, tuples or
      attributions.

    Not seen: what a function calls or reads from global variables, base classes, the weights of modules, all other
    attributes, and anything nested more than ``depth`` levels deep.

    Args:
        value (object): What is described.
        depth (int, optional): How many levels of objects are looked into.
            Default: 10

    Returns:
        str: Text that changes when what is described changes.

    Examples::

        >>> describe(partial(max, 3)) == describe(partial(max, 3)) != describe(partial(max, 4))
        True
    """
    return _describe(value, depth, {})


def _describe(value: Any, depth: int, names: Mapping[int, str]) -> str:
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, (Tensor, np.ndarray)):
        return fingerprint_of(value)
    if isinstance(value, nn.Module):
        return f"module {names.get(id(value)) or _source(type(value))}"
    return f"{_source(_defined(value))} {_contents(value, depth - 1, names) if depth else ''}"


def _defined(value: Any) -> Any:
    """The function or class whose source text stands for a value."""
    return value if inspect.isroutine(value) or isinstance(value, type) else type(value)


def _contents(value: Any, depth: int, names: Mapping[int, str]) -> list[str]:
    """Descriptions of what a value holds."""
    parts: Any = ()
    if isinstance(value, Mapping):
        parts = [part for key in sorted(value, key=repr) for part in (key, value[key])]
    elif isinstance(value, (list, tuple)):
        parts = value
    elif isinstance(value, (set, frozenset)):
        parts = sorted(value, key=repr)
    elif isinstance(value, partial):
        parts = value.func, value.args, value.keywords
    elif inspect.ismethod(value):
        parts = value.__self__, value.__func__
    elif inspect.isfunction(value):
        enclosed = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
        parts = value.__defaults__, value.__kwdefaults__, enclosed
    elif isinstance(value, Attribution):
        if isinstance(value.forward_func, nn.Module):
            names = {id(module): repr(name) for name, module in value.forward_func.named_modules()}
        parts = [vars(value)]
    elif not isinstance(value, type):
        attributes = getattr(value, "__dict__", {})
        parts = [{name: part for name, part in attributes.items() if isinstance(part, _DATA)}]
    return [_describe(part, depth, names) for part in parts]


def _source(value: Any) -> str:
    name = f"{value.__module__}.{value.__qualname__}" if hasattr(value, "__qualname__") else repr(value)
    try:
        return f"{name} {fingerprint_of(inspect.getsource(value))}"
    except (OSError, TypeError):
        return name
