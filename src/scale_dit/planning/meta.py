"""What operations give on the device `meta`, worked out once.

torch works out the shapes of most operations in Python, which takes a millisecond each; a model consists of many equal
ones.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

MOST_KNOWN = 2**14
"""Operations that are kept."""


class Made(NamedTuple):
    """Tensors on `meta` by their sizes, strides and dtypes."""

    forms: list[tuple[torch.Size, tuple[int, ...], torch.dtype]]
    is_one: bool
    """Whether it is a tensor, not a tuple of them."""

    @classmethod
    def of(cls, output: Any, inputs: list[Tensor]) -> Made | None:
        """Of an operation's output; `None` if it is more than that, or shares memory with the inputs."""
        is_one = isinstance(output, Tensor)
        parts = [output] if is_one else output
        if not isinstance(parts, list | tuple) or not all(_is_plain(part) for part in parts):
            return None
        made = cls([(part.shape, part.stride(), part.dtype) for part in parts], is_one)
        if not {*map(_storage, parts)}.isdisjoint(map(_storage, inputs)):
            return None
        again = [made.again()] if is_one else made.again()
        sizes = [[part.untyped_storage().nbytes() for part in each] for each in (parts, again)]
        return made if sizes[0] == sizes[1] else None

    def again(self) -> Any:
        """New ones."""
        tensors = [torch.empty_strided(size, step, dtype=kind, device="meta") for size, step, kind in self.forms]
        return tensors[0] if self.is_one else tuple(tensors)


_KNOWN: dict[tuple[Any, ...], Made | None] = {}
"""What operations make of arguments; `None`: not only tensors with memory of their own."""


def on_meta(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operation of torch gives: `func(*args, **kwargs)`."""
    key: list[Any] = [func, torch.get_default_dtype()]
    if func.is_view or func._schema.is_mutable or not _describe((args, kwargs), key):
        return func(*args, **kwargs)
    place = tuple(key)
    known = _KNOWN.get(place)
    if known is not None:
        return known.again()
    output = func(*args, **kwargs)
    if len(_KNOWN) >= MOST_KNOWN:
        _KNOWN.clear()
    _KNOWN[place] = Made.of(output, tensors_in((args, kwargs)))
    return output


def _describe(value: Any, into: list[Any]) -> bool:
    """Add all that an operation sees of its arguments; false if there are tensors that are not as simple as most.

    Numbers come with their type: to torch, 1 is not 1.0.
    """
    if isinstance(value, Tensor):
        into += value.shape, value.stride(), value.dtype
        return _is_plain(value)
    if isinstance(value, list | tuple):
        into.append(len(value))
        return all(_describe(each, into) for each in value)
    if isinstance(value, dict):
        into.append(tuple(value))
        return all(_describe(each, into) for each in value.values())
    into += type(value), value
    return True


def tensors_in(tree: Any) -> list[Tensor]:
    """Those in an operation's arguments, or in what it gives."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, list | tuple):
        return []
    return [tensor for each in tree for tensor in tensors_in(each)]


def _is_plain(value: Any) -> bool:
    return type(value) in (Tensor, Parameter) and value.device.type == "meta"


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
