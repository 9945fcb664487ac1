"""The rules of the house (CONTRIBUTING.md): what lies where, who may import whom, how long a file is."""

import ast
import graphlib
import importlib.util
import os
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

from lib.imports import bytecode_note

SCRIPTS = {"preprocess", "train", "inference", "play", "study"} | {
    path.stem for path in ROOT.glob("train_experiment_*.py")
}
LONGEST_FILE, LONGEST_SCRIPT, LONGEST_FUNCTION = 500, 500, 80
# These read from top to bottom: the training loop, and one without optimisations.
LONG_FUNCTIONS = {"train.py:train": 160, "tests/plain_loop.py:plain_loop": 90}


def modules():
    """{dotted name: path} of the project's own Python files."""
    places = [*ROOT.glob("*.py")]
    for folder in ("lib", "demo", "prompts", "bench", "tests"):
        places += (ROOT / folder).rglob("*.py")
    names = {}
    for path in places:
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imports(path, known):
    """The project's modules that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            named = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        found |= {name for name in named if name in known}
    return found


KNOWN = modules()
GRAPH = {name: imports(path, KNOWN) for name, path in KNOWN.items()}


def within(name, *rooms):
    return any(name == room or name.startswith(room + ".") for room in rooms)


def importers(room, *forbidden):
    """(importer, imported) for each file of `room` that imports something `forbidden`."""
    return sorted(
        (name, other)
        for name, others in GRAPH.items()
        if within(name, room)
        for other in others
        if within(other, *forbidden)
    )


def test_the_root_holds_the_scripts_and_the_folders_that_a_user_knows():
    done = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip("no git checkout")
    top = {name.split("/")[0] for name in done.stdout.splitlines()}
    assert top == {
        *(f"{script}.py" for script in SCRIPTS),
        "data",
        "prompts",
        "lora_weights",
        "results",
        "lib",
        "demo",
        "bench",
        "notebooks",
        "tests",
        "requirements.txt",
        "requirements-dev.txt",
        "pyproject.toml",
        "Makefile",
        "README.md",
        "CONTRIBUTING.md",
        "LICENSE",
        ".ci",
        ".github",
        ".gitignore",
    }


def test_scripts_use_lib_and_nothing_in_lib_uses_a_script():
    for script in SCRIPTS:
        others = {name for name in GRAPH[script] if not within(name, "lib")}
        assert others == ({"train"} if script.startswith("train_experiment") else set()), script
    assert importers("lib", *SCRIPTS, "demo", "prompts", "bench", "tests") == []


def test_training_and_evaluation_do_not_use_each_other():
    assert importers("lib.training", "lib.evaluation") == []
    assert importers("lib.evaluation", "lib.training") == []


def test_kernels_know_models_not_recipes():
    assert importers("lib.kernels", "lib.training", "lib.evaluation", "lib.dataset") == []


def test_tests_do_not_use_the_bench():
    assert importers("tests", "bench") == []


def test_no_file_imports_itself_through_others():
    tuple(graphlib.TopologicalSorter(GRAPH).static_order())  # raises CycleError, naming the files


@pytest.mark.parametrize("name", sorted(n for n in KNOWN if within(n, "lib", "demo", "prompts", "tests", *SCRIPTS)))
def test_files_and_functions_are_short_enough_to_read(name):
    text = KNOWN[name].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= (LONGEST_SCRIPT if name in SCRIPTS else LONGEST_FILE)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            label = f"{KNOWN[name].relative_to(ROOT).as_posix()}:{node.name}"
            most = LONG_FUNCTIONS.get(label, LONGEST_FUNCTION)
            assert node.end_lineno - node.lineno < most, label


def test_every_file_says_what_it_is_for():
    for path in KNOWN.values():
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


HEAVY = ("torch", "diffusers", "transformers", "bitsandbytes", "matplotlib", "wandb", "scipy")


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("train", ["--data-dir", "/nowhere"]),
        ("inference", ["--lora-dir", "/nowhere"]),
        ("play", ["--lora-dir", "/nowhere"]),
        ("preprocess", ["--data-dir", "/nowhere"]),
    ],
)
def test_a_missing_folder_is_named_before_anything_heavy_is_imported(script, options):
    code = (
        f"import sys, runpy\nsys.argv = ['{script}.py', *{options}]\n"
        f"try:\n    runpy.run_path('{script}.py', run_name='__main__')\nexcept SystemExit as stop:\n"
        f"    print('heavy:', stop.code, *[n for n in {HEAVY} if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "/nowhere" in done.stderr
    assert done.stdout.splitlines()[-1] == "heavy: 1", done.stdout + done.stderr


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_options_are_answered_before_anything_heavy_is_imported(script):
    """--help and a wrong option need neither torch nor a second of anybody's time."""
    for options in (["--help"], ["--no-such-option"], ["--seed", "x"]):
        code = (
            f"import sys, runpy\nsys.argv = ['{script}.py', *{options}]\n"
            f"try:\n    runpy.run_path('{script}.py', run_name='__main__')\n"
            f"except SystemExit:\n    pass\nprint('heavy:', *[n for n in {HEAVY} if n in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == "heavy:", done.stdout + done.stderr


def test_training_starts_without_a_compiler_metrics_or_charts():
    code = """
import os, sys
from lib.imports import import_first, quick_imports
with quick_imports():
    import_first()
    from lib.evaluation.generation import preview_generator
    from lib.training import early_stopping, run_folder
unwanted = "torch._inductor.compile_fx", "lpips", "matplotlib", "scipy.optimize", "scipy.stats", "torchmetrics", "wandb"
print("TORCHDYNAMO_DISABLE" in os.environ, *[name for name in unwanted if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["False"], done.stdout + done.stderr[-2000:]


def test_a_slow_start_without_bytecode_is_explained(tmp_path, monkeypatch):
    package = tmp_path / "torch/__init__.py"
    package.parent.mkdir()
    package.touch()
    found = importlib.util.spec_from_file_location("torch", package)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    assert bytecode_note() is None  # the first start writes it
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    note = bytecode_note()
    assert "PYTHONDONTWRITEBYTECODE" in note and "write it once" in note
    command = shlex.split(note.split("with: ")[1])
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    assert f"{tmp_path} cannot be written; let its owner run" in bytecode_note()
    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path / "elsewhere"))
    assert bytecode_note() is None
    monkeypatch.setattr(sys, "pycache_prefix", None)
    subprocess.run(command, check=True, env=os.environ | dict(PYTHONDONTWRITEBYTECODE="1"))
    assert bytecode_note() is None


def test_imports_pause_the_garbage_collector_and_change_nothing_else():
    """A stranger's package that is imported meanwhile finds PyTorch as it is."""
    code = """
import gc, sys
from lib.imports import quick_imports
with quick_imports():
    import torch
    stopped, compiled = gc.isenabled(), torch.compile
print(stopped, gc.isenabled(), gc.get_freeze_count() > 10**4, compiled is torch.compile, compiled.__module__)
frozen = gc.get_freeze_count()
with quick_imports():
    rest = [[] for _ in range(10**5)]
print(gc.get_freeze_count() == frozen)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["False True True True torch", "True"], done.stdout + done.stderr[-2000:]
