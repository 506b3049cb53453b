"""House rules that the linters do not know."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for top in ("src", "tests", "tools") for path in (ROOT / top).rglob("*.py"))
PRODUCT = [path for path in SOURCES if path.is_relative_to(ROOT / "src")]
CONTRACTS = [path for path in PRODUCT if path.name == "base.py" or path.parent.name == "model"]
DIRECTORIES = ("src", "tests", "tools", "docs", "packaging", "recipes", ".ci", "requirements")
TEXTS = sorted(
    path
    for top in (ROOT, *(ROOT / name for name in DIRECTORIES))
    for path in (top.iterdir() if top == ROOT else top.rglob("*"))
    if path.is_file() and path.suffix in {".py", ".md", ".sh", ".toml", ".in", ".service", ".json", ".conf", ""}
    and "__pycache__" not in path.parts
    and path != Path(__file__).resolve()  # names what it forbids
)  # fmt: skip

MODULE_LINES, FUNCTION_LINES = 500, 60
LEFT_FOR_LATER = re.compile(r"\b(TODO|FIXME|XXX)\b")
FOREIGN_WORDS = re.compile(r"(?<![\w.])/work/|helper agent", re.IGNORECASE)

named = pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
named_product = pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text(), str(path)))


@named
def test_sizes(path: Path) -> None:
    """A module or function that does not fit a reader's head is split."""
    assert len(path.read_text().splitlines()) <= MODULE_LINES
    long = [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in nodes(path)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= FUNCTION_LINES
    ]
    assert not long


@named
def test_no_error_is_swallowed(path: Path) -> None:
    """``except ...: pass`` hides faults: handle them, say so, or let them rise."""
    swallowed = [
        node.lineno
        for node in nodes(path)
        if isinstance(node, ast.ExceptHandler) and all(isinstance(statement, ast.Pass) for statement in node.body)
    ]
    assert not swallowed


@named_product
def test_every_task_has_an_owner(path: Path) -> None:
    """A task nobody keeps can vanish with its error: use a TaskGroup, or keep it and await it on close."""
    groups = {
        ast.unparse(item.optional_vars)
        for node in nodes(path)
        if isinstance(node, ast.AsyncWith)
        for item in node.items
        if item.optional_vars and "TaskGroup" in ast.unparse(item.context_expr)
    }
    bare = [
        node.lineno
        for node in nodes(path)
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Attribute)
        and node.value.func.attr in {"create_task", "ensure_future"}
        and ast.unparse(node.value.func.value) not in groups
    ]
    assert not bare


@pytest.mark.parametrize("path", CONTRACTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_contracts_are_explained(path: Path) -> None:
    tree = ast.parse(path.read_text())
    if not tree.body:
        return
    assert ast.get_docstring(tree), "the module has no docstring"
    protocols = [
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "Protocol" for base in node.bases)
    ]
    assert not [node.name for node in protocols if not ast.get_docstring(node)]


def test_only_one_module_spawns_with_the_standard_library() -> None:
    """Everything else runs programs by host.process.run, with its deadline and its replayable error."""
    users = {
        str(path.relative_to(ROOT / "src/alveole"))
        for path in PRODUCT
        for node in nodes(path)
        if (isinstance(node, ast.Import) and any(alias.name == "subprocess" for alias in node.names))
        or (isinstance(node, ast.ImportFrom) and node.module == "subprocess")
    }
    assert not {user for user in users if not user.startswith(("host/", "cli/"))}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_text(path: Path) -> None:
    """Nothing left for later, nothing about where it was written, no tabs but where the format wants them."""
    text = path.read_text()
    assert not LEFT_FOR_LATER.findall(text)
    assert not FOREIGN_WORDS.findall(text)
    if path.suffix == ".py" and path.is_relative_to(ROOT / "src"):
        assert "\t" not in text


DOCUMENTS = sorted(path for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    """Relative links of the documents, and anchors within them."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), target
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there.read_text()), target


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
