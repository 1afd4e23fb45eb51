"""Which program reads which file: the table of docs/files.md, which tests prove cell by cell, both ways.

A file is of a family, an algorithm and a layout, of adapters on the layers of attention and MLPs. A program reads it if
it uses every key, changes every weight that was trained, and makes of it what it is in training.
"""

LAYOUTS = ("kohya", "diffusers", "comfyui", "lycoris")
TOOLS = {"D": "diffusers", "P": "PEFT", "C": "ComfyUI", "L": "LyCORIS"}
UNETS, FLUXES, REST = ("SD", "SDXL"), ("Flux.1", "Chroma", "Flux.2"), ("SD 3", "Wan", "Z-Image", "Lumina 2")
ROWS: tuple[tuple[str, tuple[str, ...], tuple[str | None, ...]], ...] = (
    ("LoRA", UNETS, ("DLC", "DP", "C", "LC")),
    ("LoRA", (*FLUXES, "Z-Image"), ("DC", "DPC", "C", "LC")),
    ("LoRA", ("SD 3",), ("C", "DPC", "C", "LC")),
    ("LoRA", ("Qwen-Image",), ("DLC", "DPC", "DC", "LC")),
    ("LoRA", ("Wan",), ("DC", "DP", "DC", "L")),
    ("LoRA", ("Lumina 2",), ("C", "DP", "C", "L")),
    ("DoRA", (*UNETS, "Qwen-Image"), ("L", "DP", "C", "L")),
    ("DoRA", (*FLUXES, *REST), ("", "DP", "C", "L")),
    ("LoHa", (*UNETS, "Qwen-Image"), ("LC", None, "C", "LC")),
    ("LoHa", (*FLUXES, "SD 3", "Z-Image"), ("C", None, "C", "LC")),
    ("LoHa", ("Wan", "Lumina 2"), ("C", None, "C", "L")),
    ("OFT", (*UNETS, "Qwen-Image"), ("LC", None, "C", "LC")),
    ("OFT", (*FLUXES, "SD 3", "Z-Image"), ("C", None, "C", "LC")),
    ("OFT", ("Wan", "Lumina 2"), ("C", None, "C", "L")),
    ("LoKr", (*UNETS, "Qwen-Image"), ("LC", None, "C", "LC")),
    ("LoKr", ("Flux.1", "Chroma", "SD 3"), (None, None, None, "LC")),
    ("LoKr", ("Flux.2",), (None, "DC", None, "DLC")),
    ("LoKr", ("Z-Image",), (None, "DC", None, "LC")),
    ("LoKr", ("Wan",), ("C", None, "C", "L")),
    ("LoKr", ("Lumina 2",), (None, None, None, "L")),
)
"""Algorithm, families, and for each layout the programs that read the file; None: there can be no such file."""
READS = {
    (family, algorithm, layout): tuple(TOOLS[tool] for tool in tools)
    for algorithm, families, cells in ROWS
    for family in families
    for layout, tools in zip(LAYOUTS, cells, strict=True)
    if tools is not None
}
"""{family, algorithm, layout: the programs}, of the files that there can be."""
REASONS = {
    "diffusers": "diffusers reads LoRA( and DoRA|, DoRA and LoKr) for this model, got",
    "kohya": "Kronecker products of several layers make no Kronecker product of the one that they are there",
    "comfyui": "Kronecker products of several layers make no Kronecker product of the one that they are there",
}
"""What is said of a file that there cannot be."""


def table() -> str:
    """ROWS as Markdown."""
    lines = ["| algorithm | family | " + " | ".join(f"`{layout}`" for layout in LAYOUTS) + " |", "|---" * 6 + "|"]
    for algorithm, families, cells in ROWS:
        words = [
            {"diffusers": "¹", "kohya": "²", "comfyui": "²"}[layout] if tools is None
            else ", ".join(TOOLS[tool] for tool in tools) or "–"
            for layout, tools in zip(LAYOUTS, cells, strict=True)
        ]  # fmt: skip
        lines.append(f"| {algorithm} | {', '.join(families)} | {' | '.join(words)} |")
    return "\n".join(lines) + "\n"
