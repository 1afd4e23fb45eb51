"""Copies that share weights, and checkpointing: fewer bytes kept, the same gradients."""

import torch
from torch import Tensor

from lorasmith.adapters.lora import LoRA
from lorasmith.attach import AdapterSet, Targets, attached
from lorasmith.families.sd import StableDiffusion, StableDiffusionDenoiser
from lorasmith.memory import blocks, checkpointed, shared_copy


def test_a_copy_shares_weights_and_nothing_else(family: StableDiffusion) -> None:
    twin = shared_copy(family.denoiser)
    pairs = list(zip(family.denoiser.unet.named_parameters(), twin.unet.named_parameters(), strict=True))
    assert all(name == other and a.data_ptr() == b.data_ptr() for (name, a), (other, b) in pairs)
    assert all(a.requires_grad and not b.requires_grad for (_, a), (_, b) in pairs)
    twin.unet.register_forward_hook(lambda *args: None)
    assert not family.denoiser.unet._forward_hooks


def test_another_dtype_makes_new_weights(family: StableDiffusion) -> None:
    stored = family.denoiser.unet.dtype
    twin = shared_copy(family.denoiser, torch.device("cpu"), torch.float64)
    assert twin.unet.dtype == torch.float64 and family.denoiser.unet.dtype == stored


def test_blocks_are_the_residual_and_transformer_blocks(family: StableDiffusion) -> None:
    kinds = {type(block).__name__ for block in blocks(family.denoiser.unet)}
    assert kinds == {"ResnetBlock2D", "BasicTransformerBlock"}


def kept_bytes_and_gradients(
    denoiser: StableDiffusionDenoiser, x: Tensor, texts: Tensor, checkpoint: bool
) -> tuple[int, list[Tensor]]:
    """Bytes kept for the backward pass, each storage once and weights left out, and the adapters' gradients."""
    adapters = AdapterSet.new(denoiser, LoRA(rank=2), Targets(preset="all"), 0)
    weights = {p.untyped_storage().data_ptr() for p in (*denoiser.unet.parameters(), *adapters.parameters())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with attached(denoiser, adapters):
        t = torch.tensor([10, 500, 700, 900])
        if checkpoint:
            with checkpointed(denoiser), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = denoiser.predict(x, t, {"text": texts}).square().mean()
            with checkpointed(denoiser):
                loss.backward()
        else:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = denoiser.predict(x, t, {"text": texts}).square().mean()
            loss.backward()
    return sum(kept.values()), [p.grad for p in adapters.parameters() if p.grad is not None]


def test_checkpointing_keeps_less_and_gives_the_same_gradients(
    family: StableDiffusion, latents: Tensor, texts: Tensor
) -> None:
    denoiser = shared_copy(family.denoiser, torch.device("cpu"), torch.float32)
    plain_bytes, plain = kept_bytes_and_gradients(denoiser, latents, texts, False)
    fewer_bytes, again = kept_bytes_and_gradients(denoiser, latents, texts, True)
    assert fewer_bytes < plain_bytes / 3
    assert len(plain) == len(again) and all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_checkpointing_ends_with_its_context(family: StableDiffusion) -> None:
    denoiser = shared_copy(family.denoiser)
    block = blocks(denoiser.unet)[0]
    before = block.forward
    with checkpointed(denoiser):
        assert block.forward != before
    assert block.forward == before
