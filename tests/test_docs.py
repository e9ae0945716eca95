"""Links of the documentation lead somewhere, and performance.md stays short; no GPU, no JAX."""

import pathlib
import re

import pytest

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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_links_of_a_page_lead_somewhere(page):
    assert _broken_links(page) == []


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
