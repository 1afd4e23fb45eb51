"""The table of file_table, proved: diffusers, PEFT and LyCORIS read each file that they are said to, and no other.

What ComfyUI reads is proved in tests/comfyui.
"""

import copy
import itertools
import logging
from pathlib import Path
from typing import Any, get_args

import diffusers
import pytest
import torch
from file_table import READS, REASONS, ROWS
from file_tools import ALGORITHMS, adapted, merged_weights, written
from lycoris import LycorisNetwork, create_lycoris_from_weights
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from tiers import table
from tiny_nets import NETS, Holder, holder_of, pipeline_of
from torch import Tensor, nn

from lorasmith.adapters.adapter_set import AdapterSet
from lorasmith.adapters.algorithms import LoRA
from lorasmith.adapters.targets import Targets
from lorasmith.formats import lora_file
from lorasmith.formats.keys import by_layer
from lorasmith.formats.write import metadata_of
from lorasmith.types import LayoutName

logging.getLogger("LyCORIS").setLevel(logging.ERROR)
LAYOUTS: tuple[LayoutName, ...] = get_args(LayoutName)
CELLS = list(itertools.product(NETS, ALGORITHMS))
WIDE = {
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "num_layers": 1,
    "num_single_layers": 1,
    "in_channels": 64,
}
COUNTS_ON_WIDTH = {("Flux.1", "kohya"), ("Chroma", "kohya")}
"""What diffusers reads only of layers as wide as the real ones."""
UNREAD = (ValueError, KeyError, AttributeError, AssertionError, RuntimeError, IndexError)
Weights = dict[str, Tensor]


def tuned_weights(net: nn.Module) -> Weights:
    """{a weight that PEFT adapts: as it makes it}."""
    found = {}
    for name, module in net.named_modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
            found[f"{name}.weight"] = module.get_base_layer().weight.data
    return found


def by_diffusers(path: Path, holder: Holder, family: str) -> Weights:
    net = copy.deepcopy(holder.net)
    pipeline_of(family, net).load_lora_weights(path.parent, weight_name=path.name)
    return tuned_weights(net)


def by_peft(path: Path, holder: Holder, family: str) -> Weights:
    """Without the net's name, as PEFT holds one net alone; its scale is 1 where alpha is the rank."""
    net, root = copy.deepcopy(holder.net), f"{holder.root}."
    state = {key.removeprefix(root): t for key, t in lora_file.read(path)[0].items() if key.startswith(root)}
    names = sorted({key.partition(".lora_")[0] for key in state if ".lora_" in key})
    config = LoraConfig(r=2, lora_alpha=2, target_modules=names, use_dora=any("magnitude" in key for key in state))
    inject_adapter_in_model(config, net)
    unread: Any = set_peft_model_state_dict(net, state)
    if unread.unexpected_keys:
        raise ValueError(f"PEFT does not know {unread.unexpected_keys[:3]}")
    return tuned_weights(net)


def by_lycoris(path: Path, holder: Holder, family: str) -> Weights:
    net, state = copy.deepcopy(holder.net), lora_file.read(path)[0]
    network, _ = create_lycoris_from_weights(1.0, "", net, weights_sd=state)
    if len(network.loras) != len(by_layer(state)):
        raise ValueError(f"LyCORIS finds {len(network.loras)} of {len(by_layer(state))} layers")
    names = {module: name for name, module in net.named_modules()}
    layers: list[Any] = [lora.org_module[0] for lora in network.loras]
    network.apply_to()
    found = {}
    for layer in layers:
        with torch.no_grad():
            y = layer(torch.eye(layer.in_features))
        found[f"{names[layer]}.weight"] = (y if layer.bias is None else y - layer.bias).T
    return found


READERS = {"diffusers": by_diffusers, "PEFT": by_peft, "LyCORIS": by_lycoris}


def reads(tool: str, path: Path, holder: Holder, family: str, expected: Weights) -> bool:
    try:
        found = READERS[tool](path, holder, family)
    except UNREAD:
        return False
    if found.keys() != expected.keys():
        return False
    return all(torch.allclose(found[key], expected[key], atol=1e-4, rtol=1e-4) for key in expected)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    diffusers.utils.logging.set_verbosity(logging.CRITICAL)


@table(("family", "algorithm"), CELLS, quick=CELLS[::6])
def test_each_program_reads_what_the_table_says(
    family: str, algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = holder_of(family)
    adapters = adapted(holder, algorithm)
    expected, wrong = merged_weights(holder, adapters), []
    for layout in LAYOUTS:
        if (family, algorithm, layout) not in READS:
            with pytest.raises(ValueError, match=f"file_layout {layout}: .*{REASONS[layout]}"):
                written(adapters, holder, layout)
            continue
        state, said = written(adapters, holder, layout), READS[family, algorithm, layout]
        path = tmp_path / f"{layout}.safetensors"
        lora_file.write(path, state, metadata_of(adapters, holder, layout))
        monkeypatch.setattr(LycorisNetwork, "LORA_PREFIX", "lora_unet" if layout == "kohya" else "lycoris")
        for tool in READERS:
            if tool == "diffusers" and (family, layout) in COUNTS_ON_WIDTH:
                continue
            found = reads(tool, path, holder, family, expected)
            if found != (tool in said):
                wrong.append(f"{layout}: {tool} {'reads' if found else 'does not read'} it")
    assert not wrong, "\n".join(wrong)


def test_the_table_has_every_family_and_algorithm_once() -> None:
    named = [(family, algorithm) for algorithm, families, _ in ROWS for family in families]
    assert sorted(named) == sorted(CELLS)


@pytest.mark.parametrize(("family", "layout"), sorted(COUNTS_ON_WIDTH))
def test_diffusers_reads_fused_layers_of_the_real_width(family: str, layout: LayoutName, tmp_path: Path) -> None:
    """Its own conversion makes of the file what its own layout holds."""
    holder = holder_of(family, "meta", **WIDE)
    adapters = adapted(holder, "LoRA")
    state, own = written(adapters, holder, layout), written(adapters, holder, "diffusers")
    assert "diffusers" in READS[family, "LoRA", layout]
    path = tmp_path / "a.safetensors"
    lora_file.write(path, state, {})
    converted = pipeline_of(family, holder.net).lora_state_dict(tmp_path, weight_name=path.name)
    layers = by_layer(own)
    for layer in by_layer(converted):
        a, b = (converted[f"{layer}.lora_{part}.weight"].float() for part in "AB")
        expected = torch.zeros(64, a.shape[1])
        if layer in layers:
            expected = own[f"{layer}.lora_B.weight"][:64] @ own[f"{layer}.lora_A.weight"]
        else:
            assert not b.any() and layer.endswith("proj_mlp"), "a part of linear1 that has no adapter"
        torch.testing.assert_close(b[:64] @ a, expected, atol=1e-5, rtol=1e-4)
    assert layers.keys() <= by_layer(converted).keys()


@pytest.mark.parametrize("layout", ["kohya", "comfyui"])
def test_diffusers_refuses_wan_s_layers_outside_its_blocks(layout: LayoutName, tmp_path: Path) -> None:
    holder = holder_of("Wan")
    everywhere = AdapterSet.new(holder, LoRA(rank=2), Targets(preset="all"), 0)
    lora_file.write(tmp_path / "a.safetensors", written(everywhere, holder, layout), {})
    with pytest.raises((ValueError, IndexError), match="`state_dict` should be empty|list index out of range"):
        by_diffusers(tmp_path / "a.safetensors", holder, "Wan")
