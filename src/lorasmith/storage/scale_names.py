"""What programs call the scale of a stored tensor, by which its numbers are multiplied to give what it stands for."""

import re
from collections.abc import Container

CERTAIN = r"scale_weight|weight_scale(_inv)?"
"""ComfyUI's first layout and musubi-tuner's; ComfyUI's second and compressed-tensors'; DeepSeek's."""
SCALE = re.compile(rf"(?P<tensor>.+?)(\.weight)?[._]({CERTAIN}|scale)")
CERTAIN_SCALE = re.compile(rf"(.*[._])?({CERTAIN})")
VAGUE_SCALE = re.compile(rf"(.*[._])?({CERTAIN}|fp8_scale|scale)")
"""Names in a file's metadata that state a scale, of a tensor that they do not say."""


def scaled_by(name: str, keys: Container[str]) -> str | None:
    """Which of a file's tensors a scale of this name is multiplied with; None where it is the name of no scale."""
    match = SCALE.fullmatch(name)
    return match and next((key for key in (match["tensor"], f"{match['tensor']}.weight") if key in keys), None)


def is_certain(name: str) -> bool:
    """Whether nothing but a scale is called so; norms and attention have a learnt `scale` too."""
    return CERTAIN_SCALE.fullmatch(name) is not None
