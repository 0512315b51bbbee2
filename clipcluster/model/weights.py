"""Starting weights from a file into a tower, with proof of what was loaded.

A file and a tower differ by a prefix, and a load that skips what it does not know takes nothing and raises
nothing. Here the prefix is found, the coverage is counted, and too little of it is an error.
"""

from __future__ import annotations

import json
import re
from collections import ChainMap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from clipcluster.errors import UserError

LEAST_COVERAGE = 0.9
"""Fraction of the tower's tensors, and of their elements, that a file must bring."""

# A prefix is any run of these words: `module.`, `_orig_mod.module.`, `visual.trunk.`, `text.transformer.`, …
_WRAPPERS = {
    *("module", "_orig_mod", "model", "base_model", "backbone", "trunk", "encoder", "visual", "image"),
    *("text", "text_model", "transformer", "bert", "roberta", "distilbert", "electra"),
}
FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Classifiers, language-model heads and poolers: a tower does not have them.
_HEADS = re.compile(
    r"^(head|head_dist|fc|classifier|head\.fc|head\.l|last_linear|lm_head|cls|score|pooler|pre_classifier"
    r"|vocab_[a-z_]+|discriminator_predictions|generator_[a-z_]+|qa_outputs)\.(weight|bias|.*\.(weight|bias)|bias)$"
)
# What a module computes for itself: written by some versions, ignored by others.
_COMPUTED = re.compile(
    r"(^|\.)(num_batches_tracked|position_ids|attn\.bias|attn\.masked_bias|relative_position_index"
    r"|relative_coords_table|attn_mask|inv_freq)$"
)
_NEW_NAMES = {"gamma": "weight", "beta": "bias"}
_OLD_LAYER_NORM = re.compile(r"(?<=LayerNorm\.)(gamma|beta)$")


@dataclass(frozen=True)
class Coverage:
    """What one file brought to one tower.

    `loaded` of `tensors` tensors hold `fraction` of the tower's elements; `missing` stay as they were drawn;
    `left_out` are the file's own tensors (under `prefix`) that the tower does not have.
    """

    tower: str
    file: str
    prefix: str
    loaded: int
    tensors: int
    fraction: float
    missing: tuple[str, ...]
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        counted = f"{self.loaded} of {self.tensors} tensors ({self.fraction:.1%})"
        text = f"{self.tower} tower: {counted} from {self.file}"
        if self.prefix:
            text += f", prefix {self.prefix!r} removed"
        if self.missing:
            text += f"; randomly initialised: {some(self.missing)}"
        if self.left_out:
            text += f"; not used: {some(self.left_out)}"
        return text


def load_weights(tower: nn.Module, source: Path, *, name: str) -> Coverage:
    """Copy the tensors of a file, or of a model folder, into a tower; parameters and buffers, any dtype.

    `name` is the tower's name in messages (`image`, `text`).

    Raises UserError where the file is missing or unreadable, matches less than LEAST_COVERAGE of the tower,
    or holds a larger tower than the one built.
    """
    found = read_state_dict(source)
    state = {_OLD_LAYER_NORM.sub(lambda old: _NEW_NAMES[old[0]], key): found[key] for key in found}
    own = {key: value for key, value in tower.state_dict().items() if not _COMPUTED.search(key)}
    prefix = _best_prefix(state, own)
    inside = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    fitting = {key: value for key, value in inside.items() if key in own and value.shape == own[key].shape}
    left_out = tuple(k for k in inside if k not in fitting and k not in own and not _COMPUTED.search(k))
    elements = sum(value.numel() for value in own.values())
    coverage = Coverage(
        tower=name,
        file=str(source),
        prefix=prefix,
        loaded=len(fitting),
        tensors=len(own),
        fraction=sum(value.numel() for value in fitting.values()) / elements,
        missing=tuple(key for key in own if key not in fitting),
        left_out=left_out,
    )
    _check_coverage(coverage, state, inside, own)
    with torch.no_grad():
        for key, value in fitting.items():
            own[key].copy_(value)
    return coverage


def read_state_dict(source: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors`, `.pth`, `.pt` or `.bin` file, or of a folder in Hugging Face's layout.

    Pickles are read with `weights_only`; of a training checkpoint the model's part is taken.
    Raises UserError where nothing readable is there.
    """
    if source.is_dir():
        found = [source / name for name in FOLDER_FILES if (source / name).is_file()]
        if not found:
            expected = ", ".join(FOLDER_FILES)
            raise UserError(f"The folder {source} holds no weights: expected one of {expected}.")
        source = found[0]
    if not source.is_file():
        raise UserError(
            f"No weights at {source}: name a .safetensors, .pth or .bin file, or a model's folder."
        )
    shards = [read_state_dict(source.parent / shard) for shard in shard_names(source)]
    if shards:
        return dict(ChainMap(*shards))
    try:
        content = _read(source)
    except Exception as error:  # every reader has its own exceptions for a broken file
        raise UserError(f"The weights {source} cannot be read ({error}): is the file complete?") from error
    inner = (content.get(key) for key in ("state_dict", "model", "module"))
    content = next((value for value in inner if isinstance(value, dict)), content)
    state = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if not state:
        raise UserError(f"The file {source} holds no tensors; its keys are {some(tuple(content))}.")
    return state


def shard_names(file: Path) -> list[str]:
    """The files beside it that an `….index.json` puts together; none for any other file."""
    if not file.name.endswith(".index.json"):
        return []
    return sorted(set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values()))


def _read(file: Path) -> dict[str, Any]:
    if file.suffix == ".safetensors":
        return dict(load_file(file))
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except UnpicklingError as error:  # torch's message advises to load it without weights_only
        raise ValueError("it holds more than tensors") from error
    if not isinstance(content, dict):
        raise ValueError(f"a {type(content).__name__} where a dictionary of tensors was expected")
    return content


def _best_prefix(state: dict[str, Tensor], own: dict[str, Tensor]) -> str:
    """The prefix under which most of the file's tensors fit the tower; the shortest of equals."""
    prefixes = {""}
    for key in state:
        words = key.split(".")
        for count in range(1, len(words)):
            if words[count - 1] not in _WRAPPERS:
                break
            prefixes.add(".".join(words[:count]) + ".")

    def matches(prefix: str) -> int:
        return sum(prefix + key in state and state[prefix + key].shape == own[key].shape for key in own)

    return max(sorted(prefixes, key=lambda prefix: (len(prefix), prefix)), key=matches)


def _check_coverage(
    coverage: Coverage, state: dict[str, Tensor], inside: dict[str, Tensor], own: dict[str, Tensor]
) -> None:
    name, file = coverage.tower, coverage.file
    wrong = [key for key in own if key in inside and key in coverage.missing]
    shapes = [
        f"{key}: {tuple(inside[key].shape)} in the file, {tuple(own[key].shape)} in the tower"
        for key in wrong
    ]
    if min(coverage.loaded / coverage.tensors, coverage.fraction) < LEAST_COVERAGE or wrong:
        raise UserError(
            f"{file} brings {coverage.loaded} of the {name} tower's {coverage.tensors} tensors "
            f"({coverage.fraction:.1%} of its elements), so it was made for another tower.\n"
            f"  Missing from the file: {some(coverage.missing)}\n"
            f"  The file holds: {some(tuple(state))}\n"
            f"  Shapes that differ: {some(shapes)}\n"
            f"Name the tower the file was made for, or leave model.{name}.weights out to train from random "
            "weights."
        )
    parts = {key.split(".")[0] for key in own}
    larger = [key for key in coverage.left_out if key.split(".")[0] in parts and not _HEADS.match(key)]
    if larger:
        raise UserError(
            f"{file} holds a larger tower than the {name} tower built: {len(larger)} of its tensors "
            f"do not fit ({some(tuple(larger))}). Name the tower the file was made for."
        )


def some(names: Sequence[str], count: int = 6) -> str:
    """The first names, and how many there are where not all are shown."""
    shown = ", ".join(names[:count])
    return f"{shown}, … ({len(names)} in all)" if len(names) > count else shown or "nothing"
