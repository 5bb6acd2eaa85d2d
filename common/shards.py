"""How the tensors of a checkpoint lie in files, when one rank or many wrote it.

One rank: STEM.safetensors holds every tensor whole. N ranks: STEM-RANK.safetensors holds the lines
(of the first dimension) that were the rank's, in equal runs but for the last; `index.json` has the
number of ranks and the whole shapes. Tensors without a dimension are the same in all files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

INDEX = "index.json"
WEIGHTS, MOMENTS = "weights", "optimizer"


def lines(length: int, rank: int, ranks: int) -> tuple[int, int]:
    """Which of `length` lines are a rank's: [first, last), none where there are too few."""
    each = -(-length // ranks)
    return min(length, rank * each), min(length, (rank + 1) * each)


def name(stem: str, rank: int, ranks: int) -> str:
    """Of the file."""
    return f"{stem}.safetensors" if ranks == 1 else f"{stem}-{rank:05d}.safetensors"


class Index(NamedTuple):
    ranks: int = 1
    shapes: dict[str, tuple[int, ...]] = {}  # of whole weights; one rank's file says it itself

    @classmethod
    def load(cls, folder: Path) -> Index:
        """Of a checkpoint; without the file one rank wrote it. Raises ValueError (damaged)."""
        path = folder / INDEX
        if not path.exists():
            return cls()
        try:
            found = json.loads(path.read_bytes())
            shapes = {key: tuple(map(int, shape)) for key, shape in found["shapes"].items()}
            return cls(int(found["ranks"]), shapes)
        except (OSError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{INDEX} is damaged: {error}") from None

    def dump(self) -> bytes:
        return json.dumps({"ranks": self.ranks, "shapes": self.shapes}, indent=1).encode()

    def names(self) -> list[str]:
        """The index itself where there is one, and every file with tensors."""
        files = [name(s, r, self.ranks) for s in (WEIGHTS, MOMENTS) for r in range(self.ranks)]
        return files if self.ranks == 1 else [INDEX, *files]
