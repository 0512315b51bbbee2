from collections.abc import Callable
from pathlib import Path

import pytest

from clipcluster.errors import UserError
from clipcluster.recipe import files
from clipcluster.recipe.files import find_site, known_sites, user_folder, with_parents
from clipcluster.recipe.load import Loaded, load, result_keys


@pytest.fixture
def sites(recipe_file: Path) -> Path:
    """The user's folder of profiles, empty."""
    folder = recipe_file.parent / "config" / "clipcluster" / "sites"
    folder.mkdir(parents=True)
    return folder


def environ(folder: Path) -> dict[str, str]:
    return {"XDG_CONFIG_HOME": str(folder.parents[1])}


def test_the_users_folder() -> None:
    assert user_folder({"XDG_CONFIG_HOME": "/c"}) == Path("/c/clipcluster/sites")
    assert user_folder({"HOME": "/h"}) == Path("/h/.config/clipcluster/sites")


def test_the_shipped_example_is_known_and_never_taken_unasked(sites: Path) -> None:
    assert "example" in known_sites(environ(sites))
    assert find_site(None, environ(sites)) is None
    example = find_site("example", environ(sites))
    assert example is not None
    assert list(example.entries) == ["cluster"]


def test_the_only_profile_is_taken(sites: Path, small: Callable[..., Loaded]) -> None:
    (sites / "mine.yaml").write_text("cluster: {partition: gpu, account: me, environment: {A: a, B: b}}\n")
    loaded = small("cluster.environment.B=c", "cluster.account=you")
    assert loaded.recipe.cluster.partition == "gpu"
    assert loaded.recipe.cluster.account == "you"
    assert loaded.recipe.cluster.environment == {"A": "a", "B": "c"}
    (sites / "other.yaml").write_text("cluster: {partition: cpu}\n")
    assert small().recipe.cluster.partition is None


def test_the_recipe_goes_over_the_profile(sites: Path, recipe_file: Path) -> None:
    (sites / "mine.yaml").write_text("cluster: {partition: gpu, qos: high}\n")
    recipe_file.write_text(recipe_file.read_text() + "cluster: {partition: low}\n")
    cluster = load(recipe_file, (), environ(sites), site="mine").recipe.cluster
    assert (cluster.partition, cluster.qos) == ("low", "high")


def test_a_profile_changes_no_runs_name(sites: Path, recipe_file: Path) -> None:
    (sites / "mine.yaml").write_text("cluster: {nodes: 2, gpus_per_node: 8}\n")
    without = load(recipe_file, (), {"XDG_CONFIG_HOME": "/nowhere"})
    assert result_keys(load(recipe_file, (), environ(sites))) == result_keys(without)


def test_an_unknown_profile_names_the_nearest(sites: Path) -> None:
    (sites / "juwels.yaml").write_text("cluster: {}\n")
    with pytest.raises(UserError, match=r"no site profile is called jewels; did you mean juwels\?"):
        find_site("jewels", environ(sites))
    with pytest.raises(UserError, match="known: example, juwels"):
        find_site("zzz", environ(sites))


def test_a_profile_holds_the_cluster_section_only(sites: Path) -> None:
    (sites / "mine.yaml").write_text("cluster: {}\npartition: gpu\n")
    with pytest.raises(
        UserError, match=r"mine\.yaml:2: partition: a site profile has only the section cluster"
    ):
        find_site("mine", environ(sites))


def test_an_error_in_a_profile_names_its_line(sites: Path, recipe_file: Path) -> None:
    (sites / "mine.yaml").write_text("cluster:\n  partitoin: gpu\n")
    with pytest.raises(
        UserError, match=r"mine\.yaml:2: cluster\.partitoin: unknown key; did you mean cluster\.part"
    ):
        load(recipe_file, (), environ(sites))


def test_each_folder_looked_in_is_named_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "RECIPES", tmp_path / "recipes")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "r.yaml").write_text("extends: none.yaml\n")
    with pytest.raises(UserError, match=r"none.yaml does not exist \(looked in recipes\);"):
        with_parents(Path("recipes/r.yaml"), {})
