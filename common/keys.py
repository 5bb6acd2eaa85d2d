"""CURVE keys: who may speak with whom once the channel leaves this machine, and `isentrope keys`.

    isentrope keys KEYS             KEYS/learner.json  its pair, and the actors it admits
                                    KEYS/actor.json    a pair for actors, and the learner to trust
    isentrope keys KEYS --name bob  KEYS/bob.json      another pair, admitted from the next start on

Each process is given the path of its own file (`-s run.keys=…`). Files are readable by their owner
only; the secret half never leaves them.
"""

from __future__ import annotations

import os
from pathlib import Path

import click
import msgspec

from common.channel import Keys
from common.errors import ConfigError

LEARNER = "learner"


class KeyFile(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A pair in Z85, and the public keys that its holder trusts."""

    public: str
    secret: str
    peers: list[str] = []


def read(path: str) -> Keys | None:
    """The keys of a file; None for the empty path. Raises ConfigError."""
    if not path:
        return None
    file = Path(path).expanduser()
    try:
        if file.stat().st_mode & 0o077:
            raise ConfigError(f"run.keys: others can read {file}; do: chmod 600 {file}")
        found = msgspec.json.decode(file.read_bytes(), type=KeyFile)
    except OSError as error:
        raise ConfigError(
            f"run.keys: cannot read {file}: {error.strerror}; make keys with `isentrope keys`"
        ) from None
    except msgspec.MsgspecError as error:
        raise ConfigError(f"run.keys: {file} is no key file ({error})") from None
    ends = (found.public, found.secret, *found.peers)
    if any(len(key) != 40 for key in ends):
        raise ConfigError(f"run.keys: {file} holds a key that has not 40 letters")
    peers = tuple(peer.encode() for peer in found.peers)
    return Keys(found.public.encode(), found.secret.encode(), peers)


def make(folder: Path, name: str = "actor") -> list[Path]:
    """A pair for actors called `name`, admitted by the learner's file, which is made if need be.

    Raises ConfigError when `name` has a pair already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mine, theirs = folder / f"{name}.json", folder / f"{LEARNER}.json"
    if mine.exists() or name == LEARNER:
        raise ConfigError(f"{mine} is there already; choose another --name, or remove it first")
    made = [mine] if theirs.exists() else [theirs, mine]
    known = theirs.read_bytes() if theirs.exists() else b""
    learner = msgspec.json.decode(known, type=KeyFile) if known else _pair()
    actor = _pair()
    actor.peers = [learner.public]
    learner.peers.append(actor.public)
    _write(theirs, learner)
    _write(mine, actor)
    return made


def _pair() -> KeyFile:
    import zmq

    public, secret = zmq.curve_keypair()
    return KeyFile(public=public.decode(), secret=secret.decode())


def _write(path: Path, keys: KeyFile) -> None:
    """Readable by the owner alone from its first byte on, whatever lay in its place."""
    aside = path.with_suffix(".new")
    aside.unlink(missing_ok=True)
    with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(msgspec.json.encode(keys))
    aside.rename(path)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--name", default="actor", show_default=True, help="Whose pair to make.")
def keys(folder: Path, name: str) -> None:
    """Make the keys that a learner and its actors need off this machine."""
    for path in make(folder, name):
        click.echo(f"made {path}")
    click.echo(
        f"learner: -s run.keys={folder / LEARNER}.json     actor: -s run.keys={folder / name}.json"
    )
