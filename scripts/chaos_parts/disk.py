"""A small disk for the run folder, that can be filled: a tmpfs where mounting is permitted."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
from pathlib import Path

BALLOON = "balloon"
SMALLEST = 4096


class Disk:
    """`folder` on a file system of its own with `size_mb`; `fillable` says whether it is one."""

    def __init__(self, folder: Path, size_mb: int) -> None:
        self.folder, self.fillable = folder, False
        folder.mkdir(parents=True, exist_ok=True)
        detach(folder)
        words = ["mount", "-t", "tmpfs", "-o", f"size={size_mb}m", "isentrope-chaos", str(folder)]
        if os.geteuid() == 0 and shutil.which("mount"):
            done = subprocess.run(words, capture_output=True, check=False, timeout=20)
            self.fillable = done.returncode == 0

    def fill(self) -> None:
        """Take all the space there is."""
        piece = 64 << 20
        with (self.folder / BALLOON).open("ab") as balloon:
            while piece >= SMALLEST:
                try:
                    os.posix_fallocate(balloon.fileno(), balloon.tell(), piece)
                    balloon.seek(0, os.SEEK_END)
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    piece //= 2

    def is_full(self) -> bool:
        """Whether somebody who writes is told so."""
        probe = self.folder / "probe"
        try:
            probe.write_bytes(bytes(16 * SMALLEST))
        except OSError as error:
            return error.errno == errno.ENOSPC
        finally:
            probe.unlink(missing_ok=True)
        return False

    def empty(self) -> None:
        (self.folder / BALLOON).unlink(missing_ok=True)

    def close(self, keep: Path | None) -> None:
        """Take the disk away; what is on it goes to `keep` first, if that is given."""
        self.empty()
        if keep is not None and keep != self.folder:
            shutil.copytree(self.folder, keep, dirs_exist_ok=True)
        if self.fillable:
            detach(self.folder)


def detach(folder: Path) -> None:
    """Unmount what is mounted there, if anything is."""
    with contextlib.suppress(OSError):
        while folder.is_mount():
            done = subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)
            if done.returncode:
                return
