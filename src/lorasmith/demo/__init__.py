"""The embedded model and pictures, and the run that shows what lorasmith does."""

from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
BASE = FOLDER / "base"
CONCEPTS = ("line_drawing", "flat")
PROMPTS = ("rocket", "dog face", "sunflower", "red apple", "cat face", "penguin", "guitar", "umbrella")


def demo_settings(concept: str) -> dict[str, Any]:
    """The settings, nested, of the demo's run; ValueError where there are no pictures of the concept.

    Only the upper blocks are adapted, which leaves what is drawn more recognisable than adapting all of them.
    """
    if concept not in CONCEPTS:
        raise ValueError(f"concept must be one of {', '.join(CONCEPTS)}, got {concept!r}")
    pictures = FOLDER / "pictures"
    return {
        "model": str(BASE),
        "data": {
            "folder": str(pictures / concept / "train"),
            "held_out": str(pictures / concept / "held_out"),
            "drift": str(pictures / "noto" / "held_out"),
        },
        "steps": 250,
        "batch_size": 8,
        "learning_rate": 2e-3,
        "schedule": "cosine",
        "gradient_checkpointing": False,
        "targets": {"preset": "none", "include": ["up_blocks"]},
        "sampling": {"prompts": list(PROMPTS), "guidance": 3.0},
    }
