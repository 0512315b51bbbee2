"""Repeats as a recipe writes them: by number or name of a class, and what is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipcluster.data.sampling.oversampling import Copies, repeats_of
from clipcluster.errors import UserError

CLASSES = np.array([0, 1, 2, 2, -1], dtype=np.int32)
NAMES = ["cat", "wire-haired dog", "bird", "crane", "crane"]


def of(by_class, every=1.0, classes=CLASSES, classnames=NAMES):
    return repeats_of(
        every, by_class, classes=classes, classnames=classnames, recipe_key="data.train.0", name="pets"
    )


def test_classes_go_by_number_and_by_name():
    repeats = of({"2": 3.0, "wire-haired dog": 0.5, "4": 0.0}, every=2.0)
    assert repeats.every == 2.0
    assert repeats.by_class == {2: 3.0, 1: 0.5, 4: 0.0}
    assert repeats.classes is CLASSES
    assert of({"2": 3.0}, classnames=None).by_class == {2: 3.0}


def test_nothing_said_is_nothing_repeated():
    assert of({}) is None
    assert of({}, every=2.0, classes=None, classnames=None).every == 2.0


@pytest.mark.parametrize(
    ("by_class", "given", "said"),
    [
        (
            {"brid": 2.0},
            {},
            r"repeat_classes: no class in classnames\.txt is called 'brid'; did you mean 'bird'",
        ),
        (
            {"submarine": 2.0},
            {},
            "called 'submarine'; it has 5 names; give one of them or the class's number",
        ),
        ({"crane": 2.0}, {}, "'crane' is the name of the classes 3, 4; give the number of one"),
        ({"5": 2.0}, {}, "there is no class 5; the classes are 0 to 4"),
        ({"3": 2.0}, {"classnames": None}, "there is no class 3; the classes are 0 to 2"),
        (
            {"cat": 2.0},
            {"classnames": None},
            r"'cat' is the name of a class, and there is no classnames\.txt",
        ),
        ({"0": 2.0, "cat": 3.0}, {}, "'0' and 'cat' are the same class; write it once"),
        (
            {"0": 2.0},
            {"classes": None},
            r"data\.train\.0\.repeat_classes: the samples of pets have no classes",
        ),
        ({"0": 2.0}, {"classes": np.full(5, -1, dtype=np.int32)}, "the samples of pets have no classes"),
    ],
)
def test_what_is_not_known_is_refused(by_class, given, said):
    with pytest.raises(UserError, match=said):
        of(by_class, **given)


@settings(max_examples=30)
@given(st.integers(0, 9), st.dictionaries(st.integers(0, 6), st.integers(0, 40), max_size=4))
def test_every_copy_lies_in_another_portion(every, by_class):
    classes = np.arange(-1, 100) % 9 - 1
    copies = Copies(every, by_class, classes)
    times = [by_class.get(number, every) for number in classes.tolist()]
    assert copies.most == max([every, *by_class.values()])
    held = np.zeros(len(classes), dtype=int)
    if not copies.by_class:
        assert set(times) <= {copies.most}
        return
    kinds, offsets = copies.kinds(slice(None)), copies.offsets(np.arange(len(classes)))
    for portion in range(copies.most):
        held += copies.held(portion)[kinds, offsets]
    assert held.tolist() == times
    for row, count in enumerate(times):
        portions = copies.portions(np.arange(count), np.full(count, kinds[row]), np.full(count, offsets[row]))
        assert sorted(portions.tolist()) == [
            portion for portion in range(copies.most) if copies.held(portion)[kinds[row], offsets[row]]
        ]
