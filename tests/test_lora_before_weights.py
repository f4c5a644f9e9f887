"""A LoRA that does not fit is refused before the base's weights are read: here they are garbage under true configs."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import commands
import pytest
import torch
from hydra import compose, initialize_config_dir
from lora_helpers import linear_layers, random_lora
from rich.console import Console
from safetensors.torch import save_file
from small_bases import GEOMETRY, SETTINGS, flux, klein
from training_runs import ROOT

from scale_dit.embedded.build import build_transformer
from scale_dit.errors import UserError
from scale_dit.evaluation.entry import evaluate_config
from scale_dit.generation import Loras, Sampling, collect_pictures, collect_prompts, generate
from scale_dit.lightning import ScaleDiTModule
from scale_dit.lora import LoraSettings, add_lora, save_lora
from scale_dit.lora_exchange import StyleLora
from scale_dit.method import Method
from scale_dit.models.settings import BaseSettings

METHOD = Method(scale=2)
OTHERS = {"width": lambda: flux("tiny"), "depth": lambda: flux("distilled"), "family": klein}
SAID = {
    "width": r"a FluxTransformer2DModel of 2 double and 2 single blocks of width 32.* \d+ are unexpected "
    r"\(single_transformer_blocks.*of another size \(x_embedder.lora_B.weight is \[256, 4\] instead of \[32, 4\]",
    "depth": r"width 32.* 20 are unexpected \(single_transformer_blocks.1.attn.to_q.lora_A",
    "family": r"width 32.*22 are missing \(transformer_blocks.0.ff.net.0.proj.lora_A",
}


@pytest.fixture(scope="module")
def unreadable(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> BaseSettings:
    """The small base with garbage for weights."""
    folder = tmp_path_factory.mktemp("unreadable") / "small"
    shutil.copytree(small_folder, folder)
    for file in folder.rglob("*.safetensors"):
        file.write_bytes(b"garbage")
    return BaseSettings.of(str(folder))


def own_of(transformer: torch.nn.Module, folder: Path) -> str:
    """A LoRA of Scale-DiT's for a transformer, said to be the small base's."""
    add_lora(transformer, LoraSettings(4, 4))
    return str(save_lora(transformer, folder, LoraSettings(4, 4), {"base": SETTINGS.name} | METHOD.summary))


def style_of(transformer: torch.nn.Module, folder: Path) -> str:
    """A style for all layers of a transformer."""
    tensors = random_lora(transformer, linear_layers(transformer))
    save_file({f"transformer.{key}": value for key, value in tensors.items()}, folder / "style.safetensors")
    return str(folder / "style.safetensors")


def picture(base: BaseSettings, loras: Loras, output: Path) -> list[Path]:
    """Generate one, as a command does."""
    sampling = Sampling(steps=1, draft_steps=1)
    pictures = collect_pictures(collect_prompts("sand", None), base, METHOD, sampling)
    return generate(pictures, base, METHOD, sampling, output, loras=loras, device="cpu", console=Console(quiet=True))


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("kind", ["own", "theirs", "style"])
def test_generation_refuses_what_does_not_fit(unreadable, kind, other, tmp_path):
    if kind == "own":
        loras = Loras(own_of(OTHERS[other](), tmp_path))
    elif kind == "theirs":
        loras = Loras(style_of(OTHERS[other](), tmp_path), own_base="small")
    else:
        loras = Loras(styles=[StyleLora(style_of(OTHERS[other](), tmp_path))])
    said = r"does not fit this base.*width 32.*unexpected .*Select the base" if kind != "own" else SAID[other]
    with pytest.raises(UserError, match=said):
        picture(unreadable, loras, tmp_path / "pictures")
    assert not (tmp_path / "pictures").exists()


def test_a_style_of_kohyas_for_the_other_family_is_refused(unreadable, tmp_path):
    name, path = "lora_unet_double_stream_modulation_img_lin", tmp_path / "style.safetensors"
    save_file({f"{name}.lora_down.weight": torch.ones(2, 32), f"{name}.lora_up.weight": torch.ones(192, 2)}, path)
    with pytest.raises(UserError, match=f"not one of this base's family.*such as {name}"):
        picture(unreadable, Loras(styles=[StyleLora(str(path))]), tmp_path / "pictures")


def test_a_base_with_its_transformer_in_a_file_is_told_by_its_configs(unreadable, tmp_path):
    """No weights but the file's names and shapes are read."""
    save_file(build_transformer(GEOMETRY).state_dict(), tmp_path / "transformer.safetensors")
    base = replace(unreadable, transformer_file=str(tmp_path / "transformer.safetensors"))
    with pytest.raises(UserError, match="does not fit this base"):
        picture(base, Loras(own_of(flux("tiny"), tmp_path)), tmp_path / "pictures")


def test_what_fits_goes_on_to_the_weights(unreadable, tmp_path):
    loras = Loras(own_of(flux("small"), tmp_path), styles=[StyleLora(style_of(build_transformer(GEOMETRY), tmp_path))])
    loras.check(unreadable)
    with pytest.raises(Exception, match=r"(?i)safetensor|header|garbage|not a valid"):
        picture(unreadable, loras, tmp_path / "pictures")


def test_training_refuses_a_first_lora_that_does_not_fit(unreadable, tmp_path):
    path = own_of(flux("tiny"), tmp_path)
    with pytest.raises(UserError, match=SAID["width"]):
        ScaleDiTModule(unreadable, METHOD, LoraSettings(4, 4), initial_lora=path)


def test_the_layers_to_adapt_are_known_before_anything_loaded_a_family():
    """In another process: in this one every family is loaded. The demo's training begins so."""
    code = (
        "from scale_dit.lora_targets import TARGETS, target_modules; assert not TARGETS; "
        "from scale_dit.models.settings import BaseSettings; "
        "from scale_dit.planning.components import transformer_on_meta; "
        f"assert target_modules(transformer_on_meta(BaseSettings.of({str(ROOT / 'assets' / 'tiny-flux')!r})))"
    )
    process = commands.context().Process(target=exec, args=(code, {}))
    process.start()
    process.join()
    assert process.exitcode == 0


def test_evaluation_refuses_what_does_not_fit(unreadable, tmp_path):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("eval", overrides=[
            "metrics=scenes", "logger=csv", "n=1", "scale=2", f"base.path={unreadable.path}", "base.name=small",
            "base.native=128", "base.text_length=24", f"lora.path={own_of(flux('tiny'), tmp_path)}", "device=cpu",
            f"paths.output_dir={tmp_path / 'evaluation'}",
        ])  # fmt: skip
    with pytest.raises(UserError, match=SAID["width"]):
        evaluate_config(cfg)
    assert not (tmp_path / "evaluation").exists()
