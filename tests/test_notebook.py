"""The notebook, executed like on Colab and Kaggle, on the embedded miniature with few steps; torch for an older driver."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT, picture
from nbclient import NotebookClient

NOTEBOOK = ROOT / "notebooks" / "train_on_your_photos.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_committed_without_outputs(notebook):
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None


def set_to(notebook, **settings):
    """Change settings in the first code cell."""
    cell = next(cell for cell in notebook.cells if cell.cell_type == "code")
    lines = cell.source.splitlines()
    for name, value in settings.items():
        (place,) = [i for i, line in enumerate(lines) if line.startswith(f"{name} = ")]
        lines[place] = f"{name} = {value!r}"
    cell.source = "\n".join(lines)


def outputs(notebook, words):
    """(text, kinds of data) of the outputs of the cell whose source contains `words`."""
    (cell,) = [cell for cell in notebook.cells if cell.cell_type == "code" and words in cell.source]
    text = "".join(out.get("text", "") for out in cell.outputs)
    return text, [kind for out in cell.outputs for kind in out.get("data", {})]


def test_it_runs_from_images_to_the_file(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PIP_DRY_RUN", "1")  # nothing is installed
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.chdir(tmp_path)  # the kernel starts in notebooks/, as Jupyter does
    folder = tmp_path / "my run"
    set_to(
        notebook,
        DEMO=True,
        FOLDER=str(folder),
        TRAINING="--max-steps 4 --warmup-steps 1 --validation-count 2 --log-every 2 --preview-prompts {caption}",
        EVALUATION="--seeds 2 --steps 1",
    )
    previews = folder / "lora_weights" / "my_concept.earlier" / "previews"  # like those of a run in progress
    previews.mkdir(parents=True)
    picture(1).save(previews / "step_000004.webp")
    client = NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    client.execute()
    assert "32 kept" in outputs(notebook, "preprocess.py")[0]
    assert "torch" in outputs(notebook, "lib.provenance")[0]
    assert "image/jpeg" in outputs(notebook, "contact_sheet.jpg")[1]
    assert "4 steps" in outputs(notebook, "train.py {demo}")[0]
    assert "text/html" in outputs(notebook, "train.py {demo}")[1]
    assert "image/png" in outputs(notebook, "loss.png")[1]
    assert "open " in outputs(notebook, "inference.py {demo}")[0]
    (page,) = [cell for cell in notebook.cells if "<iframe srcdoc" in cell.source]
    assert "learned" in page.outputs[0]["data"]["text/html"]
    file = folder / "lora_weights" / "my_concept" / "my_concept.safetensors"
    assert file.is_file()
    assert str(file) in str(notebook.cells[-1].outputs)
    assert not (ROOT / "requirements.notebook.txt").exists()


# ---- torch for an older driver, the command in README.md ----------------------------------------------


def pip(*arguments, path=None):
    """(exit status, output) of pip install --dry-run, without an index and without the environment's settings."""
    pytest.importorskip("pip")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
    environment |= dict(PIP_CONFIG_FILE=os.devnull, PYTHONPATH=str(path or ""))
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def installed(folder, **versions):
    """A folder of empty packages of these versions."""
    for name, version in versions.items():
        place = folder / f"{name}-{version}.dist-info"
        place.mkdir(parents=True)
        (place / "METADATA").write_text(metadata(name, version))
        (place / "RECORD").write_text("")
    return folder


def metadata(name, version):
    needs = "Requires-Dist: torch==2.12.1\n" if name == "torchvision" else ""
    return f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}"


def test_the_build_for_an_older_driver_satisfies_the_requirements(tmp_path):
    pins = [line for line in (ROOT / "requirements.txt").read_text().split() if line.startswith("torch")]
    wanted = [pin for pin in pins if pin.startswith(("torch==", "torchvision=="))]
    (line,) = [line for line in (ROOT / "README.md").read_text().splitlines() if "/whl/cu126" in line]
    assert line.split()[:5] == ["pip", "install", *wanted, "--index-url"]
    # That index has versions with a local suffix, which satisfy a pin without one.
    for pin in wanted:
        name, version = pin.split("==")
        wheel, info = f"{name}-{version}+cu126", f"{name}-{version}+cu126.dist-info"
        with zipfile.ZipFile(tmp_path / f"{wheel}-py3-none-any.whl", "w") as file:
            file.writestr(f"{info}/METADATA", metadata(name, f"{version}+cu126"))
            file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            file.writestr(f"{info}/RECORD", "")
    code, output = pip("--ignore-installed", "--find-links", tmp_path, *wanted)
    assert code == 0, output
    assert "+cu126" in output.splitlines()[-1]
    assert output.splitlines()[-1].startswith("Would install")


def test_requirements_keep_that_build_but_no_other_version(tmp_path):
    pins = (ROOT / "requirements.txt").read_text().split()
    own = [pin for pin in pins if pin.startswith(("torch==", "torchvision=="))]
    versions = {name: f"{version}+cu126" for name, version in (pin.split("==") for pin in own)}
    code, output = pip(*own, path=installed(tmp_path / "same", **versions))
    assert code == 0, output
    assert "Would install" not in output
    assert "+cu126" in output
    # A newer version, as `pip install torch` will install some day, would be replaced.
    other = installed(tmp_path / "other", **versions | dict(torch="99.0+cu126"))
    code, output = pip(*own, path=other)
    assert code != 0, output
