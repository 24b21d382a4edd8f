"""Side-by-side timing: variants take turns, so that a noisy machine treats them alike; medians."""

import dataclasses
import itertools
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch: the profiler talks much

import torch
import tyro
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))

T = TypeVar("T")
Seconds = dict[str, list[float]]


def read(kind: type[T], description: str | None) -> T:
    """Read the command line as a dataclass. Raises ValueError for a number that is not above 0."""
    options = tyro.cli(kind, description=description)
    for name, value in dataclasses.asdict(options).items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and not isinstance(number, bool) and number <= 0:
                raise ValueError(f"need --{name.replace('_', '-')} > 0, got {number}")
    return options


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine(precision: str, threads: int | None = None) -> str:
    """Name what the figures of a table were measured on; sets the CPU threads."""
    if threads is not None:
        torch.set_num_threads(threads)
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        model = names[0] if names else model
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    text = f"{model}, {torch.get_num_threads()} of {os.cpu_count()} cores"
    return f"{name + ', ' if name else ''}{text}, torch {torch.__version__}, {precision}"


def in_turn(variants: dict[str, Callable[[], object]], rounds: int) -> Seconds:
    """Time each variant once a round, in turn, after one call that is not counted."""
    seconds: Seconds = {name: [] for name in variants}
    for round_number in range(rounds + 1):
        for name, call in variants.items():
            synchronize()
            start = time.perf_counter()
            call()
            synchronize()
            if round_number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median(values: list[float]) -> float:
    return statistics.median(values)


def ratio(values: list[float], others: list[float]) -> float:
    """Return how many times as long `values` took, by round: a slow minute then slows both."""
    return median([value / other for value, other in zip(values, others, strict=True)])


def spread(values: list[float]) -> float:
    """Return the distance between the quartiles in % of the median."""
    if len(values) < 4:
        return 100 * (max(values) - min(values)) / median(values)
    low, _, high = statistics.quantiles(values, n=4)
    return 100 * (high - low) / median(values)


def peak_bytes(call: Callable[[], object]) -> int:
    """Return the memory that a call needs at its peak, beyond what is allocated before it."""
    call()
    synchronize()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(0, *itertools.accumulate(num for _, num in changes))


def show(title: str, columns: list[str], rows: list[list[str]], caption: str) -> None:
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:  # as wide as the table, for files
        console = Console(width=160)
    console.print(table)
