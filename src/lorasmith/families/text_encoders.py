"""CLIP's text encoders in single files, under transformers' names or OpenCLIP's (Radford et al. 2021)."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.loaders import single_file_utils as converters
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lorasmith.families.parts import check_report
from lorasmith.families.weights import UNFIT, check_no_others, line, tensors
from lorasmith.header import Header

POSITIONS = "embeddings.position_ids"  # 0, 1, 2 …, which some files hold


def clip_encoder(header: Header, prefix: str, config: Mapping[str, Any], dtype: torch.dtype) -> CLIPTextModel:
    """The one whose tensors' names begin with this; ValueError where the weights do not fit."""
    keys = [key for key in header.shapes if key.startswith(prefix) and not key.endswith(POSITIONS)]
    state = converters.convert_ldm_clip_checkpoint(tensors(header, keys, dtype))
    return _loaded(CLIPTextModel, config, state, dtype, header)


def open_clip_encoder(
    header: Header, prefix: str, config: Mapping[str, Any], dtype: torch.dtype, *, projected: bool
) -> Any:
    """A CLIPTextModel, or with the projection of the pooled vector; layers beyond those of the config are not read."""
    layers = f"{prefix}transformer.resblocks."
    keys = [
        key
        for key in header.shapes
        if key.startswith(prefix)
        and not (key.startswith(layers) and int(key[len(layers) :].split(".")[0]) >= config["num_hidden_layers"])
        and (projected or key != f"{prefix}text_projection")
    ]
    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    try:
        given: Any = SimpleNamespace(config=SimpleNamespace(**config))
        state = converters.convert_open_clip_checkpoint(given, tensors(header, keys, dtype), prefix)
    except UNFIT as error:
        raise ValueError(f"cannot load the text encoder of {header.path}: {line(error)}") from error
    return _loaded(kind, config, state, dtype, header)


def _loaded(
    kind: Any, config: Mapping[str, Any], state: Mapping[str, torch.Tensor], dtype: torch.dtype, header: Header
) -> Any:
    try:
        loaded, found = kind.from_pretrained(
            None, config=CLIPTextConfig(**config), state_dict=dict(state), dtype=dtype, output_loading_info=True,
            ignore_mismatched_sizes=True,  # its error names no tensor, its report does
        )  # fmt: skip
    except UNFIT as error:
        raise ValueError(f"cannot load the text encoder of {header.path}: {line(error)}") from error
    what = f"the text encoder of {header.path}"
    check_report(what, found)
    check_no_others(what, found["unexpected_keys"])
    return loaded
