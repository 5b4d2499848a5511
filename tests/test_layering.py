"""Imports go one way: pss <- baselines <- recsys <- launch, with configs beside the ground; sub-packages included.

A room is a sub-package, or a module that lies at the top of its package. Rooms may import what stands in ALLOWED, and
no chain of imports leads back to the room where it began.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("configs", "pss", "baselines", "recsys", "launch")
RECSYS = ("runs", "data", "models", "embedding", "profile", "train", "report", "compare", "studies", "bench", "cost")
BELOW_STUDIES = [f"recsys.{room}" for room in RECSYS if room not in ("compare", "studies", "bench", "cost")]
ALLOWED = {
    "configs": set(),
    "pss": set(),
    "baselines": {"pss"},
    "recsys.runs": {"configs"},
    "recsys.data": {"configs"},
    "recsys.embedding": {"configs", "pss", "baselines"},
    "recsys.models": {"configs", "recsys.embedding"},
    "recsys.profile": {"configs", "recsys.runs"},
    "recsys.train": {
        "configs", "pss", "baselines",
        "recsys.runs", "recsys.data", "recsys.models", "recsys.embedding", "recsys.profile",
    },
    "recsys.report": {"configs", "recsys.runs"},
    "recsys.compare": {"configs", "recsys.runs", "recsys.report"},
    "recsys.studies": {"configs", "pss", *BELOW_STUDIES},
    "recsys.bench": {"configs", "pss", *BELOW_STUDIES},
    "recsys.cost": {"configs", "recsys.report", "recsys.data", "recsys.runs"},
    "launch.runners": {"launch.cli", "configs", "pss", "baselines", *(f"recsys.{room}" for room in RECSYS)},
    "launch": {"configs", "pss", "baselines", *(f"recsys.{room}" for room in RECSYS)},
}  # fmt: skip


def imported_modules(source: str) -> set[str]:
    """Modules of ours that a file imports, wherever in the file it does."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.partition(".")[0] in PACKAGES}


def room_of(module: str) -> str:
    """recsys.data.criteo.Options -> recsys.data; pss.hashing.locate -> pss.hashing; pss.RobeEmbedding… -> pss."""
    parts = module.split(".")
    first = ROOT.joinpath(*parts[:2])
    is_room = len(parts) > 1 and (first.is_dir() or first.with_suffix(".py").exists())
    return ".".join(parts[:2]) if is_room else parts[0]


def find_arrows(package: str) -> dict[tuple[str, str], list[str]]:
    """(room, room that it imports) -> the files that do."""
    arrows: dict[tuple[str, str], list[str]] = {}
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        here = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for module in imported_modules(path.read_text()):
            if (there := room_of(module)) != here:
                arrows.setdefault((here, there), []).append(str(path.relative_to(ROOT)))
    return arrows


def allowed_for(room: str) -> set[str]:
    return ALLOWED[room if room in ALLOWED else room.partition(".")[0]]


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_follow_the_arrow(package):
    for (here, there), files in find_arrows(package).items():
        within = here not in ALLOWED and there.partition(".")[0] == package
        is_allowed = within or there in allowed_for(here) or there.partition(".")[0] in allowed_for(here)
        assert is_allowed, f"{here} must not import {there}: {', '.join(files)}"


def test_every_room_of_recsys_has_its_arrows():
    assert {path.name for path in (ROOT / "recsys").iterdir() if (path / "__init__.py").exists()} == set(RECSYS)


@pytest.mark.parametrize("package", ["pss", "recsys", "launch"])
def test_no_chain_of_imports_leads_back(package):
    arrows: dict[str, set[str]] = {}
    for here, there in find_arrows(package):
        arrows.setdefault(here, set()).add(there)

    def follow(room: str, chain: tuple[str, ...]) -> None:
        assert room not in chain, " -> ".join((*chain, room))
        for there in arrows.get(room, ()):
            if there != package:
                follow(there, (*chain, room))

    for room in arrows:
        if room != package:
            follow(room, ())


def test_the_check_sees_an_import_inside_a_function():
    source = "def f():\n    from recsys.data.dataset import x\n    import launch.train"
    assert {room_of(module) for module in imported_modules(source)} == {"recsys.data", "launch.train"}


def test_no_file_is_named_after_nothing():
    for package in PACKAGES:
        names = {path.stem for path in (ROOT / package).rglob("*.py")}
        assert not names & {"utils", "helpers", "common", "misc"}
