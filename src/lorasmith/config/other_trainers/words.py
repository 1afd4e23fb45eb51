"""Values as other programs spell them, by the setting that they are values of here."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from lorasmith.adapters.algorithms import ALGORITHMS

SIDES = re.compile(r"\s*[\[(]?\s*\d+(\s*[,x×*]\s*\d+)+\s*[\])]?\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Words:
    """{their value, in lower case: what to type here}, either the value alone or whole settings."""

    same: Mapping[str, str] = field(default_factory=dict)
    near: Mapping[str, str] = field(default_factory=dict)


ADAMS = ("adamw8bit", "adamw_8bit", "pagedadamw", "pagedadamw8bit", "pagedadamw32bit", "adamw_optimi", "adamw_bf16",
         "adamw_adv", "adamw8bitkahan", "adamw-torch", "stableadamw", "optimi-adamw", "adamw_schedule_free",
         "schedule_free_adamw", "adamwschedulefree")  # fmt: skip
PRECISIONS = Words(
    same={"bfloat16": "bf16", "bfloat_16": "bf16", "float32": "fp32", "float_32": "fp32", "float": "fp32",
          "no": "fp32", "full": "fp32", "torch.bfloat16": "bf16", "torch.float32": "fp32"},
    near={"fp16": "bf16", "float16": "bf16", "float_16": "bf16", "half": "bf16", "fp8": "bf16", "tf32": "fp32",
          "torch.float16": "bf16"},
)  # fmt: skip
BITS = Words(
    same={"no": "none", "int8-quanto": "int8", "int8-torchao": "int8", "int_8": "int8", "fp8-quanto": "fp8",
          "fp8-torchao": "fp8", "qfloat8": "fp8", "float8": "fp8", "float_8": "fp8", "float8_e4m3fn": "fp8",
          "no_change": "none", "nf4-bnb": "nf4", "nfloat_4": "nf4", "qint8": "int8"},
    near={"int4-quanto": "nf4", "uint4": "nf4", "uint3": "nf4", "int2-quanto": "nf4", "fp4": "nf4", "qint4": "nf4",
          "bf16": "none", "fp16": "none", "fp32": "none", "bfloat_16": "none", "float_16": "none", "float_32": "none"},
)  # fmt: skip
WORDS: Mapping[str, Words] = {
    "adapter": Words(
        same={theirs: ours for algorithm in ALGORITHMS for theirs, ours in algorithm.OTHER_NAMES.items()},
        near={"lycoris": "LoKr", "lycoris.kohya": "LoHa", "networks.dylora": "LoRA", "networks.lora_fa": "LoRA",
              "networks.loha": "LoHa", "networks.lokr": "LoKr", "ia3": "LoRA", "full": "LoKr", "dylora": "LoRA",
              "lorm": "LoRA", "peft": "LoRA"},
    ),
    "optimizer": Words(near=dict.fromkeys(ADAMS, "AdamW") | {
        "adam8bit": "Adam", "sgdnesterov": "--optimizer SGD --optimizer.momentum 0.9", "sgd8bit": "SGD",
        "sgdnesterov8bit": "--optimizer SGD --optimizer.momentum 0.9", "sgd_8bit": "SGD", "rmsprop_8bit": "RMSprop",
    }),
    "schedule": Words(
        same={"constant_with_warmup": "--schedule constant --schedule.warmup 100"},
        near={"cosine_with_restarts": "cosine", "cosine_annealing": "cosine", "cosine_with_min_lr": "cosine",
              "polynomial": "linear", "rex": "cosine", "piecewise_constant": "constant", "sine": "cosine",
              "cosine_with_hard_restarts": "cosine", "inverse_sqrt": "cosine", "warmup_stable_decay": "linear",
              "adafactor": "constant"},
    ),
    "loss": Words(
        same={"l2": "MSE", "mae": "L1", "smooth_l1": "SmoothL1", "smooth l1": "SmoothL1"},
        near={"pseudo_huber": "Huber", "mean_flow": "MSE", "wavelet": "MSE", "log_cosh": "Huber"},
    ),
    "times": Words(
        same={"sigmoid": "logit_normal", "lognorm": "logit_normal", "none": "uniform", "logitnormal": "logit_normal"},
        near={"shift": "logit_normal", "flux_shift": "logit_normal", "qwen_shift": "logit_normal",
              "sigma": "uniform", "sigma_sqrt": "logit_normal", "mode": "logit_normal", "cosmap": "logit_normal",
              "weighted": "logit_normal", "heavy_tail": "logit_normal", "beta": "logit_normal",
              "cos": "logit_normal", "inverted_parabola": "logit_normal", "linear": "uniform",
              "flux2_shift": "logit_normal", "logsnr": "logit_normal"},
    ),
    "training_dtype": PRECISIONS, "lora_dtype": PRECISIONS, "base_dtype": BITS,
}  # fmt: skip


def side(text: str) -> str:
    """512,512 or 768x512 -> the side of the square of the same area; of more than two sizes, the largest."""
    if not SIDES.fullmatch(text):
        return text
    sizes = [int(number) for number in re.findall(r"\d+", text)]
    return str(round(math.sqrt(math.prod(sizes))) if len(sizes) == 2 else max(sizes))


def as_settings(pairs: str, keys: Mapping[str, str]) -> str:
    """weight_decay=0.1 betas=0.9,0.99 … -> what to type; {their key: our keys}, and what has none is left out."""
    found = []
    for name, _, text in (pair.partition("=") for pair in pairs.split()):
        values = text.strip("()[]\"'").split(",")
        found += [f"--{key} {value.strip()}" for key, value in zip(keys.get(name, "").split(), values, strict=False)]
    return " ".join(found)
