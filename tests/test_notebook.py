"""The notebook, executed as Colab and Kaggle would, on the embedded miniature and with few steps."""

import os
import sys
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
    """Give the settings in the first code cell other values."""
    cell = next(cell for cell in notebook.cells if cell.cell_type == "code")
    lines = cell.source.splitlines()
    for name, value in settings.items():
        (place,) = [i for i, line in enumerate(lines) if line.startswith(f"{name} = ")]
        lines[place] = f"{name} = {value!r}"
    cell.source = "\n".join(lines)


def outputs(notebook, words):
    """The outputs of the cell whose source holds `words`: (text, kinds of data)."""
    (cell,) = [cell for cell in notebook.cells if cell.cell_type == "code" and words in cell.source]
    text = "".join(out.get("text", "") for out in cell.outputs)
    return text, [kind for out in cell.outputs for kind in out.get("data", {})]


def test_it_runs_from_pictures_to_the_file(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PIP_DRY_RUN", "1")  # a test installs nothing
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.chdir(tmp_path)  # the kernel starts in notebooks/, as Jupyter does
    folder = tmp_path / "my run"
    set_to(
        notebook, DEMO=True, FOLDER=str(folder),
        TRAINING="--max-steps 12 --warmup-steps 1 --validation-count 2 --log-every 4",
        EVALUATION="--seeds 2 --steps 2",
    )  # fmt: skip
    previews = (
        folder / "lora_weights" / "my_concept.earlier" / "previews"
    )  # as a run in the making has
    previews.mkdir(parents=True)
    picture(1).save(previews / "step_000004.webp")
    client = NotebookClient(
        notebook, timeout=500, resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    )
    client.execute()
    assert "32 kept" in outputs(notebook, "preprocess.py")[0]
    assert "torch" in outputs(notebook, "lib.provenance")[0]
    assert "image/jpeg" in outputs(notebook, "contact_sheet.jpg")[1]
    assert "12 steps" in outputs(notebook, "train.py {demo}")[0]
    assert "text/html" in outputs(notebook, "train.py {demo}")[1]
    assert "image/png" in outputs(notebook, "loss.png")[1]
    assert "open " in outputs(notebook, "inference.py {demo}")[0]
    (page,) = [cell for cell in notebook.cells if "<iframe srcdoc" in cell.source]
    assert "learned" in page.outputs[0]["data"]["text/html"]
    file = folder / "lora_weights" / "my_concept" / "my_concept.safetensors"
    assert file.is_file()
    assert str(file) in str(notebook.cells[-1].outputs)
    assert not (ROOT / "requirements.notebook.txt").exists()
