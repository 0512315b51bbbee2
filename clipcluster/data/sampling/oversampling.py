"""How often a pass shows each sample: the repeats as a recipe writes them, and as whole numbers of copies.

With C copies of its most repeated samples, a shard is shuffled as C portions, and each copy of a
sample lies in a portion of its own. Which portions those are is spread over the C by a hash of the sample's
number in its shard, so that every portion holds the classes in the proportions of the whole: a portion of
nothing but the over-sampled class would fill batches with it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from clipcluster.data.sampling.permutation import key, subkeys
from clipcluster.errors import UserError
from clipcluster.text import counted, nearest

LARGEST_DENOMINATOR = 64
MOST_COPIES = 255
_SAME = Fraction(1, 1_000_000)  # 0.333333 stands for a third
_OFFSETS = 1 << 16  # samples of a shard until their portions repeat
_SCAN = 1 << 22  # classes looked at together


@dataclass(frozen=True, eq=False)
class Repeats:
    """Repeats of the samples of one source, as a recipe writes them.

    every: of a sample whose class is not in `by_class` (class number -> repeats); 0 leaves samples out.
    classes: (n_samples,) integers, the class of each sample in the index's order, -1 for none; only read
        where `by_class` says something, and never copied.
    recipe_key: the source's key in the recipe, for messages.
    """

    every: float = 1.0
    by_class: Mapping[int, float] = field(default_factory=dict)
    classes: np.ndarray | None = None
    recipe_key: str = ""


@dataclass(frozen=True)
class ShownClasses:
    """The classes of which a source shows samples: all but `other`, or only these if not `others`."""

    others: bool = True
    other: frozenset[int] = frozenset()

    def __contains__(self, number: object) -> bool:
        return (number in self.other) != self.others


class Copies:
    """Copies of one source's samples: whole numbers, by class.

    most: the most of any sample; a shard is as many portions. by_class: whether samples differ.
    values: (R,) uint8, the different numbers of copies. shown: classes with copies at all.
    """

    def __init__(self, every: int, by_class: Mapping[int, int], classes: np.ndarray | None) -> None:
        by_class = {number: copies for number, copies in by_class.items() if copies != every}
        self.most = max(every, *by_class.values(), 0)
        self.by_class = bool(by_class)
        shown = frozenset(number for number, copies in by_class.items() if (copies > 0) != (every > 0))
        self.shown = ShownClasses(every > 0, shown)
        self.values = np.array(sorted({every, *by_class.values()}), dtype=np.uint8)
        self._classes = classes
        self._end = max(by_class, default=-1) + 1
        # a class c has the row c + 1; the first row is of no class, the last of all classes above
        self._kinds = np.full(self._end + 2, np.searchsorted(self.values, every), dtype=np.uint8)
        for number, copies in by_class.items():
            self._kinds[number + 1] = np.searchsorted(self.values, copies)
        words = subkeys(key("portions"), np.arange(_OFFSETS if self.by_class else 0))
        self._offsets = (words % np.uint64(max(self.most, 1))).astype(np.uint8)

    def kinds(self, positions: slice | np.ndarray) -> np.ndarray:
        """Which of `values` the samples at positions within the source have, (n,) uint8."""
        assert self._classes is not None, "repeats by class come with the classes"
        return self._kinds[np.clip(self._classes[positions], -1, self._end) + 1]

    def offsets(self, numbers: np.ndarray) -> np.ndarray:
        """Where the copies of a shard's samples `numbers` (n,) begin to be dealt to its portions, uint8."""
        return self._offsets[numbers & (_OFFSETS - 1)]

    def held(self, portion: int) -> np.ndarray:
        """Whether a portion holds samples of each value and offset, (R, most) bool."""
        turned = (portion + np.arange(self.most, dtype=np.int64)) % max(self.most, 1)
        values = self.values.astype(np.int64)[:, None]
        # of `most` consecutive numbers exactly `values` fulfil this, evenly spread
        return np.asarray(turned * values % max(self.most, 1) < values)

    def portions(self, copies: np.ndarray, kinds: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """The portion of copy number `copies` (n,) of samples with these kinds and offsets, (n,) int64."""
        values = self.values.astype(np.int64)[kinds]
        return np.asarray((-(-copies * self.most // values) - offsets) % self.most)


def whole_copies(repeats: Sequence[Repeats | None]) -> tuple[int, list[Copies]]:
    """The copies of sources that are drawn as one, and how many times as often as written these are.

    0.5 for one class makes that factor 2: the class once, everything else twice. Raises UserError where
    the factor would be above 64, or the copies of a sample above 255; with what is possible.
    """
    given = [Repeats() if own is None else own for own in repeats]
    exact = [{None: _exact(own.every), **{c: _exact(r) for c, r in own.by_class.items()}} for own in given]
    values = [value for own in exact for value in own.values()]
    factor = math.lcm(*(value.denominator for value in values))
    keys = ", ".join(dict.fromkeys(own.recipe_key for own in given if own.recipe_key)) or "the repeats"
    if factor > LARGEST_DENOMINATOR:
        distinct = [float(value) for value in dict.fromkeys(values)]
        written = ", ".join(f"{value:.8g}" for value in distinct)
        wanted = ", ".join(f"{value:.8g}" for value in _nearest(distinct))
        raise UserError(
            f"{keys}: the repeats {written} are whole only when multiplied by {factor:,}; a pass holds a"
            f" sample a whole number of times, at most {LARGEST_DENOMINATOR} times as often as written. The"
            f" nearest possible repeats are {wanted}."
        )
    most = max(values) * factor
    if most > MOST_COPIES:
        raise UserError(
            f"{keys}: a pass would hold some samples {int(most):,} times (a repeat of {float(max(values)):g},"
            f" times {factor} to make all whole); at most {MOST_COPIES}. Give smaller repeats, coarser"
            " fractions, or weights of sources."
        )
    return factor, [
        Copies(
            int(written[None] * factor),
            {number: int(value * factor) for number, value in written.items() if number is not None},
            own.classes,
        )
        for written, own in zip(exact, given, strict=True)
    ]


def repeats_of(
    every: float,
    by_class: Mapping[str, float],
    *,
    classes: np.ndarray | None,
    classnames: Sequence[str] | None,
    recipe_key: str,
    name: str,
) -> Repeats | None:
    """A source's repeats as its recipe section says; None where every sample is drawn once.

    by_class: a class's number, or its name in `classnames` -> repeats. Raises UserError for a class that is
    not known, and where the samples have no classes.
    """
    if not by_class:
        return None if every == 1 else Repeats(every, recipe_key=recipe_key)
    key_ = f"{recipe_key}.repeat_classes"
    starts = range(0, 0 if classes is None else len(classes), _SCAN)
    blocks = (classes[start : start + _SCAN] for start in starts if classes is not None)
    highest = max((int(block.max()) for block in blocks), default=-1)
    if highest < 0:
        raise UserError(
            f"{key_}: the samples of {name} have no classes. Classes come from KEY.cls in the shards"
            f" (clipcluster shards index DIR counts them); {recipe_key}.repeat is for a whole source."
        )
    numbers: dict[int, str] = {}
    for word in by_class:
        number = _class_number(word, classnames, highest, key_)
        if number in numbers:
            raise UserError(f"{key_}: {numbers[number]!r} and {word!r} are the same class; write it once")
        numbers[number] = word
    return Repeats(every, {number: by_class[word] for number, word in numbers.items()}, classes, recipe_key)


def _class_number(word: str, classnames: Sequence[str] | None, highest: int, key_: str) -> int:
    if word.isdecimal():
        last = max(highest, len(classnames or ()) - 1)
        if int(word) > last:
            raise UserError(f"{key_}: there is no class {word}; the classes are 0 to {last}")
        return int(word)
    found = [number for number, known in enumerate(classnames or ()) if known.strip() == word.strip()]
    if len(found) == 1:
        return found[0]
    if classnames is None:
        raise UserError(
            f"{key_}: {word!r} is the name of a class, and there is no classnames.txt beside the shards or in"
            " the folder above; give the class's number"
        )
    if found:
        which = ", ".join(map(str, found))
        raise UserError(f"{key_}: {word!r} is the name of the classes {which}; give the number of one")
    near = nearest(word, classnames)
    names = counted(len(classnames), "name")
    hint = f"did you mean {near!r}?" if near else f"it has {names}; give one of them or the class's number"
    raise UserError(f"{key_}: no class in classnames.txt is called {word!r}; {hint}")


def _exact(value: float) -> Fraction:
    """The fraction that a decimal stands for: itself, or one with a small denominator that it rounds."""
    # repr, because 0.1 stands for one tenth and not for the binary fraction nearest to it
    written = Fraction(repr(float(value)))
    simple = written.limit_denominator(LARGEST_DENOMINATOR)
    return simple if abs(simple - written) <= _SAME else written


def _nearest(values: Sequence[float]) -> list[float]:
    """The values rounded to a common denominator of at most 64, their largest relative error least."""
    best, least = [*values], math.inf
    for denominator in range(1, LARGEST_DENOMINATOR + 1):
        rounded = [max(round(v * denominator), 1 if v else 0) / denominator for v in values]
        error = max(abs(a - b) / b for a, b in zip(rounded, values, strict=True) if b)
        if error < least - 1e-12:
            best, least = rounded, error
    return best
