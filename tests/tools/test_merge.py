"""merge: against PEFT's own sum of adapters side by side, LyCORIS' deltas and numpy's SVD; what is refused."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import lorasmith
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorasmith.tools.merge import Source, merge
from lorasmith.tools.same_layout import canonical

logging.getLogger("LyCORIS").setLevel(logging.ERROR)
NAME = "lora_unet_mid_block_attn1_to_q"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.conv = nn.Linear(10, 12), nn.Conv2d(4, 6, 3)


def peft_pair() -> tuple[Any, dict[str, dict[str, Tensor]]]:
    """A net with adapters a (rank 2, alpha 4) and b (rank 3, alpha 1), and their files."""
    torch.manual_seed(0)
    configs = {
        name: LoraConfig(r=r, lora_alpha=a, target_modules=["to_q", "conv"])
        for name, r, a in (("a", 2, 4), ("b", 3, 1))
    }
    net: Any = get_peft_model(Net(), configs["a"], adapter_name="a")
    net.add_adapter("b", configs["b"])
    for key, parameter in net.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter)
    states = {}
    for name, config in configs.items():
        found = get_peft_model_state_dict(net, adapter_name=name)
        alphas = {
            key.replace(".lora_A.weight", ".alpha"): torch.tensor(float(config.lora_alpha))
            for key in found
            if "lora_A" in key
        }
        states[name] = {key: value.detach().clone() for key, value in found.items()} | alphas
    return net, states


def written(folder: Path, states: dict[str, dict[str, Tensor]]) -> list[Path]:
    for name, state in states.items():
        save_file(state, folder / f"{name}.safetensors", {"ss_v2": "False", "title": name})
    return [folder / f"{name}.safetensors" for name in states]


def sources(*files: tuple[Path, float]) -> list[Source]:
    return [Source.parsed(f"{path}:{weight}") for path, weight in files]


def test_loras_side_by_side_are_peft_s(tmp_path: Path) -> None:
    net, states = peft_pair()
    net.add_weighted_adapter(["a", "b"], [0.7, -0.3], "c", combination_type="cat")
    a, b = written(tmp_path, states)
    losses = merge(sources((a, 0.7), (b, -0.3)), tmp_path / "c.safetensors")
    assert losses.overall < 1e-6 and not losses.worst() and set(losses.ranks.values()) == {5}
    merged = load_file(tmp_path / "c.safetensors")
    assert merged.keys() == states["a"].keys()
    for layer in ("to_q", "conv"):
        expected = net.base_model.model.get_submodule(layer).get_delta_weight("c")
        up, down = (merged[f"base_model.model.{layer}.lora_{which}.weight"] for which in "BA")
        torch.testing.assert_close((up.flatten(1) @ down.flatten(1)).view(expected.shape), expected)
        assert float(merged[f"base_model.model.{layer}.alpha"]) == len(down) == 5
    with safe_open(tmp_path / "c.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["ss_network_dim"] == metadata["ss_network_alpha"] == "5"
    assert metadata["ss_v2"] == "False" and "title" not in metadata
    assert metadata["modelspec.merged_from"] == "a.safetensors, b.safetensors"
    assert "merge of a.safetensors * 0.7, b.safetensors * -0.3" in metadata["lorasmith.history"]


def test_a_rank_cuts_the_sum_off_at_its_nearest(tmp_path: Path) -> None:
    net, states = peft_pair()
    net.add_weighted_adapter(["a", "b"], [1.0, 0.5], "c", combination_type="cat")
    a, b = written(tmp_path, states)
    losses = merge(sources((a, 1.0), (b, 0.5)), tmp_path / "c.safetensors", rank=3)
    merged = load_file(tmp_path / "c.safetensors")
    for layer in ("to_q", "conv"):
        whole = net.base_model.model.get_submodule(layer).get_delta_weight("c").detach().flatten(1).double().numpy()
        left, values, right = np.linalg.svd(whole, full_matrices=False)
        up, down = (merged[f"base_model.model.{layer}.lora_{which}.weight"].flatten(1) for which in "BA")
        np.testing.assert_allclose((up @ down).numpy(), left[:, :3] * values[:3] @ right[:3], atol=1e-4)
        assert losses.layers[f"base_model.model.{layer}"][0] == pytest.approx((values[3:] ** 2).sum(), rel=1e-3)


@pytest.mark.parametrize("kind", [LohaModule, LokrModule])
def test_other_algorithms_go_through_their_delta(tmp_path: Path, kind: Any) -> None:
    torch.manual_seed(1)
    theirs = kind(NAME, nn.Linear(10, 12), lora_dim=2, alpha=3)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    lora = {f"{NAME}.lora_up.weight": torch.randn(12, 2), f"{NAME}.lora_down.weight": torch.randn(2, 10)}
    other = {f"{NAME}.{key}": value.detach().clone() for key, value in theirs.state_dict().items()}
    a, b = written(tmp_path, {"a": lora, "b": other})
    with pytest.raises(ValueError, match="adds to others only through its delta: give --rank"):
        merge(sources((a, 1.0), (b, 0.5)), tmp_path / "c.safetensors")
    merge(sources((a, 1.0), (b, 0.5)), tmp_path / "c.safetensors", rank=10)
    merged = load_file(tmp_path / "c.safetensors")
    expected = (
        lora[f"{NAME}.lora_up.weight"] @ lora[f"{NAME}.lora_down.weight"] + 0.5 * theirs.get_weight((12, 10)).detach()
    )
    found = merged[f"{NAME}.lora_up.weight"] @ merged[f"{NAME}.lora_down.weight"]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_differences_are_added_and_layers_of_one_alone_are_scaled(tmp_path: Path) -> None:
    one = {
        f"{NAME}.lora_up.weight": torch.ones(3, 1),
        f"{NAME}.lora_down.weight": torch.ones(1, 4),
        f"{NAME}.diff_b": torch.ones(3),
    }
    other = {
        "lora_unet_norm.diff": torch.ones(5),
        f"{NAME}.diff_b": torch.ones(3),
        "lora_unet_x.lora_up.weight": torch.ones(2, 1),
    }
    other |= {"lora_unet_x.lora_down.weight": torch.ones(1, 2)}
    a, b = written(tmp_path, {"a": one, "b": other})
    merge(sources((a, 2.0), (b, 0.5)), tmp_path / "c.safetensors", dtype=torch.bfloat16)
    merged = load_file(tmp_path / "c.safetensors")
    assert merged[f"{NAME}.diff_b"].tolist() == [2.5] * 3 and merged["lora_unet_norm.diff"].tolist() == [0.5] * 5
    assert (merged["lora_unet_x.lora_up.weight"] @ merged["lora_unet_x.lora_down.weight"]).unique().tolist() == [0.5]
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("lora_te_text_model_a", "text_encoder.text_model.a"),
        ("lora_te1_text_model_a", "text_encoders.clip_l.transformer.text_model.a"),
        ("lora_te2_text_model_a", "text_encoder_2.text_model.a"),
        ("lora_unet_down_blocks_0_attn1_to_q", "unet.down_blocks.0.attn1.to_q"),
        ("lora_unet_down_blocks_0_attn1_to_q", "base_model.model.unet.down_blocks.0.attn1.processor.to_q"),
        ("lora_unet_double_blocks_0_img", "diffusion_model.double_blocks.0.img"),
    ],
)
def test_one_layer_under_programs_names(one: str, other: str) -> None:
    assert canonical(one) == canonical(other)


def test_text_encoders_are_told_apart() -> None:
    assert len({canonical(f"lora_{te}_x") for te in ("te1", "te2", "te3", "unet")}) == 4


def lora(name: str = NAME, n_out: int = 3, n_in: int = 4, **others: Tensor) -> dict[str, Tensor]:
    factors = {"lora_up.weight": torch.ones(n_out, 1), "lora_down.weight": torch.ones(1, n_in)}
    return {f"{name}.{part}": tensor for part, tensor in (factors | others).items()}


TO_K = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
REFUSED = [
    (
        lora(TO_K, 3, 768),
        lora(TO_K, 3, 2048),
        r"must be for the same model, but look made for Stable Diffusion 1.x .* and SDXL",
    ),
    (lora(), lora(n_in=5), r"must be of one shape in .*a.safetensors and .*b.safetensors, got \[3, 4\] and \[3, 5\]"),
    (lora(), lora(dora_scale=torch.ones(3, 1)), "holds DoRA, which depends on the model's weights: .* with --model"),
    (lora(), {f"{NAME}.oft_blocks": torch.zeros(1, 3, 3)}, "holds OFT, which depends"),
    (lora(), lora() | lora("unet.mid_block.attn1.to_q"), "must be named once, but another name means the same"),
    (
        lora(),
        lora("lora_unet_middle_block_1"),
        "must name layers alike to be added up, but do not, and look like LoRAs for a UNet .* fit no published model",
    ),
    (
        lora(),
        {f"{NAME}.lora_down.weight": torch.ones(1, 4)},
        rf"^{NAME}: [^:]*b.safetensors: lora_up.weight is missing beside lora_down.weight$",
    ),
    (lora(), lora(foo=torch.ones(1)), "foo is not read"),
    (lora(), lora(alpha=torch.tensor(torch.inf)), "alpha must be one finite number"),
]


@pytest.mark.parametrize(("one", "other", "message"), REFUSED)
def test_refusals(tmp_path: Path, one: dict[str, Tensor], other: dict[str, Tensor], message: str) -> None:
    a, b = written(tmp_path, {"a": one, "b": other})
    with pytest.raises(ValueError, match=message):
        merge(sources((a, 1.0), (b, 1.0)), tmp_path / "c.safetensors")
    assert len(list(tmp_path.iterdir())) == 2


def flux(*layers: str, width: int = 3072) -> dict[str, Tensor]:
    return {key: tensor for layer in layers for key, tensor in lora(f"transformer.{layer}", width, width).items()}


def test_loras_of_one_family_may_touch_other_blocks(tmp_path: Path) -> None:
    double, single = "transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.attn.to_q"
    texts = lora("lora_te2_encoder_block_0_layer_0_SelfAttention_q") | lora(
        "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    )
    a, b, c = written(tmp_path, {"a": flux(double), "b": flux(double, single), "c": texts})
    merge(sources((a, 1.0), (b, 1.0)), tmp_path / "ab.safetensors")
    merged = load_file(tmp_path / "ab.safetensors")
    assert merged.keys() == flux(double, single).keys()
    assert len(merged[f"transformer.{double}.lora_down.weight"]) == 2
    wan = {f"diffusion_model.blocks.{n}.self_attn.q": size for n, size in ((0, 1536), (1, 5120))}
    d, e = written(tmp_path, {n: lora(layer, w, w) for n, (layer, w) in zip("de", wan.items(), strict=True)})
    with pytest.raises(ValueError, match=r"made for Wan of width 1536 \(.*d.safetensors\) and Wan of width 5120"):
        merge(sources((d, 1.0), (e, 1.0)), tmp_path / "de.safetensors")
    with pytest.raises(ValueError, match="look made for Flux, Chroma or Qwen-Image .* and Wan"):
        merge(sources((a, 1.0), (d, 1.0)), tmp_path / "ad.safetensors")
    merge(sources((c, 1.0), (c, 1.0)), tmp_path / "cc.safetensors")


def test_files_of_two_experts_are_not_added_up(tmp_path: Path) -> None:
    for name in ("high_noise", "low_noise"):
        save_file(
            lora("diffusion_model.blocks.0.self_attn.q"), tmp_path / f"{name}.safetensors", {"lorasmith.expert": name}
        )
    found = sources(*((tmp_path / f"{name}.safetensors", 1.0) for name in ("high_noise", "low_noise")))
    with pytest.raises(
        ValueError, match="must be for the same expert of a model, but are for high_noise .* and low_noise"
    ):
        merge(found, tmp_path / "c.safetensors")


def test_a_loha_that_does_not_say_its_kernel_is_refused(tmp_path: Path) -> None:
    name = "lora_unet_mid_block_resnets_0_conv1"
    shapes = {"hada_w1_a": (6, 2), "hada_w1_b": (2, 36), "hada_w2_a": (6, 2), "hada_w2_b": (2, 36)}
    loha = {f"{name}.{part}": torch.ones(shape) for part, shape in shapes.items()}
    a, b = written(tmp_path, {"a": loha, "b": lora()})
    with pytest.raises(ValueError, match="does not say the kernel of this layer's LoHa"):
        merge(sources((a, 1.0), (b, 1.0)), tmp_path / "c.safetensors", rank=2)
    kernel = {f"{name}.lora_up.weight": torch.ones(6, 1, 1, 1), f"{name}.lora_down.weight": torch.ones(1, 4, 3, 3)}
    a, b = written(tmp_path, {"a": loha, "b": kernel})
    merge(sources((a, 1.0), (b, 1.0)), tmp_path / "c.safetensors", rank=2)
    assert load_file(tmp_path / "c.safetensors")[f"{name}.lora_down.weight"].shape == (2, 4, 3, 3)


def test_the_command(tmp_path: Path) -> None:
    written(tmp_path, {"a": lora(), "b": lora()})
    ended = lorasmith(tmp_path, "merge", "a.safetensors:0.7", "b.safetensors:0.3", "--output", "c.safetensors")
    assert ended.code == 0 and "c.safetensors" in ended.out
    up, down = (load_file(tmp_path / "c.safetensors")[f"{NAME}.lora_{which}.weight"] for which in ("up", "down"))
    torch.testing.assert_close(up @ down, torch.ones(3, 4))
    for arguments, message in (
        (["a.safetensors"], "merge needs two LoRAs or more, or a model to merge one into, got 1"),
        (
            ["a.safetensors:nan", "b.safetensors"],
            "the weight of a.safetensors must be a finite number other than 0, got nan",
        ),
        (
            ["a.safetensors:0", "b.safetensors"],
            "the weight of a.safetensors must be a finite number other than 0, got 0",
        ),
        (
            ["a.safetensors:abc", "b.safetensors"],
            "the weight of a.safetensors must be a finite number other than 0, got abc",
        ),
        (
            ["a.safetensors:", "b.safetensors"],
            "the weight of a.safetensors must be a finite number other than 0, got none",
        ),
        (["C:\\a", "b.safetensors"], "C:\\a must be a safetensors file: file not found"),
        (["C:a.safetensors", "b.safetensors"], "C:a.safetensors must be a safetensors file: file not found"),
        (["x.safetensors", "b.safetensors"], "x.safetensors must be a safetensors file: file not found"),
    ):
        ended = lorasmith(tmp_path, "merge", *arguments, "--output", "d.safetensors")
        assert (ended.code, ended.err) == (2, f"lorasmith: {message}\n")
    assert not (tmp_path / "d.safetensors").exists()
    (tmp_path / "a.safetensors").rename(tmp_path / "a:b")
    Source.parsed(str(tmp_path / "a:b"))
