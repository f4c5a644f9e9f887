"""Cuts, aspect buckets and the batches made of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from photo_files import dataset_of
from torch.utils.data import DataLoader

from scale_dit.data.buckets import BucketBatchSampler, bucket_sizes, nearest_bucket
from scale_dit.data.crops import Crops
from scale_dit.data.photos import collate_photos
from scale_dit.errors import UserError


class TestCrops:
    @given(
        height=st.integers(64, 4000),
        width=st.integers(64, 4000),
        zoom_high=st.sampled_from([1.0, 1.5, 8.0, None]),
        seed=st.integers(0, 1000),
        buckets=st.booleans(),
    )
    @settings(deadline=None, max_examples=60)
    def test_cuts_lie_inside_and_never_enlarge(
        self, height: int, width: int, zoom_high: float | None, seed: int, buckets: bool
    ) -> None:
        crops = Crops(64, zoom_high=zoom_high, aspect_buckets=buckets, enlarge=True)
        bucket = crops.bucket(height, width)
        left, top, right, bottom = crops.box(height, width, bucket, np.random.default_rng(seed))
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        rows, columns = crops.sizes[bucket]
        assert (bottom - top) / rows == pytest.approx((right - left) / columns, rel=1e-3)
        widest = min(height / rows, width / columns)
        assert (bottom - top) / rows >= min(1.0, widest) * 0.999
        if zoom_high == 1.0:
            assert (bottom - top) / rows == pytest.approx(widest)

    def test_zoom_is_log_uniform(self) -> None:
        crops = Crops(64, zoom_high=8)
        random = np.random.default_rng(0)
        sides = [box[2] - box[0] for box in (crops.box(1024, 1024, 0, random) for _ in range(4000))]
        octaves = np.histogram(np.log2(1024 / np.array(sides)), bins=[0, 1, 2, 3])[0] / len(sides)
        assert np.abs(octaves - 1 / 3).max() < 0.03

    def test_random_cuts_follow_seed_epoch_and_index_only(self, photo_folder: Path) -> None:
        crops = Crops(64, zoom_high=None)
        first, second = dataset_of(photo_folder, crops), dataset_of(photo_folder, crops)
        assert torch.equal(first[1]["image"], second[1]["image"])
        first.set_epoch(1)
        assert not torch.equal(first[1]["image"], second[1]["image"])
        first.set_epoch(0)
        assert torch.equal(first[1]["image"], second[1]["image"])

    def test_workers_that_live_on_see_the_new_epoch(self, photo_folder: Path) -> None:
        dataset = dataset_of(photo_folder, Crops(64, zoom_high=None))
        loader = DataLoader(dataset, batch_size=3, collate_fn=collate_photos, num_workers=1, persistent_workers=True)
        before = next(iter(loader))["image"]
        dataset.set_epoch(5)
        after = next(iter(loader))["image"]
        assert torch.equal(after, collate_photos([dataset[index] for index in range(3)])["image"])
        assert not torch.equal(before, after)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"size": 250}, "height 250 px is not a positive multiple of the token size 16 px; use 256"),
            ({"size": 0}, "use 16"),
            ({"place": "left"}, "choose one of random, centre"),
            ({"zoom_low": 0.5}, "zoom_low=0.5 must be at least 1"),
            ({"zoom_low": 4, "zoom_high": 2}, "zoom_high=2 is below zoom_low=4"),
            ({"size": (64, 128), "aspect_buckets": True}, "square"),
            ({"aspect_buckets": True, "max_aspect": 0.5}, "max_aspect=0.5"),
        ],
    )
    def test_wrong_options(self, options: dict[str, object], message: str) -> None:
        with pytest.raises(UserError, match=message):
            assert Crops(**options).sizes  # type: ignore[arg-type]


class TestBuckets:
    @given(tokens=st.integers(1, 64), max_aspect=st.floats(1, 4))
    @settings(deadline=None, max_examples=40)
    def test_sizes_are_whole_tokens_of_equal_area(self, tokens: int, max_aspect: float) -> None:
        side = tokens * 16
        sizes = bucket_sizes(side, 16, max_aspect)
        assert (side, side) in sizes
        assert len(set(sizes)) == len(sizes)
        for height, width in sizes:
            assert height % 16 == width % 16 == 0
            assert max(height, width) / min(height, width) <= max_aspect + 1e-9
            assert (width, height) in sizes
            assert abs(height * width - side**2) <= min(height, width) * 8

    def test_photographs_go_to_the_nearest_aspect(self, photo_folder: Path) -> None:
        sizes = bucket_sizes(64, 16, 2)
        assert sizes == ((80, 48), (64, 64), (48, 80))
        assert sizes[nearest_bucket(427, 640, sizes)] == (48, 80)
        dataset = dataset_of(photo_folder, Crops(64, aspect_buckets=True))
        shapes = {item["name"]: tuple(item["image"].shape[1:]) for item in (dataset[i] for i in range(3))}
        assert shapes == {"astronaut.png": (64, 64), "china.jpg": (48, 80), "more/flower.webp": (80, 48)}

    @given(
        buckets=st.lists(st.integers(0, 3), min_size=30, max_size=80),
        batch_size=st.integers(1, 4),
        ranks=st.integers(1, 3),
        drop_last=st.booleans(),
        epoch=st.integers(0, 3),
    )
    @settings(deadline=None, max_examples=60)
    def test_batches(self, buckets: list[int], batch_size: int, ranks: int, drop_last: bool, epoch: int) -> None:
        class Pictures:
            bucket_of = buckets

        batches = []
        for rank in range(ranks):
            sampler = BucketBatchSampler(Pictures(), batch_size, drop_last=drop_last, seed=7, rank=rank, ranks=ranks)
            sampler.set_epoch(epoch)
            own = list(sampler)
            assert own == list(sampler)
            assert len(own) == len(sampler)
            sampler.skip_next(1)
            assert list(sampler) == own[1:]
            assert list(sampler) == own
            batches += own
        seen = [index for batch in batches for index in batch]
        assert len(seen) == len(set(seen))
        for batch in batches:
            assert len({buckets[index] for index in batch}) == 1
            assert len(batch) == batch_size or not drop_last
        if ranks == 1 and not drop_last:
            assert sorted(seen) == list(range(len(buckets)))

    def test_epochs_differ_and_reach_the_dataset(self, photo_folder: Path) -> None:
        dataset = dataset_of(photo_folder)
        sampler = BucketBatchSampler(dataset, 1, seed=3)
        orders = set()
        for epoch in range(6):
            sampler.sampler.set_epoch(epoch)
            orders.add(str(list(sampler)))
        assert len(orders) > 1
        assert dataset.epoch == 5

    def test_lightning_sets_the_epoch(self, photo_folder: Path) -> None:
        import lightning

        class Watch(lightning.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.weight = torch.nn.Parameter(torch.zeros(()))
                self.seen: list[torch.Tensor] = []

            def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
                self.seen.append(batch["image"])
                return self.weight * batch["image"].mean()

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return torch.optim.SGD(self.parameters(), lr=0.1)

        dataset = dataset_of(photo_folder, Crops(64, zoom_high=None))
        sampler = BucketBatchSampler(dataset, 3, shuffle=False)
        module = Watch()
        trainer = lightning.Trainer(accelerator="cpu", max_epochs=2, barebones=True, use_distributed_sampler=False)
        trainer.fit(module, DataLoader(dataset, batch_sampler=sampler, collate_fn=collate_photos))
        for epoch, images in enumerate(module.seen):
            dataset.set_epoch(epoch)
            assert torch.equal(images, torch.stack([dataset[index]["image"] for index in range(3)]))
        assert len(module.seen) == 2

    def test_too_few_pictures_for_a_batch(self, photo_folder: Path) -> None:
        dataset = dataset_of(photo_folder)
        with pytest.raises(UserError, match=r"3 pictures in 1 bucket.* one batch of 4"):
            BucketBatchSampler(dataset, 4)
        with pytest.raises(UserError, match="batch_size=0"):
            BucketBatchSampler(dataset, 0)
        with pytest.raises(UserError, match="rank=2"):
            BucketBatchSampler(dataset, 1, rank=2, ranks=2)
        loader = DataLoader(dataset, batch_sampler=BucketBatchSampler(dataset, 2), collate_fn=collate_photos)
        assert [len(batch["name"]) for batch in loader] == [2]
