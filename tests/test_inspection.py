"""inspect: what LoRA files, checkpoints and folders are said to be; norms against the deltas themselves."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import lorasmith
from safetensors.torch import save_file
from torch import Tensor, nn

from lorasmith import lorafile
from lorasmith.adapters import LoHa, LoKr, LoRA
from lorasmith.adapters.dora import DoRA
from lorasmith.adapters.layer import Layer
from lorasmith.adapters.oft import OFT
from lorasmith.demo import BASE
from lorasmith.inspection import inspected, layer_norms
from lorasmith.norms_plot import kind_of_layer, norms_figure

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
    lorafile.write(tmp_path / "lora.safetensors", state, metadata or {})
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
    facts = dict(found.facts)
    assert facts["kind"] == "LoRA" and facts["algorithm"] == algorithm.name and facts["layers"] == "2"
    assert facts["steps"] == "7" and facts["dtype"] == "float32"
    assert [row[0] for row in found.rows] == ["down_blocks 0", "down_blocks 12"]
    for row, adapter in zip(found.rows, adapters.values(), strict=True):
        assert float(row[3]) == pytest.approx(float(delta(adapter).norm()), rel=1e-3)


def test_the_family_comes_from_the_names_and_sizes(tmp_path: Path) -> None:
    assert dict(inspected(written(tmp_path, LoRA())[0]).facts)["family"] == "Stable Diffusion with a text width of 24"


def test_what_is_beside_the_adapters_is_named(tmp_path: Path) -> None:
    state = {
        "lora_unet_conv_in.lora_down.weight": torch.ones(2, 4), "lora_unet_conv_in.lora_up.weight": torch.ones(4, 2),
        "lora_unet_conv_in.dora_scale": torch.ones(4), "lora_unet_conv_out.diff_b": torch.tensor([1.0, float("nan")]),
    }  # fmt: skip
    save_file(state, tmp_path / "a.safetensors")
    facts = dict(inspected(tmp_path / "a.safetensors").facts)
    assert facts["algorithm"] == "DoRA" and facts["also"] == "diff_b"
    assert facts["steps"] == "not stated" and facts["not finite"] == "1 tensors"


def test_a_diffusers_folder() -> None:
    found = inspected(BASE)
    assert dict(found.facts)["pipeline"] == "StableDiffusionPipeline"
    assert [row[0] for row in found.rows] == ["text_encoder", "unet", "vae"]


def test_a_checkpoint(tmp_path: Path) -> None:
    state = {
        "model.diffusion_model.input_blocks.0.0.weight": torch.ones(8, 4, 3, 3),
        "cond_stage_model.model.ln_final.weight": torch.ones(8).half(),
    }
    save_file(state, tmp_path / "model.safetensors", {"modelspec.title": "mine"})
    found = inspected(tmp_path / "model.safetensors")
    assert dict(found.facts)["family"] == "Stable Diffusion 2.x" and found.metadata == {"modelspec.title": "mine"}
    assert found.rows == [("cond_stage_model", "1", "8", "f16", "0.0"), ("model", "1", "288", "f32", "0.0")]


def test_refusals(tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"broken\.safetensors must be a safetensors file, but it cannot be read"):
        inspected(tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match=r"a\.ckpt must be a safetensors file: a pickle"):
        inspected(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="got nothing there"):
        inspected(tmp_path / "missing.safetensors")
    with pytest.raises(ValueError, match="must be a diffusers folder with a model_index.json"):
        inspected(tmp_path)


def test_the_command(tmp_path: Path) -> None:
    path, _ = written(tmp_path, LoRA(), {"modelspec.title": "x" * 200})
    ended = lorasmith(tmp_path, "inspect", str(path))
    assert ended.code == 0 and re.search(r"algorithm +LoRA *\n", ended.out) and "down_blocks 12" in ended.out
    assert ended.out.count("x") >= 200  # long metadata is folded, not cut
    refused = lorasmith(tmp_path, "inspect", "nowhere.safetensors")
    assert refused.code == 2 and refused.err == (
        "lorasmith: nowhere.safetensors must be a safetensors file, got nothing there\n"
    )


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
