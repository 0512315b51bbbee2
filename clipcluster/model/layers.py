"""The layers of a tower in the order of depth, found in its structure.

Layer 0 holds the parameters before the first block (stem, embeddings); each block is a layer; parameters
after the last block (a final norm, an attention pool) belong to the last block's layer.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from timm.models import group_parameters
from torch import nn

STEM = "stem"
# OPT's are registered before the blocks and used after them; those of transformers' ConvNeXt the reverse.
_LATE, _EARLY = re.compile(r"(^|\.)(final_|project_out)"), re.compile(r"(^|\.)downsampling_layer\.")


@dataclass(frozen=True)
class Layer:
    """The parameters of a tower at one depth.

    name: path of its block in the tower (`trunk.stages.2.blocks.8`), or `stem`, before the first block.
    parameters: their names in the tower. after: those among them that follow the last block.
    stage, block: the number of the list of blocks, and the block's number in it, both from 0.
    """

    name: str
    parameters: tuple[str, ...]
    after: tuple[str, ...] = ()
    stage: int | None = None
    block: int | None = None


class _Depths(NamedTuple):
    """Names of parameters: before the blocks, of each block by its path, and after them."""

    before: list[str]
    blocks: list[tuple[str, list[str]]]
    after: list[str]


def layers_of(tower: nn.Module) -> list[Layer]:
    """The layers from the first to the last; every parameter is in one, a shared one by its first name.

    The groups of a timm network are its own (`group_matcher`). In any other network the blocks are the
    members of the largest list of modules, or, where these are stages, of the lists inside them.
    """
    before, blocks, after = _by_timm(tower) or _by_structure(tower)
    layers = [Layer(STEM, tuple(before))]
    in_stage: Counter[str] = Counter()
    for path, names in blocks:
        stage = path.rpartition(".")[0]
        in_stage[stage] += 1
        layers.append(Layer(path, tuple(names), (), list(in_stage).index(stage), in_stage[stage] - 1))
    last = layers[-1]
    layers[-1] = replace(last, parameters=(*last.parameters, *after), after=tuple(after))
    return layers


def layer_ids(tower: nn.Module) -> dict[str, int]:
    """Parameter name -> number of its layer, from 0."""
    return {name: number for number, layer in enumerate(layers_of(tower)) for name in layer.parameters}


def _by_timm(tower: nn.Module) -> _Depths | None:
    """By the groups of the timm network inside; None where it has none.

    Parameters that no rule of it matches, which timm puts into a group of their own at the end, come before
    or after the blocks by the order of registration.
    """
    found = [(name, module) for name, module in tower.named_modules() if hasattr(module, "group_matcher")]
    if not found:
        return None
    prefix, network = f"{found[0][0]}.".lstrip("."), found[0][1]
    matcher: Any = network.group_matcher(coarse=False)
    known = {name: path for name, _ in network.named_parameters() if (path := _matched(matcher, name))}
    groups: dict[int, list[str]] = {}
    for name, number in group_parameters(network, matcher, reverse=True).items():
        if name in known:
            groups.setdefault(number, []).append(name)
    stem, *others = [groups[number] for number in sorted(groups)]
    if not others:
        return None
    place = {name: number for number, (name, _) in enumerate(tower.named_parameters())}
    blocks = [
        (prefix + Counter(known[name] for name in group).most_common(1)[0][0], [prefix + n for n in group])
        for group in others
    ]
    path, last = blocks[-1]
    first = place[blocks[0][1][0]]
    end = max((place[name] for name in last if name.startswith(f"{path}.")), default=place[last[-1]])
    unknown = [name for name in place if name.removeprefix(prefix) not in known]
    return _Depths(
        [*(prefix + name for name in stem), *(name for name in unknown if place[name] < first)],
        [*blocks[:-1], (path, [name for name in last if place[name] <= end])],
        [name for name in last if place[name] > end] + [name for name in unknown if place[name] > first],
    )


def _matched(matcher: Any, name: str) -> str | None:
    """The part of a parameter's name that a rule of a timm network matches; None where none matches."""
    if callable(matcher):
        return None if matcher(name) == math.inf else ".".join(name.split(".")[:2])
    rules = [rule for rule in matcher.values() if rule is not None]
    for pattern in (p for rule in rules for p in ([rule] if isinstance(rule, str) else [p for p, _ in rule])):
        if match := re.match(pattern, name):
            return match[0]
    return None


def _by_structure(module: nn.Module, path: str = "", *, inside_a_stage: bool = False) -> _Depths:
    """By the largest list of modules; embeddings come before the blocks wherever they are registered."""
    names = [path + name for name, _ in module.named_parameters()]
    blocks: list[tuple[str, list[str]]] = []
    for prefixes, block in _blocks(module, path):
        if not inside_a_stage and _is_stage(block):
            inner = _by_structure(block, prefixes[0], inside_a_stage=True)
            inner.blocks[0][1][:0] = inner.before
            inner.blocks[-1][1].extend(inner.after)
            blocks += inner.blocks
        else:
            own = prefixes[:1] if inside_a_stage else prefixes
            blocks.append((prefixes[0].rstrip("."), [name for name in names if name.startswith(own)]))
    if not blocks:
        return _Depths(names, [], [])
    known = {name for _, block in blocks for name in block}
    first = names.index(blocks[0][1][0])
    tables = tuple(
        f"{path}{name}." for name, part in module.named_modules() if isinstance(part, nn.Embedding)
    )
    before: list[str] = []
    after: list[str] = []
    for place, name in enumerate(names):
        if name not in known:
            early = _EARLY.search(name) or name.startswith(tables)
            early = early or (place < first and not _LATE.search(name))
            (before if early else after).append(name)
    return _Depths(before, blocks, after)


def _blocks(module: nn.Module, path: str) -> list[tuple[tuple[str, ...], nn.Module]]:
    """The members of the largest list of blocks, each with its prefixes: its own and those of parallel lists.

    XLM has separate lists of attentions, norms and feed-forward networks.
    """
    lists = {name: part for name, part in module.named_modules() if _is_list(part)}
    if not lists:
        return []
    name, largest = max(lists.items(), key=lambda item: _size(item[1]))  # the outermost of equals
    members = [(key, block) for key, block in largest.named_children() if _size(block)]
    parallel = [
        other
        for other, part in module.named_modules()
        if other != name and other.rpartition(".")[0] == name.rpartition(".")[0]
        if isinstance(part, nn.ModuleList) and len(part) == len(members)
    ]
    here = [f"{path}{other}." if other else path for other in (name, *parallel)]
    return [(tuple(f"{prefix}{key}." for prefix in here), block) for key, block in members]


def _is_list(module: nn.Module) -> bool:
    """Whether this is a list of blocks, and not of single operations as in a multi-layer perceptron."""
    members = [member for member in module.children() if _size(member)]
    return (
        isinstance(module, (nn.ModuleList, nn.Sequential))
        and bool(members)
        and all(any(_size(part) for part in member.children()) for member in members)
    )


def _is_stage(block: nn.Module) -> bool:
    """Whether most parameters of a block are in a list of blocks of one kind."""
    lists = [part for part in block.modules() if _is_list(part) and len({*map(type, part.children())}) == 1]
    return 2 * max(map(_size, lists), default=0) > _size(block)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
