from __future__ import annotations

import pytest
import torch

from scale_dit.picture_files import (
    fingerprint,
    load_picture,
    read_provenance,
    save_picture,
    to_float,
    to_uint8,
)


def test_values_beyond_the_range_are_clamped_and_rounded_not_wrapped():
    """torchmetrics' own conversion truncates: 1.004 * 255 = 256.02 became 0 in uint8."""
    values = torch.tensor([-0.1, 0.0, 0.4999, 1.0, 1.004]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert to_uint8(values)[0, 0, 0].tolist() == [0, 0, 127, 255, 255]


def test_nan_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        to_uint8(torch.full((1, 3, 2, 2), float("nan")))


def test_a_picture_comes_back_to_the_bit_with_its_provenance(tmp_path):
    image = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    path = tmp_path / "arm" / "0.png"
    save_picture(image, path, {"prompt": "a “red” ring, 100 %", "seed": 3})
    assert torch.equal(load_picture(path), image)
    assert read_provenance(path) == {"prompt": "a “red” ring, 100 %", "seed": 3}
    assert [file.name for file in path.parent.iterdir()] == ["0.png"]
    assert torch.equal(to_uint8(to_float(image)), image)


def test_a_missing_or_truncated_file_has_no_provenance(tmp_path):
    path = tmp_path / "0.png"
    assert read_provenance(path) is None
    save_picture(torch.rand(3, 64, 64), path, {"seed": 1})
    path.write_bytes(path.read_bytes()[:500])
    assert read_provenance(path) is None


def test_the_fingerprint_sees_every_setting():
    base = fingerprint({"steps": 18, "base": "tiny"}, "a", 0)
    assert base == fingerprint({"base": "tiny", "steps": 18}, "a", 0)
    others = [fingerprint({"steps": 19, "base": "tiny"}, "a", 0), fingerprint({"steps": 18, "base": "tiny"}, "b", 0)]
    assert base not in [*others, fingerprint({"steps": 18, "base": "tiny"}, "a", 1)]
