"""How fast a machine is: rates measured once by `scale_dit.planning.calibrate`, and where they are kept."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from scale_dit.errors import UserError
from scale_dit.files import write_atomically
from scale_dit.planning.trace import Operation, Trace

SHIPPED = Path(__file__).parent / "machines"
CPU = "cpu"


@dataclass(frozen=True)
class Machine:
    """Measured rates of one device in one precision.

    Attributes:
        name: The card's or processor's name.
        dtype: Precision that was measured.
        matmul, convolution: FLOP/s of large ones.
        attention: FLOP/s of torch's dense attention.
        windowed: FLOP/s of the project's kernel, over the pairs that its layout holds.
        bandwidth: Bytes/s that elementwise operations read and write.
        launch: Seconds that an operation takes at least.
        host_copy: Bytes/s from pinned host memory to the device.
        versions: What it was measured with.
        text_launch: Seconds that an operation of a text encoder takes at least, see `planning.practice`.
        wide: FLOP/s of the autoencoder's attention, whose head is wider than torch's kernels take; 0: not measured, as
            fast as the others.
        pinning: Bytes/s of host memory that are pinned when they are first asked for; 0: not measured, nothing counts.
        group_copy: Bytes/s at which a transformer's blocks come one by one while others compute; 0: not measured, as
            fast as one copy.
        first_encoding: Seconds that the first prompt of a process takes beyond others: libraries are loaded.
        between_steps: Seconds that a card waits at each denoising step, however large, until the next one is prepared.
        practice: How much longer stages take than their operations by themselves, see there.
    """

    name: str
    dtype: str
    matmul: float
    convolution: float
    attention: float
    windowed: float
    bandwidth: float
    launch: float
    host_copy: float
    versions: str
    text_launch: float = 0.0
    wide: float = 0.0
    pinning: float = 0.0
    group_copy: float = 0.0
    first_encoding: float = 0.0
    between_steps: float = 0.0
    practice: dict[str, float] = field(default_factory=dict)

    def seconds(self, work: Trace, launch: float = 0.0) -> float:
        """Seconds that traced work takes: every operation is bound by arithmetic, by memory or by its launch.

        What a stage takes beyond that is in `practice`.

        Args:
            launch: Seconds that an operation takes at least, if those are more than the machine's own.
        """
        launch = max(launch, self.launch)
        return sum(count * self._seconds(operation, launch) for operation, count in work.operations.items())

    def _seconds(self, operation: Operation, launch: float) -> float:
        arithmetic = operation.flops / (getattr(self, operation.kind) or self.attention) if operation.flops else 0.0
        return max(arithmetic, operation.bytes / self.bandwidth, launch)

    def pinning_seconds(self, count: int) -> float:
        """Seconds until so many bytes of host memory are pinned for the first time."""
        return count / self.pinning if self.pinning else 0.0

    def save(self, path: Path) -> None:
        """Write the profile as JSON."""
        write_atomically(path, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> Machine:
        """Read a profile.

        Raises:
            UserError: The file is none.
        """
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"{path} is no machine profile ({error}): write it anew with python -m scale_dit.planning.calibrate"
            ) from error


def device_name(device: torch.device) -> str:
    """The card's name, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def file_name(name: str, dtype: torch.dtype) -> str:
    """File of a profile, such as `nvidia-h100-80gb-hbm3-bfloat16.json`."""
    return f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}-{str(dtype).removeprefix('torch.')}.json"


def cache_folder() -> Path:
    """Where a user's own profiles lie, a folder for each version of torch."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "scale-dit" / "machines" / torch.__version__


def find_machine(device: torch.device, dtype: torch.dtype) -> Machine | None:
    """The profile of a device: the user's own, else the shipped one; for processors any that is shipped."""
    name = file_name(device_name(device), dtype)
    for path in (cache_folder() / name, SHIPPED / name, SHIPPED / file_name(CPU, torch.float32)):
        if path.is_file() and (device.type == "cpu" or path.name == name):
            return Machine.load(path)
    return None


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be had on a device; of a card, also below a cap set by torch for this process."""
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        free, total = torch.cuda.mem_get_info(device)
        cap = int(total * torch.cuda.get_per_process_memory_fraction(device))
        # What torch holds but does not use can be had as well.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return min(free + unused, cap - torch.cuda.memory_allocated(device))
    import psutil

    return psutil.virtual_memory().available
