"""The rooms of the house stand on floors; a room imports only from floors below it."""

import ast
import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import cachefreeze

PACKAGE = Path(__file__).parents[1] / "cachefreeze"
# The floors from the ground up. A package's own files stand on floors of their own inside it.
FLOORS = [
    floor.split()
    for floor in (
        "errors",
        "lineage store plan",
        "freezeout models keys",
        "cache data report",
        "training integrations",
        "probing",
        "train probe",
    )
]
INSIDE = {
    "lineage": [
        ["structure", "devices", "blocks", "calls", "frames", "undone"],
        ["soundness", "contents", "changes"],
        ["operations"],
        ["known", "modes", "modules"],
        ["unloaded"],
        ["signature"],
        ["recording", "program", "rowwise"],
        ["flow"],
        ["module_calls", "cut"],
        ["tracer", "plan", "late"],
        ["replayer", "axes", "extension", "module_outputs"],
        ["explanation"],
    ],
    "keys": [
        ["bits", "bytecode", "environment", "hashing"],
        ["device_digests"],
        ["device_watch"],
        ["code_reads", "inputs", "fingerprint", "weights"],
        ["external_state"],
        ["operations"],
    ],
    "cache": [
        [
            "codec",
            "row_layout",
            "padding",
            "moving_weights",
            "memory",
            "fetching",
            "messages",
            "views",
            "agreed_costs",
            "away_parameter",
        ],
        ["row_memory"],
        ["state", "deferred_writes", "statistics", "row_history", "item_records"],
        ["row_table", "arguments", "offloading"],
        ["entries"],
        ["cache_state"],
        [
            "lazy_loading",
            "missed_time",
            "batch_inputs",
            "frozen_state",
            "module_call",
            "optimizer_steps",
            "weight_loads",
        ],
        ["loader", "kept_values"],
        ["row_axes"],
        ["selection"],
        ["comparison", "guards", "runner", "shallower_cut"],
        ["row_collector"],
        ["cached_trace"],
        ["final_check"],
        ["cached_module"],
        ["activation_cache"],
    ],
    "store": [
        ["files"],
        ["index", "format", "leases"],
        ["journal", "locks", "objects"],
        ["codecs", "commits"],
        ["budget"],
        ["segment", "reading"],
        ["bucket"],
        ["exchange"],
        ["mirror"],
        ["found", "appending"],
        ["rows"],
        ["directory"],
        ["inspect", "places"],
        ["inspect_objects", "copying"],
    ],
    "plan": [["costs", "fill", "overhead", "views"], ["forecast"]],
    "freezeout": [["schedule", "freezing"], ["units"], ["scheduler"]],
    "models": [["layers", "hugging_face"], ["wrn", "densenet", "vgg", "ready_made"]],
    "data": [["order"], ["images"], ["inputs", "folders"], ["sets"]],
    "training": [
        ["options", "device", "randomness", "terminal", "interrupts", "launch"],
        ["ranks"],
        ["settings", "checkpoint", "run_folder", "measuring", "compiling", "pixels"],
        ["command_line", "run_state"],
        ["network", "step", "resume", "progress"],
        ["finite", "time_left", "validation"],
        ["summary"],
        ["preview", "trainer"],
        ["run"],
    ],
    "integrations": [["lightning"]],
    "probing": [
        ["heads", "rows", "backbone", "fits", "options", "pictures", "turns"],
        ["probe"],
        ["grid"],
        ["saved"],
        ["program"],
    ],
    "report": [
        ["cache_contents", "metrics", "run_results", "time_breakdown"],
        ["figures", "summary_text"],
        ["page"],
        ["compare", "html_report", "probe_page"],
    ],
}


def level(parts: tuple[str, ...]) -> tuple[int, int]:
    """Floor of a module, and floor inside its package (a package itself is its own roof)."""
    room = next(number for number, rooms in enumerate(FLOORS) if parts[0] in rooms)
    if parts[0] not in INSIDE:
        return room, 0
    inside = INSIDE[parts[0]]
    if len(parts) == 1:
        return room, len(inside)
    return room, next(number for number, rooms in enumerate(inside) if parts[1] in rooms)


def imports(path: Path) -> set[tuple[str, ...]]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the floor"
            names = [node.module or ""]
            if node.module == "cachefreeze":
                names = [f"cachefreeze.{alias.name}" for alias in node.names]
            elif names[0].startswith("cachefreeze."):  # a package's modules may be named, too
                rooms = [f"{node.module}.{alias.name}" for alias in node.names]
                files = [PACKAGE.joinpath(*room.split(".")[1:]) for room in rooms]
                names = [
                    room if file.with_suffix(".py").exists() else names[0]
                    for room, file in zip(rooms, files, strict=True)
                ]
        else:
            continue
        found |= {tuple(name.split(".")[1:]) for name in names if name.startswith("cachefreeze")}
    return found


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_from_floors_below(path: Path) -> None:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    here = tuple(part for part in parts if part != "__init__")
    for other in imports(path):
        if other[0] == here[0]:  # of one package: its inner floors count
            assert level(other) < level(here), f"{here} imports {other}"
        else:
            assert level(other)[0] < level(here)[0], f"{here} imports {other}"


def test_the_schedule_knows_no_torch() -> None:
    code = (
        "import sys, importlib.util as util\n"
        f"spec = util.spec_from_file_location('schedule', "
        f"{str(PACKAGE / 'freezeout' / 'schedule.py')!r})\n"
        "module = sys.modules['schedule'] = util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "assert module.Schedule(3, 10).freeze_steps[0] == 6\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_top_level_holds_the_programs_and_the_errors() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} <= {"__init__", "train", "probe", "errors"}
    packages = [path for path in PACKAGE.iterdir() if (path / "__init__.py").exists()]
    assert len(packages) <= 12


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_is_longer_than_450_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 450


def test_the_plan_is_arithmetic_and_knows_no_torch() -> None:
    for path in (PACKAGE / "plan").glob("*.py"):
        assert "torch" not in {name.split(".")[0] for name in _all_imports(path)}


def test_the_store_takes_arrays_and_bytes_and_names_no_tensor() -> None:
    for path in (PACKAGE / "store").glob("*.py"):
        assert "torch" not in {name.split(".")[0] for name in _all_imports(path)}


def _all_imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def test_what_is_exported_is_there_and_documented() -> None:
    for name in cachefreeze.__all__:
        assert getattr(cachefreeze, name).__doc__, f"{name} has no docstring"


EXAMPLES = ("freezeout.freezing", "freezeout.scheduler")


@pytest.mark.parametrize("room", EXAMPLES)
def test_what_docstrings_show_happens(room: str) -> None:
    found = doctest.testmod(importlib.import_module(f"cachefreeze.{room}"))
    assert found.failed == 0
    assert found.attempted
