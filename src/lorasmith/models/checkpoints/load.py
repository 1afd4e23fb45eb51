"""Weights that are fitted into a library's net: nothing missing, nothing left over, in the dtype that holds them."""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lorasmith.models.checkpoints.scaled import dequantised
from lorasmith.models.sources.reading import was_read
from lorasmith.reporting.pace import counted
from lorasmith.storage.safetensors_header import Header

log = logging.getLogger(__name__)

UNFIT = (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError, OSError, SafetensorError)
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FP8 = {"F8_E4M3": torch.bfloat16, "F8_E5M2": torch.bfloat16}  # whose numbers bf16 holds exactly
NO_WEIGHT = re.compile(r"(^|[._])(position_ids|logit_scale|(log_)?sigmas|inv_freq|num_batches_tracked)$")
"""Numbers that nets make themselves, and those of training: they may be there or not."""
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""What diffusers called the layers of attention in older VAEs: what it calls them now."""
SCALED = {"I8": torch.bfloat16}  # which are weights with a scale alone


class _Empty(TorchFunctionMode):
    """Weights that are made here take no memory; what is computed, such as tables of angles, is there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **{**(kwargs or {}), **({"device": "meta"} if func is torch.empty else {})})


def tensors(header: Header, keys: Iterable[str], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The file's tensors of these names; ValueError where they cannot be read.

    Those with a scale are multiplied by it, in float32, and become of this dtype (None: that of most of them all).
    """
    names = list(keys)
    try:
        with safe_open(header.path, framework="pt") as file:
            found = {key: _tensor(file, header, key) for key in names}
            scales = {key: file.get_tensor(header.scales[key]) for key in names if key in header.scales}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"cannot read {header.path}: {line(error)}") from error
    if scales:
        dtype = dtype or dtype_in(header, [key for key in names if key in scales or header.dtypes[key] in DTYPES])
        found |= {key: dequantised(found[key], scale).to(dtype) for key, scale in scales.items()}
    return found


def _tensor(file: Any, header: Header, key: str) -> Tensor:
    was_read(header.num_bytes(key))
    return file.get_tensor(key)


def dtype_in(header: Header, keys: Iterable[str]) -> torch.dtype:
    """The dtype of most of the numbers of these tensors; ValueError where they are quantised."""
    counts: dict[torch.dtype, int] = {}
    for key in keys:
        kind, known = header.dtypes[key], DTYPES | FP8 | (SCALED if key in header.scales else {})
        if kind not in known:
            raise ValueError(f"{header.path} must hold weights in fp32, bf16, fp16 or fp8, got {key} in {kind}")
        dtype = known[kind]
        counts[dtype] = counts.get(dtype, 0) + torch.Size(header.shapes[key]).numel()
    return max(counts, key=counts.__getitem__)


def fitted(
    kind: Any, config: Mapping[str, Any], state: Mapping[str, Tensor], dtype: torch.dtype, *, path: Path,
    takes_others: bool = False,
) -> nn.Module:  # fmt: skip
    """A net of a class of diffusers with these weights, in this dtype but for what the class keeps in float32.

    takes_others: weights that have no place in it are named in a warning. ValueError where tensors are missing, have
    another shape or, else, no place in it.
    """
    what = f"the {kind.__name__} of {path}"
    try:
        with _Empty():
            net = kind.from_config(dict(config))
        own = net.state_dict()
        state = {_present_name(key, own): tensor for key, tensor in state.items()}
        _check_shapes(state, own)
        kept = set(kind._keep_in_fp32_modules or ())
        dtypes = {key: torch.float32 if kept & set(key.split(".")) else dtype for key in state}
        state = {key: t.to(dtypes[key]) if t.is_floating_point() else t for key, t in state.items()}
        found = net.load_state_dict(state, strict=False, assign=True)
    except UNFIT as error:
        raise ValueError(f"cannot load {what}: {line(error)}") from error
    check_complete(what, found.missing_keys)
    if takes_others:
        warn_of_others(str(path), found.unexpected_keys)
    else:
        check_no_others(what, found.unexpected_keys)
    return net.eval()


def _present_name(key: str, own: Mapping[str, Tensor]) -> str:
    """The name that a net's own tensor has today; older VAEs call those of attention otherwise."""
    module, _, rest = key.rpartition(".")
    block, _, last = module.rpartition(".")
    present = f"{block}.{OLD_NAMES[last]}.{rest}" if last in OLD_NAMES and key not in own else key
    return present if present in own else key


def _check_shapes(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    for key, tensor in state.items():
        if key in own and tensor.shape != own[key].shape:
            raise ValueError(f"{key} must have the shape {list(own[key].shape)}, got {list(tensor.shape)}")


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


def check_complete(what: str, missing: Iterable[str]) -> None:
    """ValueError that counts and names the tensors that are missing of a part."""
    if lacking := sorted(missing):
        raise ValueError(f"cannot load {what}: {tensors_that(lacking, 'is', 'are')} missing, such as {lacking[0]}")


def check_no_others(what: str, unexpected: Iterable[str]) -> None:
    """ValueError that counts and names the weights that a part has no place for; what is no weight is logged."""
    keys = sorted(unexpected)
    if strange := [key for key in keys if not NO_WEIGHT.search(key)]:
        raise ValueError(
            f"cannot load {what}: {tensors_that(strange, 'has', 'have')} no place in it, such as {strange[0]}"
        )
    if keys:
        log.info("not read of %s: %s, such as %s", what, counted(len(keys), "tensor"), keys[0])


def warn_of_others(what: str, unexpected: Iterable[str]) -> None:
    """A warning that counts and names the weights that a part has no place for."""
    if strange := sorted(key for key in unexpected if not NO_WEIGHT.search(key)):
        number, have = tensors_that(strange, "has", "have"), "is" if len(strange) == 1 else "are"
        log.warning("%s: %s no place in the model and %s not used, such as %s", what, number, have, strange[0])


def tensors_that(keys: Sequence[str], one: str, several: str) -> str:
    """ "1 tensor is", "2 tensors are"."""
    return f"{counted(len(keys), 'tensor')} {one if len(keys) == 1 else several}"


def line(error: Exception) -> str:
    """What an error says, in one line."""
    said = f"no {error.args[0]}" if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(said.split())[:200] or type(error).__name__
