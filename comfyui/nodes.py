"""Training a LoRA in ComfyUI, and what is done with it: saving, applying, plotting."""

import logging
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io, ui

from lorasmith.api import NO_LORA
from lorasmith.formats import lora_file

from .applying import keys_left, with_lora
from .layouts import LAYOUTS, in_layout
from .pictures import loss_picture, tensor_of
from .places import output_path
from .training import Trained, trained
from .widgets import config_of_node, contract_inputs, further_inputs

log = logging.getLogger(__name__)

CATEGORY = "lorasmith"


class LorasmithTrainLora(io.ComfyNode):
    """The training node: train_lora's inputs and outputs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LorasmithTrainLora",
            display_name="Train LoRA (lorasmith)",
            category=CATEGORY,
            description="Trains a LoRA on latents and their conditioning.",
            is_input_list=True,
            inputs=[
                io.Model.Input("model", tooltip="the diffusion model to train the LoRA on"),
                io.Latent.Input("latents", tooltip="the data set; several sizes may be mixed"),
                io.Conditioning.Input("positive", tooltip="one conditioning for each latent, or one for all"),
                *contract_inputs(),
                io.Boolean.Input(
                    "bucket_mode",
                    default=False,
                    optional=True,
                    tooltip="each of the latents is a batch of one size, with its own list of conditionings",
                ),
                io.Boolean.Input(
                    "resume",
                    default=True,
                    optional=True,
                    tooltip="continue a training with the same inputs that was cancelled or failed",
                ),
                *further_inputs(),
            ],
            outputs=[
                io.Model.Output(display_name="model_with_lora", tooltip="the model with the trained LoRA applied"),
                io.LoraModel.Output(display_name="lora", tooltip="the trained weights"),
                io.LossMap.Output(display_name="loss", tooltip="the loss of each step"),
                io.Int.Output(display_name="steps", tooltip="steps completed, including those of existing_lora"),
            ],
        )

    @classmethod
    def execute(cls, model: list[Any], latents: list[Any], positive: list[Any], **values: list[Any]) -> io.NodeOutput:
        chosen = {name: value[0] for name, value in values.items()}
        name = chosen["existing_lora"]
        path = None if name == NO_LORA else Path(folder_paths.get_full_path_or_raise("loras", name))
        result = trained(
            model[0], latents, positive, config_of_node(chosen, path),
            are_buckets=chosen.get("bucket_mode", False), is_resuming=chosen.get("resume", True),
        )  # fmt: skip
        return io.NodeOutput(with_lora(model[0], result.lora, 1.0), result.lora, {"loss": result.losses}, result.steps)


class LorasmithSaveLora(io.ComfyNode):
    """A LoRA as a file, in the layout that the program it is for reads."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LorasmithSaveLora",
            display_name="Save LoRA (lorasmith)",
            category=CATEGORY,
            description="Writes a LoRA with its metadata into the output folder.",
            is_output_node=True,
            inputs=[
                io.LoraModel.Input("lora", tooltip="the trained weights"),
                io.String.Input("prefix", default="loras/ComfyUI_trained_lora", tooltip="in the output folder"),
                io.Int.Input("steps", optional=True, force_input=True, tooltip="steps trained, for the file's name"),
                io.Combo.Input(
                    "layout",
                    options=list(LAYOUTS),
                    default="ComfyUI",
                    tooltip="the program that reads it",
                ),
                io.Model.Input("model", optional=True, tooltip="the model it is for; only kohya and diffusers need it"),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="the file, relative to the output folder")],
        )

    @classmethod
    def execute(
        cls, lora: Any, prefix: str, layout: str = "ComfyUI", steps: int | None = None, model: Any = None
    ) -> io.NodeOutput:
        weights, metadata = lora.file(layout) if isinstance(lora, Trained) else (lora, {})
        state = in_layout(weights, layout, None if model is None else model.model)
        left = [] if model is None else keys_left(model, state)
        if left:
            log.warning("this file is for %s: ComfyUI does not read %d of its %d keys", layout, len(left), len(state))
        path = output_path(prefix, ("" if steps is None else f"_{steps}_steps") + "_{counter:05}_.safetensors")
        path.parent.mkdir(parents=True, exist_ok=True)
        lora_file.write(path, state, metadata)
        shown = path.relative_to(folder_paths.get_output_directory()).as_posix()
        return io.NodeOutput(shown, ui=ui.PreviewText(shown))


class LorasmithLoadLora(io.ComfyNode):
    """A LoRA on a model, in the weights or beside them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LorasmithLoadLora",
            display_name="Apply LoRA (lorasmith)",
            category=CATEGORY,
            description="Applies a LoRA to a model, and refuses one that does not fit.",
            inputs=[
                io.Model.Input("model", tooltip="the model, which is left unchanged"),
                io.LoraModel.Input("lora", tooltip="the trained weights"),
                io.Float.Input("strength", default=1.0, min=-100.0, max=100.0, step=0.01, tooltip="of the LoRA"),
                io.Boolean.Input(
                    "bypass",
                    default=False,
                    tooltip="compute the LoRA separately from the weights; required for quantised weights",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="the model with the LoRA")],
        )

    @classmethod
    def execute(cls, model: Any, lora: Any, strength: float, bypass: bool = False) -> io.NodeOutput:
        return io.NodeOutput(with_lora(model, lora, strength, beside=bypass))


class LorasmithLossGraph(io.ComfyNode):
    """The losses of a training as a plot."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LorasmithLossGraph",
            display_name="Loss Graph (lorasmith)",
            category=CATEGORY,
            description="Plots the loss of each step and its smoothed course.",
            is_output_node=True,
            inputs=[
                io.LossMap.Input("loss", tooltip="the losses from the training node"),
                io.String.Input("filename_prefix", default="loss_graph", tooltip="path and name in the output folder"),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="the plot")],
        )

    @classmethod
    def execute(cls, loss: dict[str, list[float]], filename_prefix: str = "loss_graph") -> io.NodeOutput:
        picture = loss_picture(loss["loss"])
        path = output_path(filename_prefix, "_{counter:05}_.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
        pixels = tensor_of(picture)
        return io.NodeOutput(pixels, ui=ui.PreviewImage(pixels, cls=cls))
