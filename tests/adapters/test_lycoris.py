"""Every algorithm against LyCORIS: the same weights make the same layer and gradients, and files go both ways."""

import logging
from typing import Any

import pytest
import torch
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.wrapper import network_module_dict
from lycoris_layers import lycoris_layer
from torch import Tensor, nn

from lorasmith.adapters.algorithms import OFT, DoRA, LoHa, LoKr, LoRA
from lorasmith.adapters.base import Layer
from lorasmith.adapters.registry import adapter_from_file

logging.getLogger("LyCORIS").setLevel(logging.ERROR)


def counterpart(algorithm: Any, module: Any) -> Any:
    """LyCORIS's module with the same settings."""
    rank, alpha = algorithm.rank, algorithm.alpha
    if isinstance(algorithm, DoRA):
        return LoConModule("layer", module, lora_dim=rank, alpha=alpha, weight_decompose=True)
    if isinstance(algorithm, LoRA):
        return LoConModule("layer", module, lora_dim=rank, alpha=alpha)
    if isinstance(algorithm, LoHa):
        return LohaModule("layer", module, lora_dim=rank, alpha=alpha)
    if isinstance(algorithm, LoKr):
        factor = -1 if algorithm.factor is None else algorithm.factor
        return LokrModule("layer", module, lora_dim=rank, alpha=alpha, factor=factor)
    if isinstance(algorithm, OFT):
        return DiagOFTModule("layer", module, lora_dim=rank, constraint=alpha or 0)
    if module.weight.ndim > 2 and module.groups > 1:
        pytest.skip("LyCORIS takes a convolution for one of a single group")
    kind = network_module_dict[algorithm.adapter().LYCORIS_ARGS["algo"]]
    return kind("layer", module, lora_dim=rank, alpha=alpha)


def delta(theirs: Any, weight: Tensor) -> Tensor:
    """What it adds to a weight, new lengths too; get_diff_weight of LoHa and LoKr multiplies by their scale twice."""
    if isinstance(theirs, LohaModule | LokrModule):
        return theirs.get_weight(weight.shape)
    if isinstance(theirs, LoConModule) and theirs.wd:
        return theirs.get_merged_weight(shape=weight.shape)[0] - weight
    return theirs.get_diff_weight(shape=weight.shape)[0]


def scrambled(theirs: Any) -> Any:
    generator = torch.Generator().manual_seed(2)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return theirs


def assert_alike(sample: Any, ours: Any, theirs: Any) -> None:
    """The same output as that of the layer with LyCORIS's delta added to its weight."""
    weight = sample.module.weight.detach()
    expected = sample.run(sample.x, weight + delta(theirs, weight))
    torch.testing.assert_close(sample.adapted(ours), expected, rtol=1e-4, atol=1e-4)


def assert_gradients_alike(sample: Any, ours: Any, theirs: Any) -> None:
    """The same gradients of x and the factors as autograd's through LyCORIS's delta added to the weight."""
    weight = sample.module.weight.detach()
    x = sample.x.clone().requires_grad_()
    merged = sample.run(x, weight + delta(theirs, weight))
    grad = torch.randn(merged.shape, generator=torch.Generator().manual_seed(3))
    by_name = dict(theirs.named_parameters())
    factors = [by_name[suffix] for suffix in ours.file_tensors(torch.float32) if suffix != "alpha"]
    expected = torch.autograd.grad(merged, [x, *factors], grad)
    actual = torch.autograd.grad(sample.adapted(ours, x), [x, *ours.parameters()], grad)
    for one, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, reference, rtol=1e-3, atol=1e-4 * float(reference.abs().max()))


def test_the_same_weights_make_the_same_layer_and_gradients(algorithm: Any, sample: Any, adapter: Any) -> None:
    theirs = counterpart(algorithm, sample.module)
    suffixes = [suffix for suffix in adapter.file_tensors(torch.float32) if suffix != "alpha"]
    parameters = dict(theirs.named_parameters())
    assert set(suffixes) == set(parameters)
    if isinstance(algorithm, DoRA):  # whose norm is a constant in the paper's section 4.3, and none in LyCORIS
        theirs.load_state_dict(adapter.file_tensors(torch.float32))
        assert_alike(sample, adapter, theirs)
        return
    for suffix, parameter in zip(suffixes, adapter.parameters(), strict=True):
        parameters[suffix].data.copy_(parameter.data)
    assert_alike(sample, adapter, theirs)
    assert_gradients_alike(sample, adapter, theirs)


def test_lycoris_reads_our_file(algorithm: Any, sample: Any, adapter: Any) -> None:
    """Into a module with the same settings, and into the one that it makes from the file alone."""
    tensors = adapter.file_tensors(torch.float32)
    theirs = counterpart(algorithm, sample.module)
    theirs.load_state_dict(tensors, strict=True)
    assert_alike(sample, adapter, theirs)
    file = {f"layer.{suffix}": tensor for suffix, tensor in tensors.items()}
    assert_alike(sample, adapter, lycoris_layer(file, "layer", sample.module))


def test_we_read_lycoriss_file(algorithm: Any, sample: Any) -> None:
    theirs = scrambled(counterpart(algorithm, sample.module))
    ours = adapter_from_file(sample.sizes, theirs.state_dict(), sample.module)
    assert ours.algorithm == algorithm.name
    assert_alike(sample, ours, theirs)


def test_the_merged_weight_is_lycoris_s(algorithm: Any, sample: Any, adapter: Any) -> None:
    theirs = counterpart(algorithm, sample.module)
    theirs.load_state_dict(adapter.file_tensors(torch.float32), strict=True)
    weight = sample.module.weight.detach()
    with torch.no_grad():
        merged = adapter.merged(weight)
        assert merged.dtype == torch.float32 and not torch.allclose(merged, weight, atol=1e-3)
        torch.testing.assert_close(merged, weight + delta(theirs, weight), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("factor", [-1, 1, 3])
@pytest.mark.parametrize("options", ["decompose_both", "full_matrix", "unbalanced_factorization"])
def test_we_read_lokrs_of_other_shapes_than_ours(sample: Any, options: str, factor: int) -> None:
    theirs: Any = LokrModule("layer", sample.module, lora_dim=2, alpha=3, factor=factor, **{options: True})
    ours = adapter_from_file(sample.sizes, scrambled(theirs).state_dict())
    assert_alike(sample, ours, theirs)
    assert_gradients_alike(sample, ours, theirs)


def test_a_lokr_whose_smaller_half_is_decomposed_too(sample_of: Any) -> None:
    sample = sample_of(nn.Linear(36, 36), torch.randn(3, 36))
    theirs: Any = LokrModule("layer", sample.module, lora_dim=2, alpha=3, decompose_both=True)
    ours: Any = adapter_from_file(sample.sizes, scrambled(theirs).state_dict())
    assert ours.names == ("lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b")
    assert (ours.rank, ours.alpha) == (2, 3)
    assert_alike(sample, ours, theirs)
    assert_gradients_alike(sample, ours, theirs)


@pytest.mark.parametrize("kind", [LoConModule, LohaModule, LokrModule])
def test_files_of_options_that_we_lack_are_refused(kind: Any) -> None:
    conv: Any = nn.Conv2d(24, 30, 3)
    sizes = Layer.of("layer", conv)
    lengths = {"weight_decompose": True, "wd_on_out": True}
    cases = [({"use_tucker": True}, "lora_mid|_t"), *([] if kind is LoConModule else [(lengths, "dora_scale")])]
    for options, suffix in cases:
        with pytest.raises(ValueError, match=f"({suffix}).* (is|are) not read"):
            adapter_from_file(sizes, kind("layer", conv, lora_dim=2, alpha=1, **options).state_dict(), conv)
    with pytest.raises(ValueError, match="rescale .* is not read"):
        adapter_from_file(sizes, DiagOFTModule("layer", conv, lora_dim=3, rescaled=True).state_dict())
