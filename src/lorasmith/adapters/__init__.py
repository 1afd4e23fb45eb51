"""The algorithms, one a file, and what they share."""

from typing import Annotated

from pydantic import Field

from lorasmith.adapters.lora import LoRA
from lorasmith.component import named

Algorithm = Annotated[LoRA, Field(description="the kind of adapter"), named("LoRA")]
