"""Bad safetensors files: one clear line each, whatever their bytes; what fuzzing found stays here."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import lorasmith
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from lorasmith.demo import BASE
from lorasmith.storage.safetensors import TensorFile
from lorasmith.storage.safetensors_header import Header, header_bytes
from lorasmith.tools.inspect import inspected
from lorasmith.tools.merge import Source, merge
from lorasmith.tools.merge_into_model import merge_into
from lorasmith.tools.metadata import rewrite
from lorasmith.tools.resize import resize
from lorasmith.tools.svd import Cut

FUZZ = settings(
    max_examples=150, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def written(path: Path, head: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


HOSTILE = [
    ("a head of 10 GB", {"a": F32}, bytes(8), 10**10, "header too large"),
    ("a head of 2^64", {"a": F32}, bytes(8), 2**64 - 1, "header too large"),
    (
        "a head longer than the file",
        {"a": F32},
        bytes(8),
        500,
        "x.safetensors is cut off: it ends inside its header of 500 bytes",
    ),
    ("a list of lists", b"[" * 10**5 + b"]" * 10**5, b"", None, "does not begin as one"),
    ("objects in objects", b'{"a":' * 10**5 + b"1" + b"}" * 10**5, b"", None, "recursion limit"),
    ("nested where nobody looks", b'{"a":{"x":' + b"[" * 10**5 + b"]" * 10**5 + b"}}", b"", None, "recursion limit"),
    ("overlapping", {"a": F32, "b": F32 | {"data_offsets": [4, 12]}}, bytes(12), None, "invalid offset for tensor `b`"),
    ("a negative place", {"a": F32 | {"data_offsets": [-8, 0]}}, bytes(8), None, "expected usize"),
    ("backwards", {"a": F32 | {"data_offsets": [8, 0]}}, bytes(8), None, "invalid offset"),
    ("a negative side", {"a": F32 | {"shape": [-2]}}, bytes(8), None, "expected usize"),
    ("a hole", {"a": F32 | {"data_offsets": [8, 16]}}, bytes(16), None, "invalid offset"),
    ("cut off", {"a": F32}, bytes(4), None, "is cut off: 4 of its 77 bytes are missing"),
    ("more behind", {"a": F32}, bytes(16), None, "not fully covered"),
    ("a shape that overflows", {"a": F32 | {"shape": [2**40, 2**40]}}, bytes(8), None, "overflow"),
    (
        "another size than the shape's",
        {"a": F32 | {"shape": [3]}},
        bytes(8),
        None,
        "invalid shape, data type, or offset",
    ),
    ("an unknown dtype", {"a": F32 | {"dtype": "F31"}}, bytes(8), None, "unknown variant `F31`"),
    ("no UTF-8", b'{"\xff":1}', b"", None, "invalid UTF-8"),
    ("metadata that are no text", {"__metadata__": {"x": 1}}, b"", None, "expected a string"),
    ("a name twice", b'{"a":%s,"a":%s}' % ((json.dumps(F32).encode(),) * 2), bytes(8), None, "got a twice"),
    ("metadata twice", b'{"__metadata__":{"x":"1","x":"2"}}', b"", None, "got x twice"),
    ("a thousand axes", {"a": F32 | {"shape": [1] * 999 + [2]}}, bytes(8), None, "must have at most 64 axes, got 1000"),
]


@pytest.mark.parametrize(
    ("head", "data", "length", "message"), [case[1:] for case in HOSTILE], ids=[c[0] for c in HOSTILE]
)
def test_hostile_heads_are_refused_in_one_line(
    tmp_path: Path, head: Any, data: bytes, length: int | None, message: str
) -> None:
    written(tmp_path / "x.safetensors", head, data, length)
    for command in (
        ["inspect", "x.safetensors"], ["metadata", "x.safetensors"],
        ["metadata", "x.safetensors", "--strip", "--output", "y.safetensors"],
        ["resize", "x.safetensors", "--rank", "1", "--output", "y.safetensors"],
        ["merge", "x.safetensors", "x.safetensors", "--output", "y.safetensors"],
        ["extract", "x.safetensors", "x.safetensors", "--rank", "1", "--output", "y.safetensors"],
    ):  # fmt: skip
        ended = lorasmith(tmp_path, *command)
        assert ended.code == 2 and ended.err.count("\n") == 1 and message in ended.err and not ended.out
        assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_places_are_those_of_the_bytes(tmp_path: Path) -> None:
    state = {"b": torch.randn(3, 2), "a": torch.arange(5), "e": torch.empty(0, 3), "s": torch.tensor(2.0).bfloat16()}
    save_file(state, tmp_path / "x.safetensors", {"k": "v"})
    header = Header.of(tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    with TensorFile(header) as file:
        for key, tensor in state.items():
            assert torch.equal(file.tensor(key), tensor) and header.shapes[key] == tuple(tensor.shape)
            begin, end = header.places[key]
            assert content[begin:end] == b"".join(file.pieces(key)) and header.num_bytes(key) == tensor.nbytes
    assert header.metadata == {"k": "v"}


def test_dtypes_that_torch_has_not_are_refused_where_they_are_read(tmp_path: Path) -> None:
    head = {"x": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}
    with TensorFile(Header.of(written(tmp_path / "x.safetensors", head, bytes(3)))) as file:
        with pytest.raises(ValueError, match="x must be of a dtype among F64, F32, .*, got F6_E2M3"):
            file.tensor("x")


def test_a_file_that_is_cut_while_it_is_open(tmp_path: Path) -> None:
    save_file({"a": torch.ones(100)}, tmp_path / "x.safetensors")
    with TensorFile(Header.of(tmp_path / "x.safetensors")) as file:
        (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:-4])
        with pytest.raises(ValueError, match="must not change while it is read, but it ends inside a"):
            file.tensor("a")
        with pytest.raises(ValueError, match="must not change while it is read, but it ends at byte"):
            list(file.pieces("a"))


def tried(path: Path) -> None:
    """Whatever a file's bytes are: it is read, or refused in one line, and nothing is left beside it."""
    output = path.with_name("y.safetensors")
    for action in (
        lambda: inspected(path),
        lambda: rewrite(path, output, changes={}, strip=True, overwrite=True),
        lambda: resize(path, output, Cut(rank=1), overwrite=True),
        lambda: merge([Source.parsed(f"{path}:{weight}") for weight in (1, 2)], output, rank=2, overwrite=True),
        lambda: merge_into(BASE, [Source.parsed(str(path))], path.with_name("out")),
    ):
        try:
            action()
        except ValueError as error:
            assert str(error)
        assert {p.name for p in path.parent.iterdir()} <= {path.name, output.name}


@FUZZ
@given(content=st.binary(max_size=200))
def test_any_bytes(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    tried(tmp_path / "x.safetensors")


SOUND = save(
    {"a.lora_down.weight": torch.ones(2, 3), "a.lora_up.weight": torch.ones(4, 2), "a.alpha": torch.tensor(2.0)},
    {"ss_steps": "3", "lora_adapter_metadata": "{}"},
)


@FUZZ
@given(place=st.integers(0, len(SOUND) - 1), new=st.binary(max_size=4), cut=st.integers(0, 5))
def test_a_sound_file_with_bytes_changed_or_cut_off(tmp_path: Path, place: int, new: bytes, cut: int) -> None:
    content = SOUND[:place] + new + SOUND[place + len(new) :]
    (tmp_path / "x.safetensors").write_bytes(content[: len(content) - cut] if cut < 5 else content[:place])
    tried(tmp_path / "x.safetensors")


PARTS = (
    "lora_down.weight", "lora_up.weight", "alpha", "dora_scale", "diff", "diff_b", "hada_w1_a", "hada_w1_b",
    "hada_w2_a", "hada_w2_b", "lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "oft_blocks",
    "lora_mid.weight", "lora_A.weight", "lora_magnitude_vector", "lora_B.bias", "",
)  # fmt: skip
SHAPES = st.lists(st.integers(0, 4), max_size=5)
KINDS = st.sampled_from(
    [("F32", 4), ("BF16", 2), ("F16", 2), ("I64", 8), ("BOOL", 1), ("U16", 2), ("C64", 8), ("F8_E4M3", 1)]
)
LAYERS = st.sampled_from(["lora_unet_down_blocks_0_attn2_to_k", "transformer.blocks.0.x", "lora_te_x", ".", "a"])
METADATA = st.dictionaries(
    st.sampled_from(["ss_steps", "lora_adapter_metadata", "lorasmith.history", "lorasmith.config", "x"]),
    st.sampled_from(
        ["", "{", "[]", "{}", '{"unet.r": 0}', '{"r": "x"}', "null", "9" * 30, '{"alpha_pattern": {"(": 1}}']
    ),
)


@FUZZ
@given(
    tensors=st.lists(st.tuples(LAYERS, st.sampled_from(PARTS), SHAPES, KINDS), max_size=6), metadata=METADATA,
    byte=st.sampled_from([0, 1, 60, 127, 255]),
)  # fmt: skip
def test_parts_of_any_shape_and_dtype(tmp_path: Path, tensors: Any, metadata: dict[str, str], byte: int) -> None:
    entries, data = {}, b""
    for layer, part, shape, (dtype, width) in tensors:
        size = torch.Size(shape).numel() * width
        entries[f"{layer}.{part}"] = (dtype, shape, size)
    for dtype, _, size in entries.values():
        data += bytes([byte % 2 if dtype == "BOOL" else byte]) * size
    head = header_bytes([(key, *entry) for key, entry in entries.items()], metadata)
    (tmp_path / "x.safetensors").write_bytes(head + data)
    tried(tmp_path / "x.safetensors")
