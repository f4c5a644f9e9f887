"""Lightning data modules over procedural scenes: rendered pictures, and latents held in memory."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset, IterableDataset

from scale_dit.data.captions import caption
from scale_dit.data.encoding import encode_batch
from scale_dit.data.scenes import Scene, pack, render_packed, sample_scene


class PackedScenes(Dataset):
    """Scene `index` of a split, collated into renderer parameters (a dict of tensors) and captions.

    Args:
        split: One of `scenes.SPLITS`.
        count: Number of scenes.
        first: Seed of the first scene.
        aspect: Width / height.
        tokenize: Turns a batch of captions into tensors, in the worker; they are added to the batch as `tokens`.
    """

    def __init__(
        self,
        split: str,
        count: int,
        first: int = 0,
        aspect: float = 1.0,
        tokenize: Callable[[list[str]], Any] | None = None,
    ):
        self.split, self.count, self.first, self.aspect = split, count, first, aspect
        self.tokenize = tokenize

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Scene:
        return sample_scene(self.first + index, split=self.split, aspect=self.aspect)

    def collate(self, scenes: Sequence[Scene]) -> dict[str, object]:
        """Pack scenes and write their captions, in the worker."""
        captions = [caption(scene, scene.seed) for scene in scenes]
        batch: dict[str, object] = {"packed": pack(scenes), "caption": captions}
        return batch if self.tokenize is None else batch | {"tokens": self.tokenize(captions)}

    def loader(self, batch_size: int, workers: int) -> DataLoader:
        """A loader over the scenes in order."""
        return DataLoader(self, batch_size=batch_size, num_workers=workers, collate_fn=self.collate)

    def rendered(
        self, height: int, width: int, device: torch.device, batch_size: int, workers: int
    ) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Pictures `[B, 3, height, width]` in [0, 1] on `device`, each with the batch that it was rendered from."""
        for batch in self.loader(batch_size, workers):
            packed = {name: tensor.to(device) for name, tensor in batch["packed"].items()}
            yield render_packed(packed, height, width), batch


class ScenePictures(lightning.LightningDataModule):
    """Pictures `image` `[B, 3, side, side]` in [0, 1], rendered on the training device, for the autoencoder.

    Args:
        size: Side in px of training pictures: textures look alike at every scale, so small ones teach as much.
        validation_size: Side in px of held-out pictures, the base's native side.
        batch_size: Pictures a step and device.
        validation: Number of held-out whole scenes.
        photos: Share of each batch that is random crops of the photographs that scikit-image ships.
        workers: Loader processes.
    """

    def __init__(
        self,
        size: int = 128,
        validation_size: int = 256,
        batch_size: int = 64,
        validation: int = 256,
        photos: float = 0.125,
        workers: int = 4,
    ):
        super().__init__()
        self.size, self.validation_size = size, validation_size
        self.batch_size, self.validation = batch_size, validation
        self.photo_share, self.workers = photos, workers
        self.photo_pictures: list[Tensor] = load_sample_photos() if photos else []

    def train_dataloader(self) -> DataLoader:
        """Endless training scenes, other ones on every rank."""
        rank = self.trainer.global_rank if self.trainer else 0
        scenes = PackedScenes("train", count=100_000_000, first=rank * 100_000_000)
        return scenes.loader(self.batch_size, self.workers)

    def val_dataloader(self) -> DataLoader:
        """Held-out scenes."""
        return PackedScenes("validation", self.validation).loader(self.batch_size, workers=0)

    def on_after_batch_transfer(self, batch: dict[str, Any], _: int) -> dict[str, Any]:
        """Render, and put photograph crops in place of the last pictures while training."""
        size = self.size if self.trainer.training else self.validation_size
        picture = render_packed(batch["packed"], size, size)
        count = round(self.photo_share * len(picture)) if self.photo_pictures and self.trainer.training else 0
        if count:
            crops = torch.stack([self._photo_crop() for _ in range(count)])
            picture = torch.cat([picture[count:], crops.to(picture.device)])
        return {"image": picture, "caption": batch["caption"]}

    def _photo_crop(self) -> Tensor:
        photo = self.photo_pictures[int(torch.randint(len(self.photo_pictures), ()))]
        side = int(torch.randint(self.size // 2, min(photo.shape[1:]) + 1, ()))
        top, left = (int(torch.randint(extent - side + 1, ())) for extent in photo.shape[1:])
        crop = photo[None, :, top : top + side, left : left + side]
        return torch.nn.functional.interpolate(crop, size=(self.size, self.size), mode="bicubic", antialias=True)[
            0
        ].clamp(0, 1)


def load_sample_photos() -> list[Tensor]:
    """Colour photographs that scikit-image ships, `[3, H, W]` in [0, 1]."""
    from skimage import data

    pictures = [data.astronaut(), data.coffee(), data.chelsea(), data.rocket(), data.hubble_deep_field()]
    return [torch.from_numpy(picture).permute(2, 0, 1).float() / 255 for picture in pictures]


class MemoryBatches(IterableDataset):
    """Endless shuffled batches out of tensors in memory; batch k depends on the seed and k alone.

    Args:
        buckets: One dict of equally long tensors (or dicts of them) for each picture size; a batch comes from one
            bucket, buckets in proportion to their lengths.
        batch_size: Rows a batch.
        seed: Order of the batches.
        first: Index of the first batch, so that a resumed run goes on where it stopped.
    """

    def __init__(self, buckets: list[dict[str, Any]], batch_size: int, seed: int, first: int = 0):
        self.buckets, self.batch_size, self.seed, self.first = buckets, batch_size, seed, first

    def __iter__(self) -> Iterator[dict[str, Any]]:
        lengths = torch.tensor([float(len(bucket["latents"])) for bucket in self.buckets])
        for index in itertools.count(self.first):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
            bucket = self.buckets[int(torch.multinomial(lengths, 1, generator=generator))]
            rows = torch.randint(len(bucket["latents"]), (self.batch_size,), generator=generator)
            yield tree_map(lambda tensor, rows=rows: tensor[rows.to(tensor.device, non_blocking=True)], bucket)


class SceneLatents(lightning.LightningDataModule):
    """Latents and token ids of scenes for `TinyBaseModule`, rendered and encoded once, held on the training device.

    Args:
        count: Scenes a rank, over all sizes.
        batch_size: Scenes a step and device.
        sizes: `(height, width, share)`: native sizes in px, as FLUX was trained at several.
        workers: Loader processes while rendering.
        seed: Which scenes, and the order of the batches; a base that is trained further wants another one.
    """

    def __init__(
        self,
        count: int = 150_000,
        batch_size: int = 512,
        sizes: Sequence[tuple[int, int, float]] = ((256, 256, 0.7), (192, 320, 0.15), (320, 192, 0.15)),
        workers: int = 8,
        seed: int = 0,
    ):
        super().__init__()
        self.count, self.batch_size, self.sizes = count, batch_size, [tuple(size) for size in sizes]
        self.workers, self.seed = workers, seed
        self.buckets: list[dict[str, Tensor]] = []

    def setup(self, stage: str) -> None:
        """Render and encode this rank's scenes."""
        if not self.buckets:
            self.buckets = [
                self._encode_bucket(int(height), int(width), round(self.count * share), position)
                for position, (height, width, share) in enumerate(self.sizes)
            ]

    @torch.no_grad()
    def _encode_bucket(self, height: int, width: int, count: int, position: int) -> dict[str, Tensor]:
        module, device = self.trainer.lightning_module, self.trainer.strategy.root_device
        # A copy in the layout and precision in which a GPU convolves fastest.
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        vae = copy.deepcopy(module.vae).to(device, dtype, memory_format=torch.channels_last)
        part = self.seed * 1000 + self.trainer.global_rank
        first = (part * len(self.sizes) + position) * 10_000_000
        scenes = PackedScenes("train", count, first, width / height, module.tokenize)
        columns: dict[str, list[Tensor]] = {"latents": [], "clip_ids": [], "t5_ids": []}
        for picture, batch in scenes.rendered(height, width, device, 256, self.workers):
            latents = vae.encode((picture * 2 - 1).to(dtype, memory_format=torch.channels_last)).latent_dist.mean
            latents = (latents.float() - vae.config.shift_factor) * vae.config.scaling_factor
            clip_ids, t5_ids = batch["tokens"]
            columns["latents"].append(latents.bfloat16().contiguous())
            columns["clip_ids"].append(clip_ids.to(device, torch.int16))
            columns["t5_ids"].append(t5_ids.to(device, torch.int16))
        return {name: torch.cat(tensors) for name, tensors in columns.items()}

    def train_dataloader(self) -> DataLoader:
        """Endless batches from memory."""
        seed = self.seed * 1000 + self.trainer.global_rank
        return DataLoader(MemoryBatches(self.buckets, self.batch_size, seed), batch_size=None)


class ScenePairs(lightning.LightningDataModule):
    """Scenes with their own reductions as drafts, for `ScaleDiTModule`: rendered and encoded once, held in memory.

    Args:
        count: Scenes a rank.
        batch_size: Scenes a step and device.
        scale: The draft's sides are the picture's divided by it; it must be the method's.
        guidance_tokens: Further reduction of the draft, as in the method.
        workers: Loader processes while rendering.
        seed: Order of the batches.
    """

    def __init__(
        self,
        count: int = 1024,
        batch_size: int = 16,
        scale: float = 4.0,
        guidance_tokens: int | None = None,
        workers: int = 0,
        seed: int = 0,
    ):
        super().__init__()
        self.count, self.batch_size, self.scale, self.guidance_tokens = count, batch_size, scale, guidance_tokens
        self.workers, self.seed = workers, seed
        self.pairs: dict[str, Any] = {}
        self.first_batch = 0

    def setup(self, stage: str) -> None:
        """Render, reduce and encode this rank's scenes."""
        if self.pairs:
            return
        base, size = self.trainer.lightning_module.base, self.trainer.lightning_module.base_settings.native
        device = self.trainer.strategy.root_device
        base.encoders_to(device)
        encode_text = partial(base.encode_prompts, device=device)
        parts = []
        scenes = PackedScenes("train", self.count, self.trainer.global_rank * 10_000_000)
        for picture, batch in scenes.rendered(size, size, device, 64, self.workers):
            pair = encode_batch(
                picture, batch["caption"], base.encode_images, encode_text, self.scale,
                base.settings.token_size, self.guidance_tokens,
            )  # fmt: skip
            parts.append({name: pair[name] for name in ("latents", "guidance_latents", "text")})
        self.pairs = tree_map(lambda *tensors: torch.cat(tensors), *parts)

    def train_dataloader(self) -> DataLoader:
        """Endless batches from memory."""
        seed = self.seed * 1000 + self.trainer.global_rank
        return DataLoader(MemoryBatches([self.pairs], self.batch_size, seed, self.first_batch), batch_size=None)

    def state_dict(self) -> dict[str, int]:
        """How many batches were used."""
        return {"batches": self.trainer.fit_loop.epoch_loop.total_batch_idx + 1}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on behind the batches that were used."""
        self.first_batch = state_dict["batches"]


def held_out_scenes(count: int, aspect: float = 1.0, split: str = "test") -> list[Scene]:
    """The first `count` whole scenes of a split: of `test` for reported accuracies, of `validation` for choices."""
    return [sample_scene(index, split=split, zoom=1.0, aspect=aspect) for index in range(count)]


__all__ = ["MemoryBatches", "PackedScenes", "SceneLatents", "ScenePairs", "ScenePictures", "held_out_scenes"]
