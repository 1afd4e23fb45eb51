"""The names that the original latent-diffusion code gives to the UNet's modules (Rombach et al. 2022)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
}
BLOCK = (
    "norm1", "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0",
    "norm2", "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0",
    "norm3", "ff.net.0.proj", "ff.net.2",
)  # fmt: skip
DOWN = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}  # the kinds of blocks, and whether they attend
UP = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}
Names = Iterator[tuple[str, str]]


def ldm_names(unet_config: Mapping[str, Any]) -> dict[str, str]:
    """{path of a module with weights in a UNet2DConditionModel: its path below `model.diffusion_model.`}.

    unet_config: the UNet's config, whole. ValueError where the original code has no such UNet.
    """
    levels = len(unet_config["block_out_channels"])
    downs = _attends("down_block_types", unet_config, DOWN)
    ups = _attends("up_block_types", unet_config, UP)
    if unet_config["mid_block_type"] != "UNetMidBlock2DCrossAttn":
        raise ValueError(f"mid_block_type must be UNetMidBlock2DCrossAttn, got {unet_config['mid_block_type']}")
    layers = _each(unet_config["layers_per_block"], levels)
    depths = _each(unet_config["transformer_layers_per_block"], levels)
    up_depths = unet_config["reverse_transformer_layers_per_block"] or depths[::-1]
    names = {"conv_in": "input_blocks.0.0", **dict(_embeddings(unet_config))}
    names |= _down(unet_config["block_out_channels"], layers, downs, depths)
    middle_depth = _each(depths[-1], 1)[0]
    names |= _resnet("mid_block.resnets.0", "middle_block.0", shortcut=False)
    names |= _transformer("mid_block.attentions.0", "middle_block.1", middle_depth)
    names |= _resnet("mid_block.resnets.1", "middle_block.2", shortcut=False)
    names |= _up([num + 1 for num in layers[::-1]], ups, up_depths)
    return names | {"conv_norm_out": "out.0", "conv_out": "out.2"}


def _each(value: Any, number: int) -> Sequence[Any]:
    """One value for all, or already one for each."""
    return [value] * number if isinstance(value, int) else value


def _attends(key: str, config: Mapping[str, Any], kinds: Mapping[str, bool]) -> list[bool]:
    """Whether each block has attention."""
    unknown = [kind for kind in config[key] if kind not in kinds]
    if unknown:
        raise ValueError(f"{key} must be among {', '.join(kinds)}, got {unknown[0]}")
    return [kinds[kind] for kind in config[key]]


def _embeddings(config: Mapping[str, Any]) -> Names:
    yield from (("time_embedding.linear_1", "time_embed.0"), ("time_embedding.linear_2", "time_embed.2"))
    if config["addition_embed_type"] == "text_time":  # SDXL: pooled text and sizes
        yield from (("add_embedding.linear_1", "label_emb.0.0"), ("add_embedding.linear_2", "label_emb.0.2"))
    elif config["class_embed_type"] == "projection":  # unCLIP
        yield from (("class_embedding.linear_1", "label_emb.0.0"), ("class_embedding.linear_2", "label_emb.0.2"))
    elif config["num_class_embeds"] is not None:  # the upscaler's noise level
        yield "class_embedding", "label_emb"


def _down(channels: Sequence[int], layers: Sequence[int], attends: Sequence[bool], depths: Sequence[Any]) -> Names:
    """Input blocks are counted through all levels; a downsampler is one of them."""
    number, before = 1, channels[0]
    for level, width in enumerate(channels):
        block, layer_depths = f"down_blocks.{level}", _each(depths[level], layers[level])
        for layer in range(layers[level]):
            ldm = f"input_blocks.{number}"
            yield from _resnet(f"{block}.resnets.{layer}", f"{ldm}.0", shortcut=width != before)
            if attends[level]:
                yield from _transformer(f"{block}.attentions.{layer}", f"{ldm}.1", layer_depths[layer])
            number, before = number + 1, width
        if level < len(channels) - 1:
            yield f"{block}.downsamplers.0.conv", f"input_blocks.{number}.0.op"
            number += 1


def _up(layers: Sequence[int], attends: Sequence[bool], depths: Sequence[Any]) -> Names:
    """Output blocks are counted through all levels; an upsampler is the end of a level's last one.

    A skip connection widens the input of every block, so that each has a shortcut.
    """
    number = 0
    for level, num_layers in enumerate(layers):
        block, layer_depths = f"up_blocks.{level}", _each(depths[level], num_layers)
        for layer in range(num_layers):
            ldm = f"output_blocks.{number}"
            yield from _resnet(f"{block}.resnets.{layer}", f"{ldm}.0", shortcut=True)
            if attends[level]:
                yield from _transformer(f"{block}.attentions.{layer}", f"{ldm}.1", layer_depths[layer])
            number += 1
        if level < len(layers) - 1:
            yield f"{block}.upsamplers.0.conv", f"output_blocks.{number - 1}.{2 if attends[level] else 1}.conv"


def _resnet(path: str, ldm: str, *, shortcut: bool) -> Names:
    names = {**RESNET, "conv_shortcut": "skip_connection"} if shortcut else RESNET
    yield from ((f"{path}.{name}", f"{ldm}.{original}") for name, original in names.items())


def _transformer(path: str, ldm: str, depth: int) -> Names:
    """The same names on both sides."""
    blocks = [f"transformer_blocks.{number}.{name}" for number in range(depth) for name in BLOCK]
    yield from ((f"{path}.{name}", f"{ldm}.{name}") for name in ("norm", "proj_in", *blocks, "proj_out"))
