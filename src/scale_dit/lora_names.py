"""Names that trainers give the layers of a transformer: diffusers', its authors', and either with underscores.

The converters of diffusers are not used: they leave out what they do not know, ask for FLUX.1's own width and do not
swap the halves of FLUX.2's last modulation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

AuthorsLayers = Mapping[str, tuple[str, ...]]
"""A layer's name in the authors' own code -> the layers that it is split into in diffusers; `{}`: number of the block.
"""

ENDING = re.compile(r"\.lora[._](A|B|down|up)(\.[^.]+)?\.weight$|\.(down|up)\.weight$")
"""The end of a matrix's name, with the adapter's name in it or without."""
LETTERS = {"A": "A", "down": "A", "B": "B", "up": "B"}
BEGINNING = re.compile(r"^(base_model\.model\.|diffusion_model\.|transformer\.|lora_unet_|lora_transformer_|lycoris_)+")
"""What peft and other trainers write before a layer's name."""
BLOCK = re.compile(r"^((?:single_|double_)?(?:transformer_)?blocks[._])(\d+)(?=[._])")
SHIFT_BEFORE_SCALE = ("final_layer.adaLN_modulation.1",)
"""Layers whose output is (shift, scale) in the authors' code and (scale, shift) in diffusers."""


def split_name(name: str) -> tuple[str, str] | None:
    """The layer and `A` or `B` of a matrix's name, `None` for what is no matrix of a LoRA.

    >>> split_name("transformer.x_embedder.lora_down.weight")
    ('transformer.x_embedder', 'A')
    """
    found = ENDING.search(name)
    return None if found is None else (name[: found.start()], LETTERS[found[1] or found[3]])


def bare_name(layer: str) -> str:
    """A layer's name without what trainers write before it."""
    return BEGINNING.sub("", layer)


class LayerNames:
    """The layers of a family by whatever name.

    Args:
        authors_layers: The family's.
    """

    def __init__(self, authors_layers: AuthorsLayers):
        self.targets: dict[str, tuple[str, ...]] = {}
        self.swapped: set[str] = set()
        for authors, targets in authors_layers.items():
            for spelling in (authors, authors.replace(".", "_")):
                self.targets[spelling] = targets
                if authors in SHIFT_BEFORE_SCALE:
                    self.swapped.add(spelling)
            for target in targets:
                self.targets[target] = self.targets[target.replace(".", "_")] = (target,)

    def translate(self, layer: str, down: Tensor | None, up: Tensor | None) -> dict[str, Tensor] | None:
        """The matrices of a layer by peft's names (`x_embedder.lora_A.weight`) in diffusers' layers.

        Args:
            layer: As a file names it.
            down, up: `[rank, in]` and `[out, rank]`; `None` is left out.

        Returns:
            `None`: the family has no such layer.
        """
        bare = bare_name(layer)
        block = BLOCK.match(bare)
        generic = bare if block is None else f"{block[1]}{{}}{bare[block.end() :]}"
        targets = self.targets.get(generic)
        if targets is None:
            # A diffusers name that this transformer may lack: whether it does is told by its layers.
            return _pair(bare, down, up) if layer.startswith("transformer.") else None
        if up is not None and generic in self.swapped:
            shift, scale = up.tensor_split(2)
            up = torch.cat([scale, shift])
        number = "" if block is None else block[2]
        found: dict[str, Tensor] = {}
        for target, part in zip(targets, _rows(down, up, len(targets)), strict=True):
            found |= _pair(target.format(number), down, part)
        return found


def _rows(down: Tensor | None, up: Tensor | None, count: int) -> list[Tensor | None]:
    """The rows of `up` for query, key, value and, as the fourth, a feed-forward layer that is wider."""
    if up is None or count == 1:
        return [up] * count
    width = len(up) // count if count == 3 or down is None else down.shape[-1]
    return [up[i * width : None if i == count - 1 else (i + 1) * width] for i in range(count)]


def _pair(layer: str, down: Tensor | None, up: Tensor | None) -> dict[str, Tensor]:
    matrices = {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
    return {name: matrix for name, matrix in matrices.items() if matrix is not None}
