"""The architecture, checked on the source: allowed imports between packages, and unused modules."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "pema"
FOUNDATION = frozenset(
    {
        "cache",
        "errors",
        "exchange",
        "devices",
        "extras",
        "files",
        "lifeline",
        "locks",
        "schema",
        "tensors",
        "console",
        "signature",
        "own",
        "processes",
        "relay",
    }
)
"""Modules below all rooms."""

ROOMS = {
    "storage": set(),
    "tasks": set(),
    "owner": {"storage"},
    "owner.sources": set(),
    "owner.models": {"owner", "owner.sources"},
    "owner.local": {"owner", "owner.models"},
    "owner.client": {"owner", "owner.models"},
    "owner.llamacpp": {"owner", "owner.client", "owner.models", "owner.sources", "tasks"},
    "owner.logprobs": {"owner", "owner.client", "owner.llamacpp", "owner.models", "owner.sources"},
    "owner.engines": {"owner", "owner.client", "owner.llamacpp", "owner.logprobs", "owner.models", "owner.sources"},
    "owner.openai_api": {"owner", "owner.client", "owner.models", "owner.sources", "tasks"},
    "owner.mask": {"owner"},
    "serving": {"owner", "owner.local", "owner.client", "owner.mask"},
    "cluster": {"owner"},
    "memory": {"cluster", "owner", "storage", "tasks"},
    "adapter": {"cluster", "memory", "owner", "storage", "tasks"},
    "generation": {"adapter", "cluster", "owner", "storage", "tasks"},
    "evaluation": {"generation", "adapter", "cluster", "memory", "owner", "owner.models", "owner.sources", "tasks"},
    "methods": {"evaluation", "generation", "adapter", "memory", "owner", "owner.local", "owner.models", "tasks"},
    "experiments": {"methods", "evaluation", "tasks"},
    "privacy": {"evaluation", "adapter", "memory", "owner"},
    "pages": {"experiments", "evaluation", "generation", "adapter", "owner", "tasks"},
    "cli": {
        *("pages", "privacy", "experiments", "evaluation", "generation", "adapter", "memory", "cluster", "owner"),
        *("storage", "tasks"),
    },
}
"""The rooms that each room may import, itself and the foundation aside.

`owner` is the face that a data owner sees: the contract, the head bundle, what crosses the network, and opening a PLM
by its name. Behind it lie the rooms of the parties: what is asked of a model (`MODELS`), the engine that runs a PLM,
the client of a server, the mask. Weights are for these and for `methods`, which hold PEMA against those that need them.
"""

MODELS = {"owner.derivation", "owner.loading", "owner.positions", "owner.probing", "owner.weights"}
"""The modules of the room `owner.models`."""

EDGES = {
    "__main__": {"cli"},
    "__init__": {
        "api",
        "adapter",
        "cluster",
        "evaluation",
        "generation",
        "memory",
        "owner",
        "owner.client",
        "owner.local",
        "owner.logprobs",
        "tasks",
    },
    "api": {"adapter", "generation", "memory", "owner", "storage", "tasks"},
    "owner.loading": {"tasks"},  # the token that ends a turn in a chat template
    "owner.openai_api.following": {"owner.local"},  # advances the sessions of several texts in one pass
    "owner.opening": {
        "owner.client",
        "owner.engines",
        "owner.llamacpp",
        "owner.local",
        "owner.logprobs",
        "owner.mask",
        "owner.openai_api",
        "owner.sources",
    },
    "generation.decoding": {"owner.models"},  # batches of one length, where positions depend on it
    "generation.replicated": {"owner.models"},  # as generation.decoding
    "generation.rounds": {"memory"},  # builds memories of the contexts that adapters reach
    "generation.classification": {"owner.models"},  # as generation.decoding
    "experiments.description": {"owner", "memory", "generation"},  # settings of the PLM, of building and generation
    "experiments.estimate": {"owner", "owner.local", "memory", "adapter"},  # measures the PLM, and models trainings
    "experiments.plan": {"owner"},  # the PLM that the estimate measures
    "experiments.requirements": {"owner", "owner.local"},  # what a PLM gives, its weights included
    "experiments.workplace": {"owner", "owner.local"},  # opens PLMs, and keeps one for the methods
    "cli.options": {
        "owner.openai_api",
        "owner.sources",
    },  # a name that leads nowhere is refused before torch is imported
    "cli.serve": {"owner.local", "serving"},
    "cli.recover": {"owner.logprobs"},
    "cli.release": {"owner.mask"},
}
"""What single modules may import beyond their room."""


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str:
    """The innermost room that holds a module, or the module itself where none does."""
    parts = module.split(".")
    if ".".join(parts[:2]) in MODELS:
        return "owner.models"
    names = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((name for name in names if name in ROOMS), parts[0])


def imported(source: str) -> set[str]:
    """What a module imports of pema, at its top or inside a function, without the leading "pema."."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("pema.") for name in names if name.startswith("pema.")}


def violations(module: str, source: str) -> list[str]:
    """The imports of a module that its room may not have, and private names of other modules."""
    room = room_of(module)
    allowed = {room, *FOUNDATION, *ROOMS.get(room, ()), *EDGES.get(module, ())}
    if module in FOUNDATION:
        allowed = set(FOUNDATION)
    names = imported(source)
    wrong = [name for name in names if room_of(name) not in allowed and name != "__version__"]
    wrong += [name for name in names if any(part.startswith("_") for part in name.split(".")) and name != "__version__"]
    return sorted(wrong)


MODULES = {name_of(path) or "__init__": path for path in sorted(SOURCE.rglob("*.py"))}


@pytest.mark.parametrize("module", MODULES)
def test_imports_follow_the_table(module):
    wrong = violations(module, MODULES[module].read_text(encoding="utf-8"))
    assert not wrong, f"{module} may not import {', '.join(wrong)}"


def test_the_page_on_the_architecture_names_every_package_and_every_module_below_them():
    root = SOURCE.parent.parent
    page = (root / "docs" / "architecture.md").read_text(encoding="utf-8")
    below = page[page.index("Below all packages") : page.index("| package |")]
    assert not [module for module in FOUNDATION if f"`{module}`" not in below]
    assert not [name for name in ROOMS if "." not in name and f"\n| `{name}/` |" not in page]
    files = re.findall(r"`(\w+/[\w/]+\.py)`", page)
    assert not [file for file in files if not ((SOURCE / file).exists() or (root / file).exists())]


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("adapter.module", "from pema.owner.local import LocalPLM"),
        ("adapter.module", "from pema.serving.policy import Policy"),
        ("adapter.module", "from pema.generation import plugin"),
        ("generation.plugin", "import pema.owner.local.running"),
        ("experiments.compare", "from pema.owner.local import LocalPLM"),
        ("cli.build", "from pema.serving.policy import Policy"),
        ("memory.build", "from pema.memory.reader import _block"),
        ("owner.contract", "def f():\n    from pema.owner.client.remote import RemotePLM"),
        ("files", "from pema.memory.reader import Memory"),
    ],
)
def test_what_the_table_forbids_is_found(module, line):
    assert module in MODULES
    source = MODULES[module].read_text(encoding="utf-8")
    assert not violations(module, source)
    assert violations(module, f"{source}\n{line}\n")


def test_every_folder_is_in_the_table_and_the_table_has_no_cycle():
    folders = {path.name for path in SOURCE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders == {room for room in ROOMS if "." not in room}
    done = set()
    while left := {room for room in ROOMS if room not in done}:
        ready = {room for room in left if ROOMS[room] <= done}
        assert ready, f"a circle among {sorted(left)}"
        done |= ready


def test_no_modules_import_one_another_in_a_circle():
    def module_of(name):
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        return name

    graph = {
        module: {module_of(name) for name in imported(path.read_text(encoding="utf-8"))} - {module, ""}
        for module, path in MODULES.items()
        if module != "__init__"
    }
    while free := {module for module, others in graph.items() if not others & graph.keys()}:
        graph = {module: others for module, others in graph.items() if module not in free}
    assert not graph, f"circles among {sorted(graph)}"


def test_no_entry_of_the_table_is_unused():
    used = {name: set() for name in (*ROOMS, *EDGES)}
    for module, path in MODULES.items():
        for name in imported(path.read_text(encoding="utf-8")):
            used[room_of(module)].add(room_of(name)) if room_of(module) in used else None
            if module in EDGES:
                used[module].add(room_of(name))
    for name, rooms in (ROOMS | EDGES).items():
        assert rooms <= used[name], f"{name}: {sorted(rooms - used[name])}"


@pytest.mark.parametrize("module", MODULES)
def test_no_pickle_no_print_no_bare_except(module):
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            assert not names & {"pickle", "joblib", "dill", "cloudpickle"}
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"print", "torch.load", "torch.save", "pickle.load"}
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None


def test_modules_of_tests_have_different_names():
    """pytest imports them by name: of two with the same one, only the first is found."""
    names = Counter(path.name for path in Path(__file__).parent.rglob("*.py") if path.name != "conftest.py")
    assert [name for name, count in names.items() if count > 1] == []


def test_no_module_is_named_after_nothing():
    assert not {path.stem for path in SOURCE.rglob("*.py")} & {"utils", "util", "helpers", "helper", "common", "misc"}
