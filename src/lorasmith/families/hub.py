"""Models by their hub id: the files that are loaded, fetched once and kept in the hub's own cache."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from lorasmith.families.folder import WEIGHTS, variant_of

log = logging.getLogger(__name__)

ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
PARTS = ("unet", "vae", "text_encoder")  # with weights
SMALL = {"scheduler": (".json",), "tokenizer": (".json", ".txt"), **{part: (".json",) for part in PARTS}}


def is_id(model: str) -> bool:
    """Whether it looks like owner/name."""
    return ID.fullmatch(model) is not None


def fetched(model_id: str) -> Path:
    """The folder in the hub's cache, made complete from the hub where it can be reached; ValueError where it is not."""
    try:
        files = HfApi().model_info(model_id).siblings or []  # one request; the list of files tries again for 20 s
        return Path(snapshot_download(model_id, allow_patterns=needed([file.rfilename for file in files])))
    except Exception as error:  # the HTTP client's own errors among them, which change with the library
        folder, reason = _cached(model_id), _reason(error)
        if folder is None:
            raise ValueError(
                f"{model_id} must be a diffusers folder or the id of a model on the hub "
                f"(its cache does not hold it, and {reason}), got no such folder"
            ) from error
        if not isinstance(error, OfflineModeIsEnabled):
            log.warning("the copy of %s in the hub's cache is taken: %s", model_id, reason)
        return folder


def needed(names: Sequence[str]) -> list[str]:
    """Of a repository's files those that are loaded: of each part's weights one variant, and no pickles."""
    folders: dict[str, list[str]] = {}
    for name in names:
        path = PurePosixPath(name)
        folders.setdefault(str(path.parent), []).append(path.name)
    chosen = [name for name in names if name == "model_index.json"]
    for folder, suffixes in SMALL.items():
        chosen += [f"{folder}/{file}" for file in folders.get(folder, []) if file.endswith(suffixes)]
    for part in PARTS:
        files = folders.get(part, [])
        variant = variant_of(files)
        chosen += [f"{part}/{file}" for file in files if (match := WEIGHTS.fullmatch(file)) and match[1] == variant]
    return chosen


def _cached(model_id: str) -> Path | None:
    """The snapshot in the cache if it holds weights for every part."""
    try:
        folder = Path(snapshot_download(model_id, local_files_only=True, allow_patterns=["model_index.json"]))
    except LocalEntryNotFoundError:
        return None
    return folder if all(list((folder / part).glob("*.safetensors")) for part in PARTS) else None


def _reason(error: Exception) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE=1 forbids to fetch it"
    if isinstance(error, GatedRepoError):
        return "the hub shows it to those only who accepted its terms: accept them on its page and set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has no such model, or a private one: then set HF_TOKEN"
    return f"it cannot be fetched: {' '.join(str(error).split())[:200]}"
