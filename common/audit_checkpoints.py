"""Are the weights in the checkpoints those that the journal says? Reads safetensors without a
tensor library.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

from common import shards
from common.errors import WeightsError
from common.versions import Tensor, digest


def check_checkpoints(
    folder: Path, digests: dict[int, str], weights_dtype: str
) -> tuple[int, list[str]]:
    """(how many agree with the step record of their version, a line for each that does not).

    `digests`: version -> digest. A checkpoint of the parameters before the first step has no
    record.
    """
    agree, faults = 0, []
    dtypes = (weights_dtype,) if weights_dtype else ("fp32", "bf16")
    for path in sorted(folder.glob("step-*")):
        name = f"checkpoint {path.name}"
        try:
            version = int(path.name.removeprefix("step-"))
            masters = read_weights(path)
            found = {digest(published(masters, dtype)) for dtype in dtypes}
        except (WeightsError, ValueError) as error:
            faults.append(f"{name}: {error}")
            continue
        recorded = digests.get(version)
        if recorded is None and version > 0:
            faults.append(f"{name}: no step record made version {version}")
        elif recorded is not None and recorded not in found:
            faults.append(
                f"{name}: its weights do not have the digest {recorded} of the step record"
            )
        else:
            agree += 1
    return agree, faults


def read_weights(folder: Path) -> tuple[Tensor, ...]:
    """The whole weights of a checkpoint of any number of ranks. Raises WeightsError, ValueError."""
    index = shards.Index.load(folder)
    files = [shards.name(shards.WEIGHTS, rank, index.ranks) for rank in range(index.ranks)]
    first, *others = (read_safetensors(folder / file) for file in files)
    slices = [{tensor.name: tensor for tensor in part} for part in others]
    if not others:
        return first
    return tuple(
        tensor._replace(
            shape=index.shapes[tensor.name],
            data=memoryview(b"".join([tensor.data, *(s[tensor.name].data for s in slices)])),
        )
        for tensor in first
    )


def read_safetensors(path: Path) -> tuple[Tensor, ...]:
    """Raises WeightsError when the file is missing, cut, or no safetensors file."""
    try:
        data = memoryview(path.read_bytes())
        (length,) = struct.unpack_from("<Q", data)
        entries: dict[str, Any] = json.loads(bytes(data[8 : 8 + length]))
        entries.pop("__metadata__", None)
        body = data[8 + length :]
        tensors = [
            Tensor(name, e["dtype"], tuple(e["shape"]), body[slice(*e["data_offsets"])])
            for name, e in entries.items()
        ]
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path.name} can not be read: {error}") from None
    end = max((e["data_offsets"][1] for e in entries.values()), default=0)
    if end != len(body):
        raise WeightsError(f"{path.name} is cut: it has {len(body)} of {end} bytes")
    return tuple(tensors)


def published(masters: tuple[Tensor, ...], weights_dtype: str) -> tuple[Tensor, ...]:
    """Master weights (float32) as they are published: in float32, or rounded to bfloat16."""
    if weights_dtype != "bf16":
        return masters
    return tuple(t._replace(dtype="BF16", data=_rounded(t.data)) for t in masters)


def _rounded(data: memoryview) -> memoryview:
    """float32 to the nearest bfloat16, ties to even; not-a-number stays one."""
    bits = np.frombuffer(data, np.uint32)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(nan, np.uint16(0x7FC0), nearest).astype("<u2").data.cast("B")
