"""Text encoders that are trained: a denoiser that encodes captions itself, so that their adapters get gradients.

B batch, L tokens.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from lorasmith.adapters.targets import adaptable_layers
from lorasmith.formats.text_encoder_names import text_layer
from lorasmith.types import Codec, Cond, Denoiser, Process, unread

LEVEL = "text_model."
"""What files' names have before CLIP's modules; in transformers 5 the model without a projection lacks it."""


@dataclass(frozen=True)
class Texts:
    """How layers of a family's text encoders are named in LoRA files, and how they are trained."""

    prefixes: Mapping[str, str]  # {net: kohya's name of it}
    encode: Callable[[Mapping[str, Any], Cond], Cond]  # nets, {name: [B,L]} -> {name: [B,L,D] or [B,D]}
    idle: Callable[[Mapping[str, Any]], tuple[str, ...]] = lambda encoders: ()
    """nets -> how paths of layers begin that nobody reads."""
    optional: Collection[str] = ()
    """The nets without which `encode` takes what they return, `output_of`, from the conditioning."""


@dataclass(frozen=True)
class TextDenoiser:
    """A denoiser with text encoders before it: conditioning holds tokens instead of what they are encoded to."""

    inner: Denoiser
    encoders: Mapping[str, Any]
    texts: Texts

    @property
    def nets(self) -> dict[str, nn.Module]:
        return {**self.inner.nets, **self.encoders}

    @property
    def process(self) -> Process:
        return self.inner.process

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """x_t [B,C,h,w], t [B], cond {tokens_of(encoder): [B,L], …} -> what the inner denoiser predicts."""
        return self.inner.predict(x_t, t, self.encoded(cond))

    def encoded(self, cond: Cond) -> Cond:
        """{tokens_of(encoder): [B,L], …} -> what the inner denoiser is given; ValueError where tokens are missing."""
        tokens = {tokens_of(name) for name in self.encoders}
        if missing := sorted(tokens - cond.keys()):
            found = ", ".join(sorted(cond)) or "nothing"
            raise ValueError(
                f"positive must be captions where text encoders are trained, got {found} without {missing[0]}"
            )
        others = {name: value for name, value in cond.items() if name not in tokens}
        return {**others, **self.texts.encode(self.encoders, cond)}

    def unread(self) -> set[str]:
        beginnings = self.texts.idle(self.encoders)
        own = {path for path in adaptable_layers(self.encoders) if path.startswith(beginnings)}
        return own | set(unread(self.inner))

    def file_key(self, path: str) -> str:
        """text_encoder.encoder.layers.0… -> lora_te_text_model_encoder_layers_0…: kohya's names."""
        net, _, module = path.partition(".")
        if net not in self.encoders:
            return self.inner.file_key(path)
        return f"{self.texts.prefixes[net]}_{self._with_level(net, module)}".replace(".", "_")

    def aliases(self) -> dict[str, str]:
        """Diffusers' names."""
        return {
            f"{net}.{self._with_level(net, path)}": f"{net}.{path}"
            for net, encoder in self.encoders.items()
            for path, _ in encoder.named_modules()
        }

    def _with_level(self, net: str, module: str) -> str:
        text = text_layer(f"{net}.{module}")
        has_level = LEVEL.rstrip(".") in dict(self.encoders[net].named_children())
        return f"{LEVEL}{module}" if text and text.is_clip and not has_level else module


def tokens_of(encoder: str) -> str:
    """text_encoder -> ids, text_encoder_2 -> ids_2: the tokens' name in conditioning."""
    return encoder.replace("text_encoder", "ids")


def output_of(encoder: str) -> str:
    """text_encoder_3 -> output_3: the name in conditioning of what an encoder makes of the tokens."""
    return encoder.replace("text_encoder", "output")


def tokens(texts: Sequence[str], tokenizers: Mapping[str, Any], lengths: Mapping[str, int]) -> Cond:
    """B texts -> {tokens_of(encoder): [B,L]} by each encoder's tokenizer, filled up or cut to its length L."""
    return {
        tokens_of(name): tokenizer(
            list(texts), padding="max_length", max_length=lengths[name], truncation=True, return_tensors="pt"
        ).input_ids
        for name, tokenizer in tokenizers.items()
    }


class TokenCodec(Codec, Protocol):
    """A codec that can leave the encoding of tokens to a denoiser."""

    kept_tokens: Collection[str]
    """The encoders whose tokens encode_texts returns; where there are none, it returns what the denoiser reads."""


class TextFamily(Protocol):
    """A family whose text encoders can be trained."""

    @property
    def denoiser(self) -> Denoiser: ...

    TEXTS: ClassVar[Texts | None]

    def codec(self, device: torch.device) -> Any: ...

    def pipeline(self, denoiser: Denoiser) -> Any: ...

    def metadata(self) -> dict[str, str]: ...


@dataclass(frozen=True)
class WithTexts:
    """A family whose denoiser holds the text encoders too."""

    family: TextFamily
    denoiser: TextDenoiser

    @classmethod
    def of(cls, family: TextFamily) -> "WithTexts":
        """ValueError where its text encoders are missing, or of a kind that is not trained."""
        texts = family.TEXTS
        if texts is None:
            raise ValueError("text_encoder.train must be false for this model: its text encoders are not trained yet")
        pipe = family.pipeline(family.denoiser)
        encoders = {name: encoder for name in texts.prefixes if (encoder := getattr(pipe, name)) is not None}
        missing = [name for name in texts.prefixes if name not in encoders and name not in texts.optional]
        if missing:
            raise ValueError(
                f"model, or encoders beside a single file, must hold {missing[0]} where text_encoder.train or a LoRA "
                f"adapts it, but does not"
            )
        return cls(family, TextDenoiser(family.denoiser, encoders, texts))

    def only(self, nets: Collection[str]) -> "WithTexts":
        """Without the optional encoders that are not among these nets: captions are encoded with them once."""
        encoders = self.denoiser.encoders
        left = {name: encoders[name] for name in encoders if name in nets or name not in self.denoiser.texts.optional}
        return replace(self, denoiser=replace(self.denoiser, encoders=left))

    def codec(self, device: torch.device) -> TokenCodec:
        codec = self.family.codec(device)
        codec.kept_tokens = frozenset(self.denoiser.encoders)
        return codec

    def pipeline(self, denoiser: Denoiser) -> Any:
        return self.family.pipeline(denoiser)

    def metadata(self) -> dict[str, str]:
        return self.family.metadata()
