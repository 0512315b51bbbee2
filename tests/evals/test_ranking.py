"""The place of the right candidate against the definition, spelled out."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import ALONE
from torch.nn import functional

from clipcluster.evals.ranking import TIE, Pairs, best_of, exact, figures, places_of, rank_pairs, scores_of
from clipcluster.evals.retrieval import figures_of


def nothing() -> None:
    pass


def place(scores: np.ndarray, right: list[int]) -> int:
    """The definition: ties within TIE of the best right candidate go to the lower number."""
    best = max(scores[right])
    own = min(number for number in right if scores[number] >= best - TIE)
    return sum(
        score > best + TIE or (number < own and score >= best - TIE) for number, score in enumerate(scores)
    )


def reference(images: np.ndarray, texts: np.ndarray, pairs: list[tuple[int, int]]) -> dict[str, list[int]]:
    """The places of both conventions, query by query, in float64."""
    similar = images @ texts.T
    rows, columns = np.array(pairs).T
    paired = images[rows] @ texts[columns].T
    return {
        "i2t": [place(similar[i], [t for j, t in pairs if j == i]) for i in sorted(set(rows))],
        "t2i": [place(similar[:, t], [i for i, u in pairs if u == t]) for t in range(len(texts))],
        "paired_i2t": [place(paired[row], [row]) for row in range(len(pairs))],
        "paired_t2i": [place(paired[:, row], [row]) for row in range(len(pairs))],
    }


@st.composite
def pairings(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Images with some texts each, or none; texts of several images; every text in a pair."""
    texts = draw(st.integers(1, 9))
    owned = draw(st.lists(st.sets(st.integers(0, texts - 1), max_size=5), min_size=1, max_size=8))
    used = sorted(set().union(*owned))
    pairs = [(image, used.index(text)) for image, own in enumerate(owned) for text in sorted(own)]
    return pairs or [(0, 0)]


@settings(max_examples=80, deadline=None)
@given(pairings(), st.integers(0, 10_000), st.sampled_from([1, 5, 23, 1 << 22]), st.booleans())
def test_places_are_the_definition_with_any_chunk(
    pairs: list[tuple[int, int]], seed: int, elements: int, ties: bool
) -> None:
    random = torch.Generator().manual_seed(seed)
    count = max(image for image, _ in pairs) + 1, max(text for _, text in pairs) + 1
    sides = [functional.normalize(torch.randn(n, 6, generator=random), dim=1) for n in count]
    if ties:  # few directions, copied
        sides = [functional.normalize(side.sign(), dim=1) for side in sides]
    columns = Pairs(*torch.tensor(pairs).T)
    found = rank_pairs(sides[0], sides[1], columns, ALONE, nothing, elements)
    found["i2t"] = found["i2t"][sorted({image for image, _ in pairs})]
    images, texts = (exact(side).numpy() for side in sides)
    expected = reference(images, texts, pairs)
    assert {name: own.tolist() for name, own in found.items()} == expected
    assert np.abs(images - sides[0].double().numpy()).max() <= 2**-26


def test_scores_are_the_same_to_the_last_bit_however_they_are_cut() -> None:
    torch.manual_seed(0)
    images, texts = (exact(functional.normalize(torch.randn(n, 512), dim=1)) for n in (301, 407))
    whole = scores_of(images, texts)
    parts = [scores_of(one, texts) for size in (1, 7, 300) for one in images.split(size)]
    assert all(torch.equal(torch.cat(own), whole) for own in (parts[:301], parts[301:344], parts[344:]))
    assert torch.equal(scores_of(texts.flip(1), images.flip(1)).T, whole)
    numbers = torch.randint(0, 301, (999,)).sort().values, torch.randint(0, 407, (999,))
    assert (Pairs(*numbers).scores(images, texts) == whole[numbers].numpy()).all()


def test_differences_of_rounding_are_ties() -> None:
    scores = torch.tensor([[0.5, 0.5 + 5e-7, 0.5 - 5e-7]])
    for own in range(3):
        assert places_of(scores, torch.tensor([own])) == own
    assert best_of(torch.tensor([[0.2, 0.5, 0.5 + 2e-7, 0.9]]), 3).tolist() == [[3, 1, 2]]


def test_what_is_not_a_number_comes_last() -> None:
    nan = float("nan")
    scores = torch.tensor([[0.5, nan, 0.1], [nan, nan, nan], [nan, 0.9, 0.8]])
    assert places_of(scores, torch.tensor([1, 2, 2])).tolist() == [2, 2, 1]
    broken = torch.full((3, 2), nan)
    found = rank_pairs(broken, broken, Pairs(torch.arange(3), torch.arange(3)), ALONE, nothing)
    assert all(own.tolist() == [0, 1, 2] for own in found.values())


@settings(max_examples=50)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=20))
def test_figures_are_those_of_openclip(places: list[int]) -> None:
    found = dict(figures(np.array(places)))
    for cut in (1, 5, 10):
        assert found[f"r{cut}"] == pytest.approx(sum(place < cut for place in places) / len(places))
    assert found["mean_rank"] == pytest.approx(sum(places) / len(places) + 1)
    assert found["median_rank"] == np.floor(np.median(places)) + 1


def test_the_figures_of_rows_are_those_that_openclip_computes() -> None:
    train = pytest.importorskip("open_clip_train.train")
    torch.manual_seed(1)
    sides = [functional.normalize(torch.randn(150, 32), dim=1) for _ in range(2)]
    theirs = train.get_clip_metrics(*sides, torch.tensor(1.0))
    rows = torch.arange(150)
    found = figures_of(rank_pairs(*sides, Pairs(rows, rows), ALONE, nothing))
    for ours, their in (("i2t", "image_to_text"), ("t2i", "text_to_image")):
        for prefix in ("", "paired_"):
            for cut in (1, 5, 10):
                assert found[f"{prefix}{ours}_r{cut}"] == theirs[f"{their}_R@{cut}"]
            assert found[f"{prefix}{ours}_mean_rank"] == pytest.approx(theirs[f"{their}_mean_rank"])
            assert found[f"{prefix}{ours}_median_rank"] == theirs[f"{their}_median_rank"]
    six = [theirs[f"{way}_R@{cut}"] for way in ("image_to_text", "text_to_image") for cut in (1, 5, 10)]
    assert found["mean_recall"] == found["paired_mean_recall"] == pytest.approx(np.mean(six))
