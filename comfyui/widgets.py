"""The training node's inputs, made from lorasmith's schema: train_lora's sixteen, then all other settings."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from lorasmith.api import NAMES, NO_LORA, config_of, train_lora
from lorasmith.config.schema import Config
from lorasmith.config.settings import Setting, settings
from lorasmith.config.values import nested

DEFAULTS = {name: parameter.default for name, parameter in inspect.signature(train_lora).parameters.items()}
CONTRACT = (
    "batch_size", "grad_accumulation_steps", "steps", "learning_rate", "rank", "optimizer", "loss_function", "seed",
    "training_dtype", "lora_dtype", "algorithm", "gradient_checkpointing", "existing_lora",
)  # fmt: skip
"""After model, latents and positive, in this order."""
KEYS = {NAMES[key]: key for key in ("adapter.rank", "adapter.alpha", "adapter.factor", "adapter", "loss")} | {
    "save_every": "checkpoints.steps"
}
"""{input: key of its setting}, where they differ."""
LEFT_OUT = (
    "model", "encoders", "data.", "output", "device", "sampling.", "sharded", "offloading", "tensorboard",
    "text_encoder.", "file_layout", "ignore_unknown", "threads",
)  # fmt: skip
"""Settings of runs from the command line; `offloading`, which needs a model that waits on another device;
`text_encoder`, as ComfyUI hands over conditioning that is encoded already; `file_layout`, of the node that saves;
`ignore_unknown`, as a file is taken whole here; and `threads`, whose number belongs to ComfyUI's process."""
FIRST = (
    "alpha", "targets_preset", "targets_include", "targets_exclude", "loss_space", "times", "max_grad_norm",
    "checkpoint_depth",
)  # fmt: skip
"""The further inputs that come first."""

TOOLTIPS = {
    "steps": "optimizer steps",
    "targets_preset": "attention layers, attention and MLP layers, or all linear layers and convolutions",
    "targets_include": "regular expressions of layer paths to adapt as well, one a line",
    "alpha": "the update is scaled by alpha / rank; 0: the rank. Of OFT: the limit of its rotation; 0: none",
    "factor": "of LoKr: rows and columns of the smaller Kronecker factor; 0: near square",
    "save_every": "write a checkpoint every N steps; 0: only every so many minutes",
    "checkpoints_minutes": "write a checkpoint every N minutes, for at most 1 % of the time; 0: only by steps",
    "checkpoints_keep": "how many checkpoints are kept while it trains; they go when it ends",
    "non_finite_returns": "how often it goes back to its last checkpoint by steps (save_every) instead of stopping",
}
"""Where the setting's own help speaks of the command line, or of something else before it."""

HAS_ADVANCED = "advanced" in inspect.signature(io.Int.Input).parameters
"""Whether this version of ComfyUI can fold inputs away."""


def contract_inputs() -> list[Any]:
    """The widgets of train_lora's sixteen inputs."""
    known = settings()
    return [
        _existing_lora() if name == "existing_lora" else _widget(known[KEYS.get(name, name)], name, DEFAULTS[name])
        for name in CONTRACT
    ]


def further_inputs() -> list[Any]:
    """A widget for every other setting."""
    return [_widget(setting, name, _default(setting), optional=True) for name, setting in _further().items()]


def config_of_node(values: Mapping[str, Any], lora_path: Path | None) -> Config:
    """The node's values as a config; ValueError in one line that names the input."""
    try:
        return config_of(_config_inputs(values, lora_path))
    except ValueError as error:
        key, _, rest = str(error).partition(" ")
        names = {setting.key: name for name, setting in _further().items()}
        raise ValueError(f"{names.get(key, key)} {rest}") from error


def _config_inputs(values: Mapping[str, Any], lora_path: Path | None) -> dict[str, Any]:
    """As `lorasmith.api.config_of` takes them; of further ones, those that are changed."""
    inputs = {name: values[name] for name in CONTRACT} | {"existing_lora": lora_path}
    changed = {}
    for name, setting in _further().items():
        value = values.get(name, _default(setting))
        if value != _default(setting) or name == "targets_preset":  # which holds beside targets_include, as it is shown
            changed[setting.key] = tuple(filter(None, value.splitlines())) if setting.kind is tuple else value
    if "non_finite.returns" in changed and "checkpoints.steps" not in changed:
        raise ValueError("save_every must be set where non_finite_returns is, got 0")
    inputs |= {name: changed.pop(f"adapter.{name}", None) for name in ("alpha", "factor")}
    parts = {key: values[key] for key in ("optimizer", "loss_function")}
    return {**inputs, **_with_parts(nested(changed), parts)}


def _with_parts(further: dict[str, Any], parts: Mapping[str, str]) -> dict[str, Any]:
    """Adds the names of parts of which fields are set."""
    for name, chosen in parts.items():
        key = KEYS.get(name, name)
        if isinstance(further.get(key), dict):
            further[name] = {"name": chosen, **further.pop(key)}
    return further


def _further() -> dict[str, Setting]:
    """{input: setting}, the important ones first."""
    named = {key: name for name, key in KEYS.items()}
    taken = {KEYS.get(name, name) for name in CONTRACT}
    found = {
        named.get(key, key.replace(".", "_")): setting
        for key, setting in settings().items()
        if key not in taken and not key.startswith(LEFT_OUT)
    }
    return {name: found[name] for name in sorted(found, key=lambda name: (name not in FIRST, _place(name)))}


def _place(name: str) -> int:
    return FIRST.index(name) if name in FIRST else 0


def _existing_lora() -> Any:
    options = [NO_LORA, *folder_paths.get_filename_list("loras")]
    return io.Combo.Input("existing_lora", options=options, default=NO_LORA, tooltip="LoRA to continue training")


def _default(setting: Setting) -> Any:
    """A widget's default; 0 and no text stand for none."""
    if setting.kind is tuple:
        return ""
    if setting.default == "none":
        return setting.kind(0) if setting.kind in (int, float) else "none"
    return setting.default == "true" if setting.kind is bool else setting.kind(setting.default)


def _widget(setting: Setting, name: str, default: Any, *, optional: bool = False) -> Any:
    common = {"default": default, "tooltip": _tooltip(setting, name), "optional": optional}
    if optional and name not in FIRST and HAS_ADVANCED:
        common["advanced"] = True
    if setting.kind is bool:
        return io.Boolean.Input(name, **common)
    if setting.options:
        return io.Combo.Input(name, options=list(setting.options), **common)
    if setting.kind in (int, float):
        assert setting.low is not None and setting.high is not None
        low = 0 if setting.default == "none" and optional else setting.low
        if setting.kind is int:
            control = {"control_after_generate": False} if name == "seed" else {}
            return io.Int.Input(name, min=int(low), max=int(setting.high), **control, **common)
        step = _power(min(0.01, default) if default else 0.01)
        low += step if setting.rule.startswith("above") and setting.default != "none" else 0  # 0 stands for none
        high = setting.high - (step if "below" in setting.rule else 0)
        return io.Float.Input(name, min=float(low), max=float(high), step=step, **common)
    return io.String.Input(name, multiline=setting.kind is tuple, **common)


def _power(step: float) -> float:
    """A thousandth of it, as a power of ten: how fine a number can be set."""
    return float(f"1e{int(f'{step:e}'.partition('e')[2]) - 3}")


def _tooltip(setting: Setting, name: str) -> str:
    if name in TOOLTIPS:
        return TOOLTIPS[name]
    if setting.kind is tuple:
        return f"{setting.help}, one a line"
    return f"{setting.help}; 0: none" if setting.kind in (int, float) and setting.default == "none" else setting.help
