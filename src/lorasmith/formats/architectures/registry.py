"""Every architecture."""

from lorasmith.formats.architectures.architecture import Architecture
from lorasmith.formats.architectures.aura_flow import AURA_FLOW
from lorasmith.formats.architectures.chroma import CHROMA
from lorasmith.formats.architectures.flux import FLUX
from lorasmith.formats.architectures.flux2 import FLUX2
from lorasmith.formats.architectures.lumina2 import LUMINA2
from lorasmith.formats.architectures.qwen_image import QWEN_IMAGE
from lorasmith.formats.architectures.sd import SD1, SD2
from lorasmith.formats.architectures.sd3 import SD3
from lorasmith.formats.architectures.sdxl import SDXL
from lorasmith.formats.architectures.wan import WAN
from lorasmith.formats.architectures.z_image import Z_IMAGE

ARCHITECTURES: tuple[Architecture, ...] = (
    SDXL, CHROMA, AURA_FLOW, FLUX2, FLUX, SD3, QWEN_IMAGE, Z_IMAGE, LUMINA2, WAN, SD2, SD1,
)  # fmt: skip
"""In the order in which their signs are looked for: the rarer ones first."""
BY_USE: tuple[Architecture, ...] = (
    SD1, SD2, SDXL, SD3, FLUX, CHROMA, QWEN_IMAGE, FLUX2, LUMINA2, Z_IMAGE, WAN, AURA_FLOW,
)  # fmt: skip
"""In the order in which a LoRA that fits several is tried: the most used ones first."""
