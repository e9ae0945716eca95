"""Links of the documentation lead somewhere, its commands are understood, and performance.md stays short; no GPU."""

import contextlib
import io
import pathlib
import re
import shlex

import pytest

from fdpp_jax import cli
from fdpp_jax.cli.main import _parser

REPOSITORY = pathlib.Path(__file__).parents[1]
PAGES = (
    REPOSITORY / "README.md",
    REPOSITORY / "benchmarks" / "README.md",
    *sorted((REPOSITORY / "docs").rglob("*.md")),
)
MODULES = sorted((REPOSITORY / "fdpp_jax").rglob("*.py"))
MAX_PERFORMANCE_LINES = 149

_FENCED = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
_INLINE_CODE = re.compile(r"`[^`\n]+`")
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_COMMAND_IN_TEXT = re.compile(r"`(fdpp-jax [^`\n|]+)[^`\n]*`")
_HEADING = re.compile(r"^#+ +(.+?) *#*$", re.MULTILINE)
_LINK = re.compile(r"\[[^\]]*\]\(([^()\s]+)\)")
_SCHEME = re.compile(r"[a-z]+:")
# "docs/page.md", with its anchors: "docs/page.md#one and #another".
_NAMED_IN_CODE = re.compile(r"(docs/[\w/.-]+\.md)((?:(?: and |, )?#[\w-]+)*)")


def _anchors(text: str) -> set[str]:
    """Anchors that GitHub gives to the headings of a page."""
    found: set[str] = set()
    for heading in _HEADING.findall(_FENCED.sub("", text)):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        anchor, repeated = slug, 0
        while anchor in found:
            repeated += 1
            anchor = f"{slug}-{repeated}"
        found.add(anchor)
    return found


def _refuse(target: pathlib.Path, anchor: str) -> str | None:
    """Why nothing is found at an anchor of a file, or None."""
    if not target.exists():
        return "no such file"
    if anchor and (target.suffix != ".md" or anchor not in _anchors(target.read_text(encoding="utf-8"))):
        return "no such heading"
    return None


def _broken_links(page: pathlib.Path) -> list[str]:
    """Relative links of a page that lead nowhere, each with the reason."""
    text = _INLINE_CODE.sub("", _FENCED.sub("", page.read_text(encoding="utf-8")))
    broken = []
    for link in _LINK.findall(text):
        if _SCHEME.match(link):
            continue
        path, _, anchor = link.partition("#")
        refusal = _refuse(page.parent / path if path else page, anchor)
        if refusal is not None:
            broken.append(f"{page.name}: {link}: {refusal}")
    return broken


def _broken_names(module: pathlib.Path, root: pathlib.Path) -> list[str]:
    """Pages and anchors below `root` that a module names and that are not there, each with the reason."""
    broken = []
    for path, anchors in _NAMED_IN_CODE.findall(module.read_text(encoding="utf-8")):
        for anchor in re.findall(r"#([\w-]+)", anchors) or [""]:
            refusal = _refuse(root / path, anchor)
            if refusal is not None:
                broken.append(f"{module.name}: {path}#{anchor}: {refusal}")
    return broken


def _commands(text: str) -> list[list[str]]:
    """The words of each command of a page: a line, with indented lines that go on, or a part of it between &&."""
    commands = []
    for language, block in _BLOCK.findall(text):
        for line in [] if language else re.sub(r"\n +", " ", block).splitlines():
            words = [word.strip("[]") for word in shlex.split(line, comments=True)]  # [--option]: may be left out
            for command in " ".join(map(shlex.quote, words)).split(" '&&' "):
                commands.append(shlex.split(command))
    return [command for command in commands if command]


def _argparse_s_answer(argv: list[str]) -> tuple[int, str]:
    """Exit code and text of the parser of fdpp-jax."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            _parser().parse_args(argv)
        except SystemExit as stop:
            return int(stop.code or 0), text.getvalue()
    return 0, ""


def _missing(options: list[str], text: str) -> str | None:
    """The first word that is an option, and that a text does not name, as a reason."""
    names = [word.partition("=")[0] for word in options if word.startswith("--")]
    absent = [name for name in names if not re.search(rf"{name}(?![\w-])", text)]
    return f"no option {absent[0]}" if absent else None


def _refuse_command(command: list[str]) -> str | None:
    """Why a command of a page cannot run in the repository's root, or None."""
    program, *words = pathlib.PurePath(command[0]).name, *command[1:]
    if program == "fdpp-jax":
        code, text = _argparse_s_answer(words)
        return text.splitlines()[-1] if code else None
    paths = [word for word in words if word.endswith(".py")]
    if any(not (REPOSITORY / path).exists() for path in paths):
        return "no such file"
    if program == "python":
        return _missing(words, (REPOSITORY / paths[0]).read_text(encoding="utf-8"))
    return None if program in ("python3.12", "pip", "pytest", "ruff", "mypy") else "unknown program"


def _refuse_mention(mention: str) -> str | None:
    """Why a command in running text, whose required arguments may be left out, does not exist, or None."""
    words = shlex.split(mention)[1:]
    names = [word for word in words[: 2 if words[0] == "bench" else 1] if not word.startswith("-")]
    code, text = _argparse_s_answer([*names, "--help"])
    return text.splitlines()[-1] if code else _missing(words, text)


def _broken_commands(page: pathlib.Path) -> list[str]:
    """Commands of a page that cannot run, each with the reason."""
    text = page.read_text(encoding="utf-8")
    refusals = [(shlex.join(command), _refuse_command(command)) for command in _commands(text)]
    refusals += [(mention, _refuse_mention(mention)) for mention in _COMMAND_IN_TEXT.findall(_FENCED.sub("", text))]
    return [f"{page.name}: {command}: {refusal}" for command, refusal in refusals if refusal is not None]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_links_of_a_page_lead_somewhere(page):
    assert _broken_links(page) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_commands_of_a_page_are_understood(page, monkeypatch):
    monkeypatch.chdir(REPOSITORY)  # files are written to folders that are there
    assert _broken_commands(page) == []


def test_commands_that_only_answer_run(capsys):
    commands = [command for page in PAGES for command in _commands(page.read_text(encoding="utf-8"))]
    answering = [command[1:] for command in commands if command[0] == "fdpp-jax" and command[1] in ("plan", "info")]
    assert len(answering) >= 3
    for argv in answering:
        assert cli.main(argv) == 0, capsys.readouterr().err


def test_pages_that_code_names_are_there():
    assert [name for module in MODULES for name in _broken_names(module, REPOSITORY)] == []


def test_performance_is_short():
    text = (REPOSITORY / "docs" / "performance.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_PERFORMANCE_LINES


@pytest.mark.parametrize(
    ("link", "refusal"),
    [
        ("other.md", None),
        ("other.md#the-rules-tiles", None),
        ("other.md#a-x-b-of-w_k", None),
        ("other.md#twice-1", None),
        ("#here", None),
        ("https://example.com/nowhere#at-all", None),
        ("absent.md", "no such file"),
        ("other.md#absent", "no such heading"),
        ("other.md#twice-2", "no such heading"),
        ("other.md#a-comment", "no such heading"),
        ("#there", "no such heading"),
        ("data.json#here", "no such heading"),
    ],
)
def test_the_checker_finds_a_broken_link(tmp_path, link, refusal):
    other = "# Other\n## The rule's tiles\n## A x B of `w_k`\n### Twice\n### Twice\n```\n# A comment\n```\n"
    (tmp_path / "other.md").write_text(other, encoding="utf-8")
    (tmp_path / "data.json").write_text("{}", encoding="utf-8")
    page = tmp_path / "page.md"
    page.write_text(f"# Here\n`[no](link.md)` and [a link\nof two lines]({link}).\n", encoding="utf-8")
    assert _broken_links(page) == ([] if refusal is None else [f"page.md: {link}: {refusal}"])


def test_the_checker_finds_a_broken_name_in_code(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").write_text("# Page\n## Rows\n", encoding="utf-8")
    module = tmp_path / "module.py"
    module.write_text('"""See docs/page.md."""\n# docs/page.md#rows and #tiles; docs/absent.md.\n', encoding="utf-8")
    assert _broken_names(module, tmp_path) == [
        "module.py: docs/page.md#tiles: no such heading",
        "module.py: docs/absent.md#: no such file",
    ]


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("```\nfdpp-jax plan --model llama-2-7b  # why?\n\nfdpp-jax info\n```", None),
        ("```\nfdpp-jax calibrate --data FILE [--samples 256]\n                   [--length 512]\n```", None),
        ("`fdpp-jax generate --chat`, `fdpp-jax bench decode | matmul`, `fdpp-jax tune --budget=4`", None),
        ("```\npytest tests/test_docs.py && ruff check .\n```", None),
        ("```\npython benchmarks/attention_peers.py --only '8, 32/8'\n```", None),
        ("```\nfdpp-jax plan  the plans\n```", "unrecognized arguments: the plans"),
        ("```\nmypy && .venv/bin/fdpp-jax info --model tiny\n```", "unrecognized arguments: --model tiny"),
        ("```\nfdpp-jax generate --prompt\n```", "--prompt: expected one argument"),
        ("```\npytest tests/absent.py\n```", "no such file"),
        ("```\npython benchmarks/attention_peers.py --peer SDPA\n```", "no option --peer"),
        ("```\nmake\n```", "unknown program"),
        ("`fdpp-jax decode`", "invalid choice: 'decode'"),
        ("`fdpp-jax generate --cha`", "no option --cha"),
    ],
)
def test_the_checker_finds_a_broken_command(tmp_path, text, refusal):
    page = tmp_path / "page.md"
    page.write_text(f"# Here\n\n{text}\n", encoding="utf-8")
    broken = _broken_commands(page)
    assert len(broken) == (refusal is not None)
    assert refusal is None or refusal in broken[0]
