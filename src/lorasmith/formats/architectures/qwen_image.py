"""Qwen-Image: double blocks, which the original code names as diffusers does."""

from lorasmith.formats.architectures.architecture import DOUBLE, TRANSFORMER, Architecture, OnHub, transformer

QWEN_IMAGE = Architecture(
    name="Qwen-Image",
    pipelines={"QwenImagePipeline": "qwen_image.QwenImage"},
    lora_signs=r"img_mlp|txt_mlp|img_mod",
    model_signs=r"transformer_blocks\.\d+\.img_mlp\.",
    transformer="QwenImageTransformer2DModel",
    published=(
        transformer("Qwen-Image", "QwenImagePipeline", "QwenImageTransformer2DModel", (DOUBLE, TRANSFORMER)),
    ),
    on_hub=(OnHub("Qwen-Image", "Qwen/Qwen-Image", "qwen qwenimage"),),
)  # fmt: skip
