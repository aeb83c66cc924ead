"""What every line of a benchmark says about its machine, how lines are written, and the options that all scripts read alike."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import torch

# Those that decide how fast a matrix product is, by their names in /proc/cpuinfo.
INSTRUCTION_SETS = (
    *("avx", "avx2", "fma", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "sve", "sve2", "i8mm", "bf16"),  # of Arm
)


def machine(device: torch.device) -> dict:
    """The fields of every line that say where it was measured; on a GPU with its driver and how it multiplies float32."""
    each = _processors()
    flags = (each[0].get("flags") or each[0].get("Features", "")).split() if each else []
    fields = {
        "device": device_name(device),
        "processor": device_name(torch.device("cpu")),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len({(one.get("physical id"), one.get("core id", number)) for number, one in enumerate(each)}) or os.cpu_count(),
        "l3_mib": _l3_mib(),
        "threads": torch.get_num_threads(),
    }
    return fields | _gpu(device) if device.type == "cuda" else fields


def device_name(device: torch.device) -> str:
    """Model of the processor or GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = [each["model name"] for each in _processors() if "model name" in each]
    return found[0] if found else platform.processor() or platform.machine()


@cache
def _processors() -> list[dict]:
    """/proc/cpuinfo, a dictionary for each logical processor; empty where there is none."""
    information = Path("/proc/cpuinfo")
    blocks = information.read_text().strip().split("\n\n") if information.exists() else []
    pairs = [[line.split(":", 1) for line in block.splitlines() if ":" in line] for block in blocks]
    return [found for each in pairs if "processor" in (found := {name.strip(): value.strip() for name, value in each})]


@cache
def _l3_mib() -> float | None:
    """Size of the L3 cache that the first core reaches."""
    for cache_folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if (cache_folder / "level").read_text().strip() == "3":
            size = (cache_folder / "size").read_text().strip()
            return int(size[:-1]) / {"K": 1024, "M": 1}[size[-1]]
    return None


def _gpu(device: torch.device) -> dict:
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu_memory_gib": rounded(properties.total_memory / 2**30),
        "gpu_capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "driver": _driver(),
        "float32_matmul": torch.get_float32_matmul_precision(),
    }


@cache
def _driver() -> str | None:
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return None
    return lines[0].strip() if lines else None


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions(*packages: str) -> dict[str, str | None]:
    return {name: version_of(name) for name in packages}


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def described(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


# Writing --------------------------------------------------------------------------------------------------------------------------------


def publish(rows: list[dict], out: Path | None) -> None:
    """Print the rows and add them to the file, if there is one."""
    for row in rows:
        print(json.dumps(row), flush=True)
    if out and rows:
        append(out, rows)


def append(path: Path, rows: list[dict]) -> None:
    """Add the rows to a file of JSON lines, all in one write; a line that an interruption cut short stays a line of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        cut = file.seek(0, os.SEEK_END) and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n"
        file.write((b"\n" if cut else b"") + "".join(json.dumps(row) + "\n" for row in rows).encode())


def check_writable(path: Path) -> None:
    """Raises ValueError unless lines can be added to the file; makes its folder, and leaves no empty file behind."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        with path.open("ab"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise ValueError(f"cannot write to {str(path)!r}: {error.strerror or error}") from None
    if existed:
        with path.open("rb") as file:
            first = file.readline().strip()
        if first and not _is_row(first):
            raise ValueError(f"{str(path)!r} is not a file of JSON lines; give a new file, or one that a benchmark wrote")


def _is_row(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def script(main: Callable[[], object]) -> None:
    """Run a script's main. Ctrl-C and SIGTERM let it keep the rows that it has, and end it with status 130."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted; what was measured before is kept", file=sys.stderr)
        sys.exit(130)


# Options --------------------------------------------------------------------------------------------------------------------------------
# For argparse's `type`: each turns an option's text into its value, or says what was expected before anything is measured.


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    expected = f"of {least} or more" if most is None else f"from {least} to {most}"

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"expected a whole number {expected}, got {text!r}")
        return value

    return read


seed = whole_number(0, 2**32 - 1)  # what NumPy and torch both take


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds above 0, got {text!r}")
    return value


def processor_or_gpu(text: str) -> torch.device:
    """The words of `recsys_importance.models.pick_device`, which needs pandas; those devices on which memory can be measured."""
    gpus = torch.cuda.device_count()
    there = ["cpu", *(["cuda"] if gpus else []), *(f"cuda:{number}" for number in range(gpus))]
    if text == "auto":
        return torch.device("cuda" if gpus else "cpu")
    if text not in there:
        raise argparse.ArgumentTypeError(f"device {text!r} is not available; expected {', '.join(['auto', *there])}")
    return torch.device(text)


def output_file(text: str) -> Path:
    try:
        check_writable(Path(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text)
