"""An algorithm is known by its class: nothing elsewhere compares its name, or the names of its parts."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from lorasmith.adapters.algorithms import AlgorithmName
from lorasmith.adapters.registry import ADAPTERS, IN_FLOAT32

ROOT = Path(__file__).parents[2]
OTHERS_NAMES = ROOT / "src" / "lorasmith" / "config" / "other_trainers"
NAMES = {kind.algorithm for kind in ADAPTERS} - {"LoRA"}  # which is also what all of them are called
PARTS = frozenset[str]().union(*(kind.SUFFIXES for kind in ADAPTERS)) - IN_FLOAT32
ALLOWED = {("keys.py", "lora_magnitude_vector")}  # as other programs spell it
ALLOWED |= {("__init__.py", name) for name in NAMES}  # what `import lorasmith` offers


def files() -> Iterator[Path]:
    source = ROOT / "src" / "lorasmith"
    for path in (*source.rglob("*.py"), *(ROOT / "comfyui").rglob("*.py")):
        if source / "adapters" not in path.parents and OTHERS_NAMES not in path.parents:
            yield path


def test_the_literal_has_the_names_of_the_list() -> None:
    assert get_args(AlgorithmName) == tuple(kind.algorithm for kind in ADAPTERS)


@pytest.mark.parametrize("words", [NAMES, PARTS], ids=["names", "parts"])
def test_nothing_outside_its_class_speaks_of_an_algorithm(words: frozenset[str]) -> None:
    found = {
        (path.name, node.value)
        for path in files()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in words
    }
    assert not found - ALLOWED
