"""Grouped and paired retrieval on models whose every similarity is known."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Oracle, context, oracle_set
from torch.nn import functional

from clipcluster.errors import UserError
from clipcluster.evals import ranking, retrieval
from clipcluster.evals.features import EXAMPLES


def measure(model: Oracle, captions: list[list[str]], **keys: object) -> dict[str, float]:
    return retrieval.retrieval(model, oracle_set(captions, **keys), context(), lambda: None).metrics


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
    assert found["mean_recall"] == 1
    assert found["paired_mean_recall"] == pytest.approx((0.2 + 1 + 1) / 3)
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
        retrieval.retrieval(perfect(4), recorded, context(), stop)
    assert made[0].closed


@settings(max_examples=40, deadline=None)
@given(
    captions=st.lists(st.lists(st.integers(0, 5), max_size=4), min_size=1, max_size=7).filter(any),
    seed=st.integers(0, 1000),
)
def test_figures_are_the_definitions(captions: list[list[int]], seed: int) -> None:
    torch.manual_seed(seed)
    # Few directions, so that ties and copies abound.
    image = functional.one_hot(torch.randint(0, 3, (len(captions),)), 3).float()
    text = functional.one_hot(torch.randint(0, 3, (6,)), 3).float()
    sentences = [[f"text {number}" for number in own] for own in captions]
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


def test_the_worst_queries_are_shown_with_what_was_found_instead() -> None:
    torch.manual_seed(0)
    captions = [*five_each(29), []]  # the last image is a candidate without a caption
    model = Oracle(torch.randn(30, 8), torch.randn(150, 8))
    model.images, model.texts = (functional.normalize(own, dim=1) for own in (model.images, model.texts))
    found = retrieval.retrieval(model, oracle_set(captions, left_out=[3]), context(), lambda: None)
    scores = model.texts @ model.images.T
    scores[:, 3] = -math.inf
    assert {way: len(own) for way, own in found.details.items()} == {"t2i": EXAMPLES, "i2t": EXAMPLES}
    places = [one["place"] for one in found.details["t2i"]]
    assert places == sorted(places, reverse=True)
    for one in found.details["t2i"]:
        caption = int(one["query"]["caption"].split()[-1])
        assert one["query"] == {
            "shard": "00000.tar",
            "key": f"{caption // 5:04d}",
            "caption": f"caption {caption}",
        }
        order = scores[caption].argsort(descending=True).tolist()
        assert one["place"] == order.index(caption // 5) + 1
        assert [int(own["key"]) for own in one["top"]] == order[:5]
        for own, image in zip(one["top"], order, strict=False):
            assert own["score"] == pytest.approx(float(scores[caption, image]), abs=1e-4)
            assert own["right"] == (image == caption // 5)
            assert own["caption"] == (None if image == 29 else f"caption {5 * image}")
    worst = found.details["i2t"][0]
    assert worst["place"] >= found.details["i2t"][-1]["place"]
    of_texts = scores.T[int(worst["query"]["key"])].clone()
    of_texts[15:20] = of_texts[145:] = -math.inf  # of the image that cannot be decoded, and no captions
    assert [own["caption"] for own in worst["top"]] == [
        f"caption {number}" for number in of_texts.argsort(descending=True)[:5].tolist()
    ]


def test_the_details_of_a_perfect_model_are_its_first_queries() -> None:
    found = retrieval.retrieval(perfect(12), oracle_set(five_each(12)), context(), lambda: None)
    assert [one["place"] for one in found.details["t2i"]] == [1] * EXAMPLES
    (first, *_), (image, *_) = found.details["t2i"], found.details["i2t"]
    assert first["query"]["caption"] == "caption 0"
    assert [own["right"] for own in first["top"]] == [True, False, False, False, False]
    assert [own["right"] for own in image["top"]] == [True] * 5
