"""How often each tag stands in a data set's captions, as kohya's tools count."""

import json
from collections import Counter
from collections.abc import Sequence

from lorasmith.types import Example


def tag_frequency(examples: Sequence[Example]) -> str:
    """JSON {the last name of the pictures' folder: {tag: pictures with it}}; commas part tags, in lower case."""
    counts: dict[str, Counter[str]] = {}
    for example in examples:
        tags = counts.setdefault(example.image_path.parent.name, Counter())
        tags.update(tag for part in example.caption.split(",") if (tag := part.strip().lower()))
    return json.dumps(counts, sort_keys=True)
