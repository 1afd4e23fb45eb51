"""What --strip leaves: no secret in any spelling or nesting, and all that loading needs."""

import base64
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import example, given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

from lorasmith.demo import BASE
from lorasmith.formats import lora_file
from lorasmith.storage.safetensors_header import PEFT_CONFIG, Header
from lorasmith.tools.metadata import rewrite
from lorasmith.tools.shareable import FIELDS, HASHES, KEYS, harmless

NAMES = ("annabel", "kowalczyk", "müllerhaus", "o'haraigh", "李小龙")
SPELLINGS = (
    "{0}", "C:\\Users\\{0}\\pics", "D:/loras/{0}.safetensors", "\\\\nas\\share\\{0}", "//nas/share/{0}", "/home/{0}/x",
    "/Volumes/photos/{0}", "~/{0}", "~{0}/pics", "../{0}", "./{0}/a.png", "{0}/train", "file:///C:/{0}",
    "https://x.org/{0}?q=1", "smb://nas/{0}", "{0}@mail.example.org", "mailto:{0}@x.de", "a photo of {0}, smiling",
    "$HOME/{0}", "%USERPROFILE%\\{0}", "networks.{0}", "flux/{0}/base", "1e-4 {0}",
    "torch.optim.AdamW(weight_decay=0.1, name={0})",
)  # fmt: skip
ENCODINGS = (
    str, str.upper, str.title, quote, lambda text: quote(quote(text)), lambda text: text.replace("\\", "\\\\"),
    lambda text: base64.b64encode(text.encode()).decode(), lambda text: text.encode().hex(), json.dumps,
    lambda text: json.dumps(json.dumps(text)), repr,
)  # fmt: skip
SECRETS = [encoded(spelling.format(name)) for name in NAMES for spelling in SPELLINGS for encoded in ENCODINGS]
LAYERS = [f"unet.down_blocks.0.attn1.to_{kind}.lora_{factor}.weight" for kind in "qkv" for factor in "AB"]
KNOWN = sorted(KEYS | HASHES | {PEFT_CONFIG, "prompt", "ot_config", "caption"})
INNER = [*sorted(FIELDS), "to_q", "unet.r", "unet.alpha_pattern", "down_blocks.0"]


def one_of(texts: list[str]) -> st.SearchStrategy[str]:
    """As sampled_from, without all of them in every message."""
    return st.integers(0, len(texts) - 1).map(texts.__getitem__)


secrets = one_of(SECRETS)
keys = st.one_of(one_of(INNER), secrets)
nested = st.recursive(
    st.one_of(secrets, st.integers(), st.none()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=3), inner.map(json.dumps)
    ),
    max_leaves=8,
)
values = st.one_of(secrets, nested.map(json.dumps), st.dictionaries(keys, nested, min_size=1).map(json.dumps))


def forms(name: str) -> set[str]:
    """A name as it stands in texts that were encoded: in base64 by the place where it begins, but for its ends."""
    data = name.encode()
    shifted = (base64.b64encode(b"-" * shift + data).decode()[4 if shift else 0 :] for shift in range(3))
    ascii_only = json.dumps(name)[1:-1]
    return {name, quote(name).lower(), data.hex(), ascii_only, *(text.rstrip("=")[:-1].lower() for text in shifted)}


@example({"modelspec.hash_sha256": "networks.müllerhaus".encode().hex()})
@given(st.dictionaries(st.one_of(one_of(KNOWN), secrets), values, min_size=1, max_size=4))
def test_no_secret_survives_in_any_spelling_or_nesting(metadata: dict[str, str]) -> None:
    try:
        kept = harmless(metadata, LAYERS)
    except ValueError:
        assert PEFT_CONFIG in metadata  # which scales the LoRA, so that it is refused rather than left out
        return
    text = json.dumps(kept, ensure_ascii=False).lower()
    found = [form for name in NAMES for form in forms(name) if form in text]
    assert not found and "//" not in text and "@" not in text
    assert harmless(kept, LAYERS) == kept


PRIVATE = {
    "ss_sd_model_name": "D:/models/anna.safetensors", "volume": "/Volumes/anna", "sample_prompts": "anna at home",
    "ot_config": '{"workspace_dir": "E:/OneTrainer/anna", "concepts": [{"path": "E:/pics/anna"}]}', "email": "a@b.org",
    "caption": "a photo of anna", "train_data_dir": "../anna", "ss_tag_frequency": '{"10_anna": {"anna": 3}}',
    "ss_dataset_dirs": '{"10_anna": {"n_repeats": 10}}', "modelspec.title": "anna", "modelspec.author": "anna",
    "modelspec.implementation": "https://github.com/Stability-AI/generative-models", "ss_output_name": "anna",
    "modelspec.trigger_phrase": "anna", "ss_session_id": "1234", "ss_training_started_at": "1700000000.0",
    "ss_base_model_version": "anna_v1", "ss_network_module": "anna.lora", "lorasmith.base_hash": "anna",
    "ss_seed": "anna",    "modelspec.hash_sha256": "0xanna", "ss_sd_model_hash": "d34db33f00", "format": "C:/base",
}  # fmt: skip
PUBLIC = {
    "ss_network_dim": "8", "ss_network_alpha": "4.0", "ss_network_module": "networks.lora_flux", "ss_v2": "False",
    "ss_learning_rate": "1e-4", "ss_text_encoder_lr": "[1e-4, 5e-05]", "ss_unet_lr": "None",
    "ss_seed": "18446744073709551615", "ss_resolution": "(512, 512)", "ss_lr_scheduler": "cosine",
    "ss_optimizer": "bitsandbytes.optim.adamw.AdamW8bit(weight_decay=0.1,betas=(0.9, 0.99))",
    "ss_base_model_version": "sdxl_base_v1-0", "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
    "modelspec.implementation": "diffusers", "modelspec.resolution": "1024x1024",
    "modelspec.prediction_type": "epsilon", "modelspec.sai_model_spec": "1.0.1", "sshs_legacy_hash": "d34db33f",
    "lorasmith.base_hash": "9f" * 32, "lorasmith.version": "0.1.0", "lorasmith.steps": "7",
    "lorasmith.dora_scale": "ComfyUI", "lorasmith.net": "transformer_2", "lorasmith.expert": "low_noise",
    "lorasmith.algorithm": "LoRA+OFT", "format": "pt",
    "ss_network_args": '{"conv_dim": "4", "algo": "lokr", "factor": "-1", "dora_wd": "True", "preset": "attn-mlp"}',
}  # fmt: skip


def test_what_is_left_out_and_what_stays() -> None:
    assert harmless(PRIVATE) == {}
    assert harmless(PUBLIC) == PUBLIC


@pytest.mark.parametrize(
    ("architecture", "version"),
    [
        ("stable-diffusion-v1", "sd_v1"), ("stable-diffusion-3-5-medium", "sd3"), ("flux-1-schnell", "flux1"),
        ("Flux.2-klein", "flux2"), ("Qwen-Image", "qwen_image"), ("lumina-2", "lumina2"), ("wan2.2", "wan2.2"),
        ("Z-Image", "zimage"), ("chroma", "chroma"),
    ],
)  # fmt: skip
def test_every_family_s_names_stay(architecture: str, version: str) -> None:
    metadata = {"modelspec.architecture": f"{architecture}/lora", "ss_base_model_version": version}
    assert harmless(metadata) == metadata


def test_json_keeps_what_is_known_of_it() -> None:
    args = {"conv_dim": 4, "preset": "/home/anna/preset.toml", "anna": 1, "algo": "loha", "factor": "anna"}
    twice = '{"conv_dim": "anna", "conv_dim": 4}'
    assert harmless({"ss_network_args": json.dumps(args)}) == {"ss_network_args": '{"conv_dim": 4, "algo": "loha"}'}
    assert harmless({"ss_network_args": twice}) == {"ss_network_args": '{"conv_dim": 4}'}
    assert harmless({"ss_network_args": '{"anna": 1}'}) == harmless({"ss_network_args": "{anna"}) == {}
    assert harmless({"ss_network_args": '{"factor": ' * 2000 + "1" + "}" * 2000}) == {}


@pytest.mark.parametrize(
    "text",
    [
        "192.168.0.12", "192.168.1.1:8080", "2001:470:1234::1", "::1:8080", "12:33", "2024-05-01",
        "2024-05-01 12:33:20", "+49 170 1234567", "0170/1234567", "1700000000", "4111111111111111", "d:lora", "C:",
        "c:lora/full", "(+49 170)",
    ],
)  # fmt: skip
def test_numbers_and_known_words_may_tell_who_where_and_when(text: str) -> None:
    plain = {key: text for key in KEYS - {"ss_seed"}}
    assert harmless(plain) == {}
    assert harmless({key: json.dumps({"preset": text, "r": [text]}) for key in KEYS}) == (
        dict.fromkeys(KEYS, '{"r": []}')
    )


@pytest.mark.parametrize("text", ["1e-4", "1e+4", "0.00010000000000000002", "-1", "1024x1024", "[0.9, 0.999]", "v1.5"])
def test_numbers_of_training_stay(text: str) -> None:
    assert harmless({"ss_learning_rate": text}) == {"ss_learning_rate": text}


@pytest.mark.parametrize("pattern", ["to_[qk]", r"down_blocks\.\d+\.attn1\.to_q", "^(.*attn1.*|to_v)$", "attn1.to_k"])
def test_patterns_over_layers_stay(pattern: str) -> None:
    config = {"unet.r": 4, "unet.alpha_pattern": {pattern: 2}, "unet.base_model_name_or_path": "anna/model"}
    kept = json.loads(harmless({PEFT_CONFIG: json.dumps(config)}, LAYERS)[PEFT_CONFIG])
    assert kept == {"unet.r": 4, "unet.alpha_pattern": {pattern: 2}}


@pytest.mark.parametrize("value", ['{"unet.alpha_pattern": {"[anna]": 2}}', '{"unet.r": "anna"}', "[1]", "{anna"])
def test_a_scale_is_not_lost(value: str) -> None:
    with pytest.raises(ValueError, match=f"^{PEFT_CONFIG}.* must be .*, as it scales the LoRA"):
        harmless({PEFT_CONFIG: value}, LAYERS)


def test_diffusers_and_lorasmith_load_the_same_afterwards(tmp_path: Path) -> None:
    config = LoraConfig(
        r=4, lora_alpha=2, target_modules=["to_q", "to_k"], alpha_pattern={"attn1.to_k": 8},
        rank_pattern={"attn1.to_k": 2}, use_rslora=True,
    )  # fmt: skip
    pipe: Any = StableDiffusionPipeline.from_pretrained(BASE, dtype=torch.float32)
    pipe.unet.add_adapter(config)
    pipe.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(pipe.unet),
        unet_lora_adapter_metadata={**config.to_dict(), "base_model_name_or_path": "/home/anna/sd"},
    )
    before, after = tmp_path / "pytorch_lora_weights.safetensors", tmp_path / "b.safetensors"
    written = rewrite(before, after, changes={}, strip=True)
    assert "anna" in Header.of(before).metadata[PEFT_CONFIG] and "anna" not in after.read_bytes().decode(
        errors="ignore"
    )
    assert written.reduced == [PEFT_CONFIG] and written.left_out == []

    def loaded(path: Path) -> dict[str, Any]:
        pipe.unload_lora_weights()
        pipe.load_lora_weights(str(path))
        return {n: m.scaling for n, m in pipe.unet.named_modules() if n.endswith(("to_q", "to_k"))}

    scales = loaded(before)
    assert loaded(after) == scales and len({value for scale in scales.values() for value in scale.values()}) == 2
    own, stripped = (lora_file.read(path)[0] for path in (before, after))
    assert own.keys() == stripped.keys() and all(torch.equal(own[key], stripped[key]) for key in own)


def test_the_limit_of_oft_stays(tmp_path: Path) -> None:
    config = {"adapter": {"name": "OFT", "alpha": 0.5, "rank": 4}, "data": {"folder": "anna"}, "model": "anna"}
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors", {"lorasmith.config": json.dumps(config)})
    rewrite(tmp_path / "a.safetensors", tmp_path / "b.safetensors", changes={}, strip=True)
    metadata = Header.of(tmp_path / "b.safetensors").metadata
    assert lora_file.stated_settings(metadata) == config["adapter"] and "anna" not in json.dumps(metadata)
