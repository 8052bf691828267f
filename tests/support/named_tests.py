"""The tests that a page of the documentation names, as `module::test`, and those that there are."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

TESTS = Path(__file__).parents[1]


def named_in(page: str) -> list[tuple[str, str]]:
    """Each module and test that the page names, once."""
    return sorted(set(re.findall(r"`(test_\w+)::(test_\w+)`", page)))


@functools.cache
def functions_of(module: str) -> set[str]:
    """The tests, and all other functions, in every module of that name."""
    trees = [ast.parse(path.read_text()) for path in TESTS.rglob(f"{module}.py")]
    return {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
