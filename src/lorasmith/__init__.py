"""lorasmith trains low-rank adapters (LoRA and its relatives) for diffusion models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorasmith.api import train_lora as train_lora
    from lorasmith.formats.lora_file import read as read
    from lorasmith.formats.lora_file import write as write

__version__ = "0.1.0"
_HOMES = {"read": "lorasmith.formats.lora_file", "train_lora": "lorasmith.api", "write": "lorasmith.formats.lora_file"}


def __getattr__(name: str) -> Any:
    """What is offered here from modules that take seconds to import, which happens when it is first used.

    ValueError where packages are too old for these modules.
    """
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module("lorasmith.errors").refuse_old()
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
