"""Hub ids: caches laid out by hand, and a small hub on this machine, both through the real huggingface_hub."""

import json
import logging
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from hearing import Heard
from huggingface_hub import constants
from tiny import made
from torch import Tensor

from lorasmith.api import train_lora
from lorasmith.demo import BASE
from lorasmith.models.load import bytes_to_load, load_model, located
from lorasmith.models.sources.hub import needed
from lorasmith.models.sources.kind import is_id, refuse_unfit_source
from lorasmith.reporting import progress

CPU = torch.device("cpu")
NAME = "somebody/emoji-base"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; the library reads the environment once, when it is imported, so its constants are set."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def in_cache(cache: Path) -> Path:
    """The embedded model as the hub's cache holds it; returns the snapshot."""
    repository = cache / f"models--{NAME.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    return Path(shutil.copytree(BASE, repository / "snapshots" / COMMIT))


@dataclass
class Hub:
    """A server that answers as the hub does for one repository."""

    files: dict[str, bytes] = field(default_factory=dict)
    error: tuple[int, str] | None = None  # status and X-Error-Code
    closed: bool = False  # the files are, their list is not
    sent: list[str] = field(default_factory=list)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            body, headers, status = b"", {"Content-Type": "application/json"}, 200
            name = path.partition(f"/resolve/{COMMIT}/")[2]
            if hub.error or (name and hub.closed):
                status, code = hub.error or (403, "GatedRepo")
                headers["X-Error-Code"] = code
            elif name:
                body = hub.files[name]
                headers |= {"ETag": f'"{name.replace("/", "-")}"', "X-Repo-Commit": COMMIT}
                hub.sent += [name] if self.command == "GET" else []
            elif "/tree/" in path:
                entries = [{"type": "file", "path": n, "size": len(b), "oid": n} for n, b in hub.files.items()]
                body = json.dumps(entries).encode()
            else:
                siblings = [{"rfilename": name, "size": len(content)} for name, content in hub.files.items()]
                body = json.dumps({"id": NAME, "sha": COMMIT, "siblings": siblings, "tags": []}).encode()
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield hub
    server.shutdown()
    server.server_close()


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_an_id_is_opened_from_the_cache_when_offline(cache: Path, latents: Tensor, texts: Tensor) -> None:
    in_cache(cache)
    pipe, lora, _, _ = train_lora(NAME, latents, list(texts), steps=1)
    assert isinstance(pipe, StableDiffusionPipeline)
    assert lora.keys() == train_lora(BASE, latents, list(texts), steps=1).lora.keys()


def test_what_is_nowhere_is_named_with_the_reason(cache: Path) -> None:
    message = "emoji-base must be .*its cache does not hold it, and HF_HUB_OFFLINE=1 forbids .*, got no such folder"
    with pytest.raises(ValueError, match=message) as raised:
        load_model(NAME)
    assert "\n" not in str(raised.value)
    snapshot = in_cache(cache)
    next((snapshot / "vae").glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match=message):
        load_model(NAME)


@pytest.mark.parametrize("name", ["./no/such", "./such", "~/such", "../no/such", "/no/such", "no-such", "a/b/c"])
def test_a_mistyped_folder_is_no_id(name: str) -> None:
    assert not is_id(name)
    with pytest.raises(ValueError, match="must be a diffusers folder with a model_index.json, got no such folder"):
        load_model(name)


def test_a_path_object_is_no_id(cache: Path) -> None:
    in_cache(cache)
    with pytest.raises(ValueError, match="got no such folder"):
        load_model(Path(NAME))


def test_a_folder_goes_before_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / NAME).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="got a folder without it"):
        load_model(NAME)


def test_only_what_is_loaded_is_fetched_and_only_once(hub: Hub, cache: Path, tmp_path: Path) -> None:
    others = ("README.md", "v1-5-pruned.ckpt", "model.safetensors", "safety_checker/model.safetensors")
    duplicates = ("unet/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.bin")
    own = files_of(BASE)
    del own["README.md"]
    hub.files = {**own, **dict.fromkeys((*others, *duplicates), b"x")}
    load_model(NAME).codec(CPU)
    assert sorted(hub.sent) == sorted(own)
    load_model(NAME)
    assert len(hub.sent) == len(own)


def test_fetching_tells_how_many_bytes_are_there(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "MEGABYTE", 1)
    hub.files, heard = files_of(BASE), Heard()
    hub.files.pop("README.md")
    folder, _ = located(NAME, None, heard)
    (what, total, unit), *counts, end = heard.reports
    left = sum(len(content) for name, content in hub.files.items() if name != "model_index.json")  # which came first
    assert (what, total, unit, end) == ("fetching the model", left, "MB", "done")
    assert sum(counts) == left and len(counts) > 5
    assert capfd.readouterr().err == ""  # no bars of the library's
    again = Heard()
    assert located(NAME, None, again) == (folder, None) and again.reports == []
    assert bytes_to_load(folder, None) > 4e6


def test_checks_fetch_what_says_of_which_kind_a_model_is(hub: Hub) -> None:
    hub.files = files_of(BASE)
    refuse_unfit_source(NAME, None)
    assert "model_index.json" in hub.sent and not any(name.endswith(".safetensors") for name in hub.sent)
    hub.files = {"flux1-dev.safetensors": b"x"}
    with pytest.raises(ValueError, match="^other/files must be a diffusers pipeline, but its repository has no "):
        refuse_unfit_source("other/files", None)
    hub.error = (401, "RepoNotFound")
    (weights,) = (BASE / "unet").glob("*.safetensors")
    for source in (("no/where", None), (str(weights), "no/where")):
        with pytest.raises(ValueError, match="^no/where must be .* the hub has no such model"):
            refuse_unfit_source(*source)


def test_variants_are_fetched_where_there_is_nothing_else(hub: Hub, tmp_path: Path) -> None:
    model = Path(shutil.copytree(BASE, tmp_path / "model"))
    for part in ("unet", "vae", "text_encoder"):
        weights = next((model / part).glob("*.safetensors"))
        weights.rename(weights.with_suffix(".fp16.safetensors"))
    hub.files = files_of(model)
    family = load_model(NAME)
    assert {name for name in hub.sent if name.endswith("safetensors")} == {
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/model.fp16.safetensors",
    }
    family.codec(CPU)
    assert family.pipeline(family.denoiser).vae.dtype == next(family.denoiser.nets["unet"].parameters()).dtype


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ((401, "RepoNotFound"), "the hub has no such model, or a private one: then set HF_TOKEN"),
        ((403, "GatedRepo"), "accept them on its page and set HF_TOKEN"),
        ((500, ""), "it cannot be fetched: .*500"),
    ],
)
def test_the_hubs_refusals_are_explained(
    hub: Hub, cache: Path, error: tuple[int, str], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    hub.error = error
    with pytest.raises(ValueError, match=f"its cache does not hold it, and .*{reason}"):
        load_model(NAME)
    in_cache(cache)
    with caplog.at_level(logging.WARNING, "lorasmith"):
        load_model(NAME)
    assert "the copy of somebody/emoji-base in the hub's cache is taken: " in caplog.text


def test_a_gated_model_whose_files_are_listed(hub: Hub) -> None:
    hub.files, hub.closed = files_of(BASE), True
    with pytest.raises(ValueError, match="accept them on its page and set HF_TOKEN"):
        load_model(NAME)


def test_no_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(
        ValueError, match="its cache does not hold it, and it cannot be fetched: .*, got no such folder"
    ):
        load_model(NAME)


def test_which_files_are_needed() -> None:
    stem = "unet/diffusion_pytorch_model"
    shards = [f"{stem}-0000{n}-of-00002.safetensors" for n in (1, 2)]
    small = ["model_index.json", "unet/config.json", f"{stem}.safetensors.index.json", "tokenizer/merges.txt"]
    left = [f"{stem}.fp16.safetensors", f"{stem}.bin", "unet/old/config.json", "tokenizer/x.bin", "notes.txt"]
    assert sorted(needed(small + shards + left)) == sorted(small + shards)


def test_every_family_s_files_are_needed() -> None:
    """Tokenizers of all kinds, several text encoders and transformers, shards; no part that is not asked for."""
    parts = ("transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3", "vae")
    small = [f"{part}/config.json" for part in parts] + ["model_index.json", "scheduler/scheduler_config.json"]
    small += ["tokenizer/merges.txt", "tokenizer_2/spiece.model", "tokenizer_3/tokenizer.json"]
    small += ["tokenizer/chat_template.jinja"]
    weights = [f"{part}/diffusion_pytorch_model.safetensors" for part in ("transformer", "transformer_2", "vae")]
    weights += [f"text_encoder{n}/model-00001-of-00002.safetensors" for n in ("", "_2", "_3")]
    left = ["flux1-dev.safetensors", "ae.safetensors", "image_encoder/model.safetensors", "text_encoder/model.fp16.bin"]
    assert sorted(needed(small + weights + left)) == sorted(small + weights)
    rest = [name for name in weights if not name.startswith("transformer/")]
    assert sorted(needed(small + weights + left, parts[1:])) == sorted(small + rest)


def saved_flux(folder: Path) -> Path:
    made("FluxPipeline").save_pretrained(folder)
    return folder


def test_a_model_of_another_family_is_fetched_by_its_index(hub: Hub, tmp_path: Path) -> None:
    own = files_of(saved_flux(tmp_path / "flux"))
    others = ("flux1.safetensors", "unet/diffusion_pytorch_model.safetensors", "text_encoder_3/model.safetensors")
    hub.files = {**own, **dict.fromkeys(others, b"x")}
    load_model(NAME).codec(CPU)
    assert sorted(hub.sent) == sorted(own)


def test_encoders_are_fetched_without_the_denoiser(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved_flux(tmp_path / "flux")
    hub.files = files_of(folder)
    (weights,) = (folder / "transformer").glob("*.safetensors")
    family = load_model(weights, NAME)
    family.codec(CPU)
    assert sorted(hub.sent) == sorted(name for name in hub.files if name != f"transformer/{weights.name}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert type(load_model(weights, NAME)) is type(family)
    with pytest.raises(ValueError, match="its cache does not hold it"):
        load_model(NAME)
