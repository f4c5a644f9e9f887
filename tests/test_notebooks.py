"""Every notebook runs, and the text that it was committed with is what it prints."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def printed(notebook: nbformat.NotebookNode) -> list[str]:
    """What the cells print and return, pictures left out; what one cell prints may arrive in pieces."""
    outputs = [cell.get("outputs", []) for cell in notebook.cells]
    streams = ["".join(output["text"] for output in cell if output.output_type == "stream") for cell in outputs]
    return streams + [
        output["data"]["text/plain"] for cell in outputs for output in cell if output.output_type == "execute_result"
    ]


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), str(ROOT / "kernels")]))
    notebook = nbformat.read(path, as_version=4)
    committed = printed(notebook)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    assert printed(notebook) == committed
