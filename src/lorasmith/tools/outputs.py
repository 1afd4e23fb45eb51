"""Where the tools write, and what their files say of themselves."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lorasmith import __version__
from lorasmith.reporting.progress import Progress, megabytes
from lorasmith.storage.atomic import PIECE, copied, write_pieces
from lorasmith.storage.safetensors_header import PEFT_CONFIG

if TYPE_CHECKING:  # torch, which takes seconds: metadata are changed without it
    from lorasmith.tools.svd import Losses

HISTORY = "lorasmith.history"
STALE = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256", PEFT_CONFIG)
"""What a file says of its tensors, which are others now; PEFT's configuration states ranks and alphas."""


def in_view(pieces: Iterable[bytes], num_bytes: int, what: str, progress: Progress) -> Iterator[bytes]:
    """The pieces, of so many bytes in all; how many megabytes are done is shown."""
    with megabytes(what, num_bytes, progress) as advance:
        for piece in pieces:
            yield piece
            advance(len(piece))


def copied_in_view(source: Path, target: Path, progress: Progress) -> None:
    """Copies a file; that is shown where it takes a while."""
    num_bytes = source.stat().st_size
    pieces = copied(source, 0, num_bytes)
    is_large = num_bytes > PIECE
    write_pieces(target, in_view(pieces, num_bytes, f"copying {source.name}", progress) if is_large else pieces)


def refuse_output(output: Path, *, overwrite: bool) -> None:
    """ValueError unless a safetensors file can be written there; over another only where that is asked for."""
    if output.suffix.lower() != ".safetensors":
        raise ValueError(f"output must be a .safetensors file, got {output}")
    if output.is_dir():
        raise ValueError(f"output must be a file, got the folder {output}")
    _refuse_place(output, overwrite=overwrite)


def refuse_output_like(model: Path, output: Path, *, overwrite: bool) -> None:
    """ValueError unless a model can be written there in the form of this one, a folder or a file."""
    (_refuse_output_folder if model.is_dir() else refuse_output)(output, overwrite=overwrite)


def _refuse_output_folder(output: Path, *, overwrite: bool) -> None:
    """ValueError unless a diffusers folder can be written there; over another only where that is asked for."""
    if output.suffix.lower() == ".safetensors" or output.is_file():
        raise ValueError(f"output must be a folder, as the model is, got {output}")
    _refuse_place(output, overwrite=overwrite)
    if output.exists() and not (output / "model_index.json").is_file():
        raise ValueError(f"output must be a diffusers folder to be written over, got {output}")


def _refuse_place(output: Path, *, overwrite: bool) -> None:
    """Outputs are written beside their place and moved there, so it is the folder around that must be writable."""
    folder = output.resolve().parent
    if not folder.is_dir():
        raise ValueError(f"output must be in a folder that exists, got {output}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"output must be in a folder that can be written to, got {output}")
    if output.exists() and not overwrite:
        raise ValueError(f"output must not be there yet without --overwrite, got {output}")


def derived(metadata: Mapping[str, str], what: str) -> dict[str, str]:
    """A source's metadata without what is no longer true, and one more line of its history."""
    try:
        history = json.loads(metadata.get(HISTORY, "[]"))
    except ValueError:
        history = [metadata[HISTORY]]
    entry = f"{what} (lorasmith {__version__})"
    kept = {key: value for key, value in metadata.items() if key not in STALE}
    return {**kept, HISTORY: json.dumps([*history, entry] if isinstance(history, list) else [entry])}


def network_dim(ranks: Iterable[int]) -> dict[str, str]:
    """The ranks as kohya's tools read them."""
    found = set(ranks)
    return {"ss_network_dim": str(next(iter(found))) if len(found) == 1 else "Dynamic"}


def table_of(losses: "Losses") -> list[tuple[str, ...]]:
    """What was lost: all together, then the worst layers."""
    rows = [("all layers", "", f"{losses.overall:.3g}")]
    return [*rows, *((layer, str(losses.ranks[layer]), f"{error:.3g}") for layer, error in losses.worst())]
