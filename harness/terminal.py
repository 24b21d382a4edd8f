"""Terminals that go away: what is printed must never end what is computed.

    with lasting_terminal():
        ...    # print as usual: `| head -1`, a closed session or a full disk is outlived

Stands alone: needs nothing but Python.
"""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import TextIO


def printable(text: str) -> str:
    """Return text with what a terminal would obey, such as ESC, as a backslash and its code."""
    return "".join(
        letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in text
    )


def printable_name(name: object) -> str:
    """Return a file's name as text of one line: printable, and newlines as backslashes, too."""
    return printable(str(name)).replace("\n", "\\n")


class LastingStream:
    """A text stream that goes on in silence once it cannot be written to.

    Text that it cannot encode, such as file names that are no UTF-8, is written with backslashes.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.is_gone = False

    def write(self, text: str) -> int:
        if self.is_gone:
            return len(text)
        try:
            return self.stream.write(text)
        except UnicodeEncodeError:
            encoding = self.stream.encoding or "ascii"
            return self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError) as error:  # ValueError: it is closed
            self._give_up(error)
            return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if self.is_gone:
            return
        try:
            self.stream.flush()
        except (OSError, ValueError) as error:
            self._give_up(error)

    def isatty(self) -> bool:
        try:
            return not self.is_gone and self.stream.isatty()
        except ValueError:
            return False

    def _give_up(self, error: Exception) -> None:
        self.is_gone = True
        # what is left in the stream's buffer would be written, and fail, at the interpreter's end
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)
        number = getattr(error, "errno", None)
        if number not in (None, errno.EPIPE) and sys.stderr not in (None, self):
            print(f"warning: cannot print ({error.strerror}): going on without", file=sys.stderr)

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


@contextlib.contextmanager
def lasting_terminal() -> Iterator[None]:
    """Let standard output and error outlive their terminal within the block."""
    before = sys.stdout, sys.stderr
    # a stream is None where it was closed before Python began
    nowhere = open(os.devnull, "w") if None in before else None  # noqa: SIM115
    sys.stdout, sys.stderr = (LastingStream(stream or nowhere) for stream in before)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = (stream or nowhere for stream in before)
