"""AuraFlow: joint blocks of texts and pictures, then blocks of both as one stream."""

from lorasmith.formats.architectures.architecture import Architecture, numbered, one_to_one

MLP = {"c_fc1": "linear_1", "c_fc2": "linear_2", "c_proj": "out_projection"}
LAYERS = {
    **one_to_one(
        {
            "t_embedder.mlp.0": "time_step_proj.linear_1", "t_embedder.mlp.2": "time_step_proj.linear_2",
            "cond_seq_linear": "context_embedder", "init_x_linear": "pos_embed.proj", "final_linear": "proj_out",
            "modF.1": "norm_out.linear",
        }
    ),
    **numbered(
        "double_layers.{}",
        "joint_transformer_blocks.{}",
        one_to_one(
            {
                "modX.1": "norm1.linear", "modC.1": "norm1_context.linear",
                **{f"attn.w2{name}": f"attn.to_{name}" for name in "qkv"}, "attn.w2o": "attn.to_out.0",
                **{f"attn.w1{name}": f"attn.add_{name}_proj" for name in "qkv"}, "attn.w1o": "attn.to_add_out",
                **{f"mlpX.{original}": f"ff.{name}" for original, name in MLP.items()},
                **{f"mlpC.{original}": f"ff_context.{name}" for original, name in MLP.items()},
            }
        ),
    ),
    **numbered(
        "single_layers.{}",
        "single_transformer_blocks.{}",
        one_to_one(
            {
                "modCX.1": "norm1.linear", **{f"attn.w1{name}": f"attn.to_{name}" for name in "qkv"},
                "attn.w1o": "attn.to_out.0", **{f"mlp.{original}": f"ff.{name}" for original, name in MLP.items()},
            }
        ),
    ),
}  # fmt: skip
AURA_FLOW = Architecture(
    name="AuraFlow",
    pipelines={"AuraFlowPipeline": "aura_flow.AuraFlow"},
    lora_signs=r"joint_transformer_blocks|(double|single)_layers_\d+_(attn_w|mlp|mod)",
    transformer="AuraFlowTransformer2DModel",
    layers=LAYERS,
)
