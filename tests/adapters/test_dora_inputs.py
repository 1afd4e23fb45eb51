"""DoRA with a length for each input: LyCORIS's own, and the formula."""

import logging
from typing import Any

import torch
from lycoris.modules.locon import LoConModule
from torch import Tensor, nn

from lorasmith.adapters.base import Layer
from lorasmith.adapters.registry import adapter_from_file

logging.getLogger("LyCORIS").setLevel(logging.ERROR)


def file_of(sample: Any) -> dict[str, Tensor]:
    """A file of LyCORIS with random weights, for the sample's layer."""
    theirs: Any = LoConModule("layer", sample.module, lora_dim=4, alpha=2, weight_decompose=True, wd_on_out=False)
    generator = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return {key: value.detach().clone() for key, value in theirs.state_dict().items()}


def weight_of(layer: nn.Module, file: dict[str, Tensor], norms: Tensor | None = None) -> Tensor:
    """m (W + s B A) / |W + s B A|, a length for each input; norms: in the place of |W + s B A|."""
    assert isinstance(layer.weight, Tensor)
    delta = (file["lora_up.weight"].flatten(1) @ file["lora_down.weight"].flatten(1)).view(layer.weight.shape)
    changed = layer.weight.detach() + file["alpha"] / 4 * delta
    return changed * file["dora_scale"] / (lengths_of(changed) if norms is None else norms)


def lengths_of(weight: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight, dim=(0, *range(2, weight.ndim)), keepdim=True)


def test_a_file_of_lycoris_makes_the_weight_that_it_makes_there(sample: Any) -> None:
    file = file_of(sample)
    theirs: Any = LoConModule("layer", sample.module, lora_dim=4, alpha=2, weight_decompose=True, wd_on_out=False)
    theirs.load_state_dict(file)
    expected = theirs.get_merged_weight(shape=sample.module.weight.shape)[0]
    ours = adapter_from_file(sample.sizes, file, sample.module)
    assert ours.algorithm == "DoRA"
    torch.testing.assert_close(ours.merged(sample.module.weight), expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(sample.adapted(ours), sample.run(sample.x, expected), atol=2e-5, rtol=1e-4)
    back = ours.file_tensors(torch.float32)
    assert back.keys() == file.keys()
    for key, value in back.items():
        torch.testing.assert_close(value, file[key], msg=key)


def test_gradients_are_those_of_the_formula_with_constant_norms(sample: Any) -> None:
    file = file_of(sample)
    ours: Any = adapter_from_file(sample.sizes, file, sample.module)
    sample.adapted(ours).square().sum().backward()
    leaves = {key: value.clone().requires_grad_() for key, value in file.items() if key != "alpha"}
    norms = lengths_of(weight_of(sample.module, {**file, "dora_scale": torch.ones(1)}, torch.ones(1)))
    weight = weight_of(sample.module, {**leaves, "alpha": file["alpha"]}, norms)
    sample.run(sample.x, weight).square().sum().backward()
    for ours_, key in ((ours.down, "lora_down.weight"), (ours.up, "lora_up.weight"), (ours.change, "dora_scale")):
        expected = leaves[key].grad
        assert expected is not None
        torch.testing.assert_close(ours_.grad.flatten(), expected.flatten(), atol=1e-3, rtol=1e-3)


def test_a_square_layer_of_one_output_has_lengths_of_outputs() -> None:
    layer = nn.Linear(1, 1)
    file = {"lora_down.weight": torch.ones(2, 1), "lora_up.weight": torch.ones(1, 2), "dora_scale": torch.ones(1, 1)}
    adapter: Any = adapter_from_file(Layer.of("layer", layer), file, layer)
    assert adapter.takes_base
