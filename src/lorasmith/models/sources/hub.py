"""Models by their hub id: the files that are loaded, fetched once and kept in the hub's own cache."""

import logging
import re
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from lorasmith.models.checkpoints.load import json_table
from lorasmith.models.sources.components import MODULES
from lorasmith.models.sources.parts import WEIGHTS, variant_of

log = logging.getLogger(__name__)

INDEX = "model_index.json"
TOKENIZER = re.compile(r"tokenizer(_\d)?")
WORDS = (".json", ".txt", ".model", ".jinja")  # what tokenizers are kept in


def fetched(model_id: str, without: Collection[str] = ()) -> Path:
    """The folder in the hub's cache, made complete from the hub where it can be reached; ValueError where it is not.

    without: parts whose weights are not needed.
    """
    try:
        info = HfApi().model_info(model_id)  # one request; the list of files tries again for 20 s
        names = [file.rfilename for file in info.siblings or ()]
        parts = _parts(Path(hf_hub_download(model_id, INDEX, revision=info.sha))) if INDEX in names else ()
        wanted = needed(names, [part for part in parts if part not in without])
        return Path(snapshot_download(model_id, allow_patterns=wanted))
    except Exception as error:  # the HTTP client's own errors among them, which change with the library
        folder, reason = _cached(model_id, without), _reason(error)
        if folder is None:
            raise ValueError(
                f"{model_id} must be a diffusers folder or the id of a model on the hub "
                f"(its cache does not hold it, and {reason}), got no such folder"
            ) from error
        if not isinstance(error, OfflineModeIsEnabled):
            log.warning("the copy of %s in the hub's cache is taken: %s", model_id, reason)
        return folder


def needed(names: Sequence[str], parts: Collection[str] = MODULES) -> list[str]:
    """Of a repository's files those that are loaded: of each of these parts' weights one variant, and no pickles."""
    folders: dict[str, list[str]] = {}
    for name in names:
        path = PurePosixPath(name)
        folders.setdefault(str(path.parent), []).append(path.name)
    chosen = [name for name in names if name == INDEX]
    for folder, files in folders.items():
        suffixes = WORDS if TOKENIZER.fullmatch(folder) else ".json" if folder in ("scheduler", *MODULES) else ()
        chosen += [f"{folder}/{file}" for file in files if file.endswith(suffixes)]
        if folder in parts:
            variant = variant_of(files)
            chosen += [f"{folder}/{file}" for file in files if (m := WEIGHTS.fullmatch(file)) and m[1] == variant]
    return chosen


def _parts(index: Path) -> list[str]:
    """The parts with weights that a pipeline has."""
    content = json_table(index)
    return [part for part in MODULES if isinstance(content.get(part), list) and None not in content[part]]


def _cached(model_id: str, without: Collection[str]) -> Path | None:
    """The snapshot in the cache if it holds weights for every part that is needed."""
    try:
        folder = Path(snapshot_download(model_id, local_files_only=True, allow_patterns=[INDEX]))
        parts = _parts(folder / INDEX)
    except (LocalEntryNotFoundError, ValueError):
        return None
    return folder if all(list((folder / part).glob("*.safetensors")) for part in parts if part not in without) else None


def _reason(error: Exception) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE=1 forbids to fetch it"
    if isinstance(error, GatedRepoError):
        return "the hub shows it to those only who accepted its terms: accept them on its page and set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has no such model, or a private one: then set HF_TOKEN"
    return f"it cannot be fetched: {' '.join(str(error).split())[:200]}"
