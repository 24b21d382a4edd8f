"""What stands around every script's main: flags, errors, signals, workers, whole files, rows.

if __name__ == "__main__":
    run_command(main)
"""

import itertools
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
import tyro
from rich.console import Console
from rich.markup import escape
from torch.utils.data import DataLoader

T = TypeVar("T")

# ---------------------------------------------------------------- flags and errors


def read_flags(kind: type[T], flags: Sequence[str] | None, description: str | None) -> T:
    """Read flags, or the command line's where they are None, into a dataclass.

    Of several processes the first alone prints help and errors. Wrong flags exit with code 2.
    """
    return tyro.cli(
        kind,
        args=flags,
        description=description,
        config=(tyro.conf.OmitArgPrefixes,),
        console_outputs=os.environ.get("RANK", "0") == "0",
    )


class RunError(RuntimeError):
    """An error that ends a run which had begun well, in all processes alike: exit code 1."""


def run_command(main: Callable[[], object]) -> None:
    """Run a script's main; wrong input ends it with one line and code 2, a broken run with 1."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (FloatingPointError, RunError) as error:
        # all processes of the run agreed on it: the first one says it
        _exit_with(1, str(error), is_said=os.environ.get("RANK", "0") == "0")
    except OSError as error:
        # a file may fail in any process
        _exit_with(2, _last_line(error), is_said=True)
    except ValueError as error:
        # the processes of a node read the same wrong input: the first of them says it
        _exit_with(2, _last_line(error), is_said=os.environ.get("LOCAL_RANK", "0") == "0")
    except RuntimeError as error:
        text = _explain(error)
        if text is None:
            raise
        _exit_with(1, text, is_said=True)


def _exit_with(code: int, text: str, is_said: bool) -> None:
    if is_said:
        print(f"error: {text}", file=sys.stderr)
    sys.exit(code)


def _last_line(error: Exception) -> str:
    """Return an error's message; a worker's error has its whole traceback above it."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[-1]


def _explain(error: RuntimeError) -> str | None:
    """Return a line for an error of torch's that has a known cause, None for any other."""
    first_line = (str(error).strip().splitlines() or [""])[0]
    if "DataLoader worker" in first_line:
        hint = "out of memory? then fewer --num-workers; what was saved can be resumed"
        return f"a process that decodes images died: {first_line} ({hint})"
    if isinstance(error, torch.OutOfMemoryError):
        return f"{first_line} Try a smaller --batch-size with more --accumulation-steps."
    if isinstance(error, dist.DistError) or "gloo" in first_line:
        return f"another process of the run ended: {first_line}"
    return None


# ---------------------------------------------------------------- signals and workers

STOP_SIGNALS = [signal.SIGTERM, signal.SIGINT]
if hasattr(signal, "SIGUSR1"):  # Slurm's warning; Windows has none
    STOP_SIGNALS.append(signal.SIGUSR1)


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collect STOP_SIGNALS in a list, so that a step is finished; Ctrl-C after any of them raises.

    What follows in training: Run.what_is_due agrees on the signal with all processes, run_loop
    saves and ends, train says how to resume and exits with 128 + the signal's number. Outside this
    block a signal ends the process as usual.
    """
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    previous = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def iterate(loader: DataLoader) -> Iterator:
    """Return an iterator over a loader's batches whose workers outlive signals to their group.

    The workers start with the signals blocked: the main process decides what is done about them.
    Where a worker dies the iterator raises a RuntimeError that says so.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        return _batches(iter(loader))
    blocked_before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        return _batches(iter(loader))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked_before)


def _batches(batches: Iterator) -> Iterator:
    try:
        yield from batches
    except (ConnectionError, EOFError) as error:
        # A dying worker's sockets close before the process has ended. Once it has, torch's handler
        # of its end raises, and says what killed it.
        time.sleep(1)
        raise RuntimeError(f"DataLoader worker ended: {error!r}") from error


# ---------------------------------------------------------------- files and rows


@contextmanager
def _whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name to write to, which becomes `path` once its content is on the disk.

    Raises OSError naming `path` where that fails; then nothing has changed.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # a power cut could otherwise leave the name without content
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error.strerror}") from error


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file whole or not at all. Raises OSError naming it."""
    with _whole_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def copy_whole(source: Path, path: Path) -> None:
    """Copy a file whole or not at all. Raises OSError naming the copy."""
    with _whole_file(path) as temporary:
        shutil.copyfile(source, temporary)


def unused_path(folder: Path, name: str, suffix: str = "") -> Path:
    """Return the first of `name`, `name`-2, `name`-3 and so on that `folder` does not hold."""
    path = folder / f"{name}{suffix}"
    for number in itertools.count(2):
        if not path.exists():
            return path
        path = folder / f"{name}-{number}{suffix}"


def print_rows(console: Console, rows: dict[str, str]) -> None:
    """Print names and texts below each other; no table, which would cut long paths."""
    for name, text in rows.items():
        console.print(f"[bold]{name:10}[/]  {escape(text)}", soft_wrap=True)
