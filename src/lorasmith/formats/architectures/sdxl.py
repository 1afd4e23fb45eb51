"""Stable Diffusion XL: a UNet that is told sizes."""

from lorasmith.formats.architectures.architecture import (
    CLIP_G,
    CLIP_L,
    SECOND_TEXTS,
    TEXTS,
    UNETS,
    Architecture,
    OnHub,
    unet,
)

SDXL = Architecture(
    name="SDXL",
    pipelines={"StableDiffusionXLPipeline": "sdxl.SDXL"},
    lora_signs=r"add_embedding|label_emb",
    model_signs=r"conditioner\.|add_embedding\.",
    weak_model_signs=r"label_emb\.",
    text_width=2048,
    published=(
        unet(
            "SDXL", "StableDiffusionXLPipeline", (UNETS, TEXTS, SECOND_TEXTS),
            {
                "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True,
                "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 2816,
            },
            text_encoder=CLIP_L, text_encoder_2=CLIP_G,
        ),
    ),
    on_hub=(
        OnHub(
            "Stable Diffusion XL", "stabilityai/stable-diffusion-xl-base-1.0",
            "sdxl sdxl10 xl stablediffusionxl sdxlbase pony ponyxl illustrious noobai animagine",
        ),
    ),
    comfyui={"SDXL": ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0")},
)  # fmt: skip
