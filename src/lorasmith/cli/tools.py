"""The commands for files: convert, merge, resize, extract, metadata. What they need is imported when they run."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from lorasmith.reporting.display import Display
from lorasmith.reporting.pace import counted

Dtype = Literal["fp32", "bf16", "fp16"]
Flag = Annotated[bool, Parameter(negative="")]
Overwrite = Flag
Json = Flag


def resize(
    file: Path, /, *, output: Path, rank: int | None = None, keep: float | None = None, overwrite: Overwrite = False
) -> int:
    """Reduce a LoRA's rank, and report the error.

    Parameters
    ----------
    file
        LoRA file
    output
        safetensors file to write
    rank
        rank of every layer; layers of lower rank are kept
    keep
        instead of a rank, the share of each layer's energy (sum of squared singular values) to keep, such as 0.95
    overwrite
        replace an existing file
    """
    with _working() as display:
        from lorasmith.tools.resize import resize
        from lorasmith.tools.svd import Cut

        losses = resize(file, output, Cut(rank=rank, keep=keep), overwrite=overwrite, progress=display)
    _show_losses(losses)
    print(output)
    return 0


def merge(
    loras: list[str], /, *, output: Path, model: Path | None = None, rank: int | None = None,
    dtype: Dtype | None = None, ignore_unknown: Flag = False, overwrite: Overwrite = False,
) -> int:  # fmt: skip
    """Add LoRAs, given as FILE or FILE:WEIGHT, into one LoRA file or into a model.

    Parameters
    ----------
    loras
        LoRA files with weights, such as a.safetensors:0.7
    output
        safetensors file to write, or the folder if the model is one
    model
        diffusers folder or safetensors file of a model to merge into; none: write a LoRA
    rank
        truncate the sum to this rank; required unless all are LoRA
    dtype
        dtype of the LoRA; none: the widest of the sources
    ignore_unknown
        with a model: skip layers that it does not have, instead of stopping
    overwrite
        replace an existing file
    """
    from lorasmith.storage.safetensors_header import Header
    from lorasmith.tools.outputs import refuse_output, refuse_output_like
    from lorasmith.tools.weighted import refuse_too_few, weighted

    given = [weighted(text) for text in loras]
    if model is None:
        if ignore_unknown:
            raise ValueError("ignore_unknown leaves out layers that a model does not have: give it with --model")
        refuse_output(output, overwrite=overwrite)
        refuse_too_few(given)
        for lora, _ in given:
            Header.of(lora)
        with _working() as display:
            from lorasmith.tools.svd import Cut

            if rank is not None:
                Cut(rank=rank)  # refuses what is no rank
            _load_model_classes(display)
            from lorasmith.tools.merge import Source, merge

            sources = [Source.parsed(text) for text in loras]
            losses = merge(sources, output, rank=rank, dtype=_dtype(dtype), overwrite=overwrite, progress=display)
        _show_losses(losses)
    else:
        if rank is not None or dtype is not None:
            raise ValueError("rank and dtype are those of a LoRA: give them without --model")
        with _working() as display:
            from lorasmith.models.sources.kind import local_header

            path = model_path(model)
            local_header(path)
            refuse_output_like(path, output, overwrite=overwrite)
            for lora, _ in given:
                Header.of(lora)
            _load_model_classes(display)
            from lorasmith.tools.merge import Source
            from lorasmith.tools.merge_into_model import merge_into

            sources = [Source.parsed(text) for text in loras]
            num_changed = merge_into(
                path, sources, output, overwrite=overwrite, ignore_unknown=ignore_unknown, progress=display
            )
        print(f"{counted(num_changed, 'weight')} changed")
    print(output)
    return 0


def extract(
    base: Path, tuned: Path, /, *, output: Path, rank: int | None = None, keep: float | None = None,
    dtype: Dtype = "bf16", overwrite: Overwrite = False,
) -> int:  # fmt: skip
    """Extract a LoRA from the difference between two models, and report the error.

    Parameters
    ----------
    base
        diffusers folder or safetensors file of the base model
    tuned
        the fine-tuned model, in the same form
    output
        safetensors file to write
    rank
        rank of every layer
    keep
        instead of a rank, the share of each layer's energy (sum of squared singular values) to keep, such as 0.95
    dtype
        dtype of the LoRA
    overwrite
        replace an existing file
    """
    from lorasmith.tools.outputs import refuse_output

    refuse_output(output, overwrite=overwrite)
    paths = model_path(base), model_path(tuned)
    with _working() as display:
        from lorasmith.models.sources.kind import local_header
        from lorasmith.tools.svd import Cut

        cut = Cut(rank=rank, keep=keep)
        for path in paths:
            local_header(path)
        _load_model_classes(display)
        from lorasmith.tools.extract import extract

        own = _dtype(dtype)
        assert own is not None
        losses = extract(*paths, output, cut, dtype=own, overwrite=overwrite, progress=display)
    _show_losses(losses)
    print(output)
    return 0


def metadata(
    file: Path, /, *, set: Annotated[list[str] | None, Parameter(negative="")] = None,
    strip: Annotated[bool, Parameter(negative="")] = False, output: Path | None = None, overwrite: Overwrite = False,
    json: Json = False,
) -> int:  # fmt: skip
    """Show the metadata of a safetensors file, or write a copy with other metadata.

    Parameters
    ----------
    file
        safetensors file
    set
        key=value to set; may be repeated
    strip
        keep only training settings and what loading needs: no captions, prompts, paths, links, people or times
    output
        safetensors file to write; only with --set or --strip
    overwrite
        replace an existing file
    json
        print one JSON document: metadata and, if a file is written, left_out, reduced and output
    """
    from lorasmith.cli.terminal import opened_display, show_json, show_table
    from lorasmith.storage.safetensors_header import Header
    from lorasmith.tools.metadata import changes_of, rewrite

    if not set and not strip:
        if output is not None:
            raise ValueError("output is written only with --set or --strip")
        found = Header.of(file).metadata
        if json:
            show_json({"metadata": found})
        else:
            _show_metadata(found)
        return 0
    if output is None:
        raise ValueError(f"--set and --strip need --output: --output {file} --overwrite changes the file itself")
    changes = changes_of(set or [])
    with opened_display() as display:
        written = rewrite(file, output, changes=changes, strip=strip, overwrite=overwrite, progress=display)
    if json:
        show_json({**asdict(written), "output": str(output)})
        return 0
    show_table([("left out", key) for key in written.left_out] + [("left out in part", key) for key in written.reduced])
    _show_metadata(written.metadata)
    print(output)
    return 0


def convert(
    file: Path, /, *, to: Literal["kohya", "diffusers", "comfyui", "lycoris"], output: Path, model: str | None = None,
    ignore_unknown: Flag = False, overwrite: Overwrite = False,
) -> int:  # fmt: skip
    """Convert a LoRA to the key names of another program.

    Parameters
    ----------
    file
        LoRA file
    to
        program whose key names to use
    output
        safetensors file to write
    model
        the model it was trained for, as in train (no weights are loaded); none: the published model it fits
    ignore_unknown
        skip layers that the model does not have, instead of stopping
    overwrite
        replace an existing file
    """
    from lorasmith.config.invocation import with_model
    from lorasmith.storage.safetensors_header import Header
    from lorasmith.tools.outputs import refuse_output

    refuse_output(output, overwrite=overwrite)
    Header.of(file)
    own = None if model is None else str(with_model({"model": model})["model"])
    with _working() as display:
        from lorasmith.models.sources.kind import refuse_missing

        if own is not None:
            refuse_missing(own)
        _load_model_classes(display)
        from lorasmith.tools.convert import convert

        found = convert(file, output, own, to, overwrite=overwrite, ignore_unknown=ignore_unknown, progress=display)
    print(counted(found, "layer"))
    print(output)
    return 0


def model_path(model: Path) -> Path:
    """The name demo stands for the embedded model."""
    from lorasmith.demo import BASE

    return BASE if str(model) == "demo" else model


def _dtype(name: Dtype | None) -> Any:
    import torch

    return None if name is None else {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


@contextmanager
def _working() -> Iterator[Display]:
    """A display, with the libraries loaded that every file needs."""
    from lorasmith.cli.terminal import load, opened_display

    with opened_display() as display:
        load(display, "libraries", ("torch", "lorasmith.formats.lora_file"))
        yield display


def _load_model_classes(display: Display) -> None:
    """Takes seconds: what can be refused without them is refused before."""
    from lorasmith.cli.terminal import MODEL_LIBRARIES, load

    load(display, "model classes", MODEL_LIBRARIES)


def _show_metadata(metadata: Mapping[str, str]) -> None:
    from lorasmith.cli.terminal import show_table, stdout
    from lorasmith.tools.metadata import shown

    show_table(shown(metadata) if stdout.isatty() else sorted(metadata.items()))


def _show_losses(losses: Any) -> None:
    from lorasmith.cli.terminal import show_table
    from lorasmith.tools.outputs import table_of

    show_table(table_of(losses), ("layer", "rank", "relative error"))


COMMANDS = (convert, merge, resize, extract, metadata)
