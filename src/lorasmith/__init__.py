"""lorasmith trains low-rank adapters (LoRA and its relatives) for diffusion models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorasmith.adapters.adapter_set import AdapterSet as AdapterSet
    from lorasmith.adapters.algorithms import OFT as OFT
    from lorasmith.adapters.algorithms import DoRA as DoRA
    from lorasmith.adapters.algorithms import GLoRA as GLoRA
    from lorasmith.adapters.algorithms import LoHa as LoHa
    from lorasmith.adapters.algorithms import LoKr as LoKr
    from lorasmith.adapters.algorithms import LoRA as LoRA
    from lorasmith.adapters.hooks import attach as attach
    from lorasmith.adapters.targets import Targets as Targets
    from lorasmith.api import train_lora as train_lora
    from lorasmith.config.schema import Config as Config
    from lorasmith.formats import lora_file
    from lorasmith.formats.read import adapters_from as adapters_from
    from lorasmith.models.load import load_model as load_model
    from lorasmith.prepare.share import shared_copy as shared_copy
    from lorasmith.training.loop import train as train
    from lorasmith.training.state import State as State

    read, write = read_lora, write_lora = lora_file.read, lora_file.write

__version__ = "0.1.0"
_HOMES = {
    **dict.fromkeys(("LoRA", "LoHa", "LoKr", "OFT", "DoRA", "GLoRA"), "adapters.algorithms"),
    "AdapterSet": "adapters.adapter_set",
    "Config": "config.schema",
    "State": "training.state",
    "Targets": "adapters.targets",
    "adapters_from": "formats.read",
    "attach": "adapters.hooks",
    "load_model": "models.load",
    "read_lora": "formats.lora_file:read",
    "shared_copy": "prepare.share",
    "train": "training.loop",
    "train_lora": "api",
    "write_lora": "formats.lora_file:write",
}
"""{what is offered here: its module, and its name there where that is another}."""
_FORMER = {"read": "read_lora", "write": "write_lora"}
"""{a name of before: today's}."""


def __getattr__(name: str) -> Any:
    """What is offered here from modules that take seconds to import, which happens when it is first used.

    ValueError where packages are too old for these modules.
    """
    offered = _FORMER.get(name, name)
    if offered not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module("lorasmith.errors").refuse_old()
    module, _, own_name = _HOMES[offered].partition(":")
    return getattr(import_module(f"lorasmith.{module}"), own_name or offered)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
