"""Z-Image: one stream of texts and pictures."""

from lorasmith.formats.architectures.architecture import (
    LUMINA2_OR_Z_IMAGE,
    Architecture,
    OnHub,
    numbered,
    one_to_one,
    transformer,
)

Z_IMAGE_ATTENTION = {
    "attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    **one_to_one(
        {
            "attention.out": "attention.to_out.0", "attention.q_norm": "attention.norm_q",
            "attention.k_norm": "attention.norm_k",
        }
    ),
}  # fmt: skip
LAYERS = {
    **one_to_one(
        {
            "x_embedder": "all_x_embedder.2-1", "final_layer.linear": "all_final_layer.2-1.linear",
            "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
        }
    ),
    **{
        name: paths
        for stack in ("layers.{}", "noise_refiner.{}", "context_refiner.{}", "siglip_refiner.{}")
        for name, paths in numbered(stack, stack, Z_IMAGE_ATTENTION).items()
    },
}  # fmt: skip
Z_IMAGE = Architecture(
    name="Z-Image",
    pipelines={"ZImagePipeline": "z_image.ZImage"},
    lora_signs=r"(layers|refiner)_\d+_attention_to_",
    model_signs=r"cap_pad_token$|all_x_embedder\.|layers\.0\.adaLN_modulation\.0\.",
    widths={LUMINA2_OR_Z_IMAGE: (3840,)},
    transformer="ZImageTransformer2DModel",
    layers=LAYERS,
    published=(transformer("Z-Image", "ZImagePipeline", "ZImageTransformer2DModel", (LUMINA2_OR_Z_IMAGE,)),),
    on_hub=(OnHub("Z-Image", "Tongyi-MAI/Z-Image", "zimage zimageturbo"),),
)  # fmt: skip
