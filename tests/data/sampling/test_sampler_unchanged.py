"""Orders without repeats and with one caption field, as they were before either could be asked for.

A run that resumes under a newer version must meet the batches it would have met: no digest here may change.
"""

import hashlib

import numpy as np
import pytest

from clipcluster.data.sampling.sampler import Sampler, SamplerSource
from tests.data.sources import sampler_source

COUNTS = (np.arange(1500) * 7 % 4).astype(np.uint8)
STEPS = (0, 1, 30, 31, 77, 1_000_000)


def one() -> list[SamplerSource]:
    return [sampler_source(np.full(15, 100), COUNTS)]


def one_without_captions() -> list[SamplerSource]:
    return [sampler_source(np.array([0, 7, 640, 1, 0, 333]))]


def together() -> list[SamplerSource]:
    return [
        sampler_source(np.full(15, 100), COUNTS),
        sampler_source(np.full(9, 50)),
        sampler_source(np.full(3, 9)),
    ]


def weighted() -> list[SamplerSource]:
    return [sampler_source(np.full(15, 100), COUNTS, 0.7), sampler_source(np.full(9, 50), None, 0.3)]


def digest(sampler: Sampler) -> str:
    hashed = hashlib.blake2b(repr((sampler.samples, sampler.steps_per_epoch)).encode(), digest_size=8)
    for t in STEPS:
        draws = sampler.batch(t)
        for column in (draws.source, draws.pass_index, draws.position, draws.caption):
            hashed.update(column.astype("<i8").tobytes())
    return hashed.hexdigest()


@pytest.mark.parametrize(
    ("sources", "captions", "full_shuffle_below", "expected"),
    [
        (one, "all", 0, "1af3b57f6f99287a"),
        (one, "all", 1000000, "3d48d51909496d4b"),
        (one, "random", 0, "b9995be77de6ae25"),
        (one, "random", 1000000, "6c1ae0b8e2446bf7"),
        (one, "first", 0, "743327acd5e326f7"),
        (one, "first", 1000000, "4ad6d1f4596b054c"),
        (one_without_captions, "all", 0, "b2615094563ed9b9"),
        (one_without_captions, "all", 1000000, "c5e86ed4e4e3bc8e"),
        (one_without_captions, "random", 0, "b2615094563ed9b9"),
        (one_without_captions, "random", 1000000, "c5e86ed4e4e3bc8e"),
        (one_without_captions, "first", 0, "b2615094563ed9b9"),
        (one_without_captions, "first", 1000000, "c5e86ed4e4e3bc8e"),
        (together, "all", 0, "4cd5edb65f5d1493"),
        (together, "all", 1000000, "069e9418774fea80"),
        (together, "random", 0, "56581385b8ec8d7e"),
        (together, "random", 1000000, "4e1f9b6cf25377a2"),
        (together, "first", 0, "688b1fc0f45c222b"),
        (together, "first", 1000000, "b4fa18c73aee9f28"),
        (weighted, "all", 0, "2bd43c65d57d7635"),
        (weighted, "all", 1000000, "03be495cca4d8107"),
        (weighted, "random", 0, "4c3bd79f3b66b536"),
        (weighted, "random", 1000000, "e537c0cb150b4fb5"),
        (weighted, "first", 0, "8d94269eaf5e0434"),
        (weighted, "first", 1000000, "dfbf75335f155969"),
    ],
)
def test_an_order_without_repeats_and_fields_is_what_it_was(sources, captions, full_shuffle_below, expected):
    sampler = Sampler(
        sources(), batch_size=48, seed=11, captions=captions, lanes=8, window=16,
        full_shuffle_below=full_shuffle_below,
    )  # fmt: skip
    assert digest(sampler) == expected
