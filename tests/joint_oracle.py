"""The image pass and the guidance pass as one slow, dense computation, written from the method's definition.

Text, image and guidance are one sequence in raster order that goes through the base's own layers at every step. A
boolean mask says who reads whom, every segment has its own modulation (timestep t for text and image, 0 for guidance),
and the LoRA is added by hand where it belongs. Nothing here uses the project's orders, layouts, anchors or attention.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

SEGMENTS = ("text", "image", "guidance")


@dataclass(frozen=True)
class Geometry:
    """Sizes in tokens; `halo` in tokens too."""

    text: int
    image: tuple[int, int]
    draft: tuple[int, int]
    cell: int
    window: int
    halo: int
    scope: str
    shift_odd_blocks: bool = False
    reach: str = "adjacent"
    anchors: str = "scaled"

    def mask(self, block: int) -> Tensor:
        """Who reads whom in a block, bool `[T + N + L, T + N + L]`."""
        shift = self.window // 2 if self.shift_odd_blocks and block % 2 else 0
        text, tokens = self.text, self.image[0] * self.image[1]
        size = text + tokens + self.draft[0] * self.draft[1]
        mask = torch.zeros(size, size, dtype=torch.bool)
        mask[:text, : text + tokens] = True
        mask[text : text + tokens, :text] = True
        rows, columns = (self._axis(side, draft, shift) for side, draft in zip(self.image, self.draft, strict=True))
        for part, start, stop in (("image", text, text + tokens), ("guidance", text + tokens, size)):
            both = rows[part][:, None, :, None] & columns[part][None, :, None, :]
            mask[text : text + tokens, start:stop] = both.reshape(tokens, -1)
        mask[text + tokens :, text + tokens :] = self._draft_mask()
        return mask

    def _axis(self, side: int, draft: int, shift: int) -> dict[str, Tensor]:
        """Along one axis: which image token reads which image token and which guidance token."""
        image, guidance = torch.zeros(side, side, dtype=torch.bool), torch.zeros(side, draft, dtype=torch.bool)
        for query in range(side):
            first = (query - shift) // self.window * self.window + shift
            first, end = max(first, 0), min(first + self.window, side)
            image[query, max(first - self.halo, 0) : end + self.halo] = True
            if self.scope == "global":
                guidance[query] = True
            else:
                centre = (first + end) / 2 * draft / side
                borders = range(self.cell, draft, self.cell)
                border = min(reversed(borders), key=lambda place: abs(place - centre), default=self.cell)
                guidance[query, max(border - self.cell, 0) : border + self.cell] = True
        return {"image": image, "guidance": guidance}

    def _draft_mask(self) -> Tensor:
        tokens = [(i // self.cell, j // self.cell) for i in range(self.draft[0]) for j in range(self.draft[1])]
        near = [[max(abs(a - c), abs(b - d)) <= 1 for c, d in tokens] for a, b in tokens]
        return (
            torch.tensor(near) if self.reach == "adjacent" else torch.ones(len(tokens), len(tokens), dtype=torch.bool)
        )

    def ids(self) -> Tensor:
        """Rotary ids `[T + N + L, 3]`."""
        steps = [side / draft for side, draft in zip(self.image, self.draft, strict=True)]
        offsets = [(step - 1) / 2 if self.anchors == "centred" else 0.0 for step in steps]
        steps = [1.0, 1.0] if self.anchors == "none" else steps
        ids = [(0.0, 0.0, 0.0)] * self.text
        ids += [(0.0, float(i), float(j)) for i in range(self.image[0]) for j in range(self.image[1])]
        ids += [
            (0.0, steps[0] * i + offsets[0], steps[1] * j + offsets[1])
            for i in range(self.draft[0])
            for j in range(self.draft[1])
        ]
        return torch.tensor(ids)


@dataclass
class Joint:
    """A FLUX transformer over text, image and guidance at once.

    Attributes:
        adapted: Segments that the LoRA acts on.
        guidance_keys_values: After a call, keys and values of the guidance tokens in every block.
    """

    transformer: FluxTransformer2DModel
    geometry: Geometry
    adapted: frozenset[str] = frozenset({"guidance"})
    guidance_keys_values: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def velocity(
        self,
        image: Tensor,
        text: Tensor,
        pooled: Tensor,
        time: Tensor,
        draft: Tensor,
        draft_pooled: Tensor,
        guidance_scale: float,
    ) -> Tensor:
        """Velocity of the image tokens `[B, N, C]`, everything in raster order."""
        model = self.transformer
        now = self._modulation(time, pooled, guidance_scale)
        clean = self._modulation(torch.zeros_like(time), draft_pooled, guidance_scale)
        modulation = {"text": now, "image": now, "guidance": clean}
        hidden = {
            "text": model.context_embedder(text),
            "image": self._linear(model.x_embedder, image, "image"),
            "guidance": self._linear(model.x_embedder, draft, "guidance"),
        }
        rotary = model.pos_embed(self.geometry.ids())
        self.guidance_keys_values = []
        blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
        for index, block in enumerate(blocks):
            run = self._double if index < len(model.transformer_blocks) else self._single
            hidden = run(block, hidden, modulation, rotary, self.geometry.mask(index))
        return model.proj_out(model.norm_out(hidden["image"], now))

    def _modulation(self, time: Tensor, pooled: Tensor, guidance_scale: float) -> Tensor:
        embed = self.transformer.time_text_embed
        if self.transformer.config.guidance_embeds:
            return embed(time * 1000, torch.full_like(time, guidance_scale * 1000), pooled)
        return embed(time * 1000, pooled)

    def _linear(self, layer: nn.Module, x: Tensor, segment: str) -> Tensor:
        if not hasattr(layer, "base_layer"):
            return layer(x)
        output = layer.base_layer(x)
        if segment in self.adapted:
            (name,) = layer.lora_A
            update = layer.lora_B[name].weight @ layer.lora_A[name].weight
            output = output + x @ update.T * layer.lora_alpha[name] / layer.r[name]
        return output

    def _attention(self, parts: dict[str, tuple], rotary: tuple[Tensor, Tensor], mask: Tensor) -> dict[str, Tensor]:
        query, key, value = (torch.cat([parts[name][i] for name in SEGMENTS], dim=1) for i in range(3))
        query, key = (apply_rotary_emb(each, rotary, sequence_dim=1) for each in (query, key))
        lengths = [parts[name][0].shape[1] for name in SEGMENTS]
        self.guidance_keys_values.append((key[:, -lengths[2] :], value[:, -lengths[2] :]))
        logits = torch.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
        weights = logits.masked_fill(~mask, -torch.inf).softmax(dim=-1)
        output = torch.einsum("bhqk,bkhd->bqhd", weights, value).flatten(2)
        return dict(zip(SEGMENTS, output.split(lengths, dim=1), strict=True))

    def _project(self, attn: nn.Module, x: Tensor, segment: str, layers: tuple[str, ...], norms: tuple[str, str]):
        query, key, value = (
            self._linear(getattr(attn, layer), x, segment).unflatten(-1, (-1, attn.head_dim)) for layer in layers
        )
        return getattr(attn, norms[0])(query), getattr(attn, norms[1])(key), value

    def _double(self, block, hidden, modulation, rotary, mask) -> dict[str, Tensor]:
        attn, parts, gates = block.attn, {}, {}
        for name in SEGMENTS:
            own = name == "text"
            norm = block.norm1_context if own else block.norm1
            normed, *gates[name] = norm(hidden[name], emb=modulation[name])
            layers = ("add_q_proj", "add_k_proj", "add_v_proj") if own else ("to_q", "to_k", "to_v")
            norms = ("norm_added_q", "norm_added_k") if own else ("norm_q", "norm_k")
            parts[name] = self._project(attn, normed, name, layers, norms)
        read = self._attention(parts, rotary, mask)
        result = {}
        for name in SEGMENTS:
            gate, shift_mlp, scale_mlp, gate_mlp = (each[:, None] for each in gates[name])
            own = name == "text"
            output = attn.to_add_out(read[name]) if own else self._linear(attn.to_out[0], read[name], name)
            x = hidden[name] + gate * output
            norm, ff = (block.norm2_context, block.ff_context) if own else (block.norm2, block.ff)
            normed = norm(x) * (1 + scale_mlp) + shift_mlp
            inner = nn.functional.gelu(self._linear(ff.net[0].proj, normed, name), approximate="tanh")
            result[name] = x + gate_mlp * self._linear(ff.net[2], inner, name)
        return result

    def _single(self, block, hidden, modulation, rotary, mask) -> dict[str, Tensor]:
        normed = {name: block.norm(hidden[name], emb=modulation[name]) for name in SEGMENTS}
        layers, norms = ("to_q", "to_k", "to_v"), ("norm_q", "norm_k")
        parts = {name: self._project(block.attn, normed[name][0], name, layers, norms) for name in SEGMENTS}
        read = self._attention(parts, rotary, mask)
        result = {}
        for name in SEGMENTS:
            x, gate = normed[name]
            inner = nn.functional.gelu(self._linear(block.proj_mlp, x, name), approximate="tanh")
            output = self._linear(block.proj_out, torch.cat([read[name], inner], dim=2), name)
            result[name] = hidden[name] + gate[:, None] * output
        return result


@dataclass
class Joint2(Joint):
    """A FLUX.2 transformer over text, image and guidance at once; there is no pooled text."""

    def velocity(
        self,
        image: Tensor,
        text: Tensor,
        pooled: Tensor,
        time: Tensor,
        draft: Tensor,
        draft_pooled: Tensor,
        guidance_scale: float,
    ) -> Tensor:
        """Velocity of the image tokens `[B, N, C]`, everything in raster order."""
        model = self.transformer
        now, clean = (model.time_guidance_embed(1000 * each, None) for each in (time, torch.zeros_like(time)))
        embedding = {"text": now, "image": now, "guidance": clean}
        hidden = {
            "text": model.context_embedder(text),
            "image": self._linear(model.x_embedder, image, "image"),
            "guidance": self._linear(model.x_embedder, draft, "guidance"),
        }
        places = self.geometry.ids()
        words = torch.zeros(len(places), 1)
        words[: text.shape[1], 0] = torch.arange(text.shape[1])
        rotary = model.pos_embed(torch.cat([places, words], dim=1))
        self.guidance_keys_values = []
        for index, block in enumerate([*model.transformer_blocks, *model.single_transformer_blocks]):
            run = self._double if index < len(model.transformer_blocks) else self._single
            hidden = run(block, hidden, embedding, rotary, self.geometry.mask(index))
        return model.proj_out(model.norm_out(hidden["image"], now))

    def _modulate(self, layer: nn.Module, embedding: Tensor) -> list[Tensor]:
        """Shift, scale and gate, once or twice, `[B, 1, C]` each."""
        return list(layer.linear(nn.functional.silu(embedding))[:, None].chunk(3 * layer.mod_param_sets, dim=-1))

    def _double(self, block, hidden, modulation, rotary, mask) -> dict[str, Tensor]:
        model, attn, parts, sets = self.transformer, block.attn, {}, {}
        for name in SEGMENTS:
            own = name == "text"
            layer = model.double_stream_modulation_txt if own else model.double_stream_modulation_img
            shift, scale, *sets[name] = self._modulate(layer, modulation[name])
            normed = nn.functional.layer_norm(hidden[name], hidden[name].shape[-1:], eps=1e-6) * (1 + scale) + shift
            layers = ("add_q_proj", "add_k_proj", "add_v_proj") if own else ("to_q", "to_k", "to_v")
            norms = ("norm_added_q", "norm_added_k") if own else ("norm_q", "norm_k")
            parts[name] = self._project(attn, normed, name, layers, norms)
        read = self._attention(parts, rotary, mask)
        result = {}
        for name in SEGMENTS:
            gate, shift_mlp, scale_mlp, gate_mlp = sets[name]
            own = name == "text"
            output = attn.to_add_out(read[name]) if own else self._linear(attn.to_out[0], read[name], name)
            x = hidden[name] + gate * output
            ff = block.ff_context if own else block.ff
            normed = nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale_mlp) + shift_mlp
            first, second = self._linear(ff.linear_in, normed, name).chunk(2, dim=-1)
            result[name] = x + gate_mlp * self._linear(ff.linear_out, nn.functional.silu(first) * second, name)
        return result

    def _single(self, block, hidden, modulation, rotary, mask) -> dict[str, Tensor]:
        attn, parts, inner, gates = block.attn, {}, {}, {}
        for name in SEGMENTS:
            shift, scale, gates[name] = self._modulate(self.transformer.single_stream_modulation, modulation[name])
            normed = nn.functional.layer_norm(hidden[name], hidden[name].shape[-1:], eps=1e-6) * (1 + scale) + shift
            width = attn.inner_dim
            query, key, value, first, second = self._linear(attn.to_qkv_mlp_proj, normed, name).split(
                [width, width, width, attn.mlp_hidden_dim, attn.mlp_hidden_dim], dim=-1
            )
            query, key, value = (each.unflatten(-1, (-1, attn.head_dim)) for each in (query, key, value))
            parts[name] = attn.norm_q(query), attn.norm_k(key), value
            inner[name] = nn.functional.silu(first) * second
        read = self._attention(parts, rotary, mask)
        return {
            name: hidden[name]
            + gates[name] * self._linear(attn.to_out, torch.cat([read[name], inner[name]], dim=-1), name)
            for name in SEGMENTS
        }
