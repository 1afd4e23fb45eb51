"""What other trainers call their settings, and what that is here: for messages and the pages of docs/from."""

from lorasmith.other_tools.ai_toolkit import AI_TOOLKIT, DIFFUSION_PIPE
from lorasmith.other_tools.comfyui import COMFYUI
from lorasmith.other_tools.common import COMMON
from lorasmith.other_tools.diffusers import DIFFUSERS, SIMPLETUNER
from lorasmith.other_tools.kohya import KOHYA
from lorasmith.other_tools.onetrainer import ONETRAINER

TOOLS = (KOHYA, DIFFUSERS, SIMPLETUNER, COMMON, ONETRAINER, AI_TOOLKIT, DIFFUSION_PIPE, COMFYUI)
"""In the order in which a name is looked up."""
