"""inspect: what LoRA files, checkpoints and folders are said to be; norms against the deltas themselves."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import lorasmith
from safetensors.torch import save_file
from torch import Tensor, nn

from lorasmith.adapters.algorithms import OFT, DoRA, LoHa, LoKr, LoRA
from lorasmith.adapters.base import Layer
from lorasmith.demo import BASE
from lorasmith.formats import lora_file
from lorasmith.reporting.layer_norms_plot import kind_of_layer, norms_figure
from lorasmith.tools.inspect import inspected, layer_norms

ALGORITHMS = [
    LoRA(rank=4, alpha=2),
    LoHa(rank=3, alpha=1),
    LoKr(rank=2, alpha=3),
    LoKr(rank=64),
    OFT(rank=4),
    DoRA(rank=4),
]


def written(tmp_path: Path, algorithm: Any, metadata: dict[str, str] | None = None) -> tuple[Path, dict[str, Any]]:
    """A file with random adapters on two linear layers of two blocks, and the adapters."""
    names = ("lora_unet_down_blocks_0_attentions_0_x_attn2_to_k", "lora_unet_down_blocks_12_attentions_0_y")
    adapters, state = {}, {}
    for number, name in enumerate(names):
        adapter = algorithm.build(Layer(24, 36), name, 0, nn.Linear(24, 36))
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(number))
        adapters[name] = adapter
        state |= {f"{name}.{part}": tensor for part, tensor in adapter.file_tensors(torch.float32).items()}
    lora_file.write(tmp_path / "lora.safetensors", state, metadata or {})
    return tmp_path / "lora.safetensors", adapters


def delta(adapter: Any) -> Tensor:
    """What the adapter adds to a weight that is 0, or turns one that is the identity by; of DoRA, s B A."""
    if adapter.algorithm == "DoRA":
        return (adapter.up @ adapter.down).detach()
    if adapter.algorithm == "OFT":
        return (adapter(torch.empty(0), torch.eye(36), None) - torch.eye(36)).detach()
    return adapter(torch.eye(24), torch.zeros(24, 36), None).detach()


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: f"{a.name}-{a.rank}")
def test_a_lora(tmp_path: Path, algorithm: Any) -> None:
    path, adapters = written(tmp_path, algorithm, {"lorasmith.steps": "7"})
    found = inspected(path)
    facts = found.facts
    assert facts["kind"] == "LoRA" and facts["algorithms"] == {algorithm.name: 2} and facts["layers"] == 2
    assert facts["steps"] == 7 and isinstance(facts["dtypes"], Mapping) and list(facts["dtypes"]) == ["float32"]
    assert [row["block"] for row in found.rows] == ["down_blocks 0", "down_blocks 12"]
    for row, adapter in zip(found.rows, adapters.values(), strict=True):
        assert (
            row["norm_greatest"]
            == row["norm_root_mean_square"]
            == pytest.approx(float(delta(adapter).norm()), rel=1e-3)
        )


def test_the_family_comes_from_the_names_and_sizes(tmp_path: Path) -> None:
    assert inspected(written(tmp_path, LoRA())[0]).facts["family"] == "Stable Diffusion with a text width of 24"


def test_what_is_beside_the_adapters_is_named(tmp_path: Path) -> None:
    state = {
        "lora_unet_conv_in.lora_down.weight": torch.ones(2, 4), "lora_unet_conv_in.lora_up.weight": torch.ones(4, 2),
        "lora_unet_conv_in.dora_scale": torch.ones(4), "lora_unet_conv_out.diff_b": torch.tensor([1.0, float("nan")]),
    }  # fmt: skip
    save_file(state, tmp_path / "a.safetensors")
    found = inspected(tmp_path / "a.safetensors")
    assert found.facts["algorithms"] == {"DoRA": 1} and found.facts["other_parts"] == {"diff_b": 1}
    assert found.facts["steps"] is None and found.facts["tensors_not_finite"] == 1
    assert ("steps", "not stated") in found.facts_table and ("tensors not finite", "1") in found.facts_table


def test_a_diffusers_folder() -> None:
    found = inspected(BASE)
    assert found.facts["pipeline"] == "StableDiffusionPipeline"
    assert [row["part"] for row in found.rows] == ["text_encoder", "unet", "vae"]


def test_a_checkpoint(tmp_path: Path) -> None:
    state = {
        "model.diffusion_model.input_blocks.0.0.weight": torch.ones(8, 4, 3, 3),
        "cond_stage_model.model.ln_final.weight": torch.ones(8).half(),
    }
    save_file(state, tmp_path / "model.safetensors", {"modelspec.title": "mine"})
    found = inspected(tmp_path / "model.safetensors")
    assert found.facts["family"] == "Stable Diffusion 2.x" and found.metadata == {"modelspec.title": "mine"}
    assert found.document["parts"] == [
        {"part": "cond_stage_model", "tensors": 1, "parameters": 8, "dtypes": ["f16"], "size": 16},
        {"part": "model", "tensors": 1, "parameters": 288, "dtypes": ["f32"], "size": 1152},
    ]
    assert found.rows_table[1] == ("model", "1", "288", "f32", "0.0 MB")


def test_refusals(tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"broken\.safetensors must be a safetensors file, got text$"):
        inspected(tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match=r"a\.ckpt must be a safetensors file: a pickle"):
        inspected(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="file not found"):
        inspected(tmp_path / "missing.safetensors")
    with pytest.raises(ValueError, match="must be a diffusers folder with a model_index.json"):
        inspected(tmp_path)


def test_the_command(tmp_path: Path) -> None:
    title = "x " * 200 + "\ta [bold]tab[/]"
    path, _ = written(tmp_path, LoRA(), {"modelspec.title": title})
    ended = lorasmith(tmp_path, "inspect", str(path))
    assert ended.code == 0 and "algorithms\tLoRA\n" in ended.out and "\ndown_blocks 12\t1\t8\t" in ended.out
    assert f"\nmodelspec.title\t{title}\n" in ended.out  # neither wrapped nor padded
    refused = lorasmith(tmp_path, "inspect", "nowhere.safetensors")
    assert refused.code == 2 and refused.err == (
        "lorasmith: nowhere.safetensors must be a safetensors file: file not found\n"
    )


def test_json(tmp_path: Path) -> None:
    metadata = {"modelspec.title": "grün\n" * 99, "lorasmith.steps": "7"}
    path, adapters = written(tmp_path, LoRA(rank=4, alpha=2), metadata)
    num_parameters = sum(p.numel() for adapter in adapters.values() for p in adapter.parameters())
    ended = lorasmith(tmp_path, "inspect", str(path), "--json", "--plot", "norms.png")
    found = json.loads(ended.out)
    blocks = found.pop("blocks")
    assert (ended.code, ended.err) == (0, "") and found == {
        "kind": "LoRA", "family": "Stable Diffusion with a text width of 24", "algorithms": {"LoRA": 2}, "layers": 2,
        "ranks": {"4": 2}, "alphas": {"2": 2}, "parameters": num_parameters,
        "dtypes": {"float32": 4}, "steps": 7, "other_parts": {}, "not_read": {}, "not_measured": {},
        "tensors_not_finite": 0,
        "metadata": metadata, "plot": "norms.png",
    }  # fmt: skip
    assert [block["ranks"] for block in blocks] == [[4], [4]]
    for block, adapter in zip(blocks, adapters.values(), strict=True):
        assert block["norm_greatest"] == pytest.approx(float(delta(adapter).norm()), rel=1e-5)
    model = json.loads(lorasmith(tmp_path, "inspect", "demo", "--json").out)
    assert model["kind"] == "model, a diffusers folder" and {type(part["size"]) for part in model["parts"]} == {int}


def test_norms_that_are_no_numbers_are_null(tmp_path: Path) -> None:
    state = {
        "lora_unet_a.lora_down.weight": torch.tensor([[float("nan")]]),
        "lora_unet_a.lora_up.weight": torch.ones(1, 1),
    }
    save_file(state, tmp_path / "a.safetensors")
    (block,) = json.loads(lorasmith(tmp_path, "inspect", "a.safetensors", "--json").out)["blocks"]
    assert block["norm_greatest"] is None and block["norm_root_mean_square"] is None


def test_why_a_layer_has_no_norm_is_said(tmp_path: Path) -> None:
    down, up = torch.ones(2, 4), torch.ones(4, 2)
    state = {
        "lora_unet_a.lora_down.weight": down,
        "lora_unet_b.lora_down.weight": down,
        "lora_unet_c.hada_w1_a": up,
        "lora_unet_d.lora_down.weight": down,
        "lora_unet_d.lora_up.weight": torch.ones(4, 3),
        "lora_unet_e.lora_down.weight": down,
        "lora_unet_e.lora_up.weight": up,
    }
    save_file({key: tensor.clone() for key, tensor in state.items()}, tmp_path / "half.safetensors")
    assert inspected(tmp_path / "half.safetensors").facts["not_measured"] == {
        "LoRA without lora_up.weight": 2,
        "LoHa without hada_w1_b": 1,
        "LoRA of shapes that do not fit together": 1,
    }
    shown = lorasmith(tmp_path, "inspect", "half.safetensors").out
    assert "\nnot measured\tLoRA without lora_up.weight (2), " in shown


def test_the_picture_has_a_bar_for_each_layer(tmp_path: Path) -> None:
    path, adapters = written(tmp_path, LoRA(rank=4, alpha=2))
    norms = layer_norms(path)
    assert [one.block for one in norms] == ["down_blocks 0", "down_blocks 12"]
    (axes,) = norms_figure(norms, "title").axes
    bars = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in axes.patches}  # pyright: ignore
    for number, one in enumerate(norms):
        assert bars[number] == pytest.approx(float(delta(adapters[one.layer]).norm()), rel=1e-3)
    ended = lorasmith(tmp_path, "inspect", str(path), "--plot", "norms.png")
    assert ended.code == 0 and (tmp_path / "norms.png").read_bytes().startswith(b"\x89PNG")
    for file, plot, message in (
        (str(path), "norms.jpg", "plot must be a .png file in a folder that exists, got norms.jpg"),
        (str(BASE), "a.png", f"{BASE} must be a LoRA file to have norms, which it is not"),
    ):
        refused = lorasmith(tmp_path, "inspect", file, "--plot", plot)
        assert (refused.code, refused.err) == (2, f"lorasmith: {message}\n")


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", "cross-attention"),
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k", "attention"),
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_ff_net_2", "MLP"),
        ("lora_unet_mid_block_resnets_0_conv1", "convolution"),
        ("transformer.x_embedder", "other"),
    ],
)
def test_kinds_of_layers(layer: str, kind: str) -> None:
    assert kind_of_layer(layer)[0] == kind
