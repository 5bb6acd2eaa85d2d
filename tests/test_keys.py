"""Keys off loopback: who has them gets in, who has not gets nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import zmq
from click.testing import CliRunner

from common import channel, keys
from common.errors import ConfigError


def test_the_command_makes_a_pair_for_each_side_that_trust_each_other(tmp_path: Path) -> None:
    assert CliRunner().invoke(keys.keys, [str(tmp_path)]).exit_code == 0
    learner, actor = (keys.read(str(tmp_path / f"{n}.json")) for n in ("learner", "actor"))
    assert learner is not None
    assert actor is not None
    assert learner.peers == (actor.public,)
    assert actor.peers == (learner.public,)


def test_a_further_name_is_admitted_beside_the_first(tmp_path: Path) -> None:
    keys.make(tmp_path)
    keys.make(tmp_path, "bob")
    learner, bob = (keys.read(str(tmp_path / f"{n}.json")) for n in ("learner", "bob"))
    assert learner is not None
    assert bob is not None
    assert len(learner.peers) == 2
    assert bob.public in learner.peers


def test_a_pair_is_never_overwritten(tmp_path: Path) -> None:
    keys.make(tmp_path)
    with pytest.raises(ConfigError, match="already"):
        keys.make(tmp_path)


def test_key_files_are_their_owners_alone_and_refused_otherwise(tmp_path: Path) -> None:
    for path in keys.make(tmp_path):
        assert path.stat().st_mode & 0o777 == 0o600
        path.chmod(0o644)
        with pytest.raises(ConfigError, match="chmod 600"):
            keys.read(str(path))


def test_a_secret_is_never_written_into_a_file_that_others_may_read(tmp_path: Path) -> None:
    left = tmp_path / "actor.new"  # of a command that was killed
    left.write_text("")
    left.chmod(0o666)
    (tmp_path / "learner.new").symlink_to(tmp_path / "elsewhere")
    for path in keys.make(tmp_path):
        assert path.stat().st_mode & 0o777 == 0o600
    assert not (tmp_path / "elsewhere").exists()


def test_what_is_no_key_file_is_refused_by_name(tmp_path: Path) -> None:
    damaged = tmp_path / "actor.json"
    damaged.write_text('{"public": "x"}')
    damaged.chmod(0o600)
    with pytest.raises(ConfigError, match=r"actor\.json"):
        keys.read(str(damaged))
    with pytest.raises(ConfigError, match="isentrope keys"):
        keys.read(str(tmp_path / "nowhere.json"))


def test_a_public_address_is_bound_with_keys_and_heard_only_by_those_who_have_them(
    tmp_path: Path,
) -> None:
    keys.make(tmp_path / "ours")
    keys.make(tmp_path / "theirs")
    files = [tmp_path / p for p in ("ours/learner.json", "ours/actor.json", "theirs/actor.json")]
    learner, friend, stranger = (keys.read(str(f)) for f in files)
    assert learner is not None
    assert stranger is not None
    stranger = stranger._replace(peers=(learner.public,))  # it even knows whom to ask
    with zmq.Context() as context:
        router, bound = channel.bind_router(context, "tcp://0.0.0.0:0", learner)
        here = bound.replace("0.0.0.0", "127.0.0.1")
        good = channel.connect_dealer(context, here, friend)
        bad = channel.connect_dealer(context, here, stranger)
        bad.send(b"let me in")
        good.send(b"hello")
        assert router.poll(30_000)
        assert router.recv_multipart()[1] == b"hello"
        assert not router.poll(300), "nothing of a stranger arrives"
        for socket in (router, good, bad):
            socket.close(0)
