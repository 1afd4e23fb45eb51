"""The published models that a LoRA may be for, by what its layers look like."""

from collections.abc import Mapping

from lorasmith.formats.architectures.architecture import UNETS, Published
from lorasmith.formats.architectures.registry import BY_USE
from lorasmith.formats.detect import UNKNOWN


def _by_looks() -> dict[str, tuple[Published, ...]]:
    """An architecture's own models before others that look alike."""
    found = {architecture.name: architecture.published for architecture in BY_USE}
    for model in (model for architecture in BY_USE for model in architecture.published):
        for look in model.looks:
            found[look] = (*found.get(look, ()), model)
    return found


PUBLISHED: Mapping[str, tuple[Published, ...]] = _by_looks()
"""{what a LoRA looks like, as `detect.lora_family` says it: the models that it may be for}."""


def may_be_one(family: str, other: str) -> bool:
    """Whether two LoRAs that look like these may be for one model: there is a published one that both may be for."""
    if family == other or UNKNOWN in (family, other):
        return True
    models, others = ({model.name for model in PUBLISHED.get(name, ())} for name in (family, other))
    if not models or not others:  # a UNet of another text width than published ones
        return UNETS in (family, other)
    return not models.isdisjoint(others)
