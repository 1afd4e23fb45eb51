"""The command line. What a command needs is imported when it runs, so that help is quick."""

import io
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Group, Parameter

from lorasmith import __version__
from lorasmith.cli.help_layout import HelpPages
from lorasmith.cli.tools import COMMANDS, Json, Overwrite, model_path
from lorasmith.distributed.torchrun import is_first_here
from lorasmith.errors import is_out_of_memory, text_of
from lorasmith.reporting.signals import INTERRUPTED, Interruption, interruptions

log = logging.getLogger(__name__)

ABOUT = """Train LoRAs for diffusion models.

Start with `lorasmith demo`, or with your own pictures: `lorasmith train PICTURES --model MODEL --steps 1000`.

`lorasmith COMMAND --help` describes a command.
"""
TRAINING, FILES, OTHER = (
    Group(name, sort_key=place) for place, name in enumerate(("Train and generate", "LoRA files", "Other"))
)
app = App(
    name="lorasmith", version=__version__, help=ABOUT, help_formatter=HelpPages(), suppress_keyboard_interrupt=False,
    group_commands=TRAINING, group_parameters=Group("Options"),
)  # fmt: skip
app["--help"].group = app["--version"].group = OTHER
comfyui = App(name="comfyui", help="The nodes for ComfyUI.", group=OTHER, group_commands=Group("Commands"))
app.command(comfyui)
for command in COMMANDS:
    app.command(command, group=FILES)
Tokens = Annotated[str, Parameter(allow_leading_hyphen=True, show=False)]
Resume = Annotated[bool, Parameter(negative="")]
CHECKS = ("torch", "lorasmith.runs.checks")  # what settings are checked with, and the folders and files that they name


@app.command(help_flags=[])
def train(*tokens: Tokens, resume: Resume = False, json: Json = False) -> int:
    """Train a LoRA on a folder of captioned pictures."""
    if {"--help", "-h"} & set(tokens):
        from lorasmith.cli.train_help import show

        show(_word_after_help(tokens))
        return 0
    with _shown_training(json) as (display, report):
        from lorasmith.cli.terminal import load
        from lorasmith.config.invocation import invocation

        asked = invocation(tokens, is_resuming=resume)
        load(display, "libraries", CHECKS)
        return _execute(asked.config, display, report, resume=resume, folder=asked.folder)


@app.command
def demo(*tokens: Tokens, concept: str = "line_drawing", resume: Resume = False, json: Json = False) -> int:
    """Train a LoRA on the embedded model and pictures, and show what it learnt.

    All settings of `lorasmith train` can be used too.

    Parameters
    ----------
    concept
        the style to learn: line_drawing, an obvious one, or flat, a subtler one
    resume
        continue the last demo that was interrupted, from its newest checkpoint
    json
        print events as JSON, one object per line
    """
    with _shown_training(json) as (display, report):
        from lorasmith.cli.terminal import load
        from lorasmith.config.arguments import parsed, stray_words
        from lorasmith.config.values import configured, merged
        from lorasmith.demo import demo_settings

        others, values = parsed(tokens, "demo")
        if others:
            raise ValueError(f"demo takes settings only, got {' '.join(others)}{stray_words(tokens)}")
        config = configured(merged(demo_settings(concept), values))
        load(display, "libraries", CHECKS)
        from lorasmith.runs.run_dir import numbered_folder

        folder = config.output or numbered_folder(f"demo-{concept}", is_there=resume)
        config = config.model_copy(update={"output": folder})
        return _execute(config, display, report, resume=resume)


@app.command
def sample(
    prompts: list[str], /, *, model: str, encoders: str | None = None, lora: Path | None = None,
    ignore_unknown: bool = False, output: Path | None = None, overwrite: Overwrite = False, seed: int = 0,
    steps: int = 25, guidance: float = 5.0,
) -> int:  # fmt: skip
    """Generate images without and with a LoRA, in one labelled grid.

    Parameters
    ----------
    prompts
        prompts, one image for each
    model
        base model: a diffusers folder, a single-file checkpoint, a hub id, or demo for the embedded model
    encoders
        for a single file: diffusers folder or hub id with the components it lacks, such as text encoders
    lora
        LoRA file; none: only the model
    ignore_unknown
        skip layers of the LoRA that the model does not have, instead of refusing the file
    output
        PNG file to write; none: samples.png, numbered if it exists
    overwrite
        replace an existing file
    seed
        seed of the initial noise
    steps
        denoising steps per image
    guidance
        classifier-free guidance; 1: none
    """
    from lorasmith.cli.terminal import MODEL_LIBRARIES, load, opened_display

    with opened_display() as display:
        from lorasmith.config.invocation import with_model
        from lorasmith.config.values import configured

        values = {"prompts": prompts, "seed": seed, "steps": steps, "guidance": guidance}
        named = {"model": model} if encoders is None else {"model": model, "encoders": encoders}
        config = configured(with_model({**named, "ignore_unknown": ignore_unknown, "sampling": values}))
        load(display, "libraries", CHECKS)
        from lorasmith.runs.checks import checked_sample

        path, device = checked_sample(config, lora, output, overwrite=overwrite)
        load(display, "model classes", (*MODEL_LIBRARIES, "lorasmith.runs.generate"))
        from lorasmith.ops.cpu.openmp import cores_shared
        from lorasmith.runs.generate import draw_comparison

        with cores_shared():
            draw_comparison(config, lora, path, device, display)
    print(path)
    return 0


@app.command(group=FILES)
def inspect(file: Path, /, *, plot: Path | None = None, json: Json = False) -> int:
    """Describe a LoRA file, a checkpoint or a diffusers folder.

    Parameters
    ----------
    file
        safetensors file or diffusers folder, or demo for the embedded model
    plot
        PNG file for a plot of the norms of the LoRA's layers
    json
        print one JSON document
    """
    from lorasmith.cli.terminal import load, opened_display, show_json, show_table

    if plot is not None and (plot.suffix.lower() != ".png" or not plot.parent.is_dir()):
        raise ValueError(f"plot must be a .png file in a folder that exists, got {plot}")
    path = model_path(file)
    with opened_display() as display:
        load(display, "libraries", ("torch", "lorasmith.tools.inspect"))
        from lorasmith.tools.inspect import inspected, layer_norms

        inspection = inspected(path, display)
    if not json:
        show_table(inspection.facts_table)
        show_table(inspection.rows_table, inspection.columns)
        show_table(sorted(inspection.metadata.items()), ("metadata", "value"))
    if plot is not None:
        from lorasmith.reporting.layer_norms_plot import save_norms_plot

        save_norms_plot(layer_norms(file), f"What {file.name} adds", plot)
        if not json:
            print(plot)
    if json:
        show_json({**inspection.document, **({} if plot is None else {"plot": str(plot)})})
    return 0


@comfyui.command(name="install")
def install_comfyui(path: Path, /) -> int:
    """Copy lorasmith's nodes into ComfyUI.

    Parameters
    ----------
    path
        the ComfyUI folder
    """
    from lorasmith.cli.comfyui import install

    target = install(path)
    print(f"nodes: {target}")
    print("ComfyUI's own Python needs lorasmith too: run its `python -m pip install lorasmith`, then restart ComfyUI")
    print(f"to undo it, delete {target}")
    return 0


def _word_after_help(tokens: Sequence[str]) -> str | None:
    """The word that `train --help WORD` asks about."""
    start = next(index for index, token in enumerate(tokens) if token in ("--help", "-h")) + 1
    return tokens[start] if start < len(tokens) and not tokens[start].startswith("--") else None


@contextmanager
def _shown_training(as_json: bool) -> Iterator[tuple[Any, Any]]:
    """The display and the report of a training."""
    from lorasmith.cli.summary import Printed
    from lorasmith.cli.terminal import opened_display, stdout
    from lorasmith.distributed.torchrun import is_first
    from lorasmith.reporting.events import Events

    events = Events(stdout, is_first()) if as_json else None
    with opened_display(events) as display:
        yield display, events or Printed()


def _execute(config: Any, display: Any, report: Any, *, resume: bool, folder: Path | None = None) -> int:
    """What the settings and folders forbid is refused before the libraries that load models are imported."""
    from lorasmith.cli.terminal import MODEL_LIBRARIES, load
    from lorasmith.distributed.process_group import joined
    from lorasmith.runs.checks import checked

    with joined(config.device) as world:
        request = checked(config, is_resuming=resume, folder=folder, world=world)
        load(display, "model classes", (*MODEL_LIBRARIES, "lorasmith.runs.run"))
        from lorasmith.cli.train import execute

        return execute(request, display, report)


def _hush_imports() -> None:
    """Libraries warn while they are imported, of what they do not find and nobody here asked for."""
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    for name in ("torchao", "bitsandbytes", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _refuse_bytes(arguments: Sequence[str]) -> None:
    """ValueError where an argument is not text: Python then has lone surrogates for its bytes."""
    for argument in arguments:
        if any("\ud800" <= letter <= "\udfff" for letter in argument):
            raise ValueError(f"arguments must be UTF-8, got {argument!r}")


def _printable(error: Exception) -> Exception:
    """The error to print where memory ran out or a library is missing; anything else is raised."""
    if isinstance(error, ImportError) and not is_out_of_memory(error):
        return ImportError(f"cannot import a library that is needed: {error}")
    if not is_out_of_memory(error):
        raise error
    return error if isinstance(error, MemoryError) else MemoryError(f"out of memory: {error}")


def _refused(error: Exception) -> int:
    """One line for the user; the traceback for LORASMITH_LOG=debug."""
    log.debug("", exc_info=error)
    if is_first_here() or not isinstance(error, ValueError):  # bad input is every process's
        print(f"lorasmith: {text_of(error)}", file=sys.stderr)
    return 2


def main() -> None:
    """The command `lorasmith`: exit code 0, 2 after bad input, 130 after Ctrl-C, SIGTERM or SIGHUP."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path must not fail where it cannot be printed
    try:
        with interruptions() as interruption:
            code = _code(interruption)
    except KeyboardInterrupt:
        print("lorasmith: stopped", file=sys.stderr)
        code = INTERRUPTED
    sys.exit(code)


def _code(interruption: Interruption) -> int:
    """The exit code of the command in the program's arguments; KeyboardInterrupt where it is interrupted."""
    try:
        _refuse_bytes(sys.argv[1:])
        _hush_imports()
        return app(sys.argv[1:], exit_on_error=False, print_error=False, result_action="return_value")
    except (ValueError, OSError, ArithmeticError, CycloptsError) as error:
        interruption.raise_if_it_has_come()
        return _refused(error)
    except (RuntimeError, MemoryError, ImportError, SystemError) as error:
        interruption.raise_if_it_has_come()  # libraries may make another error of it
        return _refused(_printable(error))
