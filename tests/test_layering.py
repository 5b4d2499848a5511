"""The arrow of imports: configs <- pss, baselines <- recsys <- launch.

pss and baselines never import each other, but for the frame that makes rows into a drop-in for TorchRec's module: it is
no method, and a second one beside it would have to be the same.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "configs": set(),
    "pss": {"configs"},
    "baselines": {"configs"},
    "recsys": {"configs", "pss", "baselines"},
    "launch": {"configs", "pss", "baselines", "recsys"},
}
FRAME = "from pss.collection import ComputedEmbeddingBagCollection"


def imported_packages(source: str) -> set[str]:
    """Our packages that a file imports, absolutely or not."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found.add((node.module or "").partition(".")[0])
    return found & ALLOWED.keys()


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_follow_the_arrow(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        source = path.read_text()
        if package == "baselines":
            source = source.replace(FRAME, "")
        wrong = imported_packages(source) - ALLOWED[package] - {package}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_the_check_sees_an_import_inside_a_function():
    assert imported_packages("def f():\n    from recsys.data import x\n    import launch.train") == {"recsys", "launch"}


def test_no_file_is_named_after_nothing():
    for package in ALLOWED:
        names = {path.stem for path in (ROOT / package).rglob("*.py")}
        assert not names & {"utils", "helpers", "common", "misc"}
