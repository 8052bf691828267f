"""File trees: what is copied and what counts as different."""

from __future__ import annotations

import hashlib
import pathlib

from tests.lab import trees

TREE = {"a": "1", "b/c": "2"}


def test_equal_trees_have_no_differences() -> None:
    assert trees.differences(TREE, dict(reversed(TREE.items()))) == ""


def test_each_kind_of_difference_is_named() -> None:
    found = {"b/c": "other", "d": "3"}
    assert trees.differences(TREE, found) == "1 missing: a; 1 not expected: d; 1 different: b/c"


def test_many_differences_are_counted_and_ten_are_shown() -> None:
    found = trees.differences({f"{n:02}": "" for n in range(30)}, {})
    assert found == "30 missing: 00, 01, 02, 03, 04, 05, 06, 07, 08, 09, …"


def test_real_files_are_enough_and_hashed_as_copied(tmp_path: pathlib.Path) -> None:
    tree = trees.real_files(tmp_path)
    sizes = [path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()]
    assert len(sizes) == len(tree) >= 1000
    assert sum(sizes) >= 30_000_000
    name = min(tree)
    assert tree[name] == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()


def test_made_files_are_the_same_for_the_same_seed(tmp_path: pathlib.Path) -> None:
    first = trees.made_files(tmp_path / "one", ["x", "y/z"], seed=3)
    assert trees.made_files(tmp_path / "two", ["x", "y/z"], seed=3) == first
    assert (tmp_path / "one/y/z").read_bytes() == (tmp_path / "two/y/z").read_bytes()


def test_what_the_writer_said_is_a_tree() -> None:
    assert trees.written("w-0001 abc\nw-0002 def\n") == {"w-0001": "abc", "w-0002": "def"}
