"""Data sets in ComfyUI: from a folder of pictures, grouped by size, to a file and back."""

from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy_api.latest import io, ui

from lorasmith.data.encode import pixels
from lorasmith.data.folder import examples
from lorasmith.data.listing import Listing, listed

from .conditioning import in_pairs
from .dataset_file import read, write
from .nodes import CATEGORY
from .pictures import comfy_pixels
from .places import inside

MULTIPLE = 64  # of pixels, which every model that ComfyUI trains can halve often enough
DATASETS = Path("lorasmith", "datasets")  # in the output folder


class LorasmithDataset(io.ComfyNode):
    """A folder of captioned pictures as latents and conditioning."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LorasmithDataset",
            display_name="Dataset from Folder (lorasmith)",
            category=CATEGORY,
            description="Encodes the pictures of a folder, and the captions in the .txt beside each.",
            inputs=[
                io.Combo.Input(
                    "folder", options=_subfolders(), tooltip="in the input folder; 10_cats repeats its pictures"
                ),
                io.Vae.Input("vae", tooltip="encodes the pictures"),
                io.Clip.Input("clip", tooltip="encodes the captions"),
                io.Int.Input(
                    "resolution", default=512, min=MULTIPLE, max=8192,
                    tooltip="resolution, as the side in pixels of a square of the same area; aspect ratios are kept",
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="latents", is_output_list=True, tooltip="one for each picture"),
                io.Conditioning.Output(display_name="positive", is_output_list=True, tooltip="one for each picture"),
                io.Image.Output(display_name="images", is_output_list=True, tooltip="as they were encoded"),
                io.String.Output(display_name="captions", is_output_list=True, tooltip="one for each picture"),
            ],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, folder: str, **others: Any) -> str:
        """Changes with any picture or caption in the folder, so that nothing stale is trained on."""
        root = inside(folder_paths.get_input_directory(), folder)
        found = listed(root) if root.is_dir() else Listing()
        paths = [root / path for path in (*found.pictures, *found.captions.values(), *found.tables)]
        return repr(sorted((path.as_posix(), *_state(path)) for path in paths if path.is_file()))

    @classmethod
    def execute(cls, folder: str, vae: Any, clip: Any, resolution: int) -> io.NodeOutput:
        latents, positive, images, captions = [], [], [], []
        for example in examples(inside(folder_paths.get_input_directory(), folder)):
            image = comfy_pixels(pixels(example, resolution, MULTIPLE))
            latent = {"samples": vae.encode(image)}
            cond = clip.encode_from_tokens_scheduled(clip.tokenize(example.caption))
            for column, value in ((latents, latent), (positive, cond), (images, image), (captions, example.caption)):
                column.extend([value] * example.repeats)
        return io.NodeOutput(latents, positive, images, captions)


class LorasmithBuckets(io.ComfyNode):
    """Samples grouped by the size of their latents."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LorasmithBuckets",
            display_name="Buckets by Size (lorasmith)",
            category=CATEGORY,
            description="Batches the latents of each size, each batch with the list of its conditionings.",
            is_input_list=True,
            inputs=_samples_inputs(),
            outputs=[
                io.Latent.Output(display_name="latents", is_output_list=True, tooltip="a batch for each size"),
                io.Conditioning.Output(display_name="positive", is_output_list=True, tooltip="a list for each size"),
            ],
        )

    @classmethod
    def execute(cls, latents: list[Any], positive: list[Any]) -> io.NodeOutput:
        buckets: dict[torch.Size, list[tuple[Any, Any]]] = {}
        for latent, pair in in_pairs(latents, positive, are_buckets=True):
            buckets.setdefault(latent.shape, []).append((latent, pair))
        batches = [{"samples": torch.stack([latent for latent, _ in bucket])} for bucket in buckets.values()]
        return io.NodeOutput(batches, [[pair for _, pair in bucket] for bucket in buckets.values()])


class LorasmithSaveDataset(io.ComfyNode):
    """Latents and conditioning as one safetensors file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LorasmithSaveDataset",
            display_name="Save Dataset (lorasmith)",
            category=CATEGORY,
            description="Writes encoded samples into the output folder, as safetensors.",
            is_input_list=True,
            is_output_node=True,
            inputs=[*_samples_inputs(), io.String.Input("name", default="dataset", tooltip="of the file")],
            outputs=[],
        )

    @classmethod
    def execute(cls, latents: list[Any], positive: list[Any], name: list[str]) -> io.NodeOutput:
        path = inside(_datasets(), f"{name[0]}.safetensors")
        write(path, in_pairs(latents, positive, are_buckets=True))
        return io.NodeOutput(ui=ui.PreviewText(path.relative_to(_datasets()).as_posix()))


class LorasmithLoadDataset(io.ComfyNode):
    """What Save Dataset has written."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LorasmithLoadDataset",
            display_name="Load Dataset (lorasmith)",
            category=CATEGORY,
            description="Reads encoded samples from a safetensors file; no pickle is ever opened.",
            inputs=[io.Combo.Input("name", options=_names(), tooltip="of the file, in output/lorasmith/datasets")],
            outputs=[
                io.Latent.Output(display_name="latents", is_output_list=True, tooltip="one for each sample"),
                io.Conditioning.Output(display_name="positive", is_output_list=True, tooltip="one for each sample"),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, name: str) -> float:
        path = inside(_datasets(), f"{name}.safetensors")
        return path.stat().st_mtime if path.exists() else 0.0

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        samples = read(inside(_datasets(), f"{name}.safetensors"))
        return io.NodeOutput([{"samples": latent[None]} for latent, _ in samples], [[pair] for _, pair in samples])


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _samples_inputs() -> list[Any]:
    return [
        io.Latent.Input("latents", tooltip="one, or a list of them; a batch counts as its samples"),
        io.Conditioning.Input("positive", tooltip="one for each sample, or one for all"),
    ]


def _datasets() -> str:
    return str(Path(folder_paths.get_output_directory()).resolve() / DATASETS)


def _names() -> list[str]:
    root = Path(_datasets())
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.safetensors"))


def _subfolders() -> list[str]:
    """The folders in ComfyUI's input folder, and those in them."""
    root = Path(folder_paths.get_input_directory())
    found = [path for pattern in ("*", "*/*") for path in root.glob(pattern) if path.is_dir()]
    return sorted(path.relative_to(root).as_posix() for path in found)
