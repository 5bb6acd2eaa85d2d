"""Passwords and keys: who has them gets in, and nobody reads them anywhere."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from common.config import RunConfig, without_password
from common.doctor import of_recipe
from common.errors import ConfigError, DeadlineError, WeightsError
from common.recipe import load
from common.softstate import SoftState, hidden
from common.versions import Registry
from learner.turns import FeedbackConfig
from tests import runs

PASSWORD = "pa55-word-never-seen"
USER = "isentrope"


@pytest.fixture
def guarded(redis_url: str) -> Iterator[str]:
    """A Redis whose ACL user may touch our keys and channels, without its password."""
    with redis.Redis.from_url(redis_url) as client:
        rights = ["~isentrope:*", "resetchannels", "&isentrope:*", "+@all", "-@admin"]
        client.execute_command("ACL", "SETUSER", USER, "on", f">{PASSWORD}", *rights)
        yield redis_url.removeprefix("redis://")
        client.execute_command("ACL", "DELUSER", USER)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:secret@host:1/0", "redis://:***@host:1/0"),
        ("rediss://me:s/e:c@r@host/0", "rediss://me:***@host/0"),
        ("run.redis=redis://me:secret@host", "run.redis=redis://me:***@host"),
        ("redis://host/0?password=secret&x=1", "redis://host/0?password=***&x=1"),
        ("redis://host:6379/0", "redis://host:6379/0"),
        ("redis://me@host/0?password_file=/x", "redis://me@host/0?password_file=/x"),
    ],
)
def test_people_see_an_address_without_its_password(url: str, shown: str) -> None:
    assert without_password(url) == shown


@pytest.mark.parametrize(
    "url", [f"http://:{PASSWORD}@h:1", f"redis://:x/{PASSWORD}@h:1/0", f"redis://:{PASSWORD}@h:x"]
)
def test_no_refusal_quotes_a_password(url: str) -> None:
    def refused() -> str:
        sections = load("tiny", {"run": RunConfig}, [f'run.redis="{url}"'])
        run = sections["run"]
        assert isinstance(run, RunConfig)
        Registry(run.redis, "r")
        return ""

    with pytest.raises(ConfigError) as error:
        refused()
    assert PASSWORD not in str(error.value)
    assert "redis" in str(error.value)


def test_doctor_says_that_redis_answers_and_not_with_what_password(guarded: str) -> None:
    url = f'run.redis="redis://{USER}:{PASSWORD}@{guarded}"'
    said = [str(finding) for finding in of_recipe("tiny", (url,))]
    assert any("answers" in line for line in said)
    assert not [line for line in said if PASSWORD in line]


@pytest.mark.parametrize(
    ("url", "open_"),
    [
        ("redis://192.0.2.7:6379/0", True),
        ("redis://redis.example/0", True),
        ("redis://me:secret@192.0.2.7/0", False),
        ("redis://127.0.0.1:6379/0", False),
        ("unix:///run/redis.sock", False),
    ],
)
def test_a_redis_off_this_machine_without_a_password_is_warned_of(url: str, open_: bool) -> None:
    assert ("no password" in SoftState(url, "r").unguarded) == open_


def test_the_address_of_a_voice_holds_no_key_for_it_is_journaled() -> None:
    for place in (f"https://me:{PASSWORD}@host/v1", f"https://host/v1?key={PASSWORD}"):
        with pytest.raises(ConfigError, match="environment variable") as error:
            FeedbackConfig(voice=place, model="m").check()
        assert PASSWORD not in str(error.value)
    FeedbackConfig(voice="https://host:8000/v1", model="m").check()


def test_the_processes_of_a_run_are_not_given_its_password_on_their_command_lines(
    guarded: str,
) -> None:
    for url in (
        f"redis://{USER}:{PASSWORD}@{guarded}",
        f"redis://{USER}:{PASSWORD}@{guarded}?db=1",
    ):
        address = hidden(url)
        assert PASSWORD not in address
        code = (
            "import sys; from common.versions import Registry; "
            "Registry(sys.argv[1], 'r').fence(1); print(open('/proc/self/cmdline').read())"
        )
        command = [sys.executable, "-c", code, address]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert USER in said
        assert PASSWORD not in said
    assert hidden("redis://host:1/0") == "redis://host:1/0"
    assert hidden("redis://:p%40ss@h/0").startswith("redis://h/0?password_file=/proc/")


def test_an_acl_user_that_may_touch_only_our_keys_is_enough(guarded: str) -> None:
    registry = Registry(f"redis://{USER}:{PASSWORD}@{guarded}", "r")
    registry.fence(1)
    assert registry.stamp() is None
    assert registry.live("actor:a", b"x")
    assert registry.living() == {"actor:a": b"x"}
    registry.client.publish(registry.key("hint"), 1)
    with pytest.raises(redis.exceptions.NoPermissionError):
        registry.client.get("another")
    registry.close()


def test_a_wrong_password_is_refused_in_a_line_that_does_not_repeat_it(guarded: str) -> None:
    registry = Registry(f"redis://{USER}:{PASSWORD}X@{guarded}", "r")
    with pytest.raises((WeightsError, DeadlineError)) as error:
        registry.stamp()
    assert PASSWORD not in str(error.value)
    registry.close()


def test_a_password_file_takes_the_place_of_a_password_in_the_address(
    guarded: str, tmp_path: Path
) -> None:
    (tmp_path / "password").write_text(f"{PASSWORD}\n")
    registry = Registry(f"redis://{USER}@{guarded}?password_file={tmp_path / 'password'}", "r")
    assert registry.stamp() is None
    registry.close()


@pytest.mark.timeout(400)
def test_a_run_writes_its_password_nowhere(guarded: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    address = f'"redis://{USER}:{PASSWORD}@{guarded}"'
    small = {"learner__steps": "2", "learner__groups_per_step": "2"}
    small |= {"learner__eval__first": "false", "learner__eval__last": "false"}
    runs.run(folder, recipe="scripted", run__redis=address, **small)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"recipe.toml", "status.json", "metrics.jsonl", "learner.log"} <= {p.name for p in files}
    assert any(path.suffix == ".journal" for path in files)
    assert [str(p) for p in files if PASSWORD.encode() in p.read_bytes()] == []


# -- TLS -------------------------------------------------------------------------------------------


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """Of 127.0.0.1, signed by itself."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    made = tmp_path / "certificate.pem", tmp_path / "key.pem"
    words = [
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "1",
    ]
    name = ["-subj", "/CN=redis", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", *words, *name, "-out", str(made[0]), "-keyout", str(made[1])]
    subprocess.run(command, check=True, capture_output=True)
    return made


def test_rediss_speaks_to_the_holder_of_the_certificate_only(
    redis_url: str, certificate: tuple[Path, Path]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as outside:
        port = outside.getsockname()[1]
        curtain = threading.Thread(
            target=_unwrap, args=(outside, certificate, redis_url), daemon=True
        )
        curtain.start()
        trusted = Registry(f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={certificate[0]}", "r", 5.0)
        trusted.fence(3)
        assert trusted.stamp() is None
        trusted.close()
        strange = Registry(f"rediss://127.0.0.1:{port}/0", "r", 5.0)
        with pytest.raises(DeadlineError, match="certificate"):
            strange.stamp()
        strange.close()
    curtain.join(5)


def _unwrap(outside: socket.socket, certificate: tuple[Path, Path], redis_url: str) -> None:
    """TLS outside, plain Redis inside, one connection after the other until `outside` is closed."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    host, _, port = redis_url.removeprefix("redis://").partition("/")[0].partition(":")
    outside.settimeout(0.2)
    while outside.fileno() >= 0:
        try:
            raw, _ = outside.accept()
        except TimeoutError:
            continue
        except OSError:  # closed: the test is over
            return
        raw.settimeout(5.0)
        try:
            with (
                context.wrap_socket(raw, server_side=True) as client,
                socket.create_connection((host, int(port))) as server,
            ):
                while said := client.recv(1 << 16):
                    server.sendall(said)
                    client.sendall(server.recv(1 << 16))
        except OSError:  # no TLS, or an untrusted certificate
            continue
