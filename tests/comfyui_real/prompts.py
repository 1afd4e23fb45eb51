"""Prompts for ComfyUI's server, as its API takes them: {node: {"class_type", "inputs"}}."""

from typing import Any

CONTRACT = {
    "batch_size": 1, "grad_accumulation_steps": 1, "steps": 4, "learning_rate": 0.001, "rank": 2,
    "optimizer": "AdamW", "loss_function": "MSE", "seed": 0, "training_dtype": "fp32", "lora_dtype": "fp32",
    "algorithm": "LoRA", "gradient_checkpointing": False, "existing_lora": "[None]",
}  # fmt: skip
BUILT_IN = {"checkpoint_depth": 1, "offloading": False, "quantized_backward": False, "bypass_mode": False}
Prompt = dict[str, Any]


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def from_a_folder(prefix: str, **inputs: Any) -> Prompt:
    """Pictures -> LoRA file and plot."""
    return {
        "model": node("TinyModel"),
        "data": node("LorasmithDataset", folder="pictures", vae=["model", 2], clip=["model", 1], resolution=64),
        "train": node(
            "LorasmithTrainLora", model=["model", 0], latents=["data", 0], positive=["data", 1],
            **{**CONTRACT, **inputs},
        ),
        "save": node("LorasmithSaveLora", lora=["train", 1], prefix=f"loras/{prefix}", steps=["train", 3],
                     layout="ComfyUI"),
        "plot": node("LorasmithLossGraph", loss=["train", 2], filename_prefix=f"plots/{prefix}"),
    }  # fmt: skip


def built_in_data() -> Prompt:
    """The built-in companions, up to one LATENT and one CONDITIONING a picture."""
    return {
        "model": node("TinyModel"),
        "pictures": node("LoadImageTextDataSetFromFolder", folder="pictures"),
        "data": node("MakeTrainingDataset", images=["pictures", 0], texts=["pictures", 1], vae=["model", 2],
                     clip=["model", 1]),
        "buckets": node("ResolutionBucket", latents=["data", 0], conditioning=["data", 1]),
    }  # fmt: skip


def ours_among_theirs(prefix: str, source: str, **inputs: Any) -> Prompt:
    """The pack's training between built-in nodes; source: data or buckets."""
    return built_in_data() | {
        "train": node(
            "LorasmithTrainLora", model=["model", 0], latents=[source, 0], positive=[source, 1],
            **{**CONTRACT, **inputs},
        ),
        "save": node("SaveLoRA", lora=["train", 1], prefix=f"loras/{prefix}", steps=["train", 3]),
        "plot": node("LossGraphNode", loss=["train", 2], filename_prefix=prefix),
        "load": node("LoraModelLoader", model=["model", 0], lora=["train", 1], strength_model=1.0, bypass=False),
        "sink": node("TinySink", model=["load", 0]),
    }  # fmt: skip


def theirs_among_ours(prefix: str) -> Prompt:
    """The built-in training between the pack's nodes."""
    return from_a_folder(prefix) | {
        "buckets": node("LorasmithBuckets", latents=["data", 0], positive=["data", 1]),
        "train": node(
            "TrainLoraNode", model=["model", 0], latents=["buckets", 0], positive=["buckets", 1], bucket_mode=True,
            **{**CONTRACT, **BUILT_IN, "steps": 2},
        ),
        "save": node("LorasmithSaveLora", lora=["train", 0], prefix=f"loras/{prefix}", steps=["train", 2],
                     layout="ComfyUI"),
        "plot": node("LorasmithLossGraph", loss=["train", 1], filename_prefix=f"plots/{prefix}"),
        "load": node("LorasmithLoadLora", model=["model", 0], lora=["train", 0], strength=1.0, bypass=False),
        "sink": node("TinySink", model=["load", 0]),
    }  # fmt: skip
