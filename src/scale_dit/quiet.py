"""Messages of libraries that say nothing to the person at the keyboard, each with the reason why it may go."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

HARMLESS_WARNINGS = (
    # The base is frozen and in evaluation mode on purpose.
    r"Found \d+ module\(s\) in eval mode at the start of training",
    # Between two libraries; the project calls neither of the two functions.
    r".*isinstance\(treespec, LeafSpec\).* is deprecated",
    # TensorBoard's folder is the run's folder, and a resumed run goes on in it.
    r"Experiment logs directory .* exists and is not empty",
    r"Checkpoint directory .* exists and is not empty",
    # Styles and Scale-DiT's own LoRA are on one transformer on purpose.
    r"Already found a `peft_config` attribute in the model",
    # Scenes are rendered before training, so its loader has nothing to do but to index.
    r"The 'train_dataloader' does not have many workers",
    r"The 'val_dataloader' does not have many workers",
)
HARMLESS_LOG_LINES = (
    "litlogger",
    "TPU available",
    "HPU available",
    "GPU available: False",
    # An empty list of modules.
    "that should be kept in float32: []",
    # T5's embedding has two names, and is called by the other.
    "unexecuted_layers=['shared']",
)
FILTERED_LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.rank_zero",
    "diffusers.models.modeling_utils",
    "diffusers.hooks.group_offloading",
)


class _WithoutHarmless(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not any(part in message for part in HARMLESS_LOG_LINES)


def quiet_libraries() -> None:
    """Hide the harmless messages and the loading bars of small files."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for message in HARMLESS_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name in FILTERED_LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(each, _WithoutHarmless) for each in logger.filters):
            logger.addFilter(_WithoutHarmless())
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


@contextmanager
def truncating_quietly() -> Iterator[None]:
    """Inside, libraries do not print what they cut off, which for a batch is a wall of padding."""
    loggers = [logging.getLogger(name) for name in ("diffusers.pipelines", "transformers.tokenization_utils_base")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
