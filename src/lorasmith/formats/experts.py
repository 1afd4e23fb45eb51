"""The experts of a denoiser, which have a LoRA file each, and which of them a file is for."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lorasmith.types import Denoiser, Divided

EXPERT, NET = "lorasmith.expert", "lorasmith.net"
"""The keys in a file's metadata that say which expert it is for, and what its net is called beside the others."""


@dataclass(frozen=True)
class Expert:
    """A net of a denoiser, and the denoiser that it is alone."""

    name: str
    denoiser: Denoiser
    own: str  # the net's name in that denoiser
    net: str  # its name beside the others

    @property
    def beside(self) -> dict[str, str]:
        """{the net's name in a denoiser of its own: its name beside the others}."""
        return {self.own: self.net}

    @property
    def alone(self) -> dict[str, str]:
        """{the net's name beside the others: its name in a denoiser of its own}."""
        return {self.net: self.own}

    @property
    def metadata(self) -> dict[str, str]:
        """What its files say."""
        return {EXPERT: self.name, NET: self.net}


def experts(denoiser: Denoiser) -> list[Expert]:
    """Empty where all of its nets belong into one file."""
    found = []
    for name, alone in denoiser.experts().items() if isinstance(denoiser, Divided) else ():
        ((own, net),) = alone.nets.items()
        found.append(Expert(name, alone, own, next(n for n, other in denoiser.nets.items() if other is net)))
    return found


def stated_expert(denoiser: Denoiser, metadata: Mapping[str, str]) -> Expert | None:
    """The expert that a file says it is for; None where it says none that the denoiser has."""
    return next((expert for expert in experts(denoiser) if expert.name == metadata.get(EXPERT)), None)


def named_part(denoiser: Denoiser, layers: Iterable[str], metadata: Mapping[str, str]) -> Denoiser:
    """What a file's layers are named for: the expert that it states, or the first where it names no other's net."""
    found, stated = experts(denoiser), stated_expert(denoiser, metadata)
    if stated is not None:
        return stated.denoiser
    if not found or any(layer.startswith(f"{other.net}.") for layer in layers for other in found[1:]):
        return denoiser
    return found[0].denoiser
