"""The estimate of a step against the memory of a device."""

import pytest

from clipcluster.recipe.load import load
from jobs.check import memory
from tools import slurm

GB = 1 << 30


@pytest.fixture
def recipe_with(tmp_path):
    """The demo's recipe with these keys."""

    def load_with(*overrides):
        return load("recipes/digits.yaml", ["cluster.gpus_per_node=1", *overrides]).recipe

    return load_with


@pytest.mark.parametrize(
    ("kind", "gigabytes"),
    [
        ("a100", 40),
        ("nvidia_a100-sxm4-80gb", 80),
        ("A100_1g.10gb", 10),
        ("h200", 141),
        ("tesla_v100", 16),
        ("", None),
        ("quantum", None),
        ("g5", None),
    ],
)
def test_the_memory_of_a_type_of_gpu(kind, gigabytes) -> None:
    assert memory.gpu_bytes(kind) == (gigabytes * GB if gigabytes else None)


def test_what_a_rank_has(recipe_with) -> None:
    nodes = slurm.parse_nodes("g1|idle|low|16|64000|(null)|gpu:a100:4,gpu:h100:2|none\n")
    assert memory.device_of(recipe_with(), nodes) == memory.Device(40 * GB, "a GPU of type a100", False)
    given = memory.device_of(recipe_with("cluster.gpu_memory=80 GB"), nodes)
    assert given == memory.Device(80 * GB, "cluster.gpu_memory", True)
    chosen = memory.device_of(recipe_with("cluster.gpu_type=h100"), nodes)
    assert chosen == memory.Device(80 * GB, "a GPU of type h100", False)
    unknown = slurm.parse_nodes("g1|idle|low|16|64000|(null)|gpu:4|none\n")
    assert memory.device_of(recipe_with(), unknown) is None
    on_cpu = ("cluster.gpus_per_node=0", "cluster.tasks_per_node=2", "cluster.mem=8 GB")
    own = memory.device_of(recipe_with(*on_cpu), [])
    assert own is not None
    assert (own.bytes, own.certain) == (4 * GB, True)


def test_a_step_that_does_not_fit_is_an_error_only_where_the_memory_is_certain(recipe_with) -> None:
    recipe, parts = recipe_with("data.batch_size=64"), {"weights": GB, "activations": 49 * GB}
    sure, guessed = memory.Device(40 * GB, "here", True), memory.Device(40 * GB, "there", False)
    (error,) = memory.compare(recipe, 1, parts, sure).errors
    assert error.startswith(
        "train.micro_batch: a step needs about 50.0 GB a rank (weights 1.0 GB, activations 49.0 GB), of 40.0 "
        "GB (here). Set train.micro_batch to 32 (64 samples are processed at once); or set "
        "train.activation_checkpointing to true"
    )
    assert memory.compare(recipe, 1, parts, guessed).warnings == [error.replace("(here)", "(there)")]
    tight = memory.compare(recipe, 1, parts, memory.Device(52 * GB, "here", True))
    assert (len(tight.errors), len(tight.warnings)) == (0, 1)
    fits = memory.compare(recipe, 1, parts, memory.Device(80 * GB, "here", True))
    assert (fits.errors, fits.warnings) == ([], [])
    assert fits.summary == [
        "memory: about 50.0 GB a rank (weights 1.0 GB, activations 49.0 GB), of 80.0 GB (here)"
    ]
