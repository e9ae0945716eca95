"""The house rules: imports only point down, files stay small, and importing the package is light and silent."""

import ast
import pathlib
import subprocess
import sys

import pytest

import fdpp_jax

PACKAGE = pathlib.Path(fdpp_jax.__file__).parent
REPOSITORY = PACKAGE.parent
MAX_LINES = 500

# From the top down. A room imports rooms of lower levels only; rooms that share a level do not know each other.
LEVELS = (
    ("__main__",),
    ("cli",),
    ("cli_bench", "cli_calibrate", "cli_generate", "cli_tune"),
    ("cli_types",),
    ("tuning",),
    ("benchmark", "bench_attention"),
    ("timing",),
    ("generation",),
    ("calibration",),
    ("models",),
    ("ops", "sampling", "score_stats"),
    ("attention", "matmul"),
    ("heuristics", "reference", "pallas", "triton"),
    ("tuned_tables", "limits"),
    ("device", "unified_max"),
    ("config",),
)
LEVEL_OF = {room: len(LEVELS) - index for index, rooms in enumerate(LEVELS) for room in rooms}
# The package itself gives out public names, which no room may come back for.
ROOT = "fdpp_jax"


def _room(module: str) -> str:
    """fdpp_jax.models.llama -> models; fdpp_jax -> fdpp_jax."""
    return module.split(".")[1] if "." in module else module


def _imported_modules(source: str, module: str) -> list[str]:
    """Modules of the package that `source` imports, anywhere in the file (lazy and type-checking imports count)."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: -node.level]
                base = ".".join([*parents, base] if base else parents)
            # `from fdpp_jax import ops` imports a room; `from fdpp_jax import UnifiedMax` the package.
            if base == ROOT:
                found += [f"{ROOT}.{alias.name}" if alias.name in LEVEL_OF else ROOT for alias in node.names]
            else:
                found.append(base)
    return [name for name in found if name == ROOT or name.startswith(f"{ROOT}.")]


def _upward_imports(source: str, module: str) -> list[str]:
    """One line for each import of `source` that does not point down."""
    room = _room(module)
    if room not in LEVEL_OF:
        return [f"{module} is in no level of this test's LEVELS"]
    problems = []
    for name in _imported_modules(source, module):
        target = _room(name)
        if name == ROOT and room not in ("cli", "timing", "tuning", "calibration"):
            problems.append(f"{module} imports the package's public names, which come from above")
        elif name != ROOT and target != room and LEVEL_OF.get(target, sys.maxsize) >= LEVEL_OF[room]:
            problems.append(f"{module} imports {name}, which is not below it")
    return problems


def _modules() -> dict[str, pathlib.Path]:
    paths = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(REPOSITORY).with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    del paths[ROOT]  # __init__ gives out names of all levels
    return paths


def test_imports_only_point_down():
    problems = [problem for module, path in _modules().items() for problem in _upward_imports(path.read_text(), module)]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("module", "source", "num_problems"),
    [
        ("fdpp_jax.ops", "from fdpp_jax import heuristics, reference", 0),
        ("fdpp_jax.ops", "from fdpp_jax.models import llama", 1),
        ("fdpp_jax.ops", "from fdpp_jax import models, generation", 2),
        ("fdpp_jax.ops", "import fdpp_jax.models.llama", 1),
        ("fdpp_jax.ops", "def lazy():\n    from fdpp_jax import cli", 1),
        ("fdpp_jax.heuristics", "from fdpp_jax import reference", 1),
        ("fdpp_jax.pallas.gemv", "from fdpp_jax.pallas import common", 0),
        ("fdpp_jax.pallas.gemv", "from . import common", 0),
        ("fdpp_jax.pallas.gemv", "from .. import heuristics", 1),
        ("fdpp_jax.pallas.gemv", "from ..triton.gemv import run", 1),
        ("fdpp_jax.models.llama", "from fdpp_jax import UnifiedMax", 1),
        ("fdpp_jax.models.llama", "import fdpp_jax", 1),
        ("fdpp_jax.cli", "import fdpp_jax", 0),
        ("fdpp_jax.models.llama", "import jax\nfrom flax import nnx", 0),
        ("fdpp_jax.utils", "import jax", 1),
        ("fdpp_jax.ops", "import fdpp_jax.utils", 1),
    ],
)
def test_the_checker_sees_what_points_up(module, source, num_problems):
    assert len(_upward_imports(source, module)) == num_problems


def _too_long(paths: list[pathlib.Path]) -> list[str]:
    counts = {path: len(path.read_text().splitlines()) for path in paths}
    return [
        f"{path.name} has {lines} lines, at most {MAX_LINES}" for path, lines in counts.items() if lines > MAX_LINES
    ]


def test_no_file_is_long():
    folders = [PACKAGE, *(REPOSITORY / name for name in ("tests", "examples", "benchmarks"))]
    problems = _too_long([path for folder in folders for path in folder.rglob("*.py")])
    assert not problems, "\n".join(problems)


def test_the_checker_sees_a_long_file(tmp_path):
    short, long = tmp_path / "short.py", tmp_path / "long.py"
    short.write_text("x = 1\n" * MAX_LINES)
    long.write_text("x = 1\n" * (MAX_LINES + 1))
    assert _too_long([short, long]) == ["long.py has 501 lines, at most 500"]


def _python(code: str) -> str:
    """What `code` prints in a fresh interpreter that treats warnings as errors."""
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def test_import_is_silent_and_light():
    code = """
import jax
before_backends = len(jax._src.xla_bridge._backends)
import fdpp_jax, sys
assert len(jax._src.xla_bridge._backends) == before_backends == 0, "the import started a JAX backend"
heavy = [name for name in ("torch", "triton", "jax_triton", "flax", "tokenizers", "rich") if name in sys.modules]
assert not heavy, f"the import pulls in {heavy}"
"""
    assert _python(code) == ""


def test_public_names_are_there_and_nothing_else():
    names = [
        "Calibration",
        "UnifiedMax",
        "__version__",
        "calibrate",
        "calibration",
        "dot_product_attention",
        "flat_matmul",
        "generate",
    ]
    names += ["heuristics", "models"]
    assert sorted(fdpp_jax.__all__) == names
    assert dir(fdpp_jax) == names
    for name in names:
        assert getattr(fdpp_jax, name) is not None
    with pytest.raises(AttributeError, match="module 'fdpp_jax' has no attribute 'calibrat'"):
        fdpp_jax.calibrat  # noqa: B018


def test_rooms_that_are_public_need_no_import_of_their_own():
    for call in ("calibration.load_for", "heuristics.plan_matmul", "models.load"):
        assert _python(f"import fdpp_jax; fdpp_jax.{call}") == ""


def test_plans_need_no_backend():
    code = """
import jax, fdpp_jax
from fdpp_jax.config import MatmulShape
print(fdpp_jax.heuristics.plan_matmul(MatmulShape(8, 4096, 4096), "H100").implementation)
assert not jax._src.xla_bridge._backends
"""
    assert _python(code) == "flat\n"
