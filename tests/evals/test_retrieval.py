"""Grouped and paired retrieval on models whose every similarity is known."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Oracle, context, oracle_set
from torch.nn import functional

from clipcluster.errors import UserError
from clipcluster.evals import ranking, retrieval


def measure(model: Oracle, captions: list[list[str]], **keys: object) -> dict[str, float]:
    return dict(retrieval.retrieval(model, oracle_set(captions, **keys), context(), lambda: None))


def five_each(images: int) -> list[list[str]]:
    return [[f"caption {5 * image + number}" for number in range(5)] for image in range(images)]


def perfect(images: int) -> Oracle:
    """Every caption has its image's vector."""
    return Oracle(torch.eye(images), torch.eye(images).repeat_interleave(5, dim=0))


def test_a_perfect_model_with_five_captions() -> None:
    found = measure(perfect(12), five_each(12))
    for side in ("i2t", "t2i"):
        assert found[f"{side}_r1"] == found[f"{side}_mean_rank"] == found[f"{side}_median_rank"] == 1
        # OpenCLIP's convention: four of five rows are beaten by a copy.
        assert found[f"paired_{side}_r1"] == pytest.approx(0.2)
        assert found[f"paired_{side}_r5"] == 1
        assert found[f"paired_{side}_mean_rank"] == found[f"paired_{side}_median_rank"] == 3
    assert (found["images"], found["pairs"], found["distinct_captions"]) == (12, 60, 60)


def test_a_collapsed_model_scores_as_chance_does() -> None:
    images = 40
    same = functional.normalize(torch.ones(5 * images, 16), dim=1)
    found = measure(Oracle(same[:images], same), five_each(images))
    for side in ("i2t", "t2i"):
        for cut in (1, 5, 10):
            assert found[f"{side}_r{cut}"] <= cut / images + 1e-9
            assert found[f"paired_{side}_r{cut}"] == pytest.approx(cut / (5 * images))
        assert found[f"paired_{side}_mean_rank"] == pytest.approx((5 * images + 1) / 2)
    assert found["t2i_mean_rank"] == pytest.approx((images + 1) / 2)


def test_a_broken_model_scores_no_better_than_chance() -> None:
    broken = torch.full((60, 4), float("nan"))
    found = measure(Oracle(broken[:12], broken), five_each(12))
    assert found["i2t_r1"] == found["t2i_r1"] == pytest.approx(1 / 12)


def test_identical_captions_are_one_that_belongs_to_all_their_images() -> None:
    captions = [["a digit 0", "seen 2"], ["a digit 0"], ["a digit 1"]]
    texts = torch.eye(3)
    found = measure(Oracle(texts[[0, 0, 1]], texts), captions)
    assert (found["distinct_captions"], found["pairs"], found["images"]) == (3, 4, 3)
    assert found["i2t_r1"] == 1
    # "seen 2" looks like no image: all tie, its own stands first.
    assert found["t2i_r1"] == 1
    # Rows 0 and 2 are copies of the same pair: the second one is beaten by the first.
    assert found["paired_i2t_r1"] == pytest.approx(2 / 4)


def test_an_image_without_a_caption_is_a_candidate_only() -> None:
    texts = torch.eye(2)
    found = measure(Oracle(texts[[1, 0, 1]], texts), [[], ["first 0"], ["second 1"]])
    assert (found["images"], found["pairs"]) == (3, 2)
    assert found["i2t_r1"] == 1
    assert found["t2i_r1"] == 0.5  # image 0 looks like image 2 and comes first


def test_an_image_that_cannot_be_decoded_is_no_candidate() -> None:
    found = measure(perfect(12), five_each(12), left_out=(3, 11))
    assert (found["images"], found["distinct_captions"], found["i2t_r1"]) == (10, 50, 1)


def test_a_set_without_captions_is_refused() -> None:
    with pytest.raises(UserError, match=r"no image in data/val has a caption"):
        measure(perfect(3), [[], [], []])


def test_batches_are_closed_when_a_stop_comes() -> None:
    made = []
    images = oracle_set(five_each(4), batch_size=1)
    recorded = type(images)(**{**vars(images), "batches": lambda: made.append(images.batches()) or made[-1]})

    class Stopped(Exception):
        pass

    def stop() -> None:
        raise Stopped

    with pytest.raises(Stopped):
        list(retrieval.retrieval(perfect(4), recorded, context(), stop))
    assert made[0].closed


@settings(max_examples=60, deadline=None)
@given(
    captions=st.lists(st.lists(st.integers(0, 5), max_size=4), min_size=1, max_size=7).filter(any),
    seed=st.integers(0, 1000),
    elements=st.sampled_from([1, 7, 1 << 20]),
)
def test_figures_are_the_definitions(captions: list[list[int]], seed: int, elements: int) -> None:
    torch.manual_seed(seed)
    # Few directions, so that ties and copies abound.
    image = functional.one_hot(torch.randint(0, 3, (len(captions),)), 3).float()
    text = functional.one_hot(torch.randint(0, 3, (6,)), 3).float()
    sentences = [[f"text {number}" for number in own] for own in captions]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "CHUNK_ELEMENTS", elements)
        found = measure(Oracle(image, text), sentences)

    distinct = list(dict.fromkeys(itertools.chain(*captions)))
    texts, similar = text[distinct], image @ text[distinct].T
    i2t = [
        min(_order(similar[number]).index(distinct.index(own)) for own in owns)
        for number, owns in enumerate(captions)
        if owns
    ]
    t2i = [
        min(_order(similar[:, column]).index(number) for number, owns in enumerate(captions) if own in owns)
        for column, own in enumerate(distinct)
    ]
    pairs = [(number, distinct.index(own)) for number, owns in enumerate(captions) for own in owns]
    rows, columns = (torch.tensor(side) for side in zip(*pairs, strict=True))
    paired = image[rows] @ texts[columns].T
    expected = {
        "i2t": i2t,
        "t2i": t2i,
        "paired_i2t": [_order(paired[row]).index(row) for row in range(len(pairs))],
        "paired_t2i": [_order(paired[:, row]).index(row) for row in range(len(pairs))],
    }
    for name, places in expected.items():
        for kind, value in ranking.figures(torch.tensor(places).numpy()):
            assert found[f"{name}_{kind}"] == pytest.approx(value), (name, kind)


def _order(scores: torch.Tensor) -> list[int]:
    return sorted(range(len(scores)), key=lambda candidate: (-scores[candidate].item(), candidate))
