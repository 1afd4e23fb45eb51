"""What `lorasmith convert` holds and how long it takes, for a folder of Stable Diffusion 1.5's size, random, in bf16.

python scripts/measure_converting.py: peak resident memory above that after the imports, each case in its own process.
It writes 1.7 GB below --folder and deletes them. "loaded" is the same with the whole model load_model. With --large the
LoRAs are of FLUX.1's size (700 MB and 2.1 GB).
"""

import argparse
import itertools
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import torch

LAYOUTS = ("diffusers", "comfyui")
LARGE = {"rank 64": 64, "rank 192": 192}


def make(folder: Path) -> None:
    """A folder with a UNet, a LoRA and a DoRA."""
    from diffusers import DDIMScheduler, UNet2DConditionModel

    from lorasmith.adapters.adapter_set import AdapterSet
    from lorasmith.adapters.algorithms import DoRA, LoRA
    from lorasmith.adapters.targets import Targets
    from lorasmith.formats import lora_file
    from lorasmith.models.load import load_model

    model = folder / "model"
    UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8).bfloat16().save_pretrained(model / "unet")
    DDIMScheduler().save_pretrained(model / "scheduler")
    parts = {"unet": ["diffusers", "UNet2DConditionModel"], "scheduler": ["diffusers", "DDIMScheduler"]}
    (model / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline", **parts}))
    denoiser = load_model(model).denoiser
    for algorithm in (LoRA(rank=16), DoRA(rank=16)):
        adapters = AdapterSet.new(denoiser, algorithm, Targets(), 0)
        state = adapters.file_state(denoiser, torch.bfloat16)
        lora_file.write(folder / f"{algorithm.name}.safetensors", state, {})


def make_large(folder: Path) -> None:
    """LoRAs for FLUX.1, of most of its linear layers."""
    from lorasmith.adapters.targets import adaptable_layers
    from lorasmith.formats import lora_file
    from lorasmith.models.meta import published_skeleton
    from lorasmith.models.reference_configs import PUBLISHED

    denoiser = published_skeleton(PUBLISHED["Flux"][0], with_texts=False)
    shapes = {
        path: tuple(module.state_dict()["weight"].shape) for path, module in adaptable_layers(denoiser.nets).items()
    }
    for name, rank in LARGE.items():
        state = {}
        for path, shape in shapes.items():
            if min(shape) > 1000:
                state[f"{path}.lora_A.weight"] = torch.ones(rank, shape[1], dtype=torch.bfloat16)
                state[f"{path}.lora_B.weight"] = torch.ones(shape[0], rank, dtype=torch.bfloat16)
        lora_file.write(folder / f"{name}.safetensors", state, {})


def measured(folder: Path, case: tuple[str, str, str]) -> tuple[float, float]:
    """(peak MB above the imports, seconds) of converting."""
    from lorasmith.formats import lora_file
    from lorasmith.formats.read import adapters_from
    from lorasmith.formats.write import in_layout
    from lorasmith.models.load import load_model
    from lorasmith.tools.convert import convert

    torch.set_num_threads(1)
    algorithm, layout, how = case
    source, output = folder / f"{algorithm}.safetensors", folder / "out.safetensors"
    before, start = peak(), time.perf_counter()
    if how == "loaded":
        denoiser = load_model(folder / "model").denoiser
        state = in_layout(adapters_from(lora_file.read(source)[0], denoiser), denoiser, torch.bfloat16, layout)  # pyright: ignore[reportArgumentType]
        lora_file.write(output, state, {})
    else:
        convert(source, output, None if how == "no model" else folder / "model", layout, overwrite=True)  # pyright: ignore[reportArgumentType]
    return peak() - before, time.perf_counter() - start


def peak() -> float:
    """MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the files are made; default: the system's for such files")
    parser.add_argument("--large", action="store_true", help="LoRAs of FLUX.1's size, without a model")
    arguments = parser.parse_args()
    cases = list(itertools.product(("LoRA", "DoRA"), LAYOUTS, ("loaded", "model", "no model")))
    cases.remove(("DoRA", "comfyui", "no model"))  # its lengths depend on the weights
    if arguments.large:
        cases = list(itertools.product(LARGE, LAYOUTS, ("no model",)))
    spawned = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        with spawned.Pool(1) as pool:
            pool.apply(make_large if arguments.large else make, (Path(folder),))
        for case in cases:
            with spawned.Pool(1) as pool:
                megabytes, seconds = pool.apply(measured, (Path(folder), case))
            print(f"| {case[0]} | {case[1]} | {case[2]} | {megabytes:.0f} MB | {seconds:.1f} s |", flush=True)


if __name__ == "__main__":
    main()
