"""Tables of studies: what was measured again replaces what it repeats, and nothing else is lost."""

import csv

import pytest

from scale_dit.errors import UserError
from scale_dit.evaluation import studies


@pytest.fixture
def table(tmp_path):
    return tmp_path / "study" / "results.csv"


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return [(row["what"], row["loss"], row["command"]) for row in csv.DictReader(file)]


def test_a_row_replaces_the_one_with_its_key_and_command(table, monkeypatch):
    monkeypatch.setattr(studies, "running_command", lambda: "first")
    studies.add_rows(table, [{"what": "a", "loss": 1}, {"what": "b", "loss": 2}], keys=("what",))
    monkeypatch.setattr(studies, "running_command", lambda: "second")
    studies.add_rows(table, [{"what": "a", "loss": 3}], keys=("what",))
    monkeypatch.setattr(studies, "running_command", lambda: "first")
    studies.add_rows(table, [{"what": "b", "loss": 4}], keys=("what",))
    assert read(table) == [("a", "1", "first"), ("a", "3", "second"), ("b", "4", "first")]


def test_other_columns_are_an_error_that_leaves_the_table_alone(table):
    studies.add_rows(table, [{"what": "a", "loss": 1}], keys=("what",))
    before = table.read_bytes()
    with pytest.raises(UserError, match=r"psnr.*another file"):
        studies.add_rows(table, [{"what": "a", "psnr": 1}], keys=("what",))
    assert table.read_bytes() == before
