"""Names of models that people give in place of a file, a folder or a hub id."""

import re

from lorasmith.formats.architectures.registry import ARCHITECTURES

ON_HUB = [model for architecture in ARCHITECTURES for model in architecture.on_hub]
HUB_IDS = {model.name: model.hub_id for model in ON_HUB}
"""{family: one of its models on the hub}."""
SHORT = {model.name: model.short for model in ON_HUB}
"""{family: what it is called for short, in lower case, without spaces and signs}."""


def family_named(text: str) -> str | None:
    """The family that SDXL, sd-1.5, Flux and so on mean."""
    short = re.sub(r"[^a-z0-9]", "", text.lower())
    return next((family for family, names in SHORT.items() if short in names.split()), None)
