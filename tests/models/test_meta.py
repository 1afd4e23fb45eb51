"""Denoisers of configs and heads alone: the same layers, names and sizes as those with weights, which are not read."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import TINY, made

from lorasmith.demo import BASE
from lorasmith.models.load import load_model
from lorasmith.models.meta import skeleton
from lorasmith.models.text_encoders import TextDenoiser
from lorasmith.types import Aliased


def check_same(found: Any, expected: Any) -> None:
    """Of every net, and nothing of a net that is there is in memory."""
    assert type(found) is type(expected) and found.nets.keys() == expected.nets.keys()
    for name, net in expected.nets.items():
        shapes = {key: tuple(parameter.shape) for key, parameter in net.named_parameters()}
        assert {key: tuple(p.shape) for key, p in found.nets[name].named_parameters()} == shapes
        assert all(parameter.is_meta for parameter in found.nets[name].parameters())
        for path, _ in net.named_modules():
            assert found.file_key(f"{name}.{path}") == expected.file_key(f"{name}.{path}")
    assert isinstance(found, Aliased) == isinstance(expected, Aliased)
    if isinstance(expected, Aliased):
        assert found.aliases() == expected.aliases()


def without_weights(folder: Path) -> Path:
    for file in folder.glob("*/*.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    return folder


@pytest.mark.parametrize("name", TINY)
def test_of_a_folder_whose_weights_are_cut_off(name: str, tmp_path: Path) -> None:
    made(name).save_pretrained(tmp_path)
    trained = ("StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline")
    expected = load_model(tmp_path, with_texts=name in trained).denoiser
    found, path = skeleton(without_weights(tmp_path), with_texts=True)
    assert path == tmp_path and isinstance(found, TextDenoiser) == (name in trained)
    check_same(found, expected)


@pytest.mark.parametrize("with_texts", [False, True])
def test_of_the_embedded_model(with_texts: bool) -> None:
    check_same(skeleton(BASE, with_texts=with_texts)[0], load_model(BASE, with_texts=with_texts).denoiser)


def test_what_makes_no_net_is_refused(tmp_path: Path) -> None:
    made("FluxPipeline").save_pretrained(tmp_path)
    config = tmp_path / "transformer" / "config.json"
    whole = config.read_text()
    config.write_text(json.dumps({**json.loads(whole), "num_layers": "many"}))
    with pytest.raises(ValueError, match="cannot make the FluxTransformer2DModel of .*transformer: "):
        skeleton(tmp_path, with_texts=False)
    config.unlink()
    with pytest.raises(ValueError, match="cannot read .*config.json"):
        skeleton(tmp_path, with_texts=False)
    config.write_text(whole)
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "transformer": ["os", "system"]}))
    with pytest.raises(ValueError, match="must be of a class of diffusers or transformers, got os.system"):
        skeleton(tmp_path, with_texts=False)
