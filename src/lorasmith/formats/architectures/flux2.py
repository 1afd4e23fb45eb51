"""Flux.2: double and single blocks with modulations that all of them share."""

from collections.abc import Collection

from lorasmith.formats.architectures.architecture import (
    DOUBLE,
    TRANSFORMER,
    Architecture,
    OnHub,
    Published,
    numbered,
    one_to_one,
    transformer,
)
from lorasmith.formats.architectures.flux import EMBEDDERS, FLUX_DOUBLE, FLUX_ENDS

FLUX2_MLPS = one_to_one(
    {
        "img_mlp.0": "ff.linear_in", "img_mlp.2": "ff.linear_out", "txt_mlp.0": "ff_context.linear_in",
        "txt_mlp.2": "ff_context.linear_out",
    }
)  # fmt: skip
LAYERS = {
    **FLUX_ENDS,
    **{name: (path.replace("time_text_embed", "time_guidance_embed"),) for name, (path,) in EMBEDDERS.items()},
    **one_to_one(
        {
            f"{modulation}.lin": f"{modulation}.linear"
            for modulation in (*(f"double_stream_modulation_{s}" for s in ("img", "txt")), "single_stream_modulation")
        }
    ),
    **numbered("double_blocks.{}", "transformer_blocks.{}", FLUX_DOUBLE | FLUX2_MLPS),
    **numbered(
        "single_blocks.{}",
        "single_transformer_blocks.{}",
        one_to_one(
            {
                "linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out", "norm.query_norm": "attn.norm_q",
                "norm.key_norm": "attn.norm_k",
            }
        ),
    ),
}  # fmt: skip


def _klein(
    name: str, num_layers: int, num_single_layers: int, num_heads: int, text_width: int, looks: Collection[str]
) -> Published:
    return transformer(
        name, "Flux2KleinPipeline", "Flux2Transformer2DModel", looks, num_layers=num_layers,
        num_single_layers=num_single_layers, num_attention_heads=num_heads, joint_attention_dim=text_width,
        guidance_embeds=False,
    )  # fmt: skip


FLUX2 = Architecture(
    name="Flux.2",
    pipelines={"Flux2Pipeline": "flux2.Flux2", "Flux2KleinPipeline": "flux2.Flux2Klein"},
    lora_signs=r"to_qkv_mlp_proj|ff_(context_)?linear_(in|out)|stream_modulation|time_guidance_embed",
    model_signs=r"single_stream_modulation\.",
    widths={"Flux": (4096, 6144)},
    transformer="Flux2Transformer2DModel",
    layers=LAYERS,
    published=(
        transformer("FLUX.2 dev", "Flux2Pipeline", "Flux2Transformer2DModel", (TRANSFORMER,)),
        _klein("FLUX.2 klein 4B", 5, 20, 24, 7680, ("Flux", DOUBLE, TRANSFORMER)),  # as wide as Flux.1
        _klein("FLUX.2 klein 9B", 8, 24, 32, 12288, (TRANSFORMER,)),
    ),
    on_hub=(
        OnHub("Flux.2", "black-forest-labs/FLUX.2-dev", "flux2 flux2dev"),
        OnHub(
            "Flux.2 Klein", "black-forest-labs/FLUX.2-klein-base-4B",
            "klein flux2klein fluxklein flux2klein4b flux2klein9b",
        ),
    ),
)  # fmt: skip
