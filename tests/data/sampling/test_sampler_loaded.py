"""The order of a recipe's samples on real shards, and a run's batches over a resume with other ranks."""

from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clipcluster.data.loading.loader import Loader
from clipcluster.data.sampling.sampler import Sampler, sampler_of
from clipcluster.data.shards.dataset import Dataset
from clipcluster.data.shards.open import open_source
from clipcluster.data.tokenizer import ByteTokenizer
from clipcluster.errors import UserError
from clipcluster.recipe.sections.recipe import Recipe

TOKENIZER = ByteTokenizer(24)


def recipe_of(*sources: dict[str, Any], captions: str = "random", **data: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "small",
            "seed": 9,
            "data": {
                "train": list(sources),
                "batch_size": 8,
                "image": {"size": 8, "crop_scale": [0.3, 1.0], "flip": True},
                "text": {"captions": captions, "context_length": 24},
                "order": {"lanes": 4, "window": 4, "full_shuffle_below": 50},
                **data,
            },
            "model": {"image": {"timm": "convnext_atto"}, "text": {"arch": "gpt2"}},
            "optim": {"lr": 1e-3},
            "train": {"duration": "2 epochs"},
        }
    )


def opened(recipe: Recipe) -> tuple[list[Dataset], Sampler]:
    shards = [open_source(source, text=True) for source in recipe.data.train]
    return shards, sampler_of(recipe, shards)


Content = tuple[list[tuple[int, str, str]], torch.Tensor, torch.Tensor]


def batches(recipe: Recipe, ranks: int, workers: int, start: int, count: int) -> list[Content]:
    """Keys, pixels and tokens of `count` batches, put together from what each of the ranks loads."""
    shares = []
    for rank in range(ranks):
        shards, sampler = opened(recipe)
        loader = Loader(
            shards, sampler, recipe.data, tokenizer=TOKENIZER, seed=recipe.seed,
            rank=rank, world_size=ranks, workers=workers, start=start,
        )  # fmt: skip
        with closing(loader):
            shares.append([next(loader) for _ in range(count)])
    return [
        (
            [key for share in step for key in share.keys],
            torch.cat([share.images for share in step]),
            torch.cat([share.tokens for share in step if share.tokens is not None]),
        )
        for step in zip(*shares, strict=True)
    ]


def of_source(tokens: torch.Tensor, letter: str) -> int:
    """Samples whose caption begins with a letter."""
    first = TOKENIZER([letter])[0][0]
    where = int((TOKENIZER(["b"])[0][0] != TOKENIZER(["a"])[0][0]).nonzero()[0])
    return int((tokens[:, where] == first[where]).sum())


@pytest.mark.parametrize("extra", [{}, {"repeat": 1, "repeat_classes": {"1": 3, "2": 0.5}}])
def test_weights_of_three_to_one_over_resumes_with_other_ranks(
    tmp_path: Path, make_shards: Callable[..., Path], extra: dict[str, Any]
) -> None:
    first = make_shards(tmp_path / "a", 61, per_shard=9, texts=lambda number: [f"a {number}", f"a {-number}"])
    second = make_shards(tmp_path / "b", 23, per_shard=5, texts=lambda number: [f"b {number}"])
    recipe = recipe_of({"shards": str(first), "weight": 3, **extra}, {"shards": str(second), "weight": 1})
    whole = batches(recipe, 1, 0, 0, 24)
    for _, _, tokens in whole:
        assert (of_source(tokens, "a"), of_source(tokens, "b")) == (6, 2)
    # stopped after 7 batches on 2 ranks, after 12 on 4, after 17 on 1 with workers
    parts = batches(recipe, 2, 0, 0, 7) + batches(recipe, 4, 0, 7, 5)
    parts += batches(recipe, 1, 1, 12, 5) + batches(recipe, 4, 0, 17, 7)
    for (keys, images, tokens), (keys_, images_, tokens_) in zip(whole, parts, strict=True):
        assert keys == keys_
        assert torch.equal(images, images_)
        assert torch.equal(tokens, tokens_)


def test_a_pass_of_real_shards_shows_classes_as_often_as_the_recipe_says(
    tmp_path: Path, make_shards: Callable[..., Path]
) -> None:
    folder = make_shards(tmp_path / "a", 64, per_shard=9)  # class: number mod 4
    (folder / "classnames.txt").write_text("cat\ndog\nbird\nfish\n")
    recipe = recipe_of(
        {"shards": str(folder), "repeat": 2, "repeat_classes": {"dog": 0.5, "3": 0, "bird": 3}}
    )
    _, sampler = opened(recipe)
    assert (sampler.group_of(0).rounds.copies, sampler.samples) == (6, 16 * 2 + 8 + 16 * 3)
    assert sampler.steps_per_epoch == 11
    assert sampler.group_of(0).pass_draws == 22 * 8
    loaded = batches(recipe, 2, 0, 0, 22)
    shown = Counter(int(key[1:]) for keys, _, _ in loaded for _, _, key in keys)
    assert shown == {number: (4, 1, 6, 0)[number % 4] for number in range(64) if number % 4 != 3}
    pictures: dict[str, set[bytes]] = {}
    for keys, images, _ in loaded:
        for (_, _, key), image in zip(keys, images, strict=True):
            pictures.setdefault(key, set()).add(image.numpy().tobytes())
    # a copy is cropped anew
    assert np.mean([len(pictures[f"s{number:05d}"]) for number in range(0, 64, 4)]) > 3


def test_classes_are_asked_of_the_shards(tmp_path: Path, make_shards: Callable[..., Path]) -> None:
    folder = make_shards(tmp_path / "a", 20)
    with pytest.raises(UserError, match=r"data\.train\.0\.repeat_classes: there is no class 4"):
        opened(recipe_of({"shards": str(folder), "repeat_classes": {"4": 2}}))
    with pytest.raises(UserError, match=r"'cat' is the name of a class, and there is no classnames\.txt"):
        opened(recipe_of({"shards": str(folder), "repeat_classes": {"cat": 2}}))


@pytest.mark.parametrize(("extra", "shown"), [({"2": 0}, {0, 1, 3}), ({"3": 1.5}, {3})])
def test_a_bad_sample_is_never_replaced_by_one_of_a_class_left_out(
    tmp_path: Path, make_shards: Callable[..., Path], extra: dict[str, float], shown: set[int]
) -> None:
    folder = make_shards(tmp_path / "a", 48, per_shard=12, bad={1, 3, 5, 17, 31})  # class: number mod 4
    every = 0 if extra.get("3") else 1
    recipe = recipe_of({"shards": str(folder), "repeat": every, "repeat_classes": extra})
    loaded = batches(recipe, 2, 0, 0, 12 if every else 4)
    classes = Counter(int(key[1:]) % 4 for keys, _, _ in loaded for _, _, key in keys)
    assert set(classes) == shown
