"""The names in LoRA files: every spelling of a part, every program's name of a layer, and none of them guessed."""

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorasmith.diffusion.process import Flow
from lorasmith.formats.keys import DOWN, DOWN_BIAS, PREFIXES, SPELLINGS, UP, UP_BIAS, by_layer, split
from lorasmith.formats.module_names import ModuleNames
from lorasmith.formats.unet_names import ldm_names
from lorasmith.models.families.sd import StableDiffusion
from lorasmith.types import Cond

ENDINGS = [  # by rows of SPELLINGS: {how a key ends: the part it means}
    {".lora_A.bias": DOWN_BIAS, ".lora_down.bias": DOWN_BIAS, ".lora_A.default.bias": DOWN_BIAS},
    {".lora_B.bias": UP_BIAS, ".lora_up.bias": UP_BIAS, ".lora_B.default.bias": UP_BIAS},
    {".lora_A.weight": DOWN, ".lora_down.weight": DOWN, ".lora_A.default.weight": DOWN, ".lora_A": DOWN},
    {".lora_B.weight": UP, ".lora_up.weight": UP, ".lora_B.default.weight": UP, ".lora_up": UP},
    {"_lora.down.weight": DOWN, ".lora.down.weight": DOWN},
    {"_lora.up.weight": UP, ".lora.up.weight": UP},
    {".lora_linear_layer.down.weight": DOWN},
    {".lora_linear_layer.up.weight": UP},
    {f".lora_magnitude_vector{end}": "lora_magnitude_vector" for end in ("", ".weight", ".default.weight")},
    {".w_norm": "diff"},
    {".b_norm": "diff_b"},
    {"_lora.alpha": "alpha", ".lora.alpha": "alpha", ".lora_linear_layer.alpha": "alpha"},
    {f".oft_R{end}": "oft_R.weight" for end in ("", ".weight", ".default.weight")},
    {".lora_E.default": "lora_E", ".ia3_l.default": "ia3_l", ".boft_R.default": "boft_R", ".hra_u.x": "hra_u"},
    {".lora_mid.weight": "lora_mid.weight", ".a1.weight": "a1.weight"},
    {
        **{f".{part}": part for part in ("alpha", "diff", "diff_b", "dora_scale", "oft_blocks", "hada_w1_a")},
        **{f".{part}": part for part in ("hada_t1", "lokr_w1", "lokr_w2_b", "lokr_t2", "reshape_weight", "anything")},
    },
]
CASES = [(spelling, *case) for (spelling, _), row in zip(SPELLINGS, ENDINGS, strict=True) for case in row.items()]


@pytest.mark.parametrize(("spelling", "ending", "part"), CASES)
def test_every_spelling_of_a_part(spelling: str, ending: str, part: str) -> None:
    """The first row of the table that fits is the one that this ending belongs to, so that each row is needed."""
    for layer in ("unet.down_blocks.0.attn1.to_q", "lora_unet_down_blocks_0_attn1_to_q", "x"):
        assert split(layer + ending) == (layer, part)
        first = next(pattern for pattern, _ in SPELLINGS if re.search(f"(?<=.){pattern}$", layer + ending))
        assert first == spelling


def test_a_key_without_an_ending_is_a_layer() -> None:
    assert split("emb_params") == ("emb_params", "")
    assert split(".alpha") == (".alpha", "")


def test_the_parts_of_a_layer_come_together() -> None:
    one, two = torch.ones(1), torch.ones(2)
    state = {"a.b.lora_A.weight": one, "a.b.lora_B.weight": two, "c.alpha": one, "a.b.alpha": two}
    assert by_layer(state) == {"a.b": {DOWN: one, UP: two, "alpha": two}, "c": {"alpha": one}}


def test_two_keys_for_one_part_are_refused() -> None:
    keys = ("a.lora_A.weight", "a.lora_down.weight")
    with pytest.raises(ValueError, match=f"^a.lora_down.weight must be the only {DOWN} of a, but there is another$"):
        by_layer({key: torch.ones(1) for key in keys})


def attention(*names: str) -> nn.Module:
    """A net with layers at these paths."""
    net = nn.Module()
    for path in names:
        *parents, last = path.split(".")
        module = net
        for parent in parents:
            if parent not in dict(module.named_children()):
                module.add_module(parent, nn.Module())
            module = module.get_submodule(parent)
        module.add_module(last, nn.Linear(2, 2))
    return net


@dataclass(frozen=True)
class Several:
    """Nets that are never run."""

    nets: dict[str, nn.Module]
    process: Flow = Flow()

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        raise NotImplementedError

    def file_key(self, path: str) -> str:
        return "own_" + path.replace(".", "_")


def test_every_program_s_name_of_a_layer() -> None:
    names = ModuleNames(Several({"unet": attention("down.0.attn1.to_q", "down.0.attn1.to_out.0")}))
    query, out = "unet.down.0.attn1.to_q", "unet.down.0.attn1.to_out.0"
    for name in ("own_unet_down_0_attn1_to_q", query, "down.0.attn1.to_q", "down.0.attn1.processor.to_q"):
        assert names.path(name) == query
    for prefix in PREFIXES:
        assert names.path(f"{prefix}down_0_attn1_to_q") == query
    for name in ("base_model.model.unet.down.0.attn1.to_q", "base_model.model.down.0.attn1.to_q"):
        assert names.path(name) == query
    for name in ("unet.down.0.attn1.to_out.0", "unet.down.0.attn1.to_out", "unet.down.0.attn1.processor.to_out"):
        assert names.path(name) == out
    for name in ("down.0.attn1", "down.0.attn1.to_k", "other.down.0.attn1.to_q", "own_down_0_attn1_to_q", "", "unet"):
        assert names.path(name) is None


def test_a_name_that_means_two_layers_means_none() -> None:
    """With two nets alike, only the net's name tells; within one, points and underscores may hide a difference."""
    names = ModuleNames(Several({"first": attention("attn.to_q", "a_b.c", "a.b_c"), "second": attention("attn.to_q")}))
    assert names.path("attn.to_q") is None and names.path("lora_unet_attn_to_q") is None
    assert names.path("first.attn.to_q") == "first.attn.to_q"
    assert names.path("lora_second_attn_to_q") == "second.attn.to_q"
    assert names.path("a_b_c") is None


def test_only_modules_with_parameters_have_names() -> None:
    net = attention("attn.to_q")
    net.add_module("norm", nn.LayerNorm(2))
    net.add_module("act", nn.SiLU())
    names = ModuleNames(Several({"unet": net}))
    assert names.path("norm") == "unet.norm" and names.path("act") is None and names.path("attn") is None


def test_a_unet_s_layers_have_their_original_names_too(family: StableDiffusion) -> None:
    names, original = ModuleNames(family.denoiser), ldm_names(family.denoiser.unet.config)
    modules: Any = dict(family.denoiser.unet.named_modules())
    found = {path: names.path(f"diffusion_model.{name}") for path, name in original.items() if path in modules}
    with_parameters = {path for path in found if [*modules[path].parameters(recurse=False)]}
    assert len(with_parameters) > 100
    for path in with_parameters:
        assert found[path] == names.path(family.denoiser.file_key(f"unet.{path}")) == f"unet.{path}"
