"""Machine profiles: measured, kept, found again; and what is free."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace

import pytest
import torch

from scale_dit.errors import UserError
from scale_dit.planning import calibrate, practice
from scale_dit.planning.machine import SHIPPED, Machine, cache_folder, file_name, find_machine, free_bytes
from scale_dit.planning.trace import Operation, Trace

CPU = torch.device("cpu")
ROUND = Machine("card", "torch.bfloat16", 100.0, 50.0, 20.0, 10.0, 1000.0, 0.5, 1.0, "")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.parametrize(
    ("operation", "seconds"),
    [
        (Operation("matmul", 1000, 100), 10.0),
        (Operation("convolution", 1000, 100), 20.0),
        (Operation("attention", 1000, 100), 50.0),
        (Operation("windowed", 1000, 100), 100.0),
        (Operation("wide", 1000, 100), 50.0),
        (Operation("elementwise", 0, 3000), 3.0),
        (Operation("matmul", 1, 1), 0.5),
    ],
)
def test_an_operation_takes_what_binds_it(operation, seconds):
    assert ROUND.seconds(Trace(Counter({operation: 3}))) == 3 * seconds


def test_wide_attention_has_a_rate_of_its_own_once_it_is_measured():
    assert replace(ROUND, wide=5.0).seconds(Trace(Counter({Operation("wide", 1000, 100): 1}))) == 200.0


def test_the_users_own_profile_comes_first():
    shipped = find_machine(CPU, torch.float32)
    assert shipped == Machine.load(SHIPPED / "cpu-float32.json")
    own = replace(shipped, matmul=1.0)
    own.save(cache_folder() / file_name("cpu", torch.float32))
    assert find_machine(CPU, torch.float32) == own
    assert find_machine(CPU, torch.bfloat16) == shipped, "a processor without a profile in this precision"


def test_a_broken_profile_says_how_to_get_another(tmp_path):
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(UserError, match=r"python -m scale_dit\.planning\.calibrate"):
        Machine.load(tmp_path / "broken.json")


def test_shipped_profiles_are_whole():
    for path in SHIPPED.glob("*.json"):
        machine = Machine.load(path)
        assert path.name == file_name(machine.name, getattr(torch, machine.dtype.removeprefix("torch.")))
        rates = {name: value for name, value in asdict(machine).items() if isinstance(value, float)}
        assert {"matmul", "windowed", "host_copy"} <= rates.keys()
        of_gpus = "text_launch", "wide", "pinning", "group_copy", "first_encoding", "between_steps"
        assert all(value > 0 for name, value in rates.items() if name not in of_gpus)
        assert machine.versions


@pytest.mark.slow
def test_calibration_measures_this_machine(tmp_path, monkeypatch, capsys):
    for module, name, value in ((calibrate, "BATCH_SECONDS", 0.05), (practice, "RUNS", 1), (practice, "STEPS", 1)):
        monkeypatch.setattr(module, name, value)  # exact enough for these bounds
    monkeypatch.setattr("sys.argv", ["calibrate", "--device", "cpu", "--to", str(tmp_path)])
    calibrate.main()
    machine = Machine.load(tmp_path / "cpu-float32.json")
    assert str(machine) in capsys.readouterr().out
    assert 1e9 < machine.matmul < 1e14, "FLOP/s of a processor"
    assert 1e8 < machine.bandwidth < 1e12
    assert 1e-7 < machine.launch <= machine.text_launch < 1e-2
    assert set(machine.practice) == {"draft", "refine", "decode"}
    assert all(0.01 < factor < 100 for factor in machine.practice.values()), "whatever else the machine does"


def test_a_text_encoders_operations_take_their_own_least():
    assert ROUND.seconds(Trace(Counter({Operation("matmul", 1, 1): 3})), launch=2.0) == 6.0


def test_free_memory_of_the_host_is_below_all_of_it():
    import psutil

    assert 0 < free_bytes(CPU) <= psutil.virtual_memory().total
