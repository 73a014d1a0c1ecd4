"""Imports point one way: down the layers, and never in a circle."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import fastmeta

PACKAGE = Path(fastmeta.__file__).parent
FOLDERS = {"fastmeta": PACKAGE, "fastmeta.triton_kernels": PACKAGE.parent / "triton_kernels"}
# From the top down; the parts of one layer may import each other.
LAYERS = (
    ("__main__",),
    ("cli",),
    ("reproduce",),
    ("presets",),
    ("training",),
    ("examples", "ssl", "data", "models"),
    ("__init__",),  # the public names: those above take them from here, as a user does
    ("graph", "verification"),
    ("methods",),
    ("directions", "derivatives", "updates"),
    ("problem",),
    ("triton_kernels",),  # loaded by name, so that nothing below needs Triton; it shares rules with ops
    ("ops",),
    ("capture",),
    ("dispatch",),
    ("checks", "state"),
    ("losses",),
    ("_extension",),
)
EXCEPTIONS = {
    "fastmeta._extension imports fastmeta": "for its __path__ alone, where the Triton kernels are added",
    "fastmeta.dispatch imports fastmeta.triton_kernels._launch": "once Triton is chosen",
    "fastmeta.ops.solve.conjugate_gradient imports fastmeta.triton_kernels.conjugate_gradient": "once Triton is chosen",
}
RANK = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


MODULES = modules()


def imported(node: ast.AST) -> Iterator[str]:
    """The modules of fastmeta that an import statement names."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in MODULES)
    elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
        for alias in node.names:
            name = f"{node.module}.{alias.name}"
            if not alias.name.startswith("_C"):  # a compiled library
                yield name if name in MODULES else node.module


def part_of(module: str) -> str:
    """The file or folder at the top level that a module belongs to."""
    return module.split(".")[1] if "." in module else "__init__"


def test_every_part_has_a_layer() -> None:
    assert {part_of(module) for module in MODULES} == set(RANK)


def test_imports_point_down_the_layers() -> None:
    """Those inside functions and of types alone, too."""
    upward = {
        f"{module} imports {name}"
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        for name in imported(node)
        if RANK[part_of(name)] < RANK[part_of(module)]
    }
    assert upward == set(EXCEPTIONS)


def test_no_module_imports_itself_in_a_circle() -> None:
    """As Python runs them: statements at the top of a file."""
    graph = {
        module: {
            name
            for node in ast.parse(path.read_text()).body
            for name in imported(node)
            if f"{module} imports {name}" not in EXCEPTIONS
        }
        for module, path in MODULES.items()
    }
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle
