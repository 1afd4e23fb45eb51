"""What a diffusers folder holds, and which of its weight files are loaded. No torch: it is asked before models load."""

import re
from collections.abc import Iterable
from pathlib import Path

MODULES = ("transformer", "transformer_2", "unet", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
"""The parts of pipelines that hold weights."""
TOKENIZER = re.compile(r"tokenizer(_\d)?")
"""The parts that are tokenizers."""
MODEL_INDEX = "model_index.json"
WEIGHTS = re.compile(r"(?:diffusion_pytorch_)?model(?:\.(?P<variant>\w+))?(?P<shard>-\d+-of-\d+)?\.safetensors")
SHARD_INDEX = re.compile(r"(?:diffusion_pytorch_)?model\.safetensors\.index(?:\.(?P<variant>\w+))?\.json")


def variant_of(names: Iterable[str]) -> str | None:
    """The variant to load of these weight files: none where there are plain ones, else "fp16" or what there is."""
    variants = {match["variant"] for name in names if (match := WEIGHTS.fullmatch(name))}
    return None if None in variants or not variants else "fp16" if "fp16" in variants else min(variants)


def weight_files(folder: Path) -> list[Path]:
    """Those that are loaded of a part: of one variant, and not shards where there is a whole file."""
    paths = sorted(folder.glob("*.safetensors"))
    variant = variant_of(path.name for path in paths)
    matches = {path: match for path in paths if (match := WEIGHTS.fullmatch(path.name)) and match["variant"] == variant}
    whole = [path for path, match in matches.items() if not match["shard"]]
    return whole or [*matches] or paths
