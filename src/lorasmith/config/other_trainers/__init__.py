"""What other trainers call their settings, and what that is here: for messages and the pages of docs/from."""

from lorasmith.config.other_trainers.ai_toolkit import AI_TOOLKIT, DIFFUSION_PIPE
from lorasmith.config.other_trainers.comfyui import COMFYUI
from lorasmith.config.other_trainers.common import COMMON
from lorasmith.config.other_trainers.diffusers import DIFFUSERS, SIMPLETUNER
from lorasmith.config.other_trainers.kohya import KOHYA
from lorasmith.config.other_trainers.onetrainer import ONETRAINER

TOOLS = (KOHYA, DIFFUSERS, SIMPLETUNER, COMMON, ONETRAINER, AI_TOOLKIT, DIFFUSION_PIPE, COMFYUI)
"""In the order in which a name is looked up."""
