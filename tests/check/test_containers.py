"""What the ranks of a container will not see, said before queueing."""

from pathlib import Path

import pytest

from clipcluster.check.containers import warnings
from clipcluster.recipe.load import load

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "digits.yaml"


@pytest.mark.parametrize(
    ("mounts", "runtime", "hidden"),
    [
        ("[]", "apptainer", True),
        ("[/data]", "apptainer", False),
        ("['/data:/data:ro', /scratch]", "pyxis", False),
        ("['/data:/inside']", "pyxis", True),  # at another path
        ("[/dat]", "pyxis", True),
    ],
)
def test_paths_outside_of_every_mount(mounts, runtime, hidden, tmp_path):
    (tmp_path / "torch.sif").touch()
    section = f"cluster.container={{runtime: {runtime}, image: {tmp_path}/torch.sif, mounts: {mounts}}}"
    found = warnings(load(RECIPE, [section], {"DIGITS": "/data/digits"}))
    assert len(found) == hidden
    if hidden:
        assert "data.train.0.shards (/data/digits/train, and 2 other paths)" in found[0]
        assert "cluster.container.mounts" in found[0]


def test_an_image_that_is_not_here_and_one_with_an_address():
    for image, there in (("/nowhere/torch.sif", False), ("docker://pytorch/pytorch", True)):
        section = f"cluster.container={{runtime: apptainer, image: '{image}', mounts: [/data]}}"
        found = warnings(load(RECIPE, [section], {"DIGITS": "/data/digits"}))
        assert [f"{image} does not exist" in line for line in found] == [True] * (not there)
    assert warnings(load(RECIPE, [], {"DIGITS": "/data/digits"})) == []
