"""UNets and autoencoders in the layout of the original latent-diffusion code (Rombach et al. 2022)."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils as converters

from lorasmith.formats.unet_names import ldm_names
from lorasmith.models.checkpoints.ldm_configs import UNET
from lorasmith.models.checkpoints.load import NO_WEIGHT, UNFIT, check_no_others, dtype_in, fitted, line, tensors
from lorasmith.storage.safetensors_header import Header

Keys = Mapping[str, str]
"""{name in the original layout, without what stands before all names of a part: key in the file}."""
OF_TRAINING = ("loss.", "model_ema.")


def below(header: Header, prefix: str) -> dict[str, str]:
    """The keys of a part whose names begin with this."""
    return {key[len(prefix) :]: key for key in header.shapes if key.startswith(prefix)}


def ldm_unet(header: Header, keys: Keys, config: Mapping[str, Any]) -> Any:
    """The UNet, in the dtype that it is stored in; ValueError where the tensors do not fit it."""
    dtype, read = dtype_in(header, keys.values()), tensors(header, keys.values())
    try:
        with torch.device("meta"):
            net: Any = UNet2DConditionModel.from_config(dict(config))
        whole = net.config
        known = set(ldm_names(whole).values())
        state = converters.convert_ldm_unet_checkpoint({f"{UNET}{name}": read.pop(keys[name]) for name in keys}, whole)
    except UNFIT as error:
        raise ValueError(f"cannot load the UNet2DConditionModel of {header.path}: {line(error)}") from error
    strange = [k for name, k in keys.items() if name.rpartition(".")[0] not in known and not NO_WEIGHT.search(k)]
    if strange:
        raise ValueError(f"{header.path} must hold a UNet of Stable Diffusion's kind, which has no {strange[0]}")
    return fitted(UNet2DConditionModel, config, state, dtype, path=header.path)


def ldm_vae(header: Header, keys: Keys, config: Mapping[str, Any], dtype: torch.dtype | None) -> Any:
    """The AutoencoderKL in this dtype (None: as stored); ValueError where the tensors do not fit it."""
    keys = {name: key for name, key in keys.items() if not name.startswith(OF_TRAINING)}
    found = tensors(header, keys.values(), dtype)
    read = {name: found[key] for name, key in keys.items()}
    try:
        state = converters.convert_ldm_vae_checkpoint(dict(read), config)
        places = {tensor.data_ptr() for tensor in state.values()}
    except UNFIT as error:
        raise ValueError(f"cannot load the AutoencoderKL of {header.path}: {line(error)}") from error
    dtype = dtype or dtype_in(header, keys.values())
    vae = fitted(AutoencoderKL, config, state, dtype, path=header.path)
    unread = [keys[name] for name, tensor in read.items() if tensor.data_ptr() not in places]
    check_no_others(f"the AutoencoderKL of {header.path}", unread)
    return vae
