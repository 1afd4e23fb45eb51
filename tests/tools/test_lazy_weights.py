"""Weights of single layers, found in every kind of file by the layer's name: the same as in the net of those files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from originals import open_clip, original
from safetensors.torch import save_file
from tiny_encoders import clip
from tiny_nets import NETS, holder_of
from torch import Tensor

from lorasmith.adapters.frozen_weight import NoWeights, loaded, row_squares
from lorasmith.adapters.targets import adaptable_layers
from lorasmith.demo import BASE
from lorasmith.models.families.sd import StableDiffusion
from lorasmith.models.meta import skeleton
from lorasmith.models.text_encoders import TextDenoiser
from lorasmith.tools.lazy_weights import Stored, with_stored_weights
from lorasmith.tools.model_files import Model

PREFIX = "model.diffusion_model."


def written(path: Path, state: dict[str, Tensor]) -> Path:
    save_file({key: tensor.contiguous().clone() for key, tensor in state.items()}, path)
    return path


def check_layers(denoiser: Any, path: Path) -> None:
    stored, layers = Stored(denoiser, path), adaptable_layers(denoiser.nets)
    assert len(layers) > 5
    for layer, module in layers.items():
        assert torch.equal(stored.weight(layer, module), module.get_parameter("weight")), layer


@pytest.mark.parametrize("family", NETS)
def test_of_the_original_layout_and_of_diffusers(family: str, tmp_path: Path) -> None:
    holder = holder_of(family)
    check_layers(
        holder, written(tmp_path / "a.safetensors", {f"{PREFIX}{k}": t for k, t in original(holder.net).items()})
    )
    if holder.root == "transformer":
        check_layers(holder, written(tmp_path / "b.safetensors", holder.net.state_dict()))


def test_all_layers_of_unets_in_single_files_have_kohya_s_names_too(tmp_path: Path) -> None:
    """Those of SDXL's deeper transformers too."""
    for family, heads in (("SD", 8), ("SDXL", (1, 2))):
        holder = holder_of(family, block_out_channels=(64, 128), attention_head_dim=heads)
        state = {f"{PREFIX}{key}": tensor for key, tensor in original(holder.net).items()}
        model = Model.opened(written(tmp_path / "a.safetensors", state))
        places = [model.place(holder.file_key(layer)) for layer in adaptable_layers(holder.nets)]
        assert None not in places and len(set(places)) == len(places)


def test_of_a_folder(family: StableDiffusion) -> None:
    check_layers(family.denoiser, BASE)


@pytest.mark.parametrize("kind", ["transformers", "OpenCLIP"])
def test_of_text_encoders_in_a_single_file(kind: str, family: StableDiffusion, tmp_path: Path) -> None:
    encoder = clip(16, projected=False)
    denoiser = TextDenoiser(family.denoiser, {"text_encoder": encoder}, StableDiffusion.TEXTS)  # pyright: ignore[reportArgumentType]
    state = encoder.state_dict()
    texts = (
        {f"cond_stage_model.transformer.text_model.{key}": tensor for key, tensor in state.items()}
        if kind == "transformers"
        else {f"cond_stage_model.model.{key}": tensor for key, tensor in open_clip(state).items()}
    )
    unet = {f"{PREFIX}{key}": tensor for key, tensor in original(family.denoiser.unet).items()}
    check_layers(denoiser, written(tmp_path / "a.safetensors", unet | texts))


def test_they_are_read_when_they_are_asked_for(family: StableDiffusion) -> None:
    denoiser, path = skeleton(BASE, with_texts=False)
    layers = adaptable_layers(with_stored_weights(denoiser, path).nets)
    for name, module in adaptable_layers(family.denoiser.nets).items():
        assert layers[name].weight.is_meta and torch.equal(loaded(layers[name]).weight, module.weight)  # pyright: ignore
        assert row_squares(layers[name]).shape == (len(module.weight),)  # pyright: ignore[reportArgumentType]
    denoiser = with_stored_weights(skeleton(BASE, with_texts=False)[0], None)
    with pytest.raises(NoWeights):
        loaded(next(iter(adaptable_layers(denoiser.nets).values())))


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    holder = holder_of("Flux.1")
    state = original(holder.net)
    key, layer = "single_blocks.0.linear1.weight", "transformer.single_transformer_blocks.0.proj_mlp"
    module = adaptable_layers(holder.nets)[layer]

    def weight(state: dict[str, Tensor]) -> Tensor:
        return Stored(holder, written(tmp_path / "a.safetensors", state)).weight(layer, module)

    with pytest.raises(ValueError, match=f"a.safetensors must hold the weight of {layer}, .* but it does not"):
        weight({name: tensor for name, tensor in state.items() if name != key})
    with pytest.raises(ValueError, match=f"{layer} of .* must have a weight of .* got"):
        weight(state | {key: state[key][:-3]})
    with pytest.raises(ValueError, match="must hold plain weights, .* got SVDQuant"):
        weight(state | {"single_blocks.0.linear1.wscales": torch.ones(1)})
    scaled = weight(state | {"single_blocks.0.linear1.scale_weight": torch.tensor(2.0)})
    assert torch.equal(scaled, 2 * module.weight)  # pyright: ignore[reportOperatorIssue]
