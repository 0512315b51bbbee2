"""Extras: further members of a sample that a task needs, decoded by a worker and stacked in the batch.

A task lists them with their decoders: the member's extension after the key's first dot, in lower case (`npz`,
`paug.json`), or several of which the first that exists is taken (`npz|pth.gz`), and the dotted name
`package.module:function` of a function that takes the member's bytes. The task's preparation
(`preparation.py`) decides what becomes of the values; the default one puts them into the batch.

The values of a batch are stacked where they are numbers, numpy arrays or tensors, and must then agree in
shape and dtype; anything else becomes a list. A decoder whose arrays differ in shape returns each in a list
or tuple.
"""

from collections.abc import Callable, Mapping, Sequence
from pkgutil import resolve_name
from typing import Any

import numpy as np
import torch

from clipcluster.runtime.outcome import DataError

Decoder = Callable[[bytes], Any]
_STACKED = (bool, int, float, np.generic, np.ndarray, torch.Tensor)


class BadExtra(Exception):
    """A sample lacks a member, or its bytes cannot be decoded; the message is the reason, in a few words."""


def decoders_of(extras: Mapping[str, str]) -> dict[str, Decoder]:
    """The decoders by member. ImportError or AttributeError where a dotted name does not exist."""
    return {extension: resolve_name(dotted) for extension, dotted in extras.items()}


def decode_extras(decoders: Mapping[str, Decoder], members: Mapping[str, bytes]) -> dict[str, Any]:
    """The values of a sample's members by name; BadExtra for one that is missing or undecodable."""
    values = {}
    for name, decode in decoders.items():
        if name not in members:
            raise BadExtra(f"no member {name.replace('|', ' or ')}")
        try:
            values[name] = decode(members[name])
        except MemoryError:
            raise
        except Exception as error:  # decoders raise whatever the bytes make them raise
            raise BadExtra(f"{name}: {type(error).__name__}: {error}"[:200]) from None
    return values


def stacked(extension: str, values: Sequence[Any], samples: Sequence[str]) -> torch.Tensor | list[Any]:
    """One value a sample as a tensor (b, ...), or as a list if they are neither numbers nor arrays.

    samples: shard and key of each, for the error. DataError where arrays differ in shape or dtype.
    """
    if not all(isinstance(value, _STACKED) for value in values):
        return list(values)
    return concatenated(extension, [_tensor(value)[None] for value in values], samples)


def concatenated(
    extension: str, parts: Sequence[torch.Tensor | list[Any]], samples: Sequence[str]
) -> torch.Tensor | list[Any]:
    """Consecutive parts of a batch as one: tensors (b, ...), or lists.

    samples: shard and key of the first of each part. DataError where parts differ in kind, shape or dtype.
    """
    tensors = [part for part in parts if isinstance(part, torch.Tensor)]
    if not tensors:
        return [value for part in parts for value in part]
    kinds = [_kind(part) for part in parts]
    for kind, sample in zip(kinds, samples, strict=True):
        if kind != kinds[0]:
            raise DataError(
                f"{sample}: its member {extension} is {kind}, and that of {samples[0]} is {kinds[0]}",
                "the decoder of a member that differs in shape has to return its array in a list",
            )
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _tensor(value: Any) -> torch.Tensor:
    # a copy: arrays made of a member's bytes cannot be written to
    return torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else torch.as_tensor(value)


def _kind(part: torch.Tensor | list[Any]) -> str:
    if not isinstance(part, torch.Tensor):
        return "no array"
    return f"{str(part.dtype).removeprefix('torch.')} of shape {tuple(part.shape[1:])}"
