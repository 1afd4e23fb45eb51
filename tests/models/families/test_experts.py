"""Experts: a LoRA file for each, which diffusers reads into its transformer; merged, converted and trained on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from commands import lorasmith
from commands import made as pictures
from tiny import made
from torch import Tensor

from lorasmith.adapters.adapter_set import AdapterSet
from lorasmith.adapters.algorithms import Algorithm, DoRA, LoHa, LoRA
from lorasmith.adapters.hooks import attached
from lorasmith.adapters.targets import Targets
from lorasmith.config.schema import Config
from lorasmith.data.dataset import Dataset
from lorasmith.formats import lora_file
from lorasmith.formats.experts import EXPERT, NET, experts
from lorasmith.formats.read import adapters_from
from lorasmith.formats.write import in_layout
from lorasmith.models.load import load_model
from lorasmith.tools.convert import convert
from lorasmith.tools.merge import Source
from lorasmith.tools.merge_into_model import merge_into
from lorasmith.training.job import Job
from lorasmith.types import Cached, Denoiser, LayoutName

CPU = torch.device("cpu")
NETS = {"high_noise": "transformer", "low_noise": "transformer_2"}
TIMES = {"high_noise": 0.9, "low_noise": 0.3}


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def job_of(
    denoiser: Denoiser, *, algorithm: Algorithm | None = None, layout: LayoutName | None = None, **values: Any
) -> Job:
    """A job whose adapters are as after training, in float32."""
    sample = Cached("one", numbers(16, 1, 6, 4), {"text": numbers(5, 16)})
    config = Config(
        steps=1, adapter=algorithm or LoRA(rank=2, alpha=3.0), file_layout=layout, training_dtype="fp32",
        lora_dtype="fp32", pack="none", **values,
    )  # fmt: skip
    job = Job.of(denoiser, Dataset.of([sample], [1], seed=0, group_size=1), config, device=CPU)
    generator = torch.Generator().manual_seed(0)
    for parameter in job.adapters.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return job


def written(job: Job, folder: Path) -> dict[str, Path]:
    """{expert: its file}."""
    found = {}
    for expert, lora, metadata in job.loras_of_experts():
        found[expert.name] = folder / f"{expert.name}.safetensors"
        lora_file.write(found[expert.name], lora, metadata)
    return found


@torch.no_grad()
def predictions(denoiser: Denoiser) -> dict[str, Tensor]:
    """{expert: what the model predicts at a time of its}."""
    x_t, cond = numbers(1, 16, 1, 6, 4), {"text": numbers(1, 5, 16)}
    return {name: denoiser.predict(x_t, torch.tensor([time]), cond) for name, time in TIMES.items()}


def with_adapters(denoiser: Denoiser, adapters: AdapterSet) -> dict[str, Tensor]:
    with attached(denoiser, adapters):
        return predictions(denoiser)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    """Equal but for rounding, where what training changed is far more than that."""
    for name, tensor in expected.items():
        change = float((tensor - before[name]).abs().max())
        assert change > 1e-3 and float((found[name] - tensor).abs().max()) < 1e-3 * change, name


@pytest.mark.parametrize(
    ("algorithm", "layout"),
    [(None, None), (None, "diffusers"), (None, "kohya"), (DoRA(rank=2, alpha=3.0), None)],
    ids=["best", "diffusers", "kohya", "DoRA"],
)
def test_diffusers_loads_each_file_into_its_transformer(
    algorithm: Algorithm | None, layout: LayoutName | None, tmp_path: Path
) -> None:
    denoiser = load_model(made("Wan 2.2")).denoiser
    job = job_of(denoiser, algorithm=algorithm, layout=layout)
    written(job, tmp_path)
    pipe = made("Wan 2.2")
    pipe.load_lora_weights(tmp_path, weight_name="high_noise.safetensors")
    pipe.load_lora_weights(tmp_path, weight_name="low_noise.safetensors", load_into_transformer_2=True)
    assert_same(predictions(load_model(pipe).denoiser), with_adapters(denoiser, job.adapters), predictions(denoiser))


def test_files_have_plain_names_and_say_whose_they_are() -> None:
    """The names of ComfyUI's key map, which tests/comfyui and file_table prove of Wan's layout."""
    denoiser = load_model(made("Wan 2.2")).denoiser
    job = job_of(denoiser)
    assert {key.split(".")[0] for key in job.lora()} == set(NETS.values())
    assert not job.file_metadata().keys() & {EXPERT, NET, "lorasmith.file_layout"}
    wan = load_model(made("Wan 2.1")).denoiser
    plain = in_layout(AdapterSet.new(wan, LoRA(rank=2), Targets(), 0), wan, torch.float32, "comfyui").keys()
    found = {expert.name: (lora, metadata) for expert, lora, metadata in job.loras_of_experts()}
    assert found.keys() == NETS.keys()
    for name, (lora, metadata) in found.items():
        assert lora.keys() == plain and all(key.startswith("diffusion_model.blocks.0.") for key in lora)
        assert (metadata[EXPERT], metadata[NET]) == (name, NETS[name])
        assert metadata["lorasmith.file_layout"] == "comfyui" and metadata["lorasmith.algorithm"] == "LoRA"
    layer = "blocks.0.self_attn.q.lora_up.weight"
    ups = [found[name][0][f"diffusion_model.{layer}"] for name in NETS]
    own = [job.lora()[f"{net}.blocks.0.attn1.to_q.lora_up.weight"] for net in NETS.values()]
    assert all(torch.equal(a, b) for a, b in zip(ups, own, strict=True)) and not torch.equal(*ups)


def test_an_expert_without_adapters_has_no_file() -> None:
    denoiser = load_model(made("Wan 2.2")).denoiser
    job = job_of(denoiser, targets=Targets(exclude=(r"^transformer\.",)))
    assert [expert.name for expert in job.trained_experts] == ["low_noise"]
    assert experts(load_model(made("Wan 2.1")).denoiser) == []
    assert list(job_of(load_model(made("Wan 2.1")).denoiser).loras_of_experts()) == []


@pytest.mark.parametrize("algorithm", [LoRA(rank=2), LoHa(rank=2), DoRA(rank=2)], ids=lambda a: a.name)
@pytest.mark.parametrize("layout", ["kohya", "comfyui", "lycoris"])
def test_what_reads_a_file_finds_its_expert(algorithm: Algorithm, layout: LayoutName, tmp_path: Path) -> None:
    """existing_lora, in training and drawing, and ComfyUI's lengths of DoRA by the expert's own weights."""
    denoiser = load_model(made("Wan 2.2")).denoiser
    job = job_of(denoiser, algorithm=algorithm, layout=layout)
    for name, path in written(job, tmp_path).items():
        again = adapters_from(*lora_file.read(path)[:1], denoiser, lora_file.read(path)[1])
        own = job.adapters.moved({NETS[name]: NETS[name]})
        assert again.adapters.keys() == own.adapters.keys()
        expected = own.file_state(denoiser, torch.float32)
        for key, tensor in again.file_state(denoiser, torch.float32).items():
            torch.testing.assert_close(tensor, expected[key], rtol=1e-5, atol=1e-6)
    path = tmp_path / "whole.safetensors"
    lora_file.write(path, job.lora(), job.file_metadata())
    assert Job.of(
        denoiser, job.dataset, job.config.model_copy(update={"existing_lora": path}), device=CPU
    ).adapters.adapters.keys() == job.adapters.adapters.keys()  # fmt: skip


def test_training_goes_on_from_the_file_of_one_expert(tmp_path: Path) -> None:
    denoiser = load_model(made("Wan 2.2")).denoiser
    paths = written(job_of(denoiser, layout="diffusers"), tmp_path)
    job = job_of(denoiser, existing_lora=paths["low_noise"])
    assert job.adapters.nets == {"transformer_2"}
    assert [expert.name for expert in job.trained_experts] == ["low_noise"]


@pytest.mark.parametrize("layout", [None, "diffusers", "lycoris"])
def test_files_are_merged_into_their_transformers(layout: LayoutName | None, tmp_path: Path) -> None:
    made("Wan 2.2").save_pretrained(tmp_path / "base")
    denoiser = load_model(tmp_path / "base").denoiser
    job = job_of(denoiser, layout=layout)
    sources = [Source.parsed(str(path)) for path in written(job, tmp_path).values()]
    assert merge_into(tmp_path / "base", sources, tmp_path / "merged") == len(job.adapters.adapters)
    found = predictions(load_model(tmp_path / "merged").denoiser)
    assert_same(found, with_adapters(denoiser, job.adapters), predictions(denoiser))


def test_files_are_converted(tmp_path: Path) -> None:
    """There and back; a file that does not say whose it is has the names of the first expert's, which are both's."""
    base, there, back, unsaid = (tmp_path / name for name in ("base", *(f"{n}.safetensors" for n in "abc")))
    made("Wan 2.2").save_pretrained(base)
    job = job_of(load_model(base).denoiser, algorithm=LoRA(rank=2))
    names = {
        f"transformer.{path.partition('.')[2]}.lora_{side}.weight" for path in job.adapters.adapters for side in "AB"
    }
    for name, path in written(job, tmp_path).items():
        convert(path, there, base, "diffusers", overwrite=True)
        convert(there, back, base, "comfyui", overwrite=True)
        (first, metadata), (last, kept) = lora_file.read(path), lora_file.read(back)
        assert kept[EXPERT] == name and kept["lorasmith.file_layout"] == metadata["lorasmith.file_layout"]
        assert last.keys() == first.keys() and all(torch.equal(last[key], first[key]) for key in first)
        lora_file.write(unsaid, first, {})
        convert(unsaid, back, base, "diffusers", overwrite=True)
        state, same = lora_file.read(there)[0], lora_file.read(back)[0]
        assert state.keys() == same.keys() == names and all(torch.equal(same[key], state[key]) for key in state)
    lora_file.write(unsaid, job.lora(), job.file_metadata())
    with pytest.raises(
        ValueError, match="^file_layout comfyui: its names are of one net, got .* transformer and transf"
    ):
        convert(unsaid, back, base, "comfyui", overwrite=True)


@pytest.mark.slow
@pytest.mark.parametrize("metadata", [{}, *({EXPERT: name, NET: net} for name, net in NETS.items())])
def test_a_file_is_converted_for_the_published_model_too(metadata: dict[str, str], tmp_path: Path) -> None:
    """As one for Wan 2.1's 14B, which has the same layers."""
    state = {"lora_down.weight": numbers(1, 5120), "lora_up.weight": numbers(5120, 1), "alpha": torch.tensor(1.0)}
    file = {f"diffusion_model.blocks.0.self_attn.q.{part}": tensor for part, tensor in state.items()}
    lora_file.write(tmp_path / "a.safetensors", file, metadata)
    assert convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", None, "diffusers") == 1
    converted, said = lora_file.read(tmp_path / "b.safetensors")
    assert converted.keys() == {f"transformer.blocks.0.attn1.to_q.lora_{side}.weight" for side in "AB"}
    assert metadata.items() <= said.items()


def test_a_run_writes_and_tells_them(tmp_path: Path) -> None:
    made("Wan 2.2").save_pretrained(tmp_path / "base")
    pictures(tmp_path / "cats", "a cat", "a black cat")
    settings = {"data.resolution": 32, "steps": 2, "sampling.prompts": "[]", "adapter.rank": 2}
    options = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    ended = lorasmith(tmp_path, "train", "cats", "--model", "base", "--device", "cpu", *options)
    assert ended.code == 0, ended.err
    folder = tmp_path / "runs" / "cats"
    names = ["lora_high_noise.safetensors", "lora_low_noise.safetensors"]
    assert sorted(path.name for path in folder.glob("*.safetensors")) == ["lora.safetensors", *names]
    for name in names:
        assert f"its part for one expert: {Path('runs', 'cats', name)}\n" in ended.out
        assert name in (folder / "report.html").read_text("utf-8")
        metadata = lora_file.read(folder / name)[1]
        assert f"lora_{metadata[EXPERT]}.safetensors" == name and metadata["modelspec.title"] == "cats"
    assert "files of experts\tlora_high_noise.safetensors, lora_low_noise.safetensors" in ended.out
