"""The head of a safetensors file: names, shapes, dtypes and metadata, without the tensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]  # "F16", "BF16" and so on
    metadata: Mapping[str, str]

    @classmethod
    def of(cls, path: Path) -> "Header":
        """ValueError where it is no sound safetensors file."""
        if path.suffix.lower() in PICKLES:
            raise ValueError(
                f"{path} must be a safetensors file: a pickle ({path.suffix}) can run code when it is loaded"
            )
        try:
            if not path.is_file():
                found = "a folder" if path.is_dir() else "nothing there"
                raise ValueError(f"{path} must be a safetensors file, got {found}")
            with safe_open(path, framework="pt") as file:
                slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
                shapes = {key: tuple(part.get_shape()) for key, part in slices.items()}
                return cls(path, shapes, {k: part.get_dtype() for k, part in slices.items()}, file.metadata() or {})
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} must be a safetensors file, but it cannot be read: {error}") from error

    def shape(self, key: str) -> tuple[int, ...]:
        """ValueError where there is no such tensor."""
        if key not in self.shapes:
            raise ValueError(f"{self.path} must hold the tensor {key}, but it does not")
        return self.shapes[key]

    def holds(self, prefix: str) -> bool:
        return any(key.startswith(prefix) for key in self.shapes)

    def count(self, prefix: str) -> int:
        """How many numbered parts there are: `prefix0.`, `prefix1.` …"""
        return len({key[len(prefix) :].partition(".")[0] for key in self.shapes if key.startswith(prefix)})
