"""Check the structure of the packages: layers without import cycles, independent parts, short files.

The sources are read with `ast`, so that imports inside functions count, and nothing is imported.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("hover_batch", "kd")
MAX_LINES = {"hover_batch": 400, "kd": 400, "benchmarks": 500, "tests": 500}

LAYERS = (
    (
        "errors",
        "files",
        "formatting",
        "progress",
        "geometry",
        "geojson",
        "taxonomy",
        "tiatoolbox_import",
        "uncertainty",
        "logs",
        "version",
        "environment",
    ),
    ("config", "cohort", "model", "shard", "bucket"),
    ("slide", "store", "nuclei", "metrics"),
    ("export", "report", "quality", "dataset", "sampling"),
    ("blocks", "pipeline", "sampled", "seconds", "slide_pictures", "slide_work", "plan", "stored_run", "status")
    + ("exporting", "compare", "reporting", "view", "diff"),
    ("executor",),
    ("segment", "doctor", "cli_errors"),
    ("api", "commands"),
    ("cli",),
    ("__main__",),
)
"""The rooms of hover_batch, ground up. A room imports from its own layer and from those below."""
LAYER_OF = {room: layer for layer, rooms in enumerate(LAYERS) for room in rooms}

KD_LAYERS = ("panels", "data", "evaluation", "teaching", "training", "package", "sweep", "commands", "cli")
"""The folders and files of kd, ground up, each a layer of its own, so that no two folders import each other."""
KD_LAYER_OF = {room: layer for layer, room in enumerate(KD_LAYERS)}

PARTS = ("slide", "model", "store", "nuclei", "export")
"""They do one thing each to what they are given; hover_batch.pipeline joins them."""
OPEN_TO_PARTS = (
    "hover_batch.model.card",
    "hover_batch.model.heads",
    "hover_batch.cohort.record",
    "hover_batch.cohort.layout",
)
"""What a part may import from another one and from the cohort: words that all share, and no work."""
OPEN_TO_KD = (
    "errors",
    "files",
    "formatting",
    "progress",
    "geometry",
    "geojson",
    "taxonomy",
    "uncertainty",
    "config",
    "model",
    "slide",
    "nuclei",
    "metrics",
)
OPEN_ABOVE_KD = ("cli", "commands")
"""Rooms that may import kd: to mount its commands, and to use it in theirs."""
MODULES_OPEN_TO_KD = (
    "hover_batch.executor.map_tasks",
    "hover_batch.cohort.record",
    "hover_batch.cohort.run_lock",
)
"""What kd may ask of other rooms: to do a function's work over many items, to open a slide by its record, and to lock a
folder."""


@dataclass(frozen=True)
class Import:
    """One import: `source` and `target` are dotted module names, the target as deep as the tree knows it."""

    source: str
    target: str
    place: str


def faults_of_imports(root: Path) -> list[str]:
    """Every broken rule among the imports of the packages under `root`, as `file:line: what is wrong`."""
    modules = {_module_name(path, root): path for path in _python_files(root, PACKAGES)}
    imports = [i for name, path in modules.items() for i in _imports(name, path, root, set(modules))]
    faults = [f"{i.place}: {fault}" for i in imports if (fault := _fault(i))]
    for package, layer_of, layers in (("hover_batch", LAYER_OF, "LAYERS"), ("kd", KD_LAYER_OF, "KD_LAYERS")):
        faults += [
            f"{modules[name].relative_to(root)}: {name} is in no layer; give it one in {layers}"
            for name in modules
            if (room := _room(name, package)) and room not in layer_of
        ]
    return faults + _circles(set(modules), imports)


def _circles(modules: set[str], imports: list[Import]) -> list[str]:
    """A circle in each folder that has one. A folder inside counts as one part, so that no two folders import each
    other, even where their files do not form a circle."""
    faults = []
    for folder in sorted({name.rpartition(".")[0] for name in modules} - {""}):
        graph: dict[str, set[str]] = {}
        for i in imports:
            source, target = _part(i.source, folder), _part(i.target, folder)
            if source and target and source != target and i.target in modules:
                graph.setdefault(source, set()).add(target)
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as circle:
            faults.append(f"imports run in a circle: {' ← '.join(circle.args[1])}")
    return faults


def _part(module: str, folder: str) -> str | None:
    """The child of `folder` that is or holds `module`, the folder for its own __init__; None for modules elsewhere."""
    depth = folder.count(".") + 2
    return ".".join(module.split(".")[:depth]) if _inside(module, folder) else None


def faults_of_length(root: Path) -> list[str]:
    """Files of the packages, the benchmarks and the tests that are too long to be read in one sitting."""
    return [
        f"{path.relative_to(root)}: {lines} lines, more than {most}"
        for folder, most in MAX_LINES.items()
        for path in _python_files(root, (folder,))
        if (lines := len(path.read_text("utf-8").splitlines())) > most
    ]


def _fault(i: Import) -> str | None:
    source_room, target_room = _room(i.source), _room(i.target)
    if _inside(i.target, "ray") and source_room != "executor":
        return "ray is imported outside hover_batch.executor"
    if _inside(i.source, "kd") and target_room and target_room not in OPEN_TO_KD and i.target not in MODULES_OPEN_TO_KD:
        known = ", ".join((*OPEN_TO_KD, *MODULES_OPEN_TO_KD))
        return f"kd imports {i.target}; of hover_batch it may import only {known}"
    if _inside(i.source, "hover_batch") and _inside(i.target, "kd") and source_room not in OPEN_ABOVE_KD:
        return f"{i.source} imports kd; only hover_batch's {' and '.join(OPEN_ABOVE_KD)} may"
    source_part, target_part = _room(i.source, "kd"), _room(i.target, "kd")
    if source_part and target_part and KD_LAYER_OF.get(target_part, 0) > KD_LAYER_OF.get(source_part, len(KD_LAYERS)):
        return f"{i.source} imports {i.target}, which is in a layer above"
    if not source_room or not target_room:
        return None
    if LAYER_OF.get(target_room, 0) > LAYER_OF.get(source_room, len(LAYERS)):
        return f"{i.source} imports {i.target}, which is in a layer above"
    if source_room in PARTS and target_room != source_room and i.target not in OPEN_TO_PARTS:
        if target_room in PARTS:
            return f"part {source_room} imports {i.target}; these parts are joined by hover_batch.pipeline"
        if target_room == "cohort":
            return f"part {source_room} imports {i.target}; of the cohort it may import record and layout"
    return None


def _room(module: str, package: str = "hover_batch") -> str | None:
    """`model` for hover_batch.model.heads; None for the package itself and for modules of others."""
    parts = module.split(".")
    return parts[1] if parts[0] == package and len(parts) > 1 else None


def _inside(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def _python_files(root: Path, folders: tuple[str, ...]) -> list[Path]:
    return [path for folder in folders for path in sorted((root / folder).rglob("*.py"))]


def _module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(module: str, path: Path, root: Path, modules: set[str]) -> Iterator[Import]:
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text("utf-8"), str(path))):
        for target in _targets(node, package, modules):
            yield Import(module, target, f"{path.relative_to(root)}:{getattr(node, 'lineno', 0)}")


def _targets(node: ast.AST, package: str, modules: set[str]) -> list[str]:
    """Names of the modules that one statement or call imports; empty where it imports none."""
    match node:
        case ast.Import(names=names):
            return [name.name for name in names]
        case ast.ImportFrom(module=base, names=names, level=level):
            if level:
                above = package.split(".")[: len(package.split(".")) - (level - 1)]
                base = ".".join([*above, base] if base else above)
            # `from package import name` imports the submodule where there is one of that name.
            return [full if (full := f"{base}.{name.name}") in modules else str(base) for name in names]
        case ast.Call(
            func=ast.Name(id="__import__" | "import_module") | ast.Attribute(attr="import_module"),
            args=[ast.Constant(value=str(name)), *_],
        ):
            return [name]
    return []


def test_imports_keep_to_the_floors() -> None:
    assert faults_of_imports(ROOT) == []


def test_no_file_is_too_long() -> None:
    assert faults_of_length(ROOT) == []


def _tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    return root


SOUND = {
    "hover_batch/__init__.py": "",
    "hover_batch/errors.py": "import math",
    "hover_batch/geometry.py": "from hover_batch.errors import InputError",
    "hover_batch/cohort/__init__.py": "",
    "hover_batch/cohort/layout.py": "from hover_batch import errors",
    "hover_batch/cohort/manifest.py": "from hover_batch.cohort import layout",
    "hover_batch/model/__init__.py": "",
    "hover_batch/model/heads.py": "",
    "hover_batch/model/cache.py": "from hover_batch.cohort import layout",
    "hover_batch/model/predict.py": "import torch\nfrom .heads import Heads",
    "hover_batch/nuclei/__init__.py": "",
    "hover_batch/nuclei/stitch.py": "from hover_batch.model.heads import Heads",
    "hover_batch/store.py": "from hover_batch.cohort import layout\nfrom hover_batch.model import heads",
    "hover_batch/pipeline.py": "from hover_batch.model.predict import predict\nfrom hover_batch import store",
    "hover_batch/executor/__init__.py": "",
    "hover_batch/executor/map_tasks.py": "",
    "hover_batch/executor/ray.py": "import ray\nfrom hover_batch import pipeline",
    "hover_batch/cli.py": "def kd():\n    import kd.cli",
    "kd/__init__.py": "",
    "kd/training/losses.py": "from hover_batch.model.heads import Heads",
    "kd/training/train.py": "from kd.training import losses",
    "kd/teaching/teach.py": "from hover_batch.executor.map_tasks import map_tasks",
    "kd/cli.py": "from kd.training import losses\nfrom hover_batch.errors import InputError",
}
"""A small house that keeps every rule; the planted faults below are added to it."""


def test_a_sound_house_has_no_faults(tmp_path: Path) -> None:
    root = _tree(tmp_path, SOUND)
    assert faults_of_imports(root) == []
    assert faults_of_length(root) == []


@pytest.mark.parametrize(
    ("file", "text", "fault"),
    [
        ("hover_batch/errors.py", "import hover_batch.config", "hover_batch/errors.py:1: .* layer above"),
        ("hover_batch/geometry.py", "def f():\n    from hover_batch import pipeline", "geometry.py:2: .* layer above"),
        ("hover_batch/geometry.py", "from . import pipeline", "geometry.py:1: .* layer above"),
        ("hover_batch/cohort/layout.py", "from ..cli import app", "layout.py:1: .* layer above"),
        ("hover_batch/attic.py", "", "attic.py: .* is in no layer"),
        ("hover_batch/store.py", "from hover_batch.nuclei.stitch import stitch", "part store imports .*stitch"),
        ("hover_batch/store.py", "from hover_batch.model import predict", "part store imports .*predict"),
        ("hover_batch/store.py", "import importlib\nimportlib.import_module('hover_batch.model')", "part store"),
        ("hover_batch/nuclei/stitch.py", "from hover_batch.cohort.manifest import read", "record and layout"),
        (
            "hover_batch/pipeline.py",
            "from kd.training.losses import student_loss",
            "imports kd; only hover_batch's cli and commands may",
        ),
        ("kd/training/losses.py", "from hover_batch import store", "kd imports hover_batch.store"),
        ("kd/teaching/teach.py", "from hover_batch.executor import ray", "kd imports hover_batch.executor.ray"),
        ("kd/cli.py", "def run():\n    import hover_batch.cohort.layout", "kd imports hover_batch.cohort.layout"),
        ("hover_batch/pipeline.py", "def f():\n    import ray", "pipeline.py:2: ray is imported outside"),
        ("kd/training/losses.py", "from ray.util import ActorPool", "losses.py:1: ray is imported outside"),
        ("hover_batch/cohort/layout.py", "def f():\n    from hover_batch.cohort.manifest import g", "in a circle"),
        ("hover_batch/cohort/manifest.py", "import hover_batch.model.heads", "in a circle: .*cohort.* ← .*model"),
        ("kd/training/losses.py", "from kd.training import train", "in a circle"),
        ("kd/evaluation/scores.py", "from kd.training import losses", "evaluation/scores.py:1: .* layer above"),
        ("kd/data/samples.py", "def f():\n    from ..teaching.teach import teach", "samples.py:2: .* layer above"),
        ("kd/panels.py", "import kd.data.cache", "panels.py:1: .* layer above"),
        ("kd/sweep.py", "from kd.commands.train import train", "sweep.py:1: .* layer above"),
        ("kd/attic/old.py", "", "attic/old.py: .* is in no layer; give it one in KD_LAYERS"),
    ],
)
def test_a_planted_fault_is_reported(tmp_path: Path, file: str, text: str, fault: str) -> None:
    faults = faults_of_imports(_tree(tmp_path, SOUND | {file: text}))
    assert len(faults) == 1
    assert re.search(fault, faults[0])


def test_a_long_file_is_reported(tmp_path: Path) -> None:
    most = MAX_LINES["kd"]
    root = _tree(tmp_path, SOUND | {"kd/long.py": "x = 1\n" * (most + 1), "kd/short.py": "x = 1\n" * most})
    assert faults_of_length(root) == [f"kd/long.py: {most + 1} lines, more than {most}"]


PRIVATE = re.compile(
    # In pieces, so that this file does not hold what it looks for.
    "|".join(
        [
            *(r"\.".join(host) for host in (("pypi", "org"), ("pythonhosted", "org"), ("registry", "npmjs"))),
            r"\.".join(("deb", "debian", "org")),
            *(f"/{folder}/" for folder in ("work", "farm")),
        ]
    )
)
"""Hosts of package registries, and paths that exist on one machine only."""


def private_names(root: Path, files: list[str]) -> list[str]:
    """`file:line: text` of every line in the text files among `files` (relative to `root`) that holds such a name."""
    found = []
    for name in files:
        content = (root / name).read_bytes()
        if b"\0" not in content:
            lines = enumerate(content.decode("utf-8", "replace").splitlines(), start=1)
            found += [f"{name}:{number}: {line.strip()}" for number, line in lines if PRIVATE.search(line)]
    return found


def test_committed_files_name_no_registry_and_no_machine() -> None:
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout: which files are committed is not known")
    # The owner of the checkout may be another user than the one who runs the tests, as in a container.
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    files = [name for name in listed.split("\0") if (ROOT / name).is_file()]
    assert "pyproject.toml" in files
    assert "uv.lock" not in files, "uv.lock holds download addresses; requirements.lock is the one to commit"
    assert private_names(ROOT, files) == []


def test_a_planted_private_name_is_reported(tmp_path: Path) -> None:
    host, folder = ".".join(("files", "pythonhosted", "org")), "/".join(("", "work", "main"))
    texts = {"a.md": f"fine\nsee {host}", "b.md": f"{folder} here", "c.md": "fine", "d.bin": f"\0{host}"}
    faults = private_names(_tree(tmp_path, texts), list(texts))
    assert faults == [f"a.md:2: see {host}", f"b.md:1: {folder} here"]
