"""The Triton kernels without a GPU: as torch wants operators, and compiled for Hopper as they are meant to be."""

from __future__ import annotations

import re
import subprocess
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from test_attention import LAYOUTS, random_inputs

from scale_dit.attention import triton as backend
from scale_dit.layout import Layout

triton = pytest.importorskip("triton")

from scale_dit_kernels.attention import TILES  # noqa: E402
from triton import knobs  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.experimental.gluon import language as gl  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
STREAM = re.compile(r"(Q|K|V|O|G|D|DQ|DK|DV)_")
FLOATS = ("lse", "part_out", "part_lse", "log_sums", "deltas", "parts", "key_parts", "value_parts")
INTEGERS = ("items", "entries", "reads", "image_places", "guidance_places", "merges", "work", "starts", "pairs")


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_operator_keeps_the_rules_of_torch(name):
    layout = LAYOUTS[name]
    text, image, guidance = random_inputs(layout)
    nothing = image[0].detach()[:, :0]
    parts = (*(text or (nothing,) * 3), *image, *(guidance or (nothing,) * 2))
    parts = tuple(part.detach().clone().requires_grad_() for part in parts)
    checks = torch.library.opcheck(backend.windowed_attention, (*parts, layout.json, 0.3))
    assert set(checks.values()) == {"SUCCESS"}
    torch.autograd.gradcheck(
        lambda *each: backend.windowed_attention(*each, layout.json, 0.3)[0], parts, fast_mode=True
    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_survives_its_text(name):
    assert Layout.from_json(LAYOUTS[name].json) == LAYOUTS[name]


def signature(kernel, constants: dict) -> tuple[dict, dict]:
    """Types of a kernel's arguments, bfloat16 streams aligned to 16 bytes, and the attributes that say so."""
    types, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        aligned = [["tt.divisibility", 16]]
        if name in constants:
            types[name] = "constexpr"
        elif STREAM.match(name):
            types[name] = ("*bf16", "i32", "i32", "i32")
            attributes |= {(place, part): aligned for part in range(4)}
        elif name in FLOATS + INTEGERS:
            types[name] = "*fp32" if name in FLOATS else "*i32"
            attributes[(place,)] = aligned
        else:
            types[name] = "fp32" if name in ("scale", "factor") else "i32"
    return types, attributes


def assemble(source, folder: Path, **options) -> tuple[str, str]:
    """What the assembler reports of a kernel compiled for Hopper, and its machine code."""
    with knobs.compilation.scope(), knobs.nvidia.scope(), redirect_stdout(StringIO()) as report:
        knobs.compilation.always_compile = True  # out of the cache there is no report
        knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.metadata.shared <= 227 * 1024
    (folder / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    code = subprocess.run(
        [TOOLS / "nvdisasm", "-c", folder / "kernel.cubin"], capture_output=True, text=True, check=True
    )
    return report.getvalue(), code.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "name", "blocks", "stages"),
    [("forward", "_forward", TILES[2][0], 3), ("backward", "_query_gradients", TILES[2][1], 3)],
)
def test_portable_kernels_compile_for_hopper_without_spills(module, name, blocks, stages, tmp_path):
    kernel = getattr(__import__(f"scale_dit_kernels.{module}", fromlist=[name]), name)
    constants = {"BLOCK_M": blocks[0], "BLOCK_N": blocks[1], "HEAD_DIM": 128, "PRECISION": "tf32"}
    types, attributes = signature(kernel, constants)
    source = ASTSource(kernel, signature=types, constexprs=constants, attrs=attributes)
    report, code = assemble(source, tmp_path, num_warps=4, num_stages=stages)
    assert "HGMMA" in code
    assert re.search(r"\b0 bytes spill stores", report), report


def assemble_for_hopper(kernel, head_dim: int, stages: dict, folder: Path) -> tuple[str, str]:
    """A kernel of the `hopper_` modules with bfloat16 streams, as `assemble` gives it."""
    columns = 64
    boxes, tiles = (gl.NVMMASharedLayout(128, 16, rank) for rank in (4, 2))
    rows = gl.NVMMASharedLayout(0, 32, 2)
    constants = {"HEAD_DIM": head_dim, "COLUMNS": columns, "BOX_LAYOUT": boxes, "TILE_LAYOUT": tiles, **stages}
    if kernel.__name__ == "key_gradients":
        constants["ROW_LAYOUT"] = rows
    types, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            types[name] = "constexpr"
        elif re.match(r"[qkvg]_", name):
            types[name] = f"tensordesc<bf16[1, 64, 1, {columns}],{boxes!r}>"
        elif name in ("log_sums", "deltas") and "ROW_LAYOUT" in constants:
            types[name] = f"tensordesc<fp32[1, 64],{rows!r}>"
        else:
            pointers = dict.fromkeys(FLOATS, "*fp32") | dict.fromkeys(INTEGERS, "*i32")
            kind = "*bf16" if STREAM.match(name) else pointers.get(name)
            types[name] = kind or ("fp32" if name in ("scale", "factor") else "i32")
            if kind or re.match(r"(o|dq|dk|dv)_", name):
                attributes[(place,)] = [["tt.divisibility", 16]]
    source = GluonASTSource(kernel, signature=types, constexprs=constants, attrs=attributes)
    return assemble(source, folder, num_warps=4, maxnreg=168)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128])
def test_hopper_makes_weights_while_products_run_and_spills_nothing_then(head_dim, tmp_path):
    from scale_dit_kernels import hopper

    _, code = assemble_for_hopper(hopper._forward, head_dim, {"STAGES": hopper.stages(head_dim)}, tmp_path)
    # The first loop over wholly allowed tiles: between the wait for the logits and the wait for the output.
    body = code.split("WARPGROUP.DEPBAR.LE gsb0, 0x1")[1].split("WARPGROUP.DEPBAR.LE gsb0, 0x0")[0]
    assert body.count("MUFU.EX2") >= 64
    assert "HGMMA" not in body
    assert len(re.findall(r"\b(?:STL|LDL)\b", body)) <= 2  # at the loop's end; none among the exponentials


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", ["query_gradients", "key_gradients"])
def test_products_of_hoppers_gradients_are_under_way_together(name, head_dim, tmp_path):
    from scale_dit_kernels import hopper_backward

    kernel, tile = getattr(hopper_backward, name), 64 * head_dim * 2
    names, counts = (
        (("K_STAGES", "V_STAGES"), hopper_backward.row_stages(tile))
        if name == "query_gradients"
        else (("KV_STAGES", "STAGES"), hopper_backward.column_stages(tile))
    )
    report, code = assemble_for_hopper(kernel, head_dim, dict(zip(names, counts, strict=True)), tmp_path)
    assert "serialized" not in report, report
    # The first loop over wholly allowed tiles, from its first product to its last wait.
    products = code.split("HGMMA", 1)[1].split("WARPGROUP.DEPBAR.LE gsb0, 0x0")
    body = products[0] + (products[1] if name == "query_gradients" else "")
    assert body.count("MUFU.EX2") >= 32
    assert len(re.findall(r"\b(?:STL|LDL)\b", body)) <= 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "name", "blocks"),
    [("forward", "_forward", TILES[2][0]), ("backward", "_query_gradients", TILES[2][1]),
     ("backward", "_key_gradients", TILES[2][1])],
)  # fmt: skip
def test_portable_kernels_fit_into_the_shared_memory_of_desktop_cards(module, name, blocks):
    kernel = getattr(__import__(f"scale_dit_kernels.{module}", fromlist=[name]), name)
    constants = {"BLOCK_M": blocks[0], "BLOCK_N": blocks[1], "HEAD_DIM": 128, "PRECISION": "tf32"}
    types, attributes = signature(kernel, constants)
    source = ASTSource(kernel, signature=types, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 89, 32), options={"num_warps": 4, "num_stages": 3})
    assert compiled.metadata.shared <= 99 * 1024
