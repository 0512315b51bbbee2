from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipcluster.errors import UserError
from clipcluster.recipe.tree import (
    Entry,
    Variable,
    assign,
    find,
    merge,
    parse_file,
    parse_override,
    read_scalar,
)


def tree_of(tmp_path: Path, text: str, name: str = "r.yaml") -> Entry:
    file = tmp_path / name
    file.write_text(text)
    return parse_file(file)


def value_at(tree: Entry, *path: str | int) -> object:
    entry = find(tree, path)
    assert entry is not None
    return entry.value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7e-4", 7e-4),
        ("7.0e-4", 7e-4),
        ("1_000", 1000),
        ("1_000.5", 1000.5),
        (".5", 0.5),
        ("-3", -3),
        ("+3", 3),
        ("", None),
        ("~", None),
        ("Null", None),
        ("true", True),
        ("FALSE", False),
        ("no", "no"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("007", "007"),
        ("2024-01-01", "2024-01-01"),
        ("1e", "1e"),
        ("e3", "e3"),
        ("0.1.2", "0.1.2"),
        ("-", "-"),
        ("_1", "_1"),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    found = read_scalar(text)
    assert found == value
    assert isinstance(found, bool) == isinstance(value, bool)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_is_read_back(value: float) -> None:
    assert read_scalar(repr(value)) == value


@given(st.text(max_size=20))
def test_no_text_breaks_the_reader(text: str) -> None:
    read_scalar(text)


def test_entries_know_their_lines(tmp_path: Path) -> None:
    tree = tree_of(tmp_path, "a: 1\nb:\n  c: [x, '${y}']\n")
    assert tree.entries["b"].origin.place.endswith("r.yaml:2")
    assert tree.entries["b"].entries["c"].origin.place.endswith("r.yaml:3")
    assert value_at(tree, "b", "c", 1) == Variable("${y}", bare=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", r"r\.yaml:3: a: written twice, first at .*r\.yaml:1"),
        ("o:\n  a: 1\n  a: 2\n", r"r\.yaml:3: a: written twice"),
        ("- 1\n", "mapping"),
        ("just text", "mapping"),
        ("a: [1\nb: 2", r"r\.yaml:2: not YAML"),
        ("a: 1\n\tb: 2\n", r"r\.yaml:2: a tab character"),
        ("a: &x {b: *x}\n", "alias"),
        ("a: !!python/object:os.system {}\n", "tag"),
        ("x: &x {b: 1}\ny:\n  <<: *x\n", r"r\.yaml:3: merge keys .* extends"),
        ("? [a, b]\n: 1\n", "a key should be a word"),
        ("a: 1\n---\nb: 2\n", "not YAML"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tree_of(tmp_path, text)


def test_an_alias_may_repeat_a_value(tmp_path: Path) -> None:
    tree = tree_of(tmp_path, "a: &x [1, 2]\nb: *x\n")
    assert [entry.value for entry in tree.entries["b"].value] == [1, 2]  # type: ignore[union-attr]


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"a: \xff\xfe\n")
    with pytest.raises(UserError, match="UTF-8"):
        parse_file(tmp_path / "r.yaml")


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is empty"):
        tree_of(tmp_path, "# nothing\n")


def test_merge_goes_into_mappings_and_replaces_lists(tmp_path: Path) -> None:
    below = tree_of(tmp_path, "a: {b: 1, c: 2}\nd: [1, 2]\ne: {x: 1}\n", "below.yaml")
    above = tree_of(tmp_path, "a: {c: 3}\nd: [9]\ne: null\n", "above.yaml")
    merged = merge(below, above)
    assert [value_at(merged, "a", name) for name in "bc"] == [1, 3]
    assert len(merged.entries["d"].value) == 1  # type: ignore[arg-type]
    assert merged.entries["e"].value is None
    inner = merged.entries["a"].entries
    assert "below.yaml" in inner["b"].origin.place
    assert "above.yaml" in inner["c"].origin.place
    assert value_at(below, "a", "c") == 2
    both = merge(below, tree_of(tmp_path, "d: [{x: 1}, 5]\n"), lists=True)
    assert value_at(both, "d", 0, "x") == 1
    assert value_at(both, "d", 1) == 5


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("a.b.0.c=3", ["a", "b", "0", "c"], 3),
        ("a=", ["a"], None),
        ("a=b=c", ["a"], "b=c"),
        ("s=${DATA}/x", ["s"], Variable("${DATA}/x", bare=True)),
        ("s=/d/{00..09}.tar", ["s"], "/d/{00..09}.tar"),
    ],
)
def test_an_override_is_a_path_and_a_value(text: str, path: list[str], value: object) -> None:
    keys, entry = parse_override(text)
    assert keys == path
    assert entry.value == value
    key = ".".join(path)
    assert entry.origin.problem(key, "wrong") == f"from the command line: {text}: wrong"
    assert entry.origin.problem(f"{key}.b", "wrong") == f"from the command line: {text}: {key}.b: wrong"


@pytest.mark.parametrize("text", ["a", "=3", "a..b=3", ".a=1", "a=[1", "a=*x"])
def test_what_is_no_override(text: str) -> None:
    with pytest.raises(UserError, match="from the command line"):
        parse_override(text)


def test_assign_makes_the_sections_between(tmp_path: Path) -> None:
    tree = tree_of(tmp_path, "a: null\nl: [{x: 1}, {x: 2}]\n")
    for text in ("a.b.c=1", "n.m=2", "l.1.x=5", "l.0={y: 7}"):
        tree = assign(tree, *parse_override(text))
    assert value_at(tree, "a", "b", "c") == 1
    assert value_at(tree, "n", "m") == 2
    assert value_at(tree, "l", 1, "x") == 5
    assert value_at(tree, "l", 0, "y") == 7
    assert tree.entries["a"].origin.override == "a.b.c=1"
    assert tree.entries["l"].origin.override is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("l.2.x=1", "l is a list: '2' should be 0 to 1"),
        ("l.x=1", "l is a list: 'x' should be 0 to 1"),
        ("l.-1=1", "l is a list"),
        ("l.²=1", "l is a list"),
        ("s.x=1", r"s is a value \(7\) and has no key 'x'"),
    ],
)
def test_assign_refuses_a_step_into_nothing(tmp_path: Path, text: str, message: str) -> None:
    tree = tree_of(tmp_path, "l: [1, 2]\ns: 7\n")
    with pytest.raises(UserError, match=message):
        assign(tree, *parse_override(text))
