"""Weights that are fitted into a library's net: nothing missing, nothing left over, in the dtype that holds them."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lorasmith.header import Header

UNFIT = (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError, OSError, SafetensorError)
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FP8 = {"F8_E4M3": torch.bfloat16, "F8_E5M2": torch.bfloat16}  # whose numbers bf16 holds exactly
SCALES = ("scale_weight", "weight_scale", "weight_scale_2", "scaled_fp8", "comfy_quant", "absmax", "quant_map")


class _Empty(TorchFunctionMode):
    """Weights that are made here take no memory; what is computed, such as tables of angles, is there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **{**(kwargs or {}), **({"device": "meta"} if func is torch.empty else {})})


def tensors(header: Header, keys: Iterable[str]) -> dict[str, Tensor]:
    """The file's tensors of these names; ValueError where they cannot be read."""
    try:
        with safe_open(header.path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in keys}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"cannot read {header.path}: {line(error)}") from error


def dtype_in(header: Header, keys: Iterable[str]) -> torch.dtype:
    """The dtype of most of the numbers of these tensors; ValueError where they are quantised."""
    counts: dict[torch.dtype, int] = {}
    for key in keys:
        kind = header.dtypes[key]
        if key.rpartition(".")[2] in SCALES or kind not in DTYPES | FP8:
            what = f"{key} in {kind}" if kind not in DTYPES | FP8 else f"scaled ones with {key}"
            raise ValueError(f"{header.path} must hold plain weights in fp32, bf16, fp16 or fp8, got {what}")
        dtype = (DTYPES | FP8)[kind]
        counts[dtype] = counts.get(dtype, 0) + torch.Size(header.shapes[key]).numel()
    return max(counts, key=counts.__getitem__)


def fitted(
    kind: Any, config: Mapping[str, Any], state: Mapping[str, Tensor], dtype: torch.dtype, *, path: Path
) -> nn.Module:
    """A net of a class of diffusers with these weights, in this dtype but for what the class keeps in float32.

    ValueError where tensors are missing, have no place in it, or another shape.
    """
    try:
        with _Empty():
            net = kind.from_config(dict(config))
        kept = set(kind._keep_in_fp32_modules or ())
        dtypes = {key: torch.float32 if kept & set(key.split(".")) else dtype for key in state}
        state = {key: tensor.to(dtypes[key]) for key, tensor in state.items()}
        found = net.load_state_dict(state, strict=False, assign=True)
    except UNFIT as error:
        raise ValueError(f"cannot load the {kind.__name__} of {path}: {line(error)}") from error
    check_fit(path, kind.__name__, found.missing_keys, found.unexpected_keys)
    return net.eval()


def shaped(kind: Any, config: Mapping[str, Any], *, path: Path | str) -> Any:
    """A net of diffusers or transformers on the meta device, which has shapes alone; ValueError if config makes none.

    path: what the config is of.
    """
    try:
        with torch.device("meta"):
            if issubclass(kind, ConfigMixin):
                return kind.from_config(dict(config))
            return kind(kind.config_class.from_dict(dict(config)))
    except (*UNFIT, AssertionError) as error:
        raise ValueError(f"cannot make the {kind.__name__} of {path}: {line(error)}") from error


def check_fit(path: Path, what: str, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """ValueError that counts and names the keys there are."""
    for keys, rule in ((sorted(missing), "are missing"), (sorted(unexpected), "have no place in it")):
        if keys:
            raise ValueError(f"cannot load the {what} of {path}: {len(keys)} tensors {rule}, such as {keys[0]}")


def line(error: Exception) -> str:
    """What an error says, in one line."""
    said = f"no {error.args[0]}" if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(said.split())[:200] or type(error).__name__
