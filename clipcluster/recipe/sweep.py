"""A recipe's section `sweep`: which keys take which values; every combination is a run of its own. No torch.

::

    sweep:
      optim.lr: [3e-4, 7e-4]                              # each value with each of the others
      zip: {data.batch_size: [256, 512], optim.warmup: [400 steps, 200 steps]}   # the first with the first, …
      list: [{loss.name: clip}, {loss.name: siglip, model.logit_bias: {init: -10}}]
      random: {count: 20, seed: 0, keys: {optim.weight_decay: {uniform: [0, 0.3]}}}
      parallel: 4

A value keeps the place where it was written, so that an error names it.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from clipcluster.errors import UserError
from clipcluster.recipe.environment import expanded
from clipcluster.recipe.tree import Entry, Variable

SECTION = "sweep"
Values = dict[str, Entry]
"""Dotted key of the recipe -> its value."""

_PARTS = ("zip", "list", "random", "parallel")  # no recipe has such keys at its top
_RANDOM = ("count", "seed", "keys")
_WORD, _LABEL = 32, 120  # characters of a value in a name, and of all that a name says
Distribution = Callable[[float, float, float], float]
DISTRIBUTIONS: dict[str, Distribution] = {
    "uniform": lambda low, high, at: low + at * (high - low),
    "log_uniform": lambda low, high, at: low * (high / low) ** at,
    "integers": lambda low, high, at: low + at * (high - low + 1),
}


@dataclass(frozen=True)
class Member:
    """One run of a sweep: the keys that differ in it, and what its name says of them."""

    values: Values
    label: str

    def plain(self) -> dict[str, Any]:
        """Key -> value as written, for JSON."""
        return {key: _plain(value) for key, value in self.values.items()}


@dataclass(frozen=True)
class Sweep:
    """The members, in the order of the recipe, and how many of them may run at once (None: all)."""

    members: tuple[Member, ...]
    parallel: int | None


def read_sweep(section: Entry, environ: Mapping[str, str]) -> Sweep:
    """The members that a section `sweep` describes: the product of its parts, each combination once.

    Raises UserError, with file and line.
    """
    if not section.entries:
        raise _problem(section, "", "should be a section such as {optim.lr: [3e-4, 7e-4]}")
    parts: list[list[Values]] = []
    plain = {name: entry for name, entry in section.entries.items() if name not in _PARTS}
    for key, entry in _flat(Entry(plain, section.origin)).items():
        parts.append([{key: value} for value in _listed(entry, key)])
    for name, read in (("zip", _zipped), ("list", _entries), ("random", _draws)):
        part = section.entries.get(name)
        if part is not None and part.value is not None:
            parts.append(read(part, environ))
    if any("name" in values for part in parts for values in part):
        raise _problem(
            section, "name", "a sweep has the recipe's name, and its members what differs; remove it"
        )
    if not parts:
        raise _problem(section, "", "gives no key values, such as {optim.lr: [3e-4, 7e-4]}")
    combinations: list[Values] = []
    for chosen in product(*parts):
        combinations.append(_together(section, chosen))
    return Sweep(_members(combinations), _parallel(section.entries.get("parallel"), environ))


def _members(combinations: Sequence[Values]) -> tuple[Member, ...]:
    """Each distinct combination with its label; a random choice may draw one twice."""
    words = _words({key for values in combinations for key in values})
    distinct: dict[str, Member] = {}
    for values in combinations:
        text = "+".join(f"{words[key]}={_word(_plain(value))}" for key, value in values.items())
        member = Member(values, text[:_LABEL])
        distinct.setdefault(repr(sorted(member.plain().items())), member)
    return tuple(distinct.values())


def _together(section: Entry, chosen: Sequence[Values]) -> Values:
    """The values of one choice of every part. UserError where two parts give a key."""
    together: Values = {}
    for values in chosen:
        for key, value in values.items():
            within = next((other for other in together if _overlap(key, other)), None)
            if within is not None:
                raise _problem(section, key, f"is given values twice ({within}); give them in one place")
            together[key] = value
    return together


def _overlap(one: str, other: str) -> bool:
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _flat(entry: Entry, prefix: str = "") -> Values:
    """What a mapping has, by dotted key; sections may be written as such or with dots."""
    found: Values = {}
    for name, inner in entry.entries.items():
        nested = inner.entries and not set(inner.entries) & set(DISTRIBUTIONS)
        found |= _flat(inner, f"{prefix}{name}.") if nested else {f"{prefix}{name}": inner}
    return found


def _listed(entry: Entry, key: str) -> list[Entry]:
    """The values in a list. UserError for anything else, and for an empty one."""
    if not isinstance(entry.value, list) or not entry.value:
        raise _problem(
            entry, key, f"should be a list of values, such as {SECTION}: {{optim.lr: [3e-4, 7e-4]}}"
        )
    return entry.value


def _mapping(entry: Entry, key: str, shape: str) -> dict[str, Entry]:
    if not entry.entries:
        raise _problem(entry, key, f"should be a mapping, such as {shape}")
    return entry.entries


def _zipped(entry: Entry, environ: Mapping[str, str]) -> list[Values]:
    _mapping(entry, "zip", "{data.batch_size: [256, 512], optim.lr: [5e-4, 1e-3]}")
    lists = {key: _listed(values, key) for key, values in _flat(entry).items()}
    lengths = {key: len(values) for key, values in lists.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{key} {length}" for key, length in lengths.items())
        raise _problem(entry, "zip", f"its lists should be equally long; they have: {counts}")
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def _entries(entry: Entry, environ: Mapping[str, str]) -> list[Values]:
    shape = "list: [{optim.lr: 3e-4}, {optim.lr: 7e-4, optim.warmup: 500 steps}]"
    listed = _listed(entry, "list")
    for one in listed:
        if not isinstance(one.value, dict):
            raise _problem(one, "list", f"its entries should be mappings, such as {shape}")
    return [_flat(one) for one in listed]


def _draws(entry: Entry, environ: Mapping[str, str]) -> list[Values]:
    """`count` draws; a draw depends on the seed, its number and its key alone: a larger count adds draws."""
    shape = "{count: 20, keys: {optim.lr: {log_uniform: [1e-4, 1e-2]}, model.embed_dim: [256, 512]}}"
    given = _mapping(entry, "random", shape)
    unknown = next((name for name in given if name not in _RANDOM), None)
    if unknown:
        raise _problem(given[unknown], f"random.{unknown}", f"unknown key; random has {', '.join(_RANDOM)}")
    for name in ("count", "keys"):
        if name not in given:
            raise _problem(entry, "random", f"the key {name} is missing; write {shape}")
    count = _whole(given["count"], "random.count", environ, 1)
    seed = _whole(given["seed"], "random.seed", environ, 0) if "seed" in given else 0
    _mapping(given["keys"], "random.keys", shape)
    drawn = {key: _drawn(key, values, count, seed, environ) for key, values in _flat(given["keys"]).items()}
    return [{key: values[number] for key, values in drawn.items()} for number in range(count)]


def _drawn(key: str, entry: Entry, count: int, seed: int, environ: Mapping[str, str]) -> list[Entry]:
    """One key's values in all draws: of a list, or numbers of four significant digits, as names show them."""
    places = [_place(seed, key, number) for number in range(count)]
    if isinstance(entry.value, list) and entry.value:
        return [entry.value[int(place * len(entry.value))] for place in places]
    name = next(iter(entry.entries), "")
    if len(entry.entries) != 1 or name not in DISTRIBUTIONS:
        kinds = " or ".join(f"{{{kind}: [LOW, HIGH]}}" for kind in DISTRIBUTIONS)
        raise _problem(entry, key, f"should be a list to choose from, or {kinds}")
    low, high = _bounds(entry.entries[name], key, name, environ)
    drawn = [DISTRIBUTIONS[name](low, high, place) for place in places]
    rounded = [math.floor(value) if name == "integers" else float(f"{value:.4g}") for value in drawn]
    return [Entry(min(high, max(low, value)), entry.origin) for value in rounded]


def _place(seed: int, key: str, number: int) -> float:
    """A number in [0, 1) that the arguments decide."""
    digest = hashlib.sha256(f"{seed}/{key}/{number}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2.0**53


def _bounds(entry: Entry, key: str, name: str, environ: Mapping[str, str]) -> tuple[float, float]:
    listed = entry.value if isinstance(entry.value, list) else []
    numbers = [expanded(one, environ, key) for one in listed]
    fitting = (int,) if name == "integers" else (int, float)
    if len(numbers) != 2 or any(type(number) not in fitting for number in numbers):
        whole = "whole " * (name == "integers")
        raise _problem(entry, key, f"{name} should have two {whole}numbers, [LOW, HIGH]")
    low, high = numbers
    if not (math.isfinite(low) and math.isfinite(high) and low <= high) or (
        name == "log_uniform" and low <= 0
    ):
        positive = " above zero" * (name == "log_uniform")
        raise _problem(entry, key, f"{name} got {low:g} and {high:g}; should be LOW{positive}, then HIGH")
    return low, high


def _parallel(entry: Entry | None, environ: Mapping[str, str]) -> int | None:
    return None if entry is None or entry.value is None else _whole(entry, "parallel", environ, 1)


def _whole(entry: Entry, key: str, environ: Mapping[str, str], least: int) -> int:
    scalar = not isinstance(entry.value, (dict, list))
    value = expanded(entry, environ, key) if scalar else None
    if type(value) is not int or value < least:
        raise _problem(entry, key, f"should be a whole number, at least {least}")
    return value


def _problem(entry: Entry, key: str, message: str) -> UserError:
    return UserError(entry.origin.problem(f"{SECTION}.{key}" if key else SECTION, message))


def _words(keys: set[str]) -> dict[str, str]:
    """Each key's last words, as few as tell it from the other keys: lr, image.weights."""
    short = {}
    for key in keys:
        parts = key.split(".")
        tails = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        others = [f".{other}" for other in keys if other != key]
        short[key] = next(
            (tail for tail in tails if not any(other.endswith(f".{tail}") for other in others)), key
        )
    return short


def _word(value: Any) -> str:
    """A value in a name: of a path the last component, of all else the letters and digits."""
    if isinstance(value, bool) or value is None:
        text = {True: "true", False: "false", None: "null"}[value]
    elif isinstance(value, float):
        text = f"{value:.12g}"
    elif isinstance(value, Mapping):
        text = "_".join(f"{key}_{_word(inner)}" for key, inner in value.items())
    elif isinstance(value, list):
        text = "_".join(map(_word, value))
    else:
        text = str(value).rstrip("/").rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9.-]+", "_", text).strip("_")[:_WORD]


def _plain(entry: Entry) -> Any:
    """An entry as it was written, without the places."""
    if isinstance(entry.value, dict):
        return {name: _plain(inner) for name, inner in entry.value.items()}
    if isinstance(entry.value, list):
        return [_plain(inner) for inner in entry.value]
    return entry.value.text if isinstance(entry.value, Variable) else entry.value
