"""What `lorasmith train` is asked for: settings on top of a folder of pictures, a settings file or a run folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from lorasmith.config import other_files
from lorasmith.config.arguments import parsed, stray_words
from lorasmith.config.files import located, read_toml
from lorasmith.config.schema import Config
from lorasmith.config.values import configured, merged
from lorasmith.demo import BASE
from lorasmith.formats.model_names import HUB_IDS, family_named

MARKS = (".lock", "steps.jsonl", "checkpoints")  # of a run, beside run.toml


@dataclass(frozen=True)
class Invocation:
    """A run's config and, where one in a folder is to be continued, that folder."""

    config: Config
    folder: Path | None = None


def invocation(tokens: Sequence[str], *, is_resuming: bool) -> Invocation:
    """The arguments of `train` but for --resume -> what is to be run; ValueError where they do not say."""
    sources, values = parsed(tokens)
    if not sources and "folder" in values.get("data", {}):
        return Invocation(configured(with_model(values)))
    if len(sources) != 1 or not sources[0]:
        got = " ".join(sources) or "none"
        advice = ": --resume takes no value" if is_resuming and len(sources) > 1 else stray_words(tokens)
        advice = advice if any(sources) else ": lorasmith train PICTURES --model MODEL"
        raise ValueError(f"train needs one folder of pictures or one TOML file, got {got}{advice}")
    source = Path(sources[0])
    if source.suffix.lower() in other_files.SUFFIXES and not source.is_dir():
        raise other_files.refusal(source)
    toml = source / "run.toml"
    is_run = toml.is_file() and any((source / name).exists() for name in MARKS)
    if is_resuming and not is_run and source.suffix.lower() != ".toml" and "model" not in values:
        found = "none that exists" if not source.exists() else "one without run.toml"
        found = f"one with run.toml but none of {', '.join(MARKS)}" if toml.is_file() else found
        raise ValueError(f"{source} must be a run folder to resume, or pictures with --model, got {found}")
    if is_run and is_resuming:
        _refuse_other_output(values, source)
        return Invocation(_from_file(toml, values), source)
    if is_run:
        raise ValueError(
            f"{source} is the folder of a run, and not of pictures: lorasmith train {source} --resume continues the "
            f"run, and lorasmith train {toml} --output {_free(source)} repeats it"
        )
    if source.suffix.lower() == ".toml":
        is_of_run = is_resuming and source.name == "run.toml" and source.is_file()
        if is_of_run:
            _refuse_other_output(values, source.parent)
        return Invocation(_from_file(source, values), source.parent if is_of_run else None)
    return Invocation(configured(with_model(merged({"data": {"folder": str(source)}}, values))))


def _from_file(path: Path, values: Mapping[str, Any]) -> Config:
    """A settings file with changes on top; what is wrong in the file is named with its line."""
    held = read_toml(path)
    try:
        return configured(with_model(merged(held, values)))
    except ValueError as error:
        raise ValueError(located(str(error), path, values)) from error


def _refuse_other_output(values: Mapping[str, Any], run: Path) -> None:
    """ValueError where a run that is to be resumed is given the name of another folder."""
    output = values.get("output")
    if isinstance(output, str) and Path(output).expanduser().resolve() != run.resolve():
        raise ValueError(f"output must be the run that is resumed, {run}, or not be given, got {output}")


def _free(folder: Path) -> Path:
    """A folder of a like name that is not there."""
    paths = (folder.with_name(f"{folder.name}-{number}") for number in count(2))
    return next(path for path in paths if not path.exists())


def with_model(values: Mapping[str, Any]) -> dict[str, Any]:
    """The name demo stands for the embedded model. ValueError for the name of a family, with a model of it."""
    model = values.get("model")
    if model == "demo":
        return {**values, "model": str(BASE)}
    family = family_named(model) if isinstance(model, str) and not Path(model).exists() else None
    if family is not None:
        raise ValueError(
            f"model must be a diffusers folder, a checkpoint file or a hub id, got {model!r}: "
            f"for {family}, --model {HUB_IDS[family]}"
        )
    return dict(values)
