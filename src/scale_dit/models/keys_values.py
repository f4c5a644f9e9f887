"""The draft's keys and values in host memory, brought to the card block by block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import torch

from scale_dit.models.flux_attention import KeysValues


class HostKeysValues(Sequence[KeysValues]):
    """A list of keys and values that holds at most two blocks' on the device: the one in use, and the next one.

    Blocks are read in order, so the next one's are copied while a block computes. At 4096 px on FLUX.1 that is 50 MB
    a block, 1 ms beside 30.

    Args:
        device: Where they are made and read. Host memory is pinned if it is a GPU.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if self.on_gpu else None
        self.host: list[KeysValues] = []
        self.fetched: dict[int, KeysValues] = {}

    def extend(self, keys_values: Iterable[KeysValues]) -> None:
        """Take in further blocks', moving them to host memory."""
        self.host += [(self._to_host(key), self._to_host(value)) for key, value in keys_values]

    def __len__(self) -> int:
        return len(self.host)

    @overload
    def __getitem__(self, index: int) -> KeysValues: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[KeysValues]: ...
    def __getitem__(self, index: int | slice) -> KeysValues | Sequence[KeysValues]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        found = self.fetched.pop(index, None) or self._fetch(index)
        if self.stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.stream)
            for part in found:  # made on the other stream: not to be used again before this one is done with it
                part.record_stream(current)
        self.fetched = {}
        if index + 1 < len(self):
            self.fetched[index + 1] = self._fetch(index + 1)
        return found

    def __iter__(self) -> Iterator[KeysValues]:
        return (self[index] for index in range(len(self)))

    def _to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self.on_gpu)
        return host.copy_(tensor)

    def _fetch(self, index: int) -> KeysValues:
        key, value = self.host[index]
        if self.stream is None:
            return key.to(self.device), value.to(self.device)
        with torch.cuda.stream(self.stream):
            return key.to(self.device, non_blocking=True), value.to(self.device, non_blocking=True)
