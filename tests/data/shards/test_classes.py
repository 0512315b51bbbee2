"""What the sources tell of a classifier's classes."""

from dataclasses import dataclass

import numpy as np
import pytest

from clipcluster.data.shards.classes import check_classes, class_count
from clipcluster.errors import UserError


@dataclass
class Labelled:
    classes: np.ndarray
    classnames: list[str] | None = None
    name: str = "train"

    @property
    def n_samples(self) -> int:
        return len(self.classes)


def labelled(*classes: int, names: list[str] | None = None) -> Labelled:
    return Labelled(np.array(classes, np.int32), names)


def test_the_number_of_classes_is_the_given_one_or_that_of_the_names() -> None:
    assert class_count(None, [labelled(0), labelled(1, names=["a", "b", "c"])]) == 3
    assert class_count(7, [labelled(0, names=["a"])]) == 7
    with pytest.raises(UserError, match=r"^model.classes: no classnames.txt beside the shards"):
        class_count(None, [labelled(0)])
    with pytest.raises(UserError, match=r"data.train.2: its classnames.txt differs from"):
        class_count(None, [labelled(0, names=["a", "b"]), labelled(0), labelled(0, names=["b", "a"])])


def test_every_sample_has_a_class_that_the_model_has() -> None:
    check_classes(3, [labelled(0, 1, 2), labelled()])
    with pytest.raises(UserError, match=r"data.train.1 \(train\): 2 of 4 samples have no class \(KEY.cls\)"):
        check_classes(3, [labelled(0), labelled(0, -1, 2, -1)])
    with pytest.raises(UserError, match=r"a sample of class 3, and the model 3 classes \(0 to 2\)"):
        check_classes(3, [labelled(0, 3)])
