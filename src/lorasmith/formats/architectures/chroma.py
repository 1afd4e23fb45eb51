"""Chroma: Flux without guidance, whose modulations a small net makes."""

from lorasmith.formats.architectures.architecture import (
    DOUBLE,
    TRANSFORMER,
    Architecture,
    OnHub,
    numbered,
    one_to_one,
    transformer,
)
from lorasmith.formats.architectures.flux import FLUX_LAYERS

LAYERS = FLUX_LAYERS | numbered(
    "distilled_guidance_layer",
    "distilled_guidance_layer",
    one_to_one({"layers.{}.in_layer": "layers.{}.linear_1", "layers.{}.out_layer": "layers.{}.linear_2"}),
)
CHROMA = Architecture(
    name="Chroma",
    pipelines={"ChromaPipeline": "chroma.Chroma"},
    lora_signs=r"distilled_guidance_layer",
    model_signs=r"distilled_guidance_layer\.",
    transformer="ChromaTransformer2DModel",
    layers=LAYERS,
    published=(
        transformer("Chroma1", "ChromaPipeline", "ChromaTransformer2DModel", ("Flux", DOUBLE, TRANSFORMER)),
    ),
    on_hub=(OnHub("Chroma", "lodestones/Chroma1-HD", "chroma chroma1 chroma1hd"),),
)  # fmt: skip
