"""Tag frequencies: counted as kohya counts."""

import json
from pathlib import Path

from lorasmith.data.tags import tag_frequency
from lorasmith.types import Example


def test_tags_are_counted_by_folder_once_a_picture() -> None:
    examples = [
        Example(Path("/home/x/10_cats/a.png"), "Cat, red , ,cat nap", repeats=10),
        Example(Path("/home/x/10_cats/b.png"), "cat"),
        Example(Path("/home/x/dogs/a.png"), "a dog, cat"),
        Example(Path("/home/x/dogs/b.png"), ""),
    ]
    found = json.loads(tag_frequency(examples))
    assert found == {"10_cats": {"cat": 2, "cat nap": 1, "red": 1}, "dogs": {"a dog": 1, "cat": 1}}
    assert "home" not in tag_frequency(examples)


def test_the_order_of_pictures_does_not_matter() -> None:
    examples = [Example(Path(f"d/{n}.png"), caption) for n, caption in enumerate(("b, a", "c", "a"))]
    assert tag_frequency(examples) == tag_frequency(examples[::-1])
