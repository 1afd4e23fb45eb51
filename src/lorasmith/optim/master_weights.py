"""All parameters as one vector in fp32, and the views of it that an optimizer steps on."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lorasmith.devices import in_double

PIECE = 2**12  # numbers of a vector whose squares are summed up in its own precision


def norm(vector: Tensor) -> float:
    """The length of a vector [N], from those of its pieces: in fp32 one long sum would lose much."""
    num_rest = len(vector) % PIECE
    whole, rest = vector.detach().split([len(vector) - num_rest, num_rest])
    lengths = [torch.linalg.vector_norm(whole.view(-1, PIECE), dim=1), torch.linalg.vector_norm(rest)[None]]
    return float(in_double(torch.cat(lengths)).norm())


class Masters:
    """All parameters as one fp32 vector [N], which the optimizer works on: small steps of 16-bit ones are not lost.

    (Micikevicius et al. 2018, section 3.1.) The parameters become parts of one vector too: in fp32, of this one itself.
    """

    @torch.inference_mode(False)  # whatever the caller is in: parameters are trained as parts of the vector
    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = list(params)
        self.sizes = [p.numel() for p in self.params]
        self.own = torch.empty(sum(self.sizes), dtype=self.params[0].dtype, device=self.params[0].device)
        for param, part in zip(self.params, self.parts(self.own), strict=True):
            part.copy_(param.detach())
            param.data = part
        self.vector = self.own.to(torch.promote_types(self.own.dtype, torch.float32)).requires_grad_()
        self.own_grad = torch.zeros_like(self.own)
        self._grads = self.parts(self.own_grad)
        self.leaves: list[Tensor] = []  # what an optimizer steps on instead of the vector

    @torch.inference_mode(False)
    def split(self, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Views of the vector in these shapes, one after the other, for an optimizer to step on."""
        parts = self.vector.detach().split([math.prod(shape) for shape in shapes])
        self.leaves = [part.view(*shape).requires_grad_() for part, shape in zip(parts, shapes, strict=True)]
        return self.leaves

    def share_gradient(self) -> None:
        """Gives each leaf its part of the vector's gradient."""
        parts = self.gradient().split([leaf.numel() for leaf in self.leaves])
        for leaf, part in zip(self.leaves, parts, strict=True):
            leaf.grad = part.view_as(leaf)

    def parts(self, vector: Tensor) -> list[Tensor]:
        """A vector [N] -> each parameter's part of it, in its shape."""
        return [part.view_as(p) for part, p in zip(vector.split(self.sizes), self.params, strict=True)]

    def clear(self) -> None:
        """Forgets all gradients, and has the parameters' next ones add up in one vector."""
        self.forget()
        self.own_grad.zero_()
        for param, grad in zip(self.params, self._grads, strict=True):
            param.grad = grad

    def forget(self) -> None:
        """Leaves the vector without a gradient."""
        for tensor in (self.vector, *self.leaves):
            tensor.grad = None

    def release(self) -> None:
        """Leaves the parameters without gradients."""
        for param in self.params:
            param.grad = None

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Adds the parameters' gradients to the vector's, in fp32, and sets them to zero."""
        taken, before = self.own_grad.to(self.vector.dtype, copy=True), self.vector.grad
        self.vector.grad = taken if before is None else before.add_(taken)
        self.own_grad.zero_()

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Multiplies the gradient."""
        if self.vector.grad is not None and factor != 1:
            self.vector.grad *= factor

    def gradient(self) -> Tensor:
        """The gradient [N]; zeros where there is none."""
        return torch.zeros_like(self.vector) if self.vector.grad is None else self.vector.grad

    @contextmanager
    def reached(self) -> Iterator[set[int]]:
        """Ids of the parameters that get a gradient within, be it zero."""
        ids: set[int] = set()
        hooks = [p.register_post_accumulate_grad_hook(lambda param: ids.add(id(param))) for p in self.params]
        try:
            yield ids
        finally:
            for hook in hooks:
                hook.remove()

    def gradients(self, ids: set[int]) -> dict[int, Tensor]:
        """{id of a parameter: what was taken of its gradient}, of some."""
        parts = zip(self.params, self.parts(self.gradient()), strict=True)
        return {id(param): part for param, part in parts if id(param) in ids}

    @torch.no_grad()
    def write(self) -> None:
        """The vector's values become the parameters', rounded."""
        self.own.copy_(self.vector)
