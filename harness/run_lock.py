"""One owner for a run's folder: a lock that its process holds, and that no kill leaves behind.

    with FolderLock() as lock:
        lock.take(Path("runs/vits16"))    # ValueError where a live run has it
        ...

The lock is `flock`'s on the file `.lock`, which says host and process. The system lets go of it
when the process ends, however it ends; the file of a killed run means nothing.
"""

import errno
import os
import socket
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = ".lock"
# what file systems without locks answer: some of NFS, of FUSE and of a cluster's own
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class FolderLock:
    """The lock on one folder, from `take` to the end of the with block."""

    def __init__(self) -> None:
        self.file: Path | None = None
        self.descriptor = -1
        if hasattr(os, "register_at_fork"):
            # The workers that decode images are forks. They outlive a killed run by seconds, and
            # with the descriptor they would hold its lock.
            os.register_at_fork(after_in_child=self._close)

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *error: object) -> None:
        if self.descriptor >= 0:
            self.file.unlink(missing_ok=True)  # before the lock is free, so that it is still ours
        self._close()

    def _close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def take(self, folder: Path) -> str:
        """Lock a folder, once; return why it cannot be locked, or nothing where it is.

        Raises ValueError where another process has it, OSError where it cannot be written.
        """
        if self.descriptor >= 0:
            return ""
        if fcntl is None:
            return "this system has no flock"
        self.file = folder / NAME
        while self.descriptor < 0:
            descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = os.read(descriptor, 1000).decode(errors="replace").strip()
                os.close(descriptor)
                if error.errno in WITHOUT_LOCKS:
                    self.file.unlink(missing_ok=True)
                    return f"its file system has no locks ({error.strerror})"
                if isinstance(error, BlockingIOError | PermissionError):
                    raise ValueError(_refusal(folder, holder)) from error
                raise
            if _is_still(self.file, descriptor):
                self.descriptor = descriptor
            else:  # the run that had it ended just now, and deleted the file
                os.close(descriptor)
        os.ftruncate(self.descriptor, 0)
        os.write(self.descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        return ""


def _is_still(file: Path, descriptor: int) -> bool:
    """Tell whether a name still means the open file."""
    try:
        return os.path.samestat(os.stat(file), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _refusal(folder: Path, holder: str) -> str:
    whose = f" ({holder})" if holder else ""
    return f"{folder} belongs to a run that is alive{whose}: need its end or another --output-dir"
