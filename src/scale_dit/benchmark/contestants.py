"""Who runs: one layer of attention, through every backend and through what a user could install instead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from scale_dit.attention import attend, attend_joined
from scale_dit.attention._joined import Joined, join_streams
from scale_dit.benchmark import alone
from scale_dit.benchmark.exact import gradients_of_head
from scale_dit.errors import UserError
from scale_dit.layout import Layout
from scale_dit.tiles import padded

DENSE = {"dense_cudnn": SDPBackend.CUDNN_ATTENTION, "dense_flash": SDPBackend.FLASH_ATTENTION}
JOINED = {"flex_joined": "flex", "fa4_joined": "fa4"}
"""Backends that join the streams in every call, given streams that were joined before the clock starts."""
LIBRARIES = {**JOINED, "flex_alone": "flex", "fa4_alone": "fa4"}
"""These and those of `alone`: the backend whose library each runs on."""


@dataclass
class Contestant:
    """One way to compute a case."""

    forward: Callable[[], Sequence[Tensor]]
    """Outputs of text and image rows, `[B, tokens, H, D]`, apart or, as a single tensor, joined."""
    leaves: Sequence[Tensor]
    upstream: Callable[[], Sequence[Tensor]]
    """Gradients of the outputs, made when they are first asked for."""
    settings: str = ""

    def run(self, with_gradients: bool) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """One call: outputs, and the gradients of `leaves` where they are wanted."""
        with torch.set_grad_enabled(with_gradients):
            outputs = self.forward()
        return outputs, torch.autograd.grad(outputs, self.leaves, self.upstream()) if with_gradients else ()


@dataclass
class Case:
    """One layer: streams as `scale_dit.attention.attend` takes them, and who reads whom."""

    layout: Layout
    text: tuple[Tensor, Tensor, Tensor]
    image: tuple[Tensor, Tensor, Tensor]
    guidance: tuple[Tensor, Tensor]

    @cached_property
    def upstream(self) -> tuple[Tensor, Tensor]:
        """Gradients of the outputs of text and image rows: random, the same for all."""
        generator = torch.Generator(self.image[0].device).manual_seed(1)
        text, image = (
            torch.randn(part.shape, generator=generator, device=part.device, dtype=part.dtype)
            for part in (self.text[0], self.image[0])
        )
        return text, image

    @cached_property
    def joined_upstream(self) -> list[Tensor]:
        """The same as one tensor."""
        return [torch.cat(self.upstream, dim=1)]

    @cached_property
    def exact_gradients(self) -> dict[int, list[Tensor]]:
        """Of the first and the last head, see `gradients_of_head`."""
        heads = {0, self.image[0].shape[2] - 1}
        return {
            head: gradients_of_head(self.text, self.image, self.guidance, self.layout, self.upstream, head)
            for head in heads
        }

    @cached_property
    def joined(self) -> Joined:
        """The streams joined for a block-sparse kernel, as leaves."""
        return Joined(*map(_leaf, join_streams(self.text, self.image, self.guidance)))

    @cached_property
    def all_rows(self) -> alone.AllRows:
        """The streams joined for a kernel that takes the text rows too, as leaves."""
        return alone.AllRows(*map(_leaf, alone.join_all(self.text, self.image, self.guidance)))

    @cached_property
    def joined_dense(self) -> list[Tensor]:
        """Query, key and value of text and image joined, as leaves."""
        return [_leaf(torch.cat(pair, dim=1)) for pair in zip(self.text, self.image, strict=True)]

    def contestant(self, name: str, settings: dict[str, int] | None = None) -> Contestant:
        """The one of that name: a backend, or one of `JOINED`, `alone.NAMES` and `DENSE`, joined here.

        Args:
            name: of a backend, or from `JOINED`, `alone.NAMES` or `DENSE`.
            settings: what to try of `settings_of`.

        Raises:
            UserError: it does not run here.
        """
        if name in DENSE:
            dense = partial(_dense, DENSE[name], self.joined_dense)
            return Contestant(dense, self.joined_dense, lambda: self.joined_upstream)
        if name in LIBRARIES:
            return self._library(name, settings or {})
        if name == "triton":  # whose outputs are one tensor
            ours = partial(attend_joined, self.text, self.image, self.guidance, self.layout, name)
            leaves = [*self.text, *self.image, *self.guidance]
            return Contestant(lambda: (ours(),), leaves, lambda: self.joined_upstream)
        as_it_comes = partial(attend, self.text, self.image, self.guidance, self.layout, name)
        return Contestant(as_it_comes, [*self.text, *self.image, *self.guidance], lambda: self.upstream)

    def _library(self, name: str, settings: dict[str, int]) -> Contestant:
        module = _module(name)
        if problem := module.unavailable(self.image[0].device, self.image[0].dtype):
            raise UserError(problem)
        text = " ".join(f"{key}={value}" for key, value in settings.items()) or "defaults"
        if name in alone.NAMES:
            sparse = partial(alone.attend_alone, name, self.all_rows, self.layout, **settings)
            return Contestant(sparse, self.all_rows, lambda: self.upstream, text)
        scale = self.image[0].shape[-1] ** -0.5
        sparse = partial(module.attend_to, self.joined, self.layout, scale, **settings)
        return Contestant(partial(_preferring_cudnn, sparse), self.joined, lambda: self.upstream, text)

    def by_stream(self, name: str, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of a contestant's leaves as those of text query, key and value, image's three, guidance's two."""
        tokens = [self.layout.text, self.layout.image.tokens, self.layout.guidance_tokens]
        if name in alone.NAMES:
            query, key, value = gradients
            by_text, by_image, by_guidance = zip(*(part.split(tokens, dim=1) for part in (key, value)), strict=True)
            text_query, image_query = query.split(tokens[:2], dim=1)
            return [text_query, *by_text, image_query, *by_image, *by_guidance]
        if name not in JOINED:
            return list(gradients)
        found = Joined(*gradients)
        apart = []
        for whole, by_text_rows in ((found.key, found.text_key), (found.value, found.text_value)):
            streams = whole.split([padded(count) for count in tokens], dim=1)
            text, image, guidance = (stream[:, :count] for stream, count in zip(streams, tokens, strict=True))
            of_text, of_image = by_text_rows.split(tokens[:2], dim=1)
            apart.append((text + of_text, image + of_image, guidance))
        by_text, by_image, by_guidance = zip(*apart, strict=True)
        return [
            *(found.text_query, *by_text),
            *(found.query[:, : tokens[1]], *by_image),
            *by_guidance,
        ]


def settings_of(name: str) -> Sequence[dict[str, int]]:
    """What is worth trying: settings of a contestant in `LIBRARIES`, none of the others."""
    return _module(name).SETTINGS if name in LIBRARIES else ({},)


def _module(name: str) -> ModuleType:
    return import_module(f"scale_dit.attention.{LIBRARIES[name]}")


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def _preferring_cudnn(forward: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
    """With what dense attention there is in it, that of the text rows, by the fastest kernel of torch's."""
    kernels = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(kernels, set_priority=True):
        return forward()


def _dense(kernel: SDPBackend, parts: Sequence[Tensor]) -> tuple[Tensor]:
    query, key, value = (part.transpose(1, 2) for part in parts)
    with sdpa_kernel(kernel):
        return (scaled_dot_product_attention(query, key, value).transpose(1, 2),)
