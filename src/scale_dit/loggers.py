"""Where metrics go: a CSV file always, Weights & Biases online or offline."""

from __future__ import annotations

import csv
import importlib.util
import logging
import netrc
import os
import sys
import uuid
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlparse

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from scale_dit.errors import UserError
from scale_dit.files import csv_text, write_atomically

log = logging.getLogger(__name__)

WANDB_MODES = ("auto", "online", "offline")
WANDB_RUN_ID = "wandb_run_id.txt"


class MetricsFile(Logger):
    """`metrics.csv`: a row for every logged step, on the disk at once; a resumed run goes on in the same file.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: str | Path):
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self.columns: list[str] = []
        if self.path.is_file():
            self.columns, rows = self._read()
            self._replace(rows)

    @property
    def name(self) -> str:
        """Lightning asks for one."""
        return "csv"

    @property
    def version(self) -> str:
        """Lightning asks for one."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        """They are in the run record."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float | Tensor], step: int | None = None) -> None:
        """Add a row; a column that is new is added to the rows before it, too."""
        row = {"step": step} | {name: float(value) for name, value in metrics.items()}
        new = sorted(row.keys() - set(self.columns) - {"step"})
        if new or not self.path.is_file():
            rows = self._read()[1] if self.path.is_file() else []
            self.columns = ["step", *sorted({*self.columns, *new} - {"step"})]
            self._replace([*rows, row])
            return
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns, lineterminator="\n").writerow(row)

    @rank_zero_only
    def forget_from(self, step: int) -> None:
        """Drop what was logged at `step` and later: a run that goes on from there takes these steps again."""
        if self.path.is_file():
            self._replace([row for row in self._read()[1] if int(row["step"]) < step])

    def _read(self) -> tuple[list[str], list[dict[str, Any]]]:
        # What stands behind the last line end was cut off, by a full disk or a power failure.
        whole = self.path.read_text().rpartition("\n")[0]
        reader = csv.DictReader(whole.splitlines())
        rows = list(reader)
        return list(reader.fieldnames or []), rows

    def _replace(self, rows: list[dict[str, Any]]) -> None:
        write_atomically(self.path, csv_text(self.columns, rows))


def wandb_logger(
    folder: str | Path,
    project: str,
    name: str | None = None,
    mode: str = "auto",
    optional: bool = False,
    **options: Any,
) -> Logger | None:
    """Weights & Biases, under a run id that the run's folder keeps, so that a resumed run goes on in the same one.

    Args:
        folder: The run's folder.
        project: W&B project.
        name: The run's name there.
        mode: `online`, `offline`, or `auto`: online if there is a key (`WANDB_API_KEY`, or one in `~/.netrc` from
            `wandb login`), else offline. The variable `WANDB_MODE` goes first, as everywhere in W&B.
        optional: Without the package, go on without it instead of raising.
        **options: As for `lightning.pytorch.loggers.WandbLogger`.

    Raises:
        UserError: Unknown mode; or no package, unless that is allowed.
    """
    if mode not in WANDB_MODES:
        raise UserError(f"unknown W&B mode {mode!r}: use one of {', '.join(WANDB_MODES)} (logger.wandb.mode=...)")
    if importlib.util.find_spec("wandb") is None:
        if optional:
            log.info("W&B is not installed; metrics go to metrics.csv alone")
            return None
        raise UserError("logger=wandb needs the package wandb: pip install wandb, or use logger=csv")
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    mode = os.environ.get("WANDB_MODE") or (("online" if has_wandb_key() else "offline") if mode == "auto" else mode)
    logger = WandbLogger(
        name=name,
        project=project,
        save_dir=str(folder),
        id=wandb_run_id(Path(folder)),
        # An offline run with the same id is joined to the first one by `wandb sync`.
        resume="allow" if mode == "online" else None,
        settings=wandb.Settings(mode=cast(Any, mode), console="off", silent=mode != "online"),
        **options,
    )
    # W&B warns of this argument, whatever its value; Lightning always gives it.
    logger._wandb_init.pop("anonymous", None)
    return logger


def has_wandb_key() -> bool:
    """Whether W&B would find a key without asking."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def wandb_run_id(folder: Path) -> str:
    """The run id in the run's folder; a new one is written there."""
    path = folder / WANDB_RUN_ID
    if path.is_file():
        return path.read_text().strip()
    run_id = uuid.uuid4().hex[:8]
    if rank_zero_only.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(run_id + "\n")
    return run_id


def close_wandb() -> None:
    """End the W&B run of this process, if there is one: the next job of a sweep begins another."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and getattr(wandb, "run", None) is not None:
        wandb.finish()
