"""The house: every package stands on a floor and imports from lower floors only."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "lorasmith"
FLOORS = (
    {"lorasmith", "types", "component", "errors", "rng", "storage", "distributed", "ops", "demo"},
    {"devices", "adapters", "data", "reporting"},
    {"diffusion", "formats", "optim"},
    {"config", "models"},
    {"prepare", "tools"},
    {"training"},
    {"api", "runs"},
    {"cli"},
    {"__main__"},
)
MAX_LINES = 400


def module_of(path: Path) -> str:
    """A file -> its dotted name below the package; the package itself is "lorasmith"."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "lorasmith"


def package_of(module: str) -> str:
    return module.partition(".")[0]


def floor_of(package: str) -> int:
    """ValueError where the package stands on no floor, or on two."""
    [floor] = [number for number, packages in enumerate(FLOORS) if package in packages]
    return floor


def imports_of(path: Path) -> set[str]:
    """The project's modules that a file imports, at its top or inside functions."""
    known = {module_of(p) for p in SOURCE.rglob("*.py")}
    found = set()
    if module_of(path) == "lorasmith":  # which offers what is above it, imported when it is used
        return set()
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
    """Whether an import goes up, or sideways into another package."""
    one, other = package_of(module), package_of(imported)
    return one != other and floor_of(other) >= floor_of(one)


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


def test_the_loop_knows_a_denoiser_not_a_model() -> None:
    assert not [m for m in imports_of(SOURCE / "training" / "loop.py") if package_of(m) == "models"]


def test_the_walk_sees_a_climb() -> None:
    assert climbs("diffusion.process", "training.loop")
    assert climbs("diffusion.losses", "formats.keys")
    assert not climbs("training.loop", "diffusion.process")


def test_the_house_is_seen_at_once() -> None:
    packages = [p for p in SOURCE.iterdir() if p.is_dir() and p.name != "__pycache__"]
    assert len(packages) <= 18
    assert all((package / "__init__.py").is_file() for package in packages)
    assert len([p for p in SOURCE.iterdir() if p.is_file()]) <= 9


def test_files_are_short() -> None:
    files = [p for folder in ("src", "tests", "scripts", "benchmarks") for p in (ROOT / folder).rglob("*.py")]
    assert not [str(p) for p in files if len(p.read_text(encoding="utf-8").splitlines()) > MAX_LINES]
