"""Tokenizers that fit random weights: of the right classes, learnt from a few captions."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2TokenizerFast

from scale_dit.embedded.build import TinyGeometry, train_clip_tokenizer, train_t5_tokenizer

CAPTIONS = (
    "a large red circle left of a small blue star, on a brick wall",
    "two yellow rings above a striped triangle, on sand",
    "a photograph of a harbour at dawn",
)
GEOMETRY = TinyGeometry(vocabulary=64)
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT = (
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)


def small_tokenizers(kinds: set[str]) -> dict[str, Any]:
    """The tokenizers of a pipeline whose text encoders are of these classes, by their names in the pipeline."""
    if "Qwen3ForCausalLM" in kinds:
        return {"tokenizer": train_qwen_tokenizer()}
    return {
        "tokenizer": train_clip_tokenizer(CAPTIONS, GEOMETRY),
        "tokenizer_2": train_t5_tokenizer(CAPTIONS, GEOMETRY),
    }


def train_qwen_tokenizer() -> Qwen2TokenizerFast:
    """Byte-level BPE in Qwen's format, with its chat template and special tokens; any text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=512, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([*CAPTIONS, *("user assistant",) * 2], trainer)
    return Qwen2TokenizerFast(
        vocab=tokenizer.get_vocab(),
        merges=_merges(tokenizer),
        pad_token=PAD,
        eos_token=END,
        unk_token=PAD,
        extra_special_tokens=[START, "<think>", "</think>"],
        chat_template=CHAT,
        model_max_length=512,
    )


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
