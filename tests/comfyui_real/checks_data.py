"""Checks of what is around a training: data sets on disk, names that would become paths, the plot of losses."""

import struct
import time
from pathlib import Path
from typing import Any

import folder_paths
import torch
from lorasmith_pack import data_nodes, nodes
from lorasmith_pack.dataset_file import read, write
from lorasmith_pack.pictures import loss_picture, tensor_of
from pack_runs import refused
from PIL import Image
from safetensors.torch import save_file

from lorasmith.formats import lora_file

NAN, INF = float("nan"), float("inf")
NAMES_THAT_LEAD_OUT = ("../x", "/etc/x", "a/../../x", "", ".", "..", "sub/../..")
OUTSIDE = ("../x", "/etc/x", "a/../../x")


def _datasets() -> Path:
    folder = Path(folder_paths.get_output_directory(), "lorasmith", "datasets")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _sample(number: int) -> tuple[torch.Tensor, list[Any]]:
    extra = {
        "pooled_output": torch.randn(1, 24).bfloat16(), "width": 512 + number, "guidance": 3.5, "nothing": None,
        "flag": True, "area": ("percentage", 0.5, 0.5, 0.0, 0.0), "text": "a ✓",
        "nested": {"list": [torch.arange(3), [1, None, {"deep": torch.ones(2, 2).half()}]], "empty": {}},
    }  # fmt: skip
    return torch.randn(4, 8, 8 + 8 * number), [torch.randn(1, 6 + number, 20), extra]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(_same(x, y) for x, y in zip(one, other, strict=True))
    return type(one) is type(other) and one == other


def check_samples_come_back_from_disk() -> None:
    with torch.inference_mode():
        samples = [_sample(number) for number in range(3)]
        path = _datasets() / "all.safetensors"
        write(path, samples)
        found = read(path)
    assert len(found) == 3
    for (latent, pair), (same_latent, same_pair) in zip(samples, found, strict=True):
        assert _same(latent, same_latent) and _same(list(pair), list(same_pair))


def check_the_nodes_save_and_load() -> None:
    samples = [_sample(number) for number in range(2)]
    latents, positive = [{"samples": latent[None]} for latent, _ in samples], [[pair] for _, pair in samples]
    data_nodes.LorasmithSaveDataset.execute(latents, positive, ["sub/mine"])
    assert (_datasets() / "sub" / "mine.safetensors").is_file()
    loaded_latents, loaded_positive = data_nodes.LorasmithLoadDataset.execute("sub/mine").args
    assert _same(latents, loaded_latents) and _same(positive, loaded_positive)
    assert "sub/mine" in data_nodes._names()


def check_a_change_of_the_file_is_seen() -> None:
    latents, positive = [{"samples": torch.randn(1, 4, 8, 8)}], [[_sample(0)[1]]]
    data_nodes.LorasmithSaveDataset.execute(latents, positive, ["seen"])
    first = data_nodes.LorasmithLoadDataset.fingerprint_inputs("seen")
    time.sleep(0.05)
    data_nodes.LorasmithSaveDataset.execute(latents, positive, ["seen"])
    assert data_nodes.LorasmithLoadDataset.fingerprint_inputs("seen") != first


def check_what_cannot_be_saved_is_refused() -> None:
    with refused("positive", "Path"):
        write(_datasets() / "odd.safetensors", [(torch.zeros(4, 8, 8), [torch.zeros(1, 6, 20), {"odd": Path()}])])
    assert not (_datasets() / "odd.safetensors").exists()


def check_names_that_lead_out_of_the_folder() -> None:
    latents, positive = [{"samples": torch.zeros(1, 4, 8, 8)}], [[_sample(0)[1]]]
    for name in OUTSIDE:
        with refused("name"):
            data_nodes.LorasmithSaveDataset.execute(latents, positive, [name])
        with refused("name"):
            data_nodes.LorasmithLoadDataset.execute(name)
        with refused("name"):
            data_nodes.LorasmithLoadDataset.fingerprint_inputs(name)
    for prefix in NAMES_THAT_LEAD_OUT:
        with refused("name"):
            nodes.LorasmithSaveLora.execute({"a.lora_up.weight": torch.zeros(1)}, prefix)
    with refused("name"):
        nodes.LorasmithLossGraph.execute({"loss": [1.0]}, "../x")


def check_names_that_links_lead_out_of_the_folder() -> None:
    link = _datasets() / "link"
    link.symlink_to("/tmp", target_is_directory=True)
    with refused("name"):
        data_nodes.LorasmithLoadDataset.execute("link/x")
    link.unlink()


class Bomb:
    """What a pickle would run."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path(folder_paths.get_output_directory(), "exploded"),)


def check_damaged_files_are_refused() -> None:
    good, bad = _datasets() / "good.safetensors", _datasets() / "bad.safetensors"
    write(good, [_sample(0)])
    content = good.read_bytes()
    damaged = {"cut": content[:-10], "cut in its head": content[:40], "empty": b"", "noise": bytes(range(256)) * 4}
    damaged["huge head"] = struct.pack("<Q", 2**40) + content[8:]
    for name, data in damaged.items():
        bad.write_bytes(data)
        with refused("bad.safetensors"):
            read(bad)
        assert name
    torch.save(Bomb(), bad)
    with refused("bad.safetensors"):
        read(bad)
    assert not Path(folder_paths.get_output_directory(), "exploded").exists()
    with refused("gone.safetensors"):
        read(_datasets() / "gone.safetensors")


def check_sound_files_of_others_are_refused() -> None:
    path = _datasets() / "other.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    with refused("other.safetensors"):
        read(path)
    sound = '[{"latent": {"tensor": "a"}, "positive": [{"tensor": "a"}, {"dict": {}}]}]'
    for said in ("{", "[1]", '[{"latent": 3}]', '{"a": 1}', "null", sound.replace('"a"', '"b"')):
        save_file({"a": torch.zeros(2)}, path, {"lorasmith.dataset": said})
        with refused("other.safetensors"):
            read(path)


def check_the_plot_of_any_losses() -> None:
    odd = ([], [0.5], [NAN], [NAN] * 5, [1.0, NAN, INF, -INF, 0.5], [0.0, 0.0, 0.0], [1e30, 1e-30], [-1.0, 2.0])
    for losses in odd:
        picture = loss_picture(losses)
        assert picture.mode == "RGB" and min(picture.size) > 100, losses


def check_the_plot_of_many_losses() -> None:
    began = time.perf_counter()
    picture = loss_picture([1 / (1 + number) for number in range(100_000)])
    assert min(picture.size) > 100 and time.perf_counter() - began < 20


def check_the_node_of_the_plot() -> None:
    for prefix in ("plots/mine", "plots/mine"):
        output = nodes.LorasmithLossGraph.execute({"loss": [1.0, 0.5]}, prefix)
        (pixels,) = output.args
        assert pixels.ndim == 4 and pixels.shape[-1] == 3 and 0 <= float(pixels.min()) and float(pixels.max()) <= 1
    files = sorted(Path(folder_paths.get_output_directory(), "plots").iterdir())
    assert [path.name for path in files] == ["mine_00001_.png", "mine_00002_.png"]
    with Image.open(files[0]) as image:
        assert torch.equal(tensor_of(image), pixels)


def check_the_node_that_saves_loras() -> None:
    lora = {
        "diffusion_model.a.lora_up.weight": torch.ones(2, 2),
        "diffusion_model.a.lora_down.weight": torch.ones(2, 2),
    }
    for steps, expected in ((12, "x_12_steps_00001_"), (12, "x_12_steps_00002_"), (None, "x_00001_")):
        (shown,) = nodes.LorasmithSaveLora.execute(lora, "loras/x", steps=steps).args
        path = Path(folder_paths.get_output_directory(), shown)
        assert path.stem == expected and path.parent.name == "loras", shown
        assert lora_file.read(path)[0].keys() == lora.keys()


def check_pictures_of_a_folder() -> None:
    """Sides are multiples of 64, captions come along, and a folder named N_name repeats its pictures."""
    folder = Path(folder_paths.get_input_directory(), "pictures", "2_cats")
    folder.mkdir(parents=True)
    for number, size in enumerate(((200, 100), (64, 64))):
        Image.new("RGB", size, (90 * number, 20, 30)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"caption {number}", encoding="utf-8")

    class Vae:
        def encode(self, image: torch.Tensor) -> torch.Tensor:
            assert image.shape[1] % 64 == 0 and image.shape[2] % 64 == 0 and image.shape[3] == 3
            return image.permute(0, 3, 1, 2)[:, :, ::8, ::8]

    class Clip:
        def tokenize(self, text: str) -> str:
            return text

        def encode_from_tokens_scheduled(self, tokens: str) -> list[Any]:
            return [[torch.zeros(1, 6, 20), {"said": tokens}]]

    latents, positive, images, captions = data_nodes.LorasmithDataset.execute("pictures", Vae(), Clip(), 128).args
    assert captions == ["caption 0", "caption 0", "caption 1", "caption 1"]
    assert [cond[0][1]["said"] for cond in positive] == captions
    assert images[0].shape[2] > images[0].shape[1] and images[2].shape[1] == images[2].shape[2]
    assert all(0 <= float(image.min()) and float(image.max()) <= 1 for image in images)
    assert len(latents) == 4 and "pictures" in data_nodes._subfolders()
    with refused("name"):
        data_nodes.LorasmithDataset.execute("../..", Vae(), Clip(), 128)


def check_buckets() -> None:
    sizes = [(8, 8), (8, 16), (8, 8)]
    latents = [{"samples": torch.full((1, 4, *size), float(number))} for number, size in enumerate(sizes)]
    positive = [[_sample(0)[1]] for _ in sizes]
    batches, conds = data_nodes.LorasmithBuckets.execute(latents, positive).args
    assert [tuple(batch["samples"].shape) for batch in batches] == [(2, 4, 8, 8), (1, 4, 8, 16)]
    assert [len(cond) for cond in conds] == [2, 1] and batches[0]["samples"][1, 0, 0, 0] == 2
    assert conds[0][1][1] is positive[2][0][1]
