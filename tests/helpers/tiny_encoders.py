"""Tiny text encoders with random weights, and tokenizers of letters, from transformers' real classes."""

from typing import Any

from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    LlamaTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def clip_tokenizer(length: int = 16) -> CLIPTokenizer:
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={w: n for n, w in enumerate(words)}, merges=[], model_max_length=length)
    tokenizer.pad_token = "<|endoftext|>"
    return tokenizer


def clip(width: int, *, projected: bool) -> Any:
    config = CLIPTextConfig(
        vocab_size=54, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=16, projection_dim=width, bos_token_id=52, eos_token_id=53, pad_token_id=53,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def t5_tokenizer() -> Any:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def t5(width: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=30, d_model=width, d_kv=8, d_ff=2 * width, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return T5EncoderModel(config).eval()


def umt5(width: int) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=30, d_model=width, d_kv=8, d_ff=2 * width, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return UMT5EncoderModel(config).eval()


def qwen_vl_tokenizer() -> Qwen2Tokenizer:
    """Letters, and the words of the template whole, so that it is as long as for the real one."""
    text = "Describe the image by detailing the color shape size texture quantity text spatial relationships of"
    first, *others = f"{text} the objects and background".split()
    words = ["system", "user", "assistant", first, *(f"Ġ{word}" for word in others)]
    merges: Any = list(dict.fromkeys((word[:end], word[end]) for word in words for end in range(1, len(word))))
    pieces = dict.fromkeys([*LETTERS, *"D,:ĠĊ", *(start + letter for start, letter in merges)])
    return Qwen2Tokenizer(
        vocab={piece: number for number, piece in enumerate(pieces)}, merges=merges, unk_token="<|endoftext|>",
        eos_token="<|endoftext|>", pad_token="<|endoftext|>", additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip


def qwen_vl(width: int, num_words: int) -> Any:
    text = {
        "vocab_size": num_words, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048, "bos_token_id": None,
        "eos_token_id": None, "pad_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": width,
        "fullatt_block_indexes": [0],
    }  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def qwen3_tokenizer() -> Any:
    """With a chat template that shows what it is asked for."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{% if not enable_thinking %} think{% endif %}{% endif %}"
    )
    return Qwen2Tokenizer(
        vocab={word: n for n, word in enumerate(("<|endoftext|>", "Ġ", *LETTERS))}, merges=[],
        extra_special_tokens=["<|im_start|>", "<|im_end|>"], chat_template=template,
    )  # fmt: skip


def qwen3(kind: Any, num_layers: int) -> Any:
    config = Qwen3Config(
        vocab_size=30, hidden_size=16, intermediate_size=16, num_hidden_layers=num_layers, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    return kind(config).eval()


def mistral_tokenizer() -> Any:
    """In the place of Pixtral's processor, which needs torchvision; its messages are lists of contents."""
    template = "{% for m in messages %}[{{ m.role }}]{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}"
    return LlamaTokenizer(
        vocab={word: n for n, word in enumerate(("<unk>", "<s>", "</s>", "▁", *LETTERS))}, merges=[],
        extra_special_tokens=["[system]", "[user]"], pad_token="</s>", chat_template=template,
    )  # fmt: skip


def mistral() -> Mistral3ForConditionalGeneration:
    text = MistralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=30, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    vision = PixtralVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    return Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision)).eval()


def gemma_tokenizer() -> GemmaTokenizer:
    words = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS)
    return GemmaTokenizer(vocab={word: n for n, word in enumerate(words)}, merges=[], add_bos_token=True)


def gemma() -> Gemma2Model:
    config = Gemma2Config(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    return Gemma2Model(config).eval()
