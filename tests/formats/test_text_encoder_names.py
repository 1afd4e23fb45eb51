"""Layers of text encoders under every program's names: of one layer all alike, of two never; modules found by them."""

from dataclasses import dataclass

import pytest
from tiny_encoders import clip, t5
from torch import Tensor, nn

from lorasmith.diffusion.process import Flow
from lorasmith.formats.module_names import ModuleNames
from lorasmith.formats.text_encoder_names import text_layer
from lorasmith.types import Cond

FIRST = (
    "lora_te_text_model_encoder_layers_0_mlp_fc1", "lora_te1_text_model_encoder_layers_0_mlp_fc1",
    "text_encoder.text_model.encoder.layers.0.mlp.fc1", "te1_text_model_encoder_layers_0_mlp_fc1",
    "lycoris_te1_text_model_encoder_layers_0_mlp_fc1", "base_model.model.text_encoder.encoder.layers.0.mlp.fc1",
    "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1", "clip_l.encoder.layers.0.mlp.fc1",
    "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1",
    "cond_stage_model.model.transformer.resblocks.0.mlp.c_fc", "text_encoder.encoder.layers.0.mlp.fc1",
    "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1",
)  # fmt: skip
SECOND = (
    "lora_te2_text_model_encoder_layers_0_mlp_fc1", "text_encoder_2.text_model.encoder.layers.0.mlp.fc1",
    "text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc1", "clip_g.encoder.layers.0.mlp.fc1",
    "conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_fc",
    "lora_te2_model_transformer_resblocks_0_mlp_c_fc",
)  # fmt: skip
T5 = (
    "lora_te3_encoder_block_0_layer_0_SelfAttention_q", "lora_te2_encoder_block_0_layer_0_SelfAttention_q",
    "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q",
    "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q", "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q",
)  # fmt: skip


def test_one_layer_has_one_meaning() -> None:
    meanings = [{text_layer(name) for name in names} for names in (FIRST, SECOND, T5)]
    assert all(len(found) == 1 and None not in found for found in meanings)
    assert len(set.union(*meanings)) == 3


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_down_blocks_0_attentions_0_proj_in", "transformer.transformer_blocks.0.attn.to_q",
        "diffusion_model.text_embedding.0", "diffusion_model.txt_in", "transformer.context_embedder",
        "transformer.time_text_embed.text_embedder.linear_1",
    ],
)  # fmt: skip
def test_other_layers_are_none_of_theirs(name: str) -> None:
    assert text_layer(name) is None


@dataclass(frozen=True)
class Encoders:
    """A denoiser that is text encoders and nothing else."""

    nets: dict[str, nn.Module]
    process: Flow = Flow()  # noqa: RUF009

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        raise NotImplementedError

    def file_key(self, path: str) -> str:
        return path


def test_modules_are_found_by_all_names() -> None:
    nets = {"text_encoder": clip(16, projected=False), "text_encoder_2": clip(16, projected=True)}
    names = ModuleNames(Encoders({**nets, "text_encoder_3": t5(16)}))
    for group, path in zip(
        (FIRST, SECOND, T5),
        (
            "text_encoder.encoder.layers.0.mlp.fc1", "text_encoder_2.text_model.encoder.layers.0.mlp.fc1",
            "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q",
        ),
        strict=True,
    ):  # fmt: skip
        assert {names.path(name) for name in group} == {path}
    whole = names.whole("conditioner.embedders.1.model.transformer.resblocks.2.attn.in_proj")
    attention = "text_encoder_2.text_model.encoder.layers.2.self_attn"
    assert whole and whole.paths == tuple(f"{attention}.{q}_proj" for q in "qkv")
    assert names.path("lora_te2_text_projection") == "text_encoder_2.text_projection"


def test_t5_is_the_second_of_flux() -> None:
    names = ModuleNames(Encoders({"text_encoder": clip(16, projected=False), "text_encoder_2": t5(16)}))
    assert {names.path(name) for name in T5} == {"text_encoder_2.encoder.block.0.layer.0.SelfAttention.q"}
    assert {names.path(name) for name in SECOND} == {None}
