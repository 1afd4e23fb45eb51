"""The embedded model and pictures: small, safe, complete; training and measuring never meet."""

from pathlib import Path

import pytest
from PIL import Image

from lorasmith.config.values import configured
from lorasmith.data.folder import examples
from lorasmith.demo import BASE, CONCEPTS, FOLDER, PROMPTS, demo_settings


def test_it_is_small_and_holds_no_pickles() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert sum(path.stat().st_size for path in files) < 30e6
    assert {path.suffix for path in files} <= {".py", ".md", ".json", ".safetensors", ".png", ".txt"}
    assert len(list(BASE.rglob("*.safetensors"))) == 3


@pytest.mark.parametrize("concept", CONCEPTS)
def test_training_and_held_out_pictures_are_apart(concept: str) -> None:
    config = configured(demo_settings(concept))
    assert config.data.folder and config.data.held_out and config.data.drift
    trained, held_out, drift = (examples(f) for f in (config.data.folder, config.data.held_out, config.data.drift))
    assert (len(trained), len(held_out), len(drift)) == (32, 128, 128)
    assert not {e.caption for e in trained} & {e.caption for e in held_out}
    assert not {Path(e.image_path).read_bytes() for e in trained} & {e.image_path.read_bytes() for e in held_out}
    assert {e.image_path.stem: e.caption for e in held_out} == {e.image_path.stem: e.caption for e in drift}
    assert not set(PROMPTS) & {e.caption for e in trained}
    for example in (*trained, *held_out, *drift):
        with Image.open(example.image_path) as image:
            assert image.size == (64, 64) and example.caption


def test_an_unknown_concept_is_named() -> None:
    with pytest.raises(ValueError, match="concept must be one of line_drawing, flat, got 'cubism'"):
        demo_settings("cubism")


def test_origins_and_licences_are_stated() -> None:
    root = Path(__file__).parents[2]
    for path in (root / "NOTICE", root / "README.md", FOLDER / "pictures" / "README.md"):
        text = path.read_text(encoding="utf-8")
        for words in ("Noto Emoji", "Apache-2.0", "OpenMoji", "CC BY-SA 4.0", "Twemoji", "CC BY 4.0"):
            assert words in text.replace("\n", " "), (path, words)
