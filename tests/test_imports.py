"""The house: every module stands on a floor and imports from lower floors only."""

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "lorasmith"
FLOORS = (
    (
        "lorasmith",
        "types",
        "component",
        "faults",
        "help_layout",
        "progress",
        "meeting",
        "torchrun",
        "not_weights",
        "installed",
        "dtypes",
    ),
    (
        "draws",
        "devices",
        "openmp",
        "kernels",
        "ldm_names",
        "original_names",
        "text_names",
        "header",
        "whole",
        "world",
        "digests",
        "experts",
        "other_tools",
        "pace",
        "scale_names",
        "streams",
        "signals",
    ),
    (
        "noise",
        "losses",
        "optimizers",
        "masters",
        "adapters",
        "data.captions",
        "data.colours",
        "data.pictures",
        "data.listing",
        "data.folder",
        "data.buckets",
        "data.tags",
        "plots",
        "demo",
        "layouts",
        "looks",
        "step_log",
        "lock",
        "tensor_file",
        "bars",
        "lines",
        "display",
    ),
    (
        "targets",
        "data.cache",
        "sources",
        "report",
        "norms_plot",
        "peft_config",
        "plain_parts",
        "tucker",
        "comfyui_pack",
        "fused",
        "events",
        "quantised",
        "algorithms",
    ),
    ("attach", "memory", "config", "lorafile", "dora_scales", "sampling", "validation"),
    (
        "settings",
        "objective",
        "state",
        "families",
        "inspection",
        "file_layouts",
        "loading",
        "base_weights",
        "low_bit",
        "sharding",
        "packing",
        "fusing",
    ),
    ("diagnosis", "checkpoints", "files", "invocation", "train_help"),
    ("training", "resuming", "plan", "base_hash"),
    ("job", "inputs"),
    ("keeping", "run_folder", "console"),
    ("checks", "drawing"),
    ("run", "contract", "run_report"),
    ("file_commands", "execution"),
    ("cli",),
    ("__main__",),
)
MAX_LINES = 400


def module_of(path: Path) -> str:
    """A file -> its dotted name below the package; the package itself is "lorasmith"."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "lorasmith"


def floor_of(module: str) -> int:
    """The floor of a module or of the package that holds it."""
    for floor, modules in enumerate(FLOORS):
        if module in modules or module.rpartition(".")[0] in modules:
            return floor
    assert module == "data", f"{module} stands on no floor"
    return 0


def imports_of(path: Path) -> set[str]:
    """The project's modules that a file imports, at its top or inside functions."""
    known = {module_of(p) for p in SOURCE.rglob("*.py")}
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module or ""]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "lorasmith":
                below = name.removeprefix("lorasmith").lstrip(".") or "lorasmith"
                found |= {below} & known
    return found - ({"lorasmith"} if module_of(path) != "lorasmith" else set())


def climbs(module: str, imported: str) -> bool:
    """Whether an import goes up or sideways; inside a package siblings may be imported."""
    same_package = module.split(".")[0] == imported.split(".")[0] and module.split(".")[0] in (
        "adapters",
        "kernels",
        "data",
        "families",
        "files",
        "other_tools",
        "settings",
    )
    if module == "training" and imported.startswith("families"):  # the loop knows a Denoiser, not a model
        return True
    return not same_package and floor_of(imported) >= floor_of(module)


def test_imports_point_down() -> None:
    bad = [
        f"{module_of(path)} -> {imported}"
        for path in SOURCE.rglob("*.py")
        for imported in imports_of(path)
        if climbs(module_of(path), imported)
    ]
    assert not bad


def test_imports_do_not_circle() -> None:
    graph = {module_of(path): imports_of(path) for path in SOURCE.rglob("*.py")}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above, module))
        if module not in done:
            for imported in graph[module]:
                visit(imported, (*above, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_the_walk_sees_a_climb() -> None:
    assert climbs("noise", "training")
    assert climbs("training", "families.sd")
    assert climbs("losses", "noise")
    assert not climbs("training", "noise")


def test_files_are_short() -> None:
    root = SOURCE.parents[1]
    files = [p for folder in ("src", "tests", "tools") for p in (root / folder).rglob("*.py")]
    assert not [str(p) for p in files if len(p.read_text(encoding="utf-8").splitlines()) > MAX_LINES]
