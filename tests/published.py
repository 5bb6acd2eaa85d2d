"""Small weight versions for the scripted engine, put into a real registry, whole or spoiled."""

from __future__ import annotations

import numpy as np

from common.pull import put_version
from common.stores import Store, open_store
from common.versions import Manifest, Registry, Tensor, digest


def lay(
    registry: Registry,
    version: int,
    incarnation: int = 1,
    seed: int | None = None,
    store: Store | None = None,
) -> Manifest:
    """Store a version whose content follows from `seed`; nobody knows of it yet."""
    content = np.random.default_rng(version if seed is None else seed).random(64, np.float32)
    tensors = (Tensor("w", "F32", (64,), memoryview(content.tobytes())),)
    return lay_tensors(registry, version, tensors, incarnation, store)


def lay_tensors(
    registry: Registry,
    version: int,
    tensors: tuple[Tensor, ...],
    incarnation: int = 1,
    store: Store | None = None,
) -> Manifest:
    """Store a version of these tensors; nobody knows of it yet."""
    named = digest(tensors)
    entries, blobs = put_version(store or open_store("redis", registry), version, named, tensors)
    return Manifest(
        version=version,
        step=version,
        digest=named,
        dtype="fp32",
        nbytes=sum(blob.nbytes for blob in blobs),
        tensors=entries,
        blobs=blobs,
        incarnation=incarnation,
    )


def put(
    registry: Registry, version: int, incarnation: int = 1, seed: int | None = None
) -> Manifest:
    manifest = lay(registry, version, incarnation, seed)
    registry.publish(manifest)
    return manifest


def spoil(registry: Registry, manifest: Manifest) -> None:
    """Flip a byte of the version's first blob, where it lies."""
    key = registry.key(f"blob:{manifest.blobs[0].key}")
    raw = bytearray(registry.client.get(key))  # type: ignore[arg-type]
    raw[5] ^= 1
    registry.client.set(key, bytes(raw))
