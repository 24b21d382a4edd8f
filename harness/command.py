"""What stands around every script's main: flags, errors, signals, workers, whole files, rows.

if __name__ == "__main__":
    run_command(main)
"""

import atexit
import io
import itertools
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
import tyro
from rich.console import Console
from rich.markup import escape
from torch.utils.data import DataLoader

from harness.terminal import lasting_terminal, printable, printable_name
from models import replace_file

T = TypeVar("T")

# ---------------------------------------------------------------- flags and errors


def read_flags(
    kind: type[T], flags: Sequence[str] | None, description: str | None, is_silent: bool = False
) -> T:
    """Read flags, or the command line's where they are None, into a dataclass.

    Of several processes the first alone prints help and errors. Wrong flags exit with code 2.
    """
    is_silent = is_silent or os.environ.get("RANK", "0") != "0"
    # tyro says some of its errors whatever console_outputs is
    said = redirect_stderr(io.StringIO()) if is_silent else nullcontext()
    with said:
        return tyro.cli(
            kind,
            args=flags,
            description=description,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.PositionalMetavarFromFieldName),
            console_outputs=not is_silent,
        )


LESS_MEMORY = (
    "need smaller images or batches, by the flags of this script; in training a smaller "
    "--batch-size with more --accumulation-steps"
)


class RunError(RuntimeError):
    """An error that ends a run which had begun well, in all processes alike: exit code 1."""


class WorkerError(RuntimeError):
    """An error in decoding images: of a worker or, after the first batch, of the main process."""


class OwnInputError(ValueError):
    """Wrong input that this process has read and the others need not have: its share of images."""


@contextmanager
def own_input() -> Iterator[None]:
    """Raise a ValueError of the block as an OwnInputError, which any process prints."""
    try:
        yield
    except ValueError as error:
        raise OwnInputError(str(error)) from error


def run_command(main: Callable[[], object]) -> None:
    """Run a script's main; wrong input ends it with one line and code 2, a broken run with 1.

    It outlives its terminal.
    """
    with lasting_terminal():
        _run(main)


def _run(main: Callable[[], object]) -> None:
    try:
        main()
    except WorkerError as error:
        _exit_with(1, printable_name(error), is_said=True)
    except KeyboardInterrupt:
        sys.exit(130)
    except (FloatingPointError, RunError) as error:
        # all processes of the run agreed on it: the first one says it
        _exit_with(1, str(error), is_said=os.environ.get("RANK", "0") == "0")
    except OSError as error:
        # a file may fail in any process
        _exit_with(2, printable_name(_message(error)), is_said=True)
    except ValueError as error:
        # the processes of a node read the same wrong input: the first of them says it
        is_first_of_node = os.environ.get("LOCAL_RANK", "0") == "0"
        is_said = is_first_of_node or isinstance(error, OwnInputError)
        _exit_with(2, printable_name(_message(error)), is_said)
    except MemoryError as error:
        _exit_with(1, f"out of memory: {_message(error)}; {LESS_MEMORY}", is_said=True)
    except RuntimeError as error:
        text = _explain(error)
        if text is None:
            raise
        _exit_with(1, text, is_said=True)


def _exit_with(code: int, text: str, is_said: bool) -> None:
    if is_said:
        print(f"error: {printable(text)}", file=sys.stderr)
    sys.exit(code)


def _is_of_worker(error: Exception) -> bool:
    """Tell whether a worker raised an error: torch raises it anew, with its traceback as text."""
    return "in DataLoader worker process" in str(error)


def _message(error: Exception) -> str:
    """Return an error's message without the traceback that stands above a worker's."""
    text = str(error).strip() or type(error).__name__
    if _is_of_worker(error):
        return text.rpartition(f"{type(error).__name__}: ")[2]
    return text


def _explain(error: RuntimeError) -> str | None:
    """Return a line for an error of torch's that has a known cause, None for any other."""
    first_line = (str(error).strip().splitlines() or [""])[0]
    text = str(error)
    if "DataLoader worker" in text and ("Bus error" in text or "shared memory" in text):
        hint = "Docker has 64 MB: docker run --shm-size 8g; or --num-workers 0"
        return f"no shared memory for the processes that decode images ({hint})"
    if "DataLoader worker" in first_line and "Caught" not in first_line:
        hint = "out of memory? then fewer --num-workers; what was saved can be resumed"
        return f"a process that decodes images died: {first_line} ({hint})"
    if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in text:
        return f"{first_line}; {LESS_MEMORY}"
    if isinstance(error, dist.DistError) or "gloo" in first_line:
        return f"another process of the run ended: {first_line}"
    return None


# ---------------------------------------------------------------- signals and workers

STOP_SIGNALS = [signal.SIGTERM, signal.SIGINT]
# Slurm's warnings, a terminal that was closed, the end of the time on the CPU; Windows has none
for name in ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGXCPU"):
    if hasattr(signal, name):
        STOP_SIGNALS.append(getattr(signal, name))

# seconds; a launcher passes on a signal that its processes have received already, as members of
# its group: one that follows the first sooner than this is taken for the same
PASSED_ON = 2.0


def is_launched() -> bool:
    """Tell whether accelerate launch or torchrun started this process."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ


@contextmanager
def stop_requests(
    minutes: float = 0, what_is_kept: Callable[[], str] = lambda: ""
) -> Iterator[list[int]]:
    """Collect STOP_SIGNALS in a list, so that a step is finished; a second SIGTERM ends it at once.

    So does Ctrl-C after any signal, and the time where the step is not over `minutes` after the
    first one: storage may have stalled. What follows in training: Run.what_is_due agrees on the
    signal with all processes, run_loop saves and ends, train says how to resume and exits with
    128 + the signal's number. Outside this block a signal ends the process as usual. A SIGHUP that
    is ignored, as under nohup, stays so.
    """
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        received.append(number)

    numbers = [
        number
        for number in STOP_SIGNALS
        if number != getattr(signal, "SIGHUP", None) or signal.getsignal(number) != signal.SIG_IGN
    ]
    watch = _Watch(minutes, what_is_kept)
    previous = {number: signal.signal(number, note) for number in numbers}
    watch.start()
    try:
        yield received
    finally:
        watch.stop()
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Watch:
    """A thread that ends the process where a signal comes again, or its step takes too long.

    Python's own handlers wait for the main thread, which may be within a read that never returns.
    """

    def __init__(self, minutes: float, what_is_kept: Callable[[], str]) -> None:
        self.minutes = minutes
        self.what_is_kept = what_is_kept

    def start(self) -> None:
        # Python writes each signal's number, as one byte, to `wakeup`; the thread reads `numbers`
        self.numbers, self.wakeup = socket.socketpair()
        self.wakeup.setblocking(False)
        self.previous = signal.set_wakeup_fd(self.wakeup.fileno(), warn_on_full_buffer=False)
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        signal.set_wakeup_fd(self.previous)
        self.wakeup.send(b"\0")  # ends the thread; forked workers may keep the socket open
        self.thread.join()
        self.wakeup.close()
        self.numbers.close()

    def _watch(self) -> None:
        first, since = 0, 0.0  # the first signal, 0 while there is none, and when it came
        times: dict[int, float] = {}  # when each signal came first
        while True:
            if first and self.minutes:
                self.numbers.settimeout(max(0.01, since + 60 * self.minutes - time.monotonic()))
            try:
                content = self.numbers.recv(1)
            except TimeoutError:
                name = signal.Signals(first).name
                text = f"what was under way did not end within {self.minutes:g} min of {name}"
                self._end(first, text)
            number = content[0]
            if number == 0:
                return
            if number not in STOP_SIGNALS:
                continue
            now = time.monotonic()
            if not first:
                first, since = number, now
            elif number == signal.SIGINT and (not is_launched() or now - since >= PASSED_ON):
                what = "a second SIGINT" if first == number else "SIGINT"
                self._end(number, f"stopped at once, by {what}")
            elif number == signal.SIGTERM and now - times.get(number, now) >= PASSED_ON:
                self._end(number, "stopped at once, by a second SIGTERM")
            times.setdefault(number, now)

    def _end(self, number: int, text: str) -> None:
        """End the process and its workers; no destructor runs, which would wait for them."""
        kept = self.what_is_kept()
        show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
        print(f"{show_cursor}error: {text}{f'; {kept}' if kept else ''}", file=sys.stderr)
        sys.stderr.flush()
        _kill_workers()
        os._exit(128 + number)


def _kill_workers() -> None:
    for worker in multiprocessing.active_children():
        worker.kill()


def _kill_workers_at_exit() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise that they ended
    _kill_workers()


def iterate(loader: DataLoader) -> Generator:
    """Return an iterator over a loader's batches whose workers outlive signals to their group.

    The workers start with the signals blocked: the main process decides what is done about them.
    They end with the last batch, or with `close`. Where a worker dies the iterator raises a
    RuntimeError that says so.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        return _batches(iter(loader))
    blocked_before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        batches = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked_before)
    # An iterator that an error's traceback holds keeps its workers until the process ends. They
    # would not heed multiprocessing's SIGTERM then, and it would wait for them for ever.
    atexit.unregister(_kill_workers_at_exit)
    atexit.register(_kill_workers_at_exit)  # after torch's own, so that it is called before them
    return _batches(batches)


def _batches(batches: Iterator) -> Generator:
    has_begun = False
    try:
        for batch in batches:
            yield batch
            has_begun = True
    except (ConnectionError, EOFError) as error:
        # A dying worker's sockets close before the process has ended. Once it has, torch's handler
        # of its end raises, and says what killed it.
        time.sleep(1)
        raise RuntimeError(f"DataLoader worker ended: {error!r}") from error
    except Exception as error:
        is_of_worker = _is_of_worker(error)
        # The traceback's frames hold the iterator in a cycle. Collected with it, torch's queues
        # close before the workers are told to end, and it waits ten seconds for each of them.
        traceback.clear_frames(error.__traceback__)
        del batches
        if is_of_worker and (has_begun or not isinstance(error, ValueError)):
            raise WorkerError(_of_worker(error)) from None
        if has_begun and isinstance(error, ValueError | OSError):
            raise WorkerError(f"cannot read a batch: {_message(error)}") from None
        raise  # a ValueError at the first batch is wrong input, whoever reads it


def _of_worker(error: Exception) -> str:
    text = f"a process that decodes images failed: {type(error).__name__}: {_message(error)}"
    if "shared memory" in str(error) or "No space left" in str(error):
        return f"{text} (Docker has 64 MB: docker run --shm-size 8g; or --num-workers 0)"
    return f"{text} (with --num-workers 0 it is raised where it happens)"


# ---------------------------------------------------------------- files and rows


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name to write to, which becomes `path` once its content is on the disk.

    Raises OSError naming `path` where that fails; with any error nothing has changed.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        yield temporary
        with open(temporary, "r+b") as file:  # Windows syncs only files that are open for writing
            os.fsync(file.fileno())  # a power cut could otherwise leave the name without content
        replace_file(temporary, path)
    except OSError as error:
        # NumPy's own errors of a full disk have a text and no number
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # which is gone where it became `path`
            temporary.unlink()


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file whole or not at all. Raises OSError naming it."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def copy_whole(source: Path, path: Path) -> None:
    """Copy a file whole or not at all. Raises OSError naming the copy."""
    with whole_file(path) as temporary:
        shutil.copyfile(source, temporary)


def unused_path(folder: Path, name: str, suffix: str = "") -> Path:
    """Return the first of `name`, `name`-2, `name`-3 and so on that `folder` does not hold."""
    path = folder / f"{name}{suffix}"
    for number in itertools.count(2):
        if not path.exists():
            return path
        path = folder / f"{name}-{number}{suffix}"


def in_epochs(number: float) -> str:
    return f"{number:g} epoch" if number == 1 else f"{number:g} epochs"


def print_rows(console: Console, rows: dict[str, str]) -> None:
    """Print names and texts below each other; no table, which would cut long paths."""
    for name, text in rows.items():
        console.print(f"[bold]{name:10}[/]  {escape(printable(text))}", soft_wrap=True)
