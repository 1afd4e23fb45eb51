"""CLIP's tokenizer from its published list of merges (Radford et al. 2021), for checkpoints that hold none."""

import gzip
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer

MERGES = Path(__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
NUM_WORDS = 49408  # 256 bytes, alone and at the end of a word, the merges, and two marks
START, END = "<|startoftext|>", "<|endoftext|>"


def clip_tokenizer(pad: str = END, length: int = 77) -> CLIPTokenizer:
    """The tokenizer that Stable Diffusion was trained with.

    pad: the token that fills up short captions: END in SD 1, "!" (number 0) in SD 2. length: tokens that a text
    encoder reads.
    """
    with gzip.open(MERGES, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")
    merges: Any = [(first, second) for first, second in map(str.split, lines[1 : NUM_WORDS - 2 * 256 - 2 + 1])]
    letters = _letters()
    words = [*letters, *(f"{letter}</w>" for letter in letters), *(a + b for a, b in merges), START, END]
    tokenizer = CLIPTokenizer(
        vocab={word: number for number, word in enumerate(words)}, merges=merges, model_max_length=length
    )
    tokenizer.pad_token = pad
    return tokenizer


def _letters() -> list[str]:
    """A printable letter for each of the 256 bytes; those that are printable stand for themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(code) for code in (*printable, *range(256, 256 + 256 - len(printable)))]
