"""Imports point down, and starting up is cheap."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

import kimi_cpu

PACKAGE = Path(kimi_cpu.__file__).parent

# The first matching prefix decides. A module may import its own layer or a lower one.
LAYERS = [
    ("errors", 0),
    ("config", 0),
    ("hardware", 0),
    ("quant", 0),
    ("store", 1),
    ("kernels", 1),
    ("attention_form", 2),
    ("bus_error", 2),
    ("model", 2),
    ("kv_cache", 2),
    ("sampling", 2),
    ("tokenizer", 2),
    ("engine", 3),
    ("prefixes", 3),
    ("chat", 3),
    ("benchmark", 3),
    ("planning", 3),
    ("server", 4),
    ("cli", 5),
    ("__main__", 5),
    ("__init__", 5),
]
# Within or across layers, these would tie together what must stay apart.
FORBIDDEN = [
    ("engine", "tokenizer"),
    ("engine", "chat"),
    ("engine", "prefixes"),
    ("store", "kernels"),
    ("kernels", "store"),
]


def first_part(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports_of(path: Path) -> list[str]:
    """The first part below `kimi_cpu` of each of a file's imports, lazy ones included."""
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] == "kimi_cpu"]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write kimi_cpu.x"
            if node.module == "kimi_cpu":
                found += [f"kimi_cpu.{a.name}" for a in node.names]
            elif node.module and node.module.startswith("kimi_cpu."):
                found.append(node.module)
    return [first_part(name) for name in found]


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_point_down(path: Path) -> None:
    layers = dict(LAYERS)
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert own in layers, f"{own} has no layer: add it to LAYERS"
    for imported in imports_of(path):
        if imported.startswith("__"):  # kimi_cpu.__version__
            continue
        assert layers[imported] <= layers[own], f"{own} imports {imported}, which lies above it"
        assert (own, imported) not in FORBIDDEN, f"{own} must not know {imported}"


def test_every_file_is_short() -> None:
    long = {p.name: n for p in FILES if (n := len(p.read_text("utf-8").splitlines())) > 600}
    assert not long


def python(code: str) -> tuple[str, float]:
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    return done.stdout, time.perf_counter() - start


@pytest.mark.parametrize(
    "code",
    [
        "import kimi_cpu",
        "from kimi_cpu.cli.main import cli\ntry: cli(['--help'])\nexcept SystemExit: pass",
    ],
    ids=["import", "help"],
)
def test_start_is_instant(code: str) -> None:
    heavy = ["numba", "llvmlite", "numpy", "tiktoken", "jinja2", "prompt_toolkit"]
    heavy += ["starlette", "uvicorn", "msgspec"]
    report = f"\nimport sys\nprint('loaded', sorted(set({heavy!r}) & set(sys.modules)))"
    out, _ = python(code + report)
    assert out.rstrip().endswith("loaded []"), out
    bare = min(python("pass")[1] for _ in range(3))
    # 0.3 s is the promise on an idle machine; compare with a bare interpreter on a busy one.
    assert min(python(code)[1] for _ in range(3)) < max(0.3, 4 * bare)
