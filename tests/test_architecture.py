"""The house rules: imports only point down and in no circle, files stay small, the import is light and silent."""

import ast
import importlib
import pathlib
import subprocess
import sys

import pytest

import fdpp_jax
from fdpp_jax.plans.backends import BACKENDS

PACKAGE = pathlib.Path(fdpp_jax.__file__).parent
REPOSITORY = PACKAGE.parent
MAX_LINES = 500

# From the top down. A room imports rooms of lower levels only; rooms that share a level do not know each other.
LEVELS = (
    ("__main__",),
    ("cli",),
    ("bench",),
    ("generation",),
    ("results",),
    ("decode_loop", "prompts"),
    ("sampling", "calibration"),
    ("score_stats",),
    ("models",),
    ("ops",),
    ("heuristics", "pallas", "triton"),
    ("plans",),
    ("unified_max", "json_fields", "progress", "device_memory"),
    ("_version",),
)
LEVEL_OF = {room: len(LEVELS) - index for index, rooms in enumerate(LEVELS) for room in rooms}
# The package itself gives out public names, which no room may come back for.
ROOT = "fdpp_jax"
KERNEL_ROOMS = ("pallas", "triton")
# Kernels of a room do not know each other; what they share stands in its parts, and its run knows them all.
KERNEL_LEVELS = {"run": 3, "parts": 1, "bridge": 0}
OTHER_KERNELS = 2


def _room(module: str) -> str:
    """fdpp_jax.models.llama -> models; fdpp_jax -> fdpp_jax."""
    return module.split(".")[1] if "." in module else module


def _modules() -> dict[str, pathlib.Path]:
    paths = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(REPOSITORY).with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    del paths[ROOT]  # __init__ gives out names of all levels
    return paths


MODULES = _modules()


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
            for alias in node.names:
                name = f"{base}.{alias.name}"
                is_module = name in MODULES or (base == ROOT and alias.name in LEVEL_OF)
                found.append(name if is_module else base)
    return [name for name in dict.fromkeys(found) if name == ROOT or name.startswith(f"{ROOT}.")]


def _upward_imports(source: str, module: str) -> list[str]:
    """One line for each import of `source` that does not point down."""
    room = _room(module)
    if room not in LEVEL_OF:
        return [f"{module} is in no level of this test's LEVELS"]
    problems = []
    for name in _imported_modules(source, module):
        target = _room(name)
        if name == ROOT:
            problems.append(f"{module} imports the package's public names, which come from above")
        elif target != room and LEVEL_OF.get(target, sys.maxsize) >= LEVEL_OF[room]:
            problems.append(f"{module} imports {name}, which is not below it")
        elif target in KERNEL_ROOMS and room not in (target, "ops", "bench"):
            problems.append(f"{module} imports {name}, and only ops and bench import kernels")
        elif room in KERNEL_ROOMS and target == room and not _is_down_among_kernels(module, name):
            problems.append(f"{module} imports {name}, another kernel")
    return problems


def _is_down_among_kernels(module: str, name: str) -> bool:
    """Whether one file of a room of kernels may import another."""
    here, there = (path.split(".")[2] if path.count(".") > 1 else "" for path in (module, name))
    return here == there or KERNEL_LEVELS.get(here, OTHER_KERNELS) > KERNEL_LEVELS.get(there, OTHER_KERNELS)


def _circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """The groups of modules that import each other in a circle."""
    reached: dict[str, set[str]] = {}
    for module in imports:
        todo, seen = list(imports[module]), set[str]()
        while todo:
            name = todo.pop()
            if name not in seen:
                seen.add(name)
                todo += imports.get(name, ())
        reached[module] = seen
    groups = {frozenset(b for b in reached[a] if a in reached.get(b, ())) for a in imports if a in reached[a]}
    return [sorted(group) for group in groups]


def test_imports_only_point_down():
    problems = [problem for module, path in MODULES.items() for problem in _upward_imports(path.read_text(), module)]
    assert not problems, "\n".join(problems)


def test_no_files_import_each_other_in_a_circle():
    assert not _circles({module: set(_imported_modules(path.read_text(), module)) for module, path in MODULES.items()})


def test_the_checker_sees_a_circle():
    assert _circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert _circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize(
    ("module", "source", "num_problems"),
    [
        ("fdpp_jax.ops.attention", "from fdpp_jax import heuristics\nfrom fdpp_jax.ops import reference", 0),
        ("fdpp_jax.ops", "from fdpp_jax.models import llama", 1),
        ("fdpp_jax.ops", "from fdpp_jax import models, generation", 2),
        ("fdpp_jax.ops", "import fdpp_jax.models.llama", 1),
        ("fdpp_jax.ops", "def lazy():\n    from fdpp_jax import cli", 1),
        ("fdpp_jax.heuristics", "from fdpp_jax.ops import reference", 1),
        ("fdpp_jax.heuristics", "from fdpp_jax.pallas import gemv", 1),
        ("fdpp_jax.plans.hopper_matmul", "from fdpp_jax import heuristics", 1),
        ("fdpp_jax.pallas.gemv", "from fdpp_jax.pallas.parts import ring", 0),
        ("fdpp_jax.pallas.gemv", "from .parts import ring", 0),
        ("fdpp_jax.pallas.gemv", "from fdpp_jax.pallas import flat_matmul", 1),
        ("fdpp_jax.pallas.fused_layer.results", "from fdpp_jax.pallas.fused_layer import phases", 0),
        ("fdpp_jax.pallas.fused_layer.results", "from fdpp_jax.pallas.decode_attention import rows", 1),
        ("fdpp_jax.pallas.parts.ring", "from fdpp_jax.pallas import gemv", 1),
        ("fdpp_jax.pallas.run", "from fdpp_jax.pallas.gemv import gemv", 0),
        ("fdpp_jax.pallas.gemv", "from .. import heuristics", 1),
        ("fdpp_jax.pallas.gemv", "from ..triton.gemv import run", 1),
        ("fdpp_jax.models.llama", "from fdpp_jax.pallas import run", 1),
        ("fdpp_jax.bench.attention", "from fdpp_jax.pallas.decode_attention.kernel import attend", 0),
        ("fdpp_jax.models.llama", "from fdpp_jax import UnifiedMax", 1),
        ("fdpp_jax.models.llama", "import fdpp_jax", 1),
        ("fdpp_jax.cli.main", "import fdpp_jax", 1),
        ("fdpp_jax.cli.main", "from fdpp_jax._version import __version__", 0),
        ("fdpp_jax.models.llama", "import jax\nfrom flax import nnx", 0),
        ("fdpp_jax.utils", "import jax", 1),
        ("fdpp_jax.ops", "import fdpp_jax.utils", 1),
    ],
)
def test_the_checker_sees_what_points_up(module, source, num_problems):
    assert len(_upward_imports(source, module)) == num_problems


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_what_runs_a_backend_is_ops_or_a_room_of_kernels(backend):
    """Its name is a string in plans, which the imports do not show."""
    assert _room(backend.run) in ("ops", *KERNEL_ROOMS)
    module = importlib.import_module(backend.run)
    for name, functions in (("attention", ["attention"]), ("matmul", ["matmul"])):
        assert getattr(backend, name) is None or all(callable(getattr(module, function)) for function in functions)
    if backend.layer is not None and any(backend.layer.configs.values()):
        assert all(callable(getattr(module, function)) for function in ("layer_state", "first_layer", "layer"))


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
    names += ["heuristics", "merge_attention_states", "models", "stream", "target"]
    assert sorted(fdpp_jax.__all__) == names
    assert dir(fdpp_jax) == names
    for name in names:
        assert getattr(fdpp_jax, name) is not None
    with pytest.raises(AttributeError, match="module 'fdpp_jax' has no attribute 'calibrat'"):
        fdpp_jax.calibrat  # noqa: B018


def test_a_misspelt_public_name_is_an_error_to_type_checkers(tmp_path):
    """Of the package itself, without the rooms behind its names, which take long to check."""
    user = tmp_path / "user.py"
    user.write_text(
        "from fdpp_jax import dot_product_attention, generate\nimport fdpp_jax\n\nfdpp_jax.models.load\n"
        "from fdpp_jax import dot_product_attenton\n"
    )
    options = ["--follow-imports=skip", "--config-file=", f"--cache-dir={tmp_path / 'cache'}"]
    command = [sys.executable, "-m", "mypy", *options, str(PACKAGE / "__init__.py"), str(user)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=REPOSITORY)
    assert 'has no attribute "dot_product_attenton"' in result.stdout
    assert "Found 1 error " in result.stdout  # the other names are right


def test_rooms_that_are_public_need_no_import_of_their_own():
    for call in ("calibration.load_for", "heuristics.plan_matmul", "models.load"):
        assert _python(f"import fdpp_jax; fdpp_jax.{call}") == ""


@pytest.mark.parametrize("kernel", ["decode_attention", "flat_matmul", "gemv", "fused_layer"])
def test_kernels_are_imported_by_their_paths(kernel):
    assert callable(getattr(importlib.import_module(f"fdpp_jax.pallas.{kernel}"), kernel))


def test_plans_need_no_backend_and_no_kernel():
    code = """
import jax, fdpp_jax, sys
from fdpp_jax.plans.shapes import MatmulShape
print(fdpp_jax.heuristics.plan_matmul(MatmulShape(8, 4096, 4096), "H100").implementation)
assert not jax._src.xla_bridge._backends
assert "fdpp_jax.pallas" not in sys.modules
"""
    assert _python(code) == "flat\n"
