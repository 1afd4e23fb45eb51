"""The text encoders in single files: CLIP under transformers' names or OpenCLIP's (Radford et al. 2021), and T5."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.loaders import single_file_utils as converters
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

from lorasmith.models.checkpoints.ldm_configs import clip_config
from lorasmith.models.checkpoints.load import UNFIT, check_no_others, line, shaped, tensors
from lorasmith.models.sources.parts import check_report
from lorasmith.storage.safetensors_header import Header

POSITIONS = "embeddings.position_ids"  # 0, 1, 2 …, which some files hold


def shaped_encoders(header: Header, names: Mapping[str, str]) -> dict[str, Any]:
    """{part: how its tensors' names begin} -> those that the file holds, without weights, on the meta device."""
    return {part: _shaped(header, prefix) for part, prefix in names.items() if header.holds(prefix)}


def _shaped(header: Header, prefix: str) -> Any:
    if header.holds(f"{prefix}encoder.block."):
        return shaped(T5EncoderModel, _t5_config(header, prefix), path=header.path)
    config = clip_config(header, prefix)
    projection = f"{prefix}text_projection.weight"
    if projection not in header.shapes:
        return shaped(CLIPTextModel, config, path=header.path)
    projected = {**config, "projection_dim": header.shape(projection)[0]}
    return shaped(CLIPTextModelWithProjection, projected, path=header.path)


def _t5_config(header: Header, prefix: str) -> dict[str, Any]:
    """A T5Config's values; what no layer's shape depends on is left out."""
    block = f"{prefix}encoder.block.0.layer"
    num_words, width = header.shape(f"{prefix}shared.weight")
    buckets, heads = header.shape(f"{block}.0.SelfAttention.relative_attention_bias.weight")
    is_gated = f"{block}.1.DenseReluDense.wi_0.weight" in header.shapes
    return {
        "vocab_size": num_words,
        "d_model": width,
        "d_kv": header.shape(f"{block}.0.SelfAttention.q.weight")[0] // heads,
        "d_ff": header.shape(f"{block}.1.DenseReluDense.wo.weight")[1],
        "num_layers": header.count(f"{prefix}encoder.block."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu" if is_gated else "relu",
    }


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
