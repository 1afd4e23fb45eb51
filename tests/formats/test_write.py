"""LoRA files of every family in every layout, read back as they were; other programs' files; what cannot be."""

import itertools
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from file_table import READS
from file_tools import adapted, merged_weights
from lycoris import LycorisNetwork, create_lycoris
from peft import LoraConfig, get_peft_model
from tiers import table
from tiny_nets import NETS, Holder, holder_of
from torch import Tensor, nn

from lorasmith.adapters.adapter_set import AdapterSet
from lorasmith.adapters.algorithms import OFT, Algorithm, DoRA, LoHa, LoKr, LoRA
from lorasmith.adapters.targets import Targets
from lorasmith.config.schema import Config
from lorasmith.data.dataset import Dataset
from lorasmith.formats import lora_file
from lorasmith.formats.dora_magnitude import COMFYUI, PAPER
from lorasmith.formats.keys import by_layer
from lorasmith.formats.module_names import originals
from lorasmith.formats.read import adapters_from
from lorasmith.formats.write import best_layout, in_layout, metadata_of
from lorasmith.training.job import Job
from lorasmith.types import Cached, LayoutName

LAYOUTS: tuple[LayoutName, ...] = get_args(LayoutName)
PLAIN: dict[str, Algorithm] = {
    "LoRA": LoRA(rank=2), "LoHa": LoHa(rank=2), "LoKr": LoKr(rank=2, factor=2), "OFT": OFT(rank=2),
    "DoRA": DoRA(rank=2),
}  # fmt: skip
CELLS = [(f, a, layout) for f, a, layout in itertools.product(NETS, PLAIN, LAYOUTS) if (f, a, layout) in READS]
QUICK = CELLS[::9]  # each family, algorithm and layout a few times
families = pytest.mark.parametrize("family", NETS)
TRANSFORMERS = [family for family in NETS if not family.startswith("SD") or family == "SD 3"]


def random_adapters(holder: Holder, algorithm: str) -> AdapterSet:
    """On every layer that can carry one."""
    odd = () if algorithm != "OFT" else odd_layers(holder)
    adapters = AdapterSet.new(holder, PLAIN[algorithm], Targets(preset="all", exclude=odd), 0)
    generator = torch.Generator().manual_seed(0)
    for parameter in adapters.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return adapters


def odd_layers(holder: Holder) -> tuple[str, ...]:
    """Layers with another size of blocks, or with an odd number of them, which have no halves."""
    return tuple(
        f"{re.escape(f'{holder.root}.{path}')}$"
        for path, module in holder.net.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d) and module.weight.shape[0] % 4
    )


@table(("family", "algorithm", "layout"), CELLS, quick=QUICK)
def test_a_file_is_read_back_as_it_was(family: str, algorithm: str, layout: LayoutName) -> None:
    holder = holder_of(family)
    adapters = random_adapters(holder, algorithm)
    state = in_layout(adapters, holder, torch.float32, layout)
    again = adapters_from(state, holder, metadata_of(adapters, holder, layout))
    assert again.adapters.keys() == adapters.adapters.keys()
    expected, found = (a.file_state(holder, torch.float32) for a in (adapters, again))
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        if key.endswith(".dora_scale"):
            torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-6)
        elif not (key.endswith(".alpha") and algorithm == "LoKr"):  # of two whole factors it says nothing
            assert torch.equal(found[key], tensor), key


@families
def test_no_two_layers_share_a_name(family: str) -> None:
    holder = holder_of(family, "meta")
    for layers in (originals(holder.net),):
        names = [layer.name for layer in layers]
        paths = [path for layer in layers for path in layer.paths]
        assert len(set(names)) == len(names) and len(set(paths)) == len(paths)
    adapters = AdapterSet.new(holder, LoRA(rank=1), Targets(preset="all"), 0)
    for layout in LAYOUTS:
        state = in_layout(adapters, holder, torch.float32, layout)
        prefix = {"kohya": "lora_unet_", "diffusers": f"{holder.root}.", "comfyui": "diffusion_model."}
        assert all(key.startswith(prefix.get(layout, "lycoris_")) for key in state)
        assert list(state) == sorted(state)


def test_names_as_the_programs_write_them() -> None:
    def layers(family: str, layout: LayoutName) -> set[str]:
        holder = holder_of(family)
        return set(by_layer(in_layout(adapted(holder, "LoRA"), holder, torch.float32, layout)))

    assert "lora_unet_double_blocks_0_img_attn_qkv" in layers("Flux.1", "kohya")
    assert "lora_unet_single_blocks_1_linear1" in layers("Chroma", "kohya")
    assert "lora_unet_joint_blocks_0_context_block_attn_qkv" in layers("SD 3", "kohya")
    assert "diffusion_model.blocks.1.self_attn.q" in layers("Wan", "comfyui")
    assert "diffusion_model.layers.0.attention.qkv" in layers("Z-Image", "comfyui")
    assert "diffusion_model.noise_refiner.0.attention.qkv" in layers("Lumina 2", "comfyui")
    assert "diffusion_model.transformer_blocks.0.attn.to_q" in layers("Qwen-Image", "comfyui")
    assert "diffusion_model.single_blocks.0.linear1" in layers("Flux.2", "comfyui")
    assert "transformer.transformer_blocks.0.attn.to_q" in layers("Flux.1", "diffusers")
    assert "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q" in layers("SD", "comfyui")
    assert "lycoris_transformer_blocks_0_attn_to_q" in layers("Flux.1", "lycoris")


def documented() -> dict[tuple[str, str], str]:
    """{family, algorithm: the best layout}, as docs/files.md says."""
    text = (Path(__file__).parents[2] / "docs" / "files.md").read_text("utf-8")
    _, _, below = text.partition("| family | LoRA | DoRA | LoHa, OFT | LoKr |\n|---|---|---|---|---|\n")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in below.partition("\n\n")[0].splitlines()]
    columns = (("LoRA",), ("DoRA",), ("LoHa", "OFT"), ("LoKr",))
    return {
        (family, algorithm): cell.strip("`")
        for families, *cells in rows
        for cell, algorithms in zip(cells, columns, strict=True)
        for family, algorithm in itertools.product(families.split(", "), algorithms)
    }


@pytest.mark.slow
def test_the_best_layout_is_the_documented_one() -> None:
    """UNets keep kohya's names, to the byte."""
    table = documented()
    assert table.keys() == set(itertools.product(NETS, PLAIN))
    for (family, algorithm), expected in table.items():
        holder = holder_of(family)
        adapters = adapted(holder, algorithm)
        assert best_layout(adapters, holder) == (None if expected == "kohya" else expected), (family, algorithm)
        best, own = in_layout(adapters, holder, torch.float32, None), adapters.file_state(holder, torch.float32)
        assert (best.keys() == own.keys()) == (expected == "kohya")
        if expected == "kohya":
            kohya = in_layout(adapters, holder, torch.float32, "kohya")
            assert kohya.keys() == own.keys() and all(torch.equal(kohya[key], own[key]) for key in own)


def test_what_is_not_diffusers_keeps_its_own_names() -> None:
    other = Holder(nn.Sequential(nn.Linear(2, 2)), "net")
    adapters = AdapterSet.new(other, LoRA(rank=1), Targets(preset="all"), 0)
    assert best_layout(adapters, other) is None
    for layout in ("kohya", "comfyui"):
        with pytest.raises(
            ValueError, match=f"file_layout {layout}: the original names are known of .*not of Sequential"
        ):
            in_layout(adapters, other, torch.float32, layout)


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_diffusers_and_comfyui_read_the_best_layout_if_they_read_one(family: str) -> None:
    def num_users(programs: tuple[str, ...]) -> int:
        return len({"diffusers", "ComfyUI"}.intersection(programs))

    holder = holder_of(family)
    for algorithm in PLAIN:
        best = best_layout(adapted(holder, algorithm), holder)
        assert best is not None
        programs = [READS.get((family, algorithm, layout), ()) for layout in LAYOUTS]
        assert num_users(READS[family, algorithm, best]) == max(map(num_users, programs)), algorithm


def test_what_cannot_be_joined_keeps_the_names_of_its_own_layers() -> None:
    """Lumina 2's q has more outputs than k and v, so that its blocks may be of another size."""
    holder = holder_of("Lumina 2", hidden_size=24, num_attention_heads=3, num_kv_heads=1)
    adapters = AdapterSet.new(holder, OFT(rank=3), Targets(), 0)
    sizes = {adapter.file_tensors(torch.float32)["oft_blocks"].shape[-1] for adapter in adapters.adapters.values()}
    assert len(sizes) > 1
    with pytest.raises(ValueError, match="OFT's blocks must be of one size for layers that become one"):
        in_layout(adapters, holder, torch.float32, "comfyui")
    assert best_layout(adapters, holder) == "lycoris"


def test_the_metadata_say_the_layout_and_the_lengths() -> None:
    flux, unet = holder_of("Flux.1"), holder_of("SD")
    assert metadata_of(adapted(unet, "LoRA"), unet, None) == {}
    assert metadata_of(adapted(unet, "DoRA"), unet, None) == PAPER
    assert metadata_of(adapted(unet, "DoRA"), unet, "comfyui") == COMFYUI | {"lorasmith.file_layout": "comfyui"}
    assert metadata_of(adapted(flux, "LoRA"), flux, None) == {"lorasmith.file_layout": "diffusers"}


def dataset() -> Dataset:
    samples = [Cached("one", torch.zeros(4, 8, 8), {"text": torch.zeros(3, 12)})]
    return Dataset.of(samples, [1], seed=0, group_size=1)


def test_a_layout_that_cannot_be_is_refused_before_training() -> None:
    config = Config(steps=1, adapter=LoKr(rank=2), file_layout="kohya", training_dtype="fp32", pack="none")
    message = (
        "^file_layout kohya: double_blocks.0.img_attn.qkv is transformer_blocks.0.attn.to_q, transformer_blocks.0.attn."
        "to_k, transformer_blocks.0.attn.to_v, but Kronecker products of several layers make no Kronecker product of "
    )
    with pytest.raises(ValueError, match=message):
        Job.of(holder_of("Flux.1"), dataset(), config, device=torch.device("cpu"))
    job = Job.of(
        holder_of("Flux.1"), dataset(), config.model_copy(update={"file_layout": "lycoris"}), device=torch.device("cpu")
    )  # fmt: skip
    assert all(key.startswith("lycoris_") for key in job.lora())
    assert job.file_metadata()["lorasmith.file_layout"] == "lycoris"


def with_offset(family: str) -> tuple[Holder, AdapterSet]:
    holder = holder_of(family)
    path = "transformer.transformer_blocks.0.attn.to_k"
    adapters = AdapterSet.new(holder, LoRA(rank=2), Targets(), 0)
    rows = holder.net.get_parameter(f"{path.partition('.')[2]}.bias")
    return holder, AdapterSet(adapters.adapters, {f"{path}.bias": torch.ones_like(rows)})


def test_offsets_in_layouts() -> None:
    """diffusers has none; a fused layer has those of its parts, zeros where there are none."""
    holder, adapters = with_offset("Flux.1")
    with pytest.raises(ValueError, match="file_layout diffusers: diffusers reads no diff_b, which transformer.trans"):
        in_layout(adapters, holder, torch.float32, "diffusers")
    state = in_layout(adapters, holder, torch.float32, "comfyui")
    assert state["diffusion_model.double_blocks.0.img_attn.qkv.diff_b"].tolist() == [0] * 16 + [1] * 16 + [0] * 16
    again = adapters_from(state, holder).offsets
    assert again["transformer.transformer_blocks.0.attn.to_k.bias"].unique().tolist() == [1]
    assert not again["transformer.transformer_blocks.0.attn.to_q.bias"].any()
    assert best_layout(adapters, holder) == "lycoris"


# Other programs' files


def deltas(holder: Holder, state: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """{weight: what a file adds to it}."""
    merged = merged_weights(holder, adapters_from(state, holder, **options))
    return {key: weight - holder.net.get_parameter(key) for key, weight in merged.items()}


def lora_of(rows: int, columns: int, seed: int, names: tuple[str, str], layer: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(4, columns, generator=generator), torch.randn(rows, 4, generator=generator)
    return {f"{layer}.{names[0]}": down, f"{layer}.{names[1]}": up}


KOHYA, PEFT = ("lora_down.weight", "lora_up.weight"), ("lora_A.weight", "lora_B.weight")
FOREIGN = [
    ("kohya's sd-scripts", "Flux.1", "lora_unet_double_blocks_0_img_attn_qkv", KOHYA, (48, 16)),
    ("kohya's sd-scripts", "SD 3", "lora_unet_joint_blocks_0_x_block_attn_qkv", KOHYA, (384, 128)),
    ("kohya's sd-scripts", "Lumina 2", "lora_unet_layers_0_attention_qkv", KOHYA, (32, 16)),
    ("musubi-tuner", "Wan", "lora_unet_blocks_0_cross_attn_k", KOHYA, (16, 16)),
    ("musubi-tuner", "Qwen-Image", "lora_unet_transformer_blocks_0_attn_add_q_proj", KOHYA, (16, 16)),
    ("musubi-tuner", "Flux.2", "lora_unet_single_blocks_0_linear1", KOHYA, (144, 16)),
    ("OneTrainer", "Flux.1", "lora_transformer_single_transformer_blocks_0_attn_to_q", KOHYA, (16, 16)),
    ("OneTrainer", "SD 3", "lora_transformer_transformer_blocks_0_attn_to_out_0", KOHYA, (128, 128)),
    ("OneTrainer", "Chroma", "transformer.transformer_blocks.0.ff.net.0.proj", KOHYA, (64, 16)),
    ("ai-toolkit", "Flux.1", "transformer.transformer_blocks.0.attn.to_q", PEFT, (16, 16)),
    ("ai-toolkit", "Wan", "diffusion_model.blocks.0.self_attn.o", PEFT, (16, 16)),
    ("ai-toolkit", "Z-Image", "diffusion_model.layers.0.attention.to_q", PEFT, (256, 256)),
    ("ai-toolkit", "Chroma", "diffusion_model.single_blocks.0.linear2", PEFT, (16, 80)),
    ("ai-toolkit", "Flux.2", "diffusion_model.double_blocks.0.txt_attn.qkv", PEFT, (48, 16)),
    ("SimpleTuner", "Qwen-Image", "transformer.transformer_blocks.0.img_mlp.net.2", PEFT, (16, 64)),
    ("PEFT", "Lumina 2", "base_model.model.layers.0.attn.to_q", PEFT, (16, 16)),
    ("PEFT", "Flux.1", "base_model.model.double_blocks.0.img_attn.proj", PEFT, (16, 16)),
    ("diffusers", "Z-Image", "transformer.layers.0.feed_forward.w1", PEFT, (682, 256)),
]


@pytest.mark.parametrize(("program", "family", "layer", "names", "shape"), FOREIGN)
def test_layers_as_other_programs_name_them(
    program: str, family: str, layer: str, names: tuple[str, str], shape: tuple[int, int]
) -> None:
    """A layer that is several here is cut: the whole's delta is what its parts' are, one after another."""
    holder = holder_of(family)
    state = lora_of(*shape, 0, names, layer)
    scale = 1.0
    if names == KOHYA:
        state[f"{layer}.alpha"], scale = torch.tensor(2.0), 0.5
    found = deltas(holder, state)
    order = {path: n for n, own in enumerate(originals(holder.net)) for path in own.paths}
    whole = next((o for o in originals(holder.net) if f"{o.paths[0]}.weight" in found and len(o.paths) > 1), None)
    paths = whole.paths if whole and len(found) > 1 else tuple(key.removesuffix(".weight") for key in found)
    assert order.keys() >= set(paths) and found.keys() == {f"{path}.weight" for path in paths}
    expected = scale * state[f"{layer}.{names[1]}"] @ state[f"{layer}.{names[0]}"]
    torch.testing.assert_close(torch.cat([found[f"{path}.weight"] for path in paths]), expected, atol=1e-4, rtol=1e-4)


def test_a_file_of_lycoris_on_a_transformer(tmp_path: Path) -> None:
    holder = holder_of("SD 3")
    before = {key: value.clone() for key, value in holder.net.state_dict().items()}
    LycorisNetwork.apply_preset(
        {"name_algo_map": {}, "target_module": [], "target_name": [r".*attn\.(to_q|add_k_proj)"]}
    )
    network: Any = create_lycoris(holder.net, 1.0, linear_dim=4, linear_alpha=4, algo="lokr", factor=4)
    network.apply_to()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    state = {key: value.detach().clone().contiguous() for key, value in network.state_dict().items()}
    network.restore()
    network.merge_to(1.0)
    merged = holder.net.state_dict()
    found = deltas(holder_of("SD 3"), state)
    assert len(found) == 4
    for key, delta in found.items():
        torch.testing.assert_close(delta, merged[key] - before[key], atol=1e-4, rtol=1e-3)


def test_a_folder_of_peft_on_a_transformer(tmp_path: Path) -> None:
    holder = holder_of("Wan")
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "ffn.net.2"], use_dora=True)
    model: Any = get_peft_model(holder_of("Wan").net, config)  # pyright: ignore[reportArgumentType]
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    found = deltas(holder, lora_file.read(tmp_path / "adapter_model.safetensors")[0])
    merged = model.merge_and_unload().state_dict()
    assert len(found) == 6
    for key, delta in found.items():
        torch.testing.assert_close(delta, merged[key] - holder.net.get_parameter(key), atol=1e-4, rtol=1e-3)


def test_unknown_layers_are_refused_or_left_out(caplog: pytest.LogCaptureFixture) -> None:
    holder = holder_of("Flux.1")
    state = lora_of(48, 16, 0, KOHYA, "lora_unet_double_blocks_0_img_attn_qkv")
    text = lora_of(8, 8, 0, KOHYA, "lora_te1_text_model_encoder_layers_0_mlp_fc1")
    with pytest.raises(
        ValueError, match=r"1 of its 2 layers does not, .*lora_te1_\w+ \(lora_down.weight, lora_up.weight"
    ):
        adapters_from(state | text, holder)
    found = adapters_from(state | text, holder, ignore_unknown=True)
    assert len(found.adapters) == 3
    assert "1 layer that the model does not have is left out: lora_te1_text_model" in caplog.text
    wrong = lora_of(47, 16, 0, KOHYA, "lora_unet_double_blocks_1_img_attn_qkv")
    with pytest.raises(ValueError, match=r"double_blocks_1_img_attn_qkv: lora_up.weight must have the shape \[48, 4\]"):
        adapters_from(state | wrong, holder, ignore_unknown=True)
    with pytest.raises(ValueError, match="the LoRA must hold an adapter, got 1 layer without one"):
        adapters_from(text, holder, ignore_unknown=True)


def test_a_layer_named_twice_is_refused() -> None:
    holder = holder_of("Flux.1")
    whole = lora_of(48, 16, 0, KOHYA, "lora_unet_double_blocks_0_img_attn_qkv")
    path = "transformer.transformer_blocks.0.attn.to_q"
    for own, parts in ((path, KOHYA), (path, PEFT), ("lora_transformer_transformer_blocks_0_attn_to_q", KOHYA)):
        with pytest.raises(ValueError, match="another key means the same layer"):
            adapters_from(whole | lora_of(16, 16, 1, parts, own), holder)


def test_layers_of_files_are_counted_as_the_file_has_them() -> None:
    holder = holder_of("Flux.1")
    state = in_layout(adapted(holder, "LoRA"), holder, torch.float32, "kohya")
    num = len(by_layer(state))
    with pytest.raises(ValueError, match=f"1 of its {num + 1} layers does not, and it looks like one for Flux"):
        adapters_from(state | lora_of(4, 4, 0, KOHYA, "lora_unet_nowhere"), holder)


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_the_scale_is_in_the_weights_where_there_is_no_alpha(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of this program's files nothing is said of it: it is known."""
    holder = holder_of(family)
    adapters = adapted(holder, "LoRA")
    state = in_layout(adapters, holder, torch.float32, "diffusers")
    assert not [key for key in state if "alpha" in key]
    lora_file.write(tmp_path / "a.safetensors", state, metadata_of(adapters, holder, "diffusers"))
    found, _ = lora_file.read(tmp_path / "a.safetensors")
    assert not caplog.records
    expected = merged_weights(holder, adapters)
    for key, delta in deltas(holder, found).items():
        torch.testing.assert_close(delta, expected[key] - holder.net.get_parameter(key), atol=1e-5, rtol=1e-4)
