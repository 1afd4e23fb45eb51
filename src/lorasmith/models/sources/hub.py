"""Models by their hub id: the files that are loaded, fetched once and kept in the hub's own cache.

No torch: an id that names no model is refused before anything is loaded.
"""

import logging
import threading
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from tqdm.auto import tqdm

from lorasmith.models.sources.folder_layout import MODEL_INDEX, MODULES, TOKENIZER, WEIGHTS, variant_of
from lorasmith.reporting.progress import SILENT, Advance, Progress, megabytes
from lorasmith.storage.json_files import json_table

log = logging.getLogger(__name__)

WORDS = (".json", ".txt", ".model", ".jinja")  # what tokenizers are kept in


class NoPipelineError(ValueError):
    """A repository of the hub that is something else than a pipeline of diffusers."""


def fetched(model_id: str, without: Collection[str] = (), progress: Progress = SILENT) -> Path:
    """The folder in the hub's cache, made complete from the hub where it can be reached; ValueError where it is not.

    without: parts whose weights are not needed.
    """
    try:
        return _fetched(model_id, without, progress)
    except NoPipelineError:
        raise
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


def _fetched(model_id: str, without: Collection[str], progress: Progress) -> Path:
    info = HfApi().model_info(model_id, files_metadata=True)  # one request; the list of files tries again for 20 s
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    if MODEL_INDEX not in sizes:
        raise NoPipelineError(
            f"{model_id} must be a diffusers pipeline, but its repository has no {MODEL_INDEX}: "
            "download its safetensors file and give that"
        )
    parts = _parts(Path(hf_hub_download(model_id, MODEL_INDEX, revision=info.sha)))
    wanted = needed([*sizes], [part for part in parts if part not in without])
    missing = [name for name in wanted if try_to_load_from_cache(model_id, name, revision=info.sha) is None]
    if progress is SILENT or not missing:  # then the library draws bars of its own
        return Path(snapshot_download(model_id, allow_patterns=wanted))
    with megabytes("fetching the model", sum(sizes[name] for name in missing), progress) as advance:
        return Path(snapshot_download(model_id, allow_patterns=wanted, tqdm_class=_told(advance)))


def _told(advance: Advance) -> type[tqdm]:
    """A bar for the hub's library that draws nothing and tells how many more bytes are there.

    The library makes two that count bytes, of what has arrived and of what is on the disk: the further one is told.
    """
    lock, furthest = threading.Lock(), 0

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})
            self.counts_bytes = options.get("unit") == "B"

        def update(self, n: float | None = 1) -> None:
            nonlocal furthest
            with lock:
                self.n += n or 0
                if self.counts_bytes and self.n > furthest:
                    advance(int(self.n) - furthest)
                    furthest = int(self.n)

    return Bar


def needed(names: Sequence[str], parts: Collection[str] = MODULES) -> list[str]:
    """Of a repository's files those that are loaded: of each of these parts' weights one variant, and no pickles."""
    folders: dict[str, list[str]] = {}
    for name in names:
        path = PurePosixPath(name)
        folders.setdefault(str(path.parent), []).append(path.name)
    chosen = [name for name in names if name == MODEL_INDEX]
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
        folder = Path(snapshot_download(model_id, local_files_only=True, allow_patterns=[MODEL_INDEX]))
        parts = _parts(folder / MODEL_INDEX)
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
