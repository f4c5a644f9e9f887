"""What a fresh clone costs: minutes of the demo and of the tests, sizes of what is shipped.

python experiments/installation/run.py              minutes are named for two cores: run it on such a machine
python experiments/installation/run.py sizes        only this one of: sizes, demo, test
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

from scale_dit.evaluation.figures import record_figure
from scale_dit.lora import FILE_NAME
from scale_dit.provenance import project_root

ASSETS = project_root() / "assets"


def record_sizes() -> None:
    lora = ASSETS / "tiny-lora" / FILE_NAME
    record_figure("lora_file_kib", lora.stat().st_size / 2**10, "KiB")
    everything = sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file())
    record_figure("assets_mib", everything / 2**20, "MiB")


def record_minutes(target: str) -> None:
    """Time a target of the Makefile, its installation done before."""
    subprocess.run(["make", "install"], cwd=project_root(), check=True)
    begin = time.perf_counter()
    if subprocess.run(["make", target], cwd=project_root()).returncode != 0:
        sys.exit(f"make {target} failed: its time is not recorded")
    minutes = (time.perf_counter() - begin) / 60
    record_figure(f"{target}_minutes_2core", minutes, "minutes", n=1)
    print(f"make {target}: {minutes:.1f} minutes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", default=["sizes", "demo", "test"], help="sizes, demo, test")
    for what in parser.parse_args().what:
        if what == "sizes":
            record_sizes()
        elif what in ("demo", "test"):
            record_minutes(what)
        else:
            sys.exit(f"unknown {what!r}: use sizes, demo or test")


if __name__ == "__main__":
    main()
