"""Settings and pictures that a trial of chaos.py draws: as varied as they come, and quick to train with."""

import random
from pathlib import Path
from typing import Any

from PIL import Image

SIZES = ((64, 64), (96, 48), (40, 80), (64, 56), (50, 50))  # of pictures
ALGORITHMS = ("LoRA", "LoHa", "LoKr", "OFT")
OPTIMIZERS: tuple[dict[str, Any], ...] = (
    {"optimizer": "AdamW", "learning_rate": 2e-3},
    {"optimizer": "Adam", "optimizer.weight_decay": 0.01, "learning_rate": 1e-3},
    {"optimizer": "SGD", "optimizer.momentum": 0.9, "learning_rate": 0.1},
    {"optimizer": "RMSprop", "optimizer.momentum": 0.5, "learning_rate": 1e-3},
)
TARGETS: tuple[dict[str, Any], ...] = (
    {"targets.preset": "attention"},
    {"targets.preset": "none", "targets.include": r"attn1\.to_[qv]"},
    {"targets.preset": "none", "targets.include": r"up_blocks.*(conv1|attn2|ff\.net)"},
)
CHECKPOINTS: tuple[dict[str, Any], ...] = (
    {"checkpoints.steps": 1, "checkpoints.minutes": 0},
    {"checkpoints.steps": 3},
    {"checkpoints.steps": 4, "checkpoints.minutes": 0.001},
    {"checkpoints.minutes": 0.001},
    {},
)
SHORT: dict[str, Any] = {
    "steps": 4, "batch_size": 1, "grad_accumulation_steps": 1, "training_dtype": "bf16", "data.resolution": 32,
    "gradient_checkpointing": "false", "targets.preset": "none", "targets.include": r"attn1\.to_[qv]",
    "checkpoints.steps": 2, "checkpoints.minutes": 0, "checkpoints.keep": 1, "sampling.prompts": '["a cat"]',
    "sampling.every": 3,
}  # fmt: skip


def drawn_settings(rng: random.Random, number: int) -> dict[str, Any]:
    """{dotted key: value}; any 16 trials in a row have every pair of algorithm and optimizer."""
    steps = rng.randint(6, 14)
    training_dtype = rng.choices(("bf16", "fp32", "none"), (5, 5, 2))[0]
    cuts = ((1, 1), (2, 1), (1, 2), (1, 3), (2, 2)) if training_dtype != "none" else ((1, 1), (1, 2))  # slow: fp16
    batch_size, num_parts = rng.choice(cuts)
    drawn = {
        "model": "demo", "device": "cpu", "steps": steps, "seed": rng.getrandbits(64),
        "adapter": ALGORITHMS[number % 4], "adapter.rank": rng.choice((2, 4)), "batch_size": batch_size,
        "grad_accumulation_steps": num_parts, "data.resolution": rng.choice((32, 40)),
        "training_dtype": training_dtype, "lora_dtype": rng.choice(("bf16", "fp32")),
        "schedule": rng.choice(("constant", "linear", "cosine")), "schedule.warmup": rng.choice((0, 3)),
        "gradient_checkpointing": rng.choice(("true", "false")), "loss": rng.choice(("MSE", "Huber")),
        "times": rng.choice(("uniform", "logit_normal")), "max_grad_norm": rng.choice((0, 1)),
        "checkpoints.keep": rng.randint(1, 3), "sampling.steps": 1,
        "sampling.prompts": rng.choice(("[]", "[]", '["a cat"]')),
        "sampling.every": rng.randint(2, steps),
    }  # fmt: skip
    optimizer = OPTIMIZERS[(number + number // 4) % 4]
    return {**drawn, **optimizer, **rng.choice(TARGETS), **rng.choice(CHECKPOINTS)}


def make_pictures(folder: Path, rng: random.Random) -> None:
    """Noise of several sizes with captions, some of it in a folder that repeats it."""
    for number in range(rng.randint(2, 5)):
        path = folder / rng.choice((".", "2_cats")) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        size = rng.choice(SIZES)
        Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1])).save(path)
        path.with_suffix(".txt").write_text(f"a cat of kind {number}", encoding="utf-8")
