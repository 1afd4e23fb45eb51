"""The layers of text encoders, whatever a program calls them: which encoder of a pipeline, and which of its layers.

CLIP has transformers' names or OpenCLIP's, which makes one layer, in_proj, of queries, keys and values.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

PREFIX = r"(?:lora_|lycoris_|base_model_model_|diffusion_model_|unet_|transformer_)*"
ENCODERS = (
    (r"te2|text_encoder_2|clip_g|conditioner_embedders_1", "2"),
    (r"te3|text_encoder_3", "3"),
    (r"t5xxl", "t5"),
    (r"te1?|text_encoder|clip_[lh]|cond_stage_model|conditioner_embedders_0", "1"),
)
"""(kohya's, diffusers', ComfyUI's names and those in checkpoints, the encoder's number); the first that fits counts."""
NAMED = [(re.compile(rf"{PREFIX}(?:text_encoders_)?(?:{names})_(?P<module>.+)"), number) for names, number in ENCODERS]
OTHERS = re.compile(rf"{PREFIX}text_encoders_\w+?_(?P<module>(?:transformer|model|encoder)_.+)")  # ComfyUI's of others
UNNAMED = re.compile(rf"{PREFIX}(?P<module>text_model_.+)")
LEVELS = re.compile(r"^(?:transformer_|text_model_|model_)+")
OF_T5 = re.compile(r"(encoder_block_\d|encoder_final_layer_norm|encoder_embed_tokens|shared$)")
OF_CLIP = re.compile(r"(encoder_layers_\d|embeddings_|final_layer_norm|text_projection)")
BLOCK = re.compile(r"resblocks_(\d+)_(.+)")
IN_PROJ = "self_attn_in_proj"
QKV = ("self_attn_q_proj", "self_attn_k_proj", "self_attn_v_proj")
OPEN_CLIP = {
    "attn_in_proj": IN_PROJ, "attn_out_proj": "self_attn_out_proj", "mlp_c_fc": "mlp_fc1", "mlp_c_proj": "mlp_fc2",
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "token_embedding": "embeddings_token_embedding",
    "ln_final": "final_layer_norm",
}  # fmt: skip
"""{a module in OpenCLIP, of a block or of the whole: in transformers}."""


class TextLayer(NamedTuple):
    """A layer of a text encoder; two names mean the same layer where these are equal."""

    encoder: str  # its number in the pipeline, t5 wherever that stands, "" where the name does not say
    module: str  # transformers' name with underscores, without the level text_model

    def __str__(self) -> str:
        return f"te{self.encoder}:{self.module}"

    @property
    def of_any(self) -> "TextLayer":
        """The same where the encoder is not named."""
        return self._replace(encoder="")

    @property
    def is_clip(self) -> bool:
        return self.encoder != "t5" and OF_CLIP.match(self.module) is not None

    @property
    def whole(self) -> "TextLayer | None":
        """Of queries OpenCLIP's in_proj, which begins with them; None of other layers."""
        if not self.module.endswith(QKV[0]):
            return None
        return self._replace(module=self.module.removesuffix(QKV[0]) + IN_PROJ)

    @property
    def members(self) -> tuple["TextLayer", ...]:
        """Of OpenCLIP's in_proj queries, keys and values; else none."""
        if not self.module.endswith(IN_PROJ):
            return ()
        return tuple(self._replace(module=self.module.removesuffix(IN_PROJ) + name) for name in QKV)


def text_layer(name: str) -> TextLayer | None:
    """What a layer's name, with points or underscores, means; None where it is of no text encoder."""
    name = name.replace(".", "_")
    for pattern, number in (*NAMED, (OTHERS, "1"), (UNNAMED, "")):
        if match := pattern.fullmatch(name):
            module = _in_transformers(LEVELS.sub("", match["module"]))
            return TextLayer("t5" if OF_T5.match(module) else number, module)
    return None


def has_text_layers(layers: Iterable[str]) -> bool:
    """Whether some of these layers' names mean one of a text encoder."""
    return any(text_layer(layer) for layer in layers)


def _in_transformers(module: str) -> str:
    block = BLOCK.fullmatch(module)
    if block:
        return f"encoder_layers_{block[1]}_{OPEN_CLIP.get(block[2], block[2])}"
    return OPEN_CLIP.get(module, module)
