"""The house's rules, checked on the source itself."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "pema"
ROOMS = (
    *("tasks", "owner", "serving", "memory", "adapter", "generation", "evaluation", "privacy", "methods"),
    *("experiments", "pages", "cli"),
)
FOUNDATION = ("errors", "locks", "files", "schema", "tensors", "console", "signature", "__init__")


def imports(path: Path) -> set[str]:
    """Rooms or foundation modules of pema that a module imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("pema.")}
    return found


MODULES = sorted(path.relative_to(SOURCE) for path in SOURCE.rglob("*.py"))


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_go_only_leftwards(module: Path) -> None:
    room = module.parts[0] if len(module.parts) > 1 else None
    if room is None:
        allowed = {*FOUNDATION} if module.stem in FOUNDATION[:-1] else {*FOUNDATION, *ROOMS}
    else:
        allowed = {*FOUNDATION, *ROOMS[: ROOMS.index(room) + 1]}
    wrong = {name for name in imports(SOURCE / module) if name in ROOMS or name in FOUNDATION} - allowed
    assert not wrong, f"{module} imports from its right: {sorted(wrong)}"


def test_every_folder_is_a_room() -> None:
    folders = {path.name for path in SOURCE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders == set(ROOMS)


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_no_pickle_no_print_no_bare_except(module: Path) -> None:
    tree = ast.parse((SOURCE / module).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            assert not names & {"pickle", "joblib", "dill", "cloudpickle"}
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"print", "torch.load", "torch.save", "pickle.load"}
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None


def test_no_module_is_named_after_nothing() -> None:
    assert not {path.stem for path in SOURCE.rglob("*.py")} & {"utils", "util", "helpers", "helper", "common", "misc"}
