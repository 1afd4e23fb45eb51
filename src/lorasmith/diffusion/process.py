"""Noise processes: what x_t is, and what the net predicts."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # torch, which takes seconds: settings are read without it
    from torch import Tensor


def _along(values: "Tensor", like: "Tensor") -> "Tensor":
    """values [B] -> [B,1,…] with as many axes as `like` [B,…], on its device."""
    return values.to(like.device).view(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True)
class Diffusion:
    """x_t = sqrt(a_t) x0 + sqrt(1 - a_t) eps, t is a step index, 0 is the cleanest (Ho et al. 2020, eq. 4).

    The net predicts eps, v = sqrt(a_t) eps - sqrt(1 - a_t) x0 (Salimans and Ho 2022, appendix D), or x0.
    """

    alphas_cumprod: "Tensor"  # a [T], float32
    prediction: Literal["eps", "v", "x0"]

    def _scales(self, t: "Tensor", like: "Tensor") -> "tuple[Tensor, Tensor]":
        """t [B] -> the factors of x0 and eps, [B,1,…] each."""
        a = self.alphas_cumprod[t.cpu()]
        return _along(a.sqrt(), like), _along((1 - a).sqrt(), like)

    def time(self, fraction: "Tensor") -> "Tensor":
        num_steps = len(self.alphas_cumprod)
        return (fraction * num_steps).long().clamp(0, num_steps - 1)

    def noise(self, x0: "Tensor", eps: "Tensor", t: "Tensor") -> "Tensor":
        signal, sigma = self._scales(t, x0)
        return signal * x0 + sigma * eps

    def target(self, x0: "Tensor", eps: "Tensor", t: "Tensor") -> "Tensor":
        if self.prediction == "eps":
            return eps
        if self.prediction == "x0":
            return x0
        signal, sigma = self._scales(t, x0)
        return signal * eps - sigma * x0

    def x0(self, x_t: "Tensor", out: "Tensor", t: "Tensor") -> "Tensor":
        if self.prediction == "x0":
            return out
        signal, sigma = self._scales(t, x_t)
        if self.prediction == "v":
            return signal * x_t - sigma * out
        return (x_t - sigma * out) / signal

    def eps(self, x_t: "Tensor", out: "Tensor", t: "Tensor") -> "Tensor":
        if self.prediction == "eps":
            return out
        signal, sigma = self._scales(t, x_t)
        if self.prediction == "v":
            return signal * out + sigma * x_t
        return (x_t - signal * out) / sigma

    def snr(self, t: "Tensor") -> "Tensor":
        a = self.alphas_cumprod[t.cpu()]
        return a / (1 - a)


@dataclass(frozen=True)
class TokenShift:
    """A shift that grows with the number of tokens N of an image: e^(a + b N) (Flux.1's and Flux.2's own code)."""

    offset: float  # a
    slope: float  # b
    patch: int = 2  # latent pixels along a token's side

    def __call__(self, shape: Sequence[int]) -> float:
        """For latents [C,h,w]."""
        height, width = shape[-2:]
        return math.exp(self.offset + self.slope * (height // self.patch) * (width // self.patch))


@dataclass(frozen=True)
class Flow:
    """x_t = (1 - t) x0 + t eps, t in [0, 1); the net predicts eps - x0 (Lipman et al. 2023; Esser et al. 2024, eq. 13).

    `shift` moves timesteps towards noise: t = s u / (1 + (s - 1) u) (Esser et al. 2024, eq. 23). With `by_size`, it
    depends on the size of the latents.
    """

    shift: float = 1.0
    by_size: Callable[[Sequence[int]], float] | None = None  # latents' shape [C,h,w] -> shift

    def sized(self, shape: Sequence[int]) -> "Flow":
        """The flow for latents of this shape."""
        return self if self.by_size is None else Flow(self.by_size(shape))

    def time(self, fraction: "Tensor") -> "Tensor":
        return self.shift * fraction / (1 + (self.shift - 1) * fraction)

    def noise(self, x0: "Tensor", eps: "Tensor", t: "Tensor") -> "Tensor":
        return x0.lerp(eps, _along(t, x0))

    def target(self, x0: "Tensor", eps: "Tensor", t: "Tensor") -> "Tensor":
        return eps - x0

    def x0(self, x_t: "Tensor", out: "Tensor", t: "Tensor") -> "Tensor":
        return x_t - _along(t, x_t) * out

    def eps(self, x_t: "Tensor", out: "Tensor", t: "Tensor") -> "Tensor":
        return x_t + (1 - _along(t, x_t)) * out

    def snr(self, t: "Tensor") -> "Tensor":
        return ((1 - t) / t).square()
