"""The dashboard: what it reads, what it survives, what it lets nobody do, and how it looks in a
real browser."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis
from matplotlib.image import imread

from common import prometheus, status, wire
from common.dash_rollouts import MOST_CHARACTERS, OTHERS, Latest
from common.dash_server import Dashboard
from common.dash_state import Watch
from common.errors import ConfigError
from common.journal import Journal
from common.records import Admit, Drop, Issue, Open
from common.runfolder import RunFolder
from common.softstate import SoftState
from common.status import ActorStatus
from common.wire import FromActor
from tests.builders import make_group, make_rollout, make_segment, make_ticket
from tests.test_views import STEPS, a_run, a_status, a_troubled_status, isentrope

CHROMIUM = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium"))), None)
EVIL = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"

Get = Callable[..., http.client.HTTPResponse]


@pytest.fixture
def serve() -> Iterator[Callable[[Watch | Path], Dashboard]]:
    """Dashboards on loopback that answer until the test ends."""
    servers: list[Dashboard] = []

    def start(watch: Watch | Path, metrics_only: bool = False) -> Dashboard:
        servers.append(Dashboard(watch, "127.0.0.1", 0, metrics_only))
        threading.Thread(target=servers[-1].serve_forever, args=(0.02,), daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def get(server: Dashboard, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    line = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    line.request("GET", path, headers={k.replace("_", "-"): v for k, v in headers.items()})
    answer = line.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read()
    line.close()
    return found


def answer(server: Dashboard, name: str) -> dict[str, Any]:
    code, _, body = get(server, f"/api/{name}")
    assert code == 200
    found: dict[str, Any] = json.loads(body)
    return found


# ---- what it shows -------------------------------------------------------------------------------


def test_the_page_is_one_document_that_loads_nothing_else(
    tmp_path: Path, serve: Callable[[Watch], Dashboard]
) -> None:
    code, headers, body = get(serve(Watch(a_run(tmp_path))), "/")
    text = body.decode()
    assert code == 200
    assert "/*CODE*/" not in text
    for word in ("src=", "<link", "@import", "url(", "innerHTML", "eval("):
        assert word not in text, word
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "unsafe" not in headers["Content-Security-Policy"]


def test_status_curves_and_fates_of_a_run_are_served(
    tmp_path: Path, serve: Callable[[Watch], Dashboard]
) -> None:
    server = serve(Watch(a_run(tmp_path)))
    now, series = answer(server, "status"), answer(server, "series")
    assert (now["step"], now["lag_histogram"][1]) == (STEPS, [1, 60])
    assert [actor["name"] for actor in now["actors"]] == ["actor-0", "actor-1"]
    assert series["curves"]["entropy"]["x"] == list(range(1, STEPS + 1))
    assert series["curves"]["heldout"] == {"x": [0], "y": [0.45]}
    assert series["curves"]["entropy_realised"]["x"] == [10]
    assert series["fates"]["zero_variance"] == list(range(1, STEPS + 1))


def test_metrics_are_served_in_prometheus_format(
    tmp_path: Path, serve: Callable[[Watch], Dashboard]
) -> None:
    code, headers, body = get(serve(Watch(a_run(tmp_path))), "/metrics")
    assert (code, headers["Content-Type"]) == (200, prometheus.CONTENT_TYPE)
    assert b"\nisentrope_step_reward 0.76\n" in body


def test_what_was_seen_is_not_sent_again(
    tmp_path: Path, serve: Callable[[Watch], Dashboard]
) -> None:
    server = serve(Watch(a_run(tmp_path)))
    _, headers, _ = get(server, "/api/series")
    code, _, body = get(server, "/api/series", If_None_Match=headers["ETag"])
    assert (code, body) == (304, b"")


def test_a_folder_of_runs_is_a_list_of_pages(
    tmp_path: Path, serve: Callable[[Watch | Path], Dashboard]
) -> None:
    server = serve(tmp_path)
    assert b"no run in" in get(server, "/")[2]
    for name in ("a", "<b>&"):
        (tmp_path / name).mkdir()
        a_run(tmp_path / name)
    text = get(server, "/")[2].decode()
    assert '<a href="/%3Cb%3E%26/">&lt;b&gt;&amp;</a>' in text
    assert "12/60" in text
    for name in ("a", "%3Cb%3E%26"):
        assert get(server, f"/{name}/")[0] == 200
        assert json.loads(get(server, f"/{name}/api/status")[2])["step"] == STEPS
        assert b"isentrope_step_reward" in get(server, f"/{name}/metrics")[2]
    for path in ("/none/api/status", "/../a/api/status", "/a%2F..%2Fa/", "/a/api/none", "/metrics"):
        assert get(server, path)[0] == 404, path


# ---- what it survives ----------------------------------------------------------------------------


def test_a_folder_that_is_not_there_yet_is_waited_for(
    tmp_path: Path, serve: Callable[[Watch], Dashboard]
) -> None:
    server = serve(Watch(tmp_path / "run"))
    assert "not there yet" in answer(server, "status")["notes"][0]
    assert answer(server, "series")["curves"] == {}
    assert answer(server, "rollouts")["groups"] == []
    (tmp_path / "run").mkdir()
    a_run(tmp_path / "run")
    assert answer(server, "status")["step"] == STEPS
    assert answer(server, "series")["curves"]["reward"]["x"][-1] == STEPS


def test_a_status_of_another_version_is_said_and_the_curves_stay(
    tmp_path: Path, serve: Callable[[Watch], Dashboard]
) -> None:
    (a_run(tmp_path) / status.FILE).write_text('{"step": "many"}')
    server = serve(Watch(tmp_path))
    assert "another version" in answer(server, "status")["notes"][0]
    assert answer(server, "series")["curves"]["reward"]["y"]


def test_a_learner_that_went_silent_is_seen(tmp_path: Path) -> None:
    now = a_status()
    now.at -= 100
    (tmp_path / status.FILE).write_bytes(status.encode(now))
    assert Watch(tmp_path).status()["silent_s"] >= 99


def test_while_redis_is_away_the_files_are_shown_and_it_is_said(
    tmp_path: Path, free_port: int
) -> None:
    RunFolder.create(tmp_path, "r1")
    found = Watch(a_run(tmp_path), f"redis://127.0.0.1:{free_port}/0").status()
    assert "did not answer" in found["redis"]["words"]
    assert (found["step"], len(found["actors"])) == (STEPS, 2)


def test_redis_shows_actors_that_the_learner_does_not_hear(tmp_path: Path, redis_url: str) -> None:
    RunFolder.create(tmp_path, "r1")
    soft = SoftState(redis_url, "r1")
    soft.live("actor:lost", msgspec.json.encode(ActorStatus(version=3)))
    soft.live("actor:odd", b"not a status")
    watch = Watch(a_run(tmp_path), redis_url)
    found = {actor["name"]: actor for actor in watch.status()["actors"]}
    assert sorted(found) == ["actor-0", "actor-1", "lost"]
    assert "does not hear" in found["lost"]["remarks"][0]
    soft.live("learner", status.encode(a_status(13)))
    assert watch.status()["step"] == 13
    soft.close()


def test_a_run_without_its_folder_is_shown_over_redis(redis_url: str) -> None:
    soft = SoftState(redis_url, "r1")
    soft.live("learner", status.encode(a_status()))
    watch = Watch(None, redis_url)
    assert watch.status()["step"] == STEPS
    assert "no run folder" in watch.series()["note"]
    assert "no run folder" in watch.rollouts()["note"]
    soft.close()


def test_nothing_is_written_to_redis(tmp_path: Path, redis_url: str) -> None:
    soft = SoftState(redis_url, "r1")
    soft.live("actor:gone", b"{}", ttl_s=0.001)
    with redis.Redis.from_url(redis_url) as client:
        before = client.info("commandstats")
        Watch(None, redis_url).status()
        after = client.info("commandstats")
    called = {name for name in after if after[name] != before.get(name)}
    assert called <= {f"cmdstat_{c}" for c in ("scan", "mget", "info", "hello", "select", "client")}
    soft.close()


# ---- the last rollouts ---------------------------------------------------------------------------


def with_journal(folder: Path, texts: list[str], eos: bool = True) -> tuple[Journal, Path]:
    """A run whose journal ends with a group a text: one answer says it, the other nothing."""
    run = RunFolder.create(folder, "r1")
    (folder / "recipe.toml").write_text('[run]\nmodel = "tiny"\n')
    journal = Journal(run.journal, 1)
    journal.append(Open(run="r1", incarnation=1, config={}))
    for number, text in enumerate(texts, start=1):
        admit(journal, number, text)
    journal.commit()
    return journal, folder


def admit(journal: Journal, number: int, text: str) -> None:
    from common.codec import Codec

    ids = tokens(text)
    ticket = make_ticket(number, prompt=tokens("1+2?"), grading=wire.Grading(gold="3"))
    rollouts = (
        make_rollout(1.0, segments=(make_segment(ids),)),
        make_rollout(0.0, segments=(make_segment(ids[:1]), make_segment(ids, role="feedback"))),
    )
    group = make_group((1, 0), ticket=number, rollouts=rollouts, problem=EVIL, actor=EVIL)
    journal.append(Issue(ticket=ticket))
    frame = bytes(Codec(FromActor).encode(group))
    journal.append(Admit(ticket=number, frame=frame, at=1.0 * number))


def tokens(text: str) -> list[int]:
    from tokenizers import Tokenizer

    from common import models

    path = models.find("tiny") / "tokenizer.json"
    return list(Tokenizer.from_file(str(path)).encode(text, add_special_tokens=False).ids)


def test_the_last_groups_are_text_and_follow_the_journal(tmp_path: Path) -> None:
    journal, folder = with_journal(tmp_path, [f"1+{n}={n + 1}#" for n in range(1, 10)])
    latest = Latest(folder)
    latest.refresh()
    groups = latest.shown()
    assert [group["ticket"] for group in groups] == list(range(9, 9 - OTHERS, -1))
    assert (groups[0]["prompt"], groups[0]["gold"]) == ("1+2?", "3")
    first, second = groups[0]["rollouts"]
    assert first["segments"][0]["text"] == "1+9=10#"
    assert [s["role"] for s in second["segments"]] == ["policy", "feedback"]
    admit(journal, 10, "7=7#" * (MOST_CHARACTERS // 4 + 1))
    journal.commit()
    latest.refresh()
    newest = latest.shown()[0]
    assert newest["ticket"] == 10
    assert newest["rollouts"][0]["segments"][0]["text"].endswith("(4 more)")
    assert latest.words() == ""
    journal.close()


def test_a_ticket_that_ended_without_an_answer_is_not_remembered(tmp_path: Path) -> None:
    journal, folder = with_journal(tmp_path, ["1=1#"])
    for number in range(2, 50):
        journal.append(Issue(ticket=make_ticket(number)))
        journal.append(Drop(ticket=number, reason="failed"))
    journal.append(Issue(ticket=make_ticket(50)))
    journal.commit()
    latest = Latest(folder)
    latest.refresh()
    assert set(latest._open) == {50}
    journal.close()


def test_a_last_word_that_is_no_text_is_none(tmp_path: Path) -> None:
    (tmp_path / status.FILE).write_bytes(b'{"run": "\xff", "phase": "waiting"}')
    assert "of another version" in Watch(tmp_path).status()["notes"][0]


def test_without_a_tokenizer_token_ids_are_shown_and_damage_is_said(tmp_path: Path) -> None:
    journal, folder = with_journal(tmp_path, ["1=1#", "2=2#"])
    journal.close()
    (folder / "recipe.toml").write_text('[run]\nmodel = "/of/another/machine"\n')
    latest = Latest(folder)
    latest.refresh()
    assert latest.shown()[0]["prompt"] == " ".join(map(str, tokens("1+2?")))
    assert "token ids" in latest.words()
    segment = next((folder / "journal").iterdir())
    damaged = bytearray(segment.read_bytes())
    damaged[40] ^= 1
    segment.write_bytes(bytes(damaged) + b"x")
    latest = Latest(folder)
    latest.refresh()
    assert "damaged" in latest.words()


# ---- what it lets nobody do ----------------------------------------------------------------------


def test_a_strange_name_is_refused_on_loopback(
    tmp_path: Path, serve: Callable[[Watch], Dashboard]
) -> None:
    server = serve(Watch(tmp_path))
    assert get(server, "/api/status", Host="evil.example")[0] == 403
    assert get(server, "/api/status", Host="[nonsense")[0] == 403
    for name in ("localhost:1", "127.0.0.1", "[::1]:80"):
        assert get(server, "/api/status", Host=name)[0] == 200
    assert get(server, "/../../etc/passwd")[0] == 404


def test_nothing_can_be_changed_through_it(
    tmp_path: Path, serve: Callable[[Watch], Dashboard]
) -> None:
    server = serve(Watch(tmp_path))
    line = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    for method in ("POST", "PUT", "DELETE"):
        line.request(method, "/api/status")
        answer = line.getresponse()
        assert answer.status == 501
        answer.read()
        line.close()


def test_leaving_loopback_has_to_be_asked_for_by_name(tmp_path: Path) -> None:
    done = isentrope("dash", str(tmp_path), "--host", "0.0.0.0")
    assert done.returncode == 2
    assert "no password" in done.stderr
    assert "--allow-remote" in done.stderr


def test_a_port_that_is_taken_is_a_line(tmp_path: Path) -> None:
    first = Dashboard(Watch(tmp_path), "127.0.0.1", 0)
    with pytest.raises(ConfigError, match="cannot listen"):
        Dashboard(Watch(tmp_path), "127.0.0.1", first.server_address[1])
    first.server_close()


def test_the_command_serves_until_sigterm_and_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv[0] = 'isentrope'\nfrom common.cli import main\n"
        "try:\n    main()\nfinally:\n    print({'torch', 'transformers'} & set(sys.modules))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "dash", str(a_run(tmp_path)), "--metrics-only"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    place, _, path = url.removeprefix("http://").partition("/")
    line = http.client.HTTPConnection(place, timeout=20)
    line.request("GET", f"/{path}")
    assert b"isentrope_step_reward" in line.getresponse().read()
    line.close()
    process.terminate()
    rest, _ = process.communicate(timeout=20)
    assert (process.returncode, rest.strip()) == (0, "set()")


# ---- in a real browser ---------------------------------------------------------------------------


def browse(url: str, *options: str) -> str:
    """Headless Chromium after four seconds of the page's own time; what it printed."""
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    done = subprocess.run(
        [*command, "--virtual-time-budget=4000", *options, url],
        capture_output=True,
        text=True,
        timeout=90,
        env={**os.environ, "DBUS_SESSION_BUS_ADDRESS": "disabled:"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (Debian: apt-get install chromium)")
def test_a_real_browser_draws_every_curve_and_runs_no_code_of_a_rollout(
    tmp_path: Path, serve: Callable[[Watch], Dashboard]
) -> None:
    journal, folder = with_journal(tmp_path / "run", ["1=1#"])
    journal.close()
    now = a_troubled_status()
    now.warnings = [EVIL]
    a_run(folder)
    (folder / "recipe.toml").write_text('[run]\nmodel = "tiny"\n')
    (folder / status.FILE).write_bytes(status.encode(now))
    page = browse(serve(Watch(folder)).url, "--dump-dom")
    assert "<b>v12</b>" in page
    assert "<title>run · isentrope</title>" in page
    assert page.count("<svg") == 8  # of nine: this run logged no ratio
    assert page.count("<img") == 0
    assert page.count("onerror") == page.count("&lt;img src=x onerror") >= 2
    for word in ("0.610", "its engine broke", "lag 2", "zero variance", "1=1#", "held-out"):
        assert word in page, word


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (Debian: apt-get install chromium)")
def test_the_page_follows_a_run_without_being_loaded_again(
    tmp_path: Path, serve: Callable[[Watch], Dashboard]
) -> None:
    server = serve(Watch(a_run(tmp_path)))
    look, seen = server.routes["/api/status"], []

    def moving() -> Any:
        """What the learner says goes on once the page has seen the beginning."""
        seen.append(look())
        (tmp_path / status.FILE).write_bytes(status.encode(a_status(12 + len(seen))))
        return seen[-1]

    server.routes["/api/status"] = moving
    page = browse(server.url, "--dump-dom")
    shown = re.search(r"<b>v(\d+)</b>", page)
    assert shown is not None
    assert 12 < int(shown[1]) < 12 + len(seen)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (Debian: apt-get install chromium)")
@pytest.mark.parametrize(("theme", "size"), [("light", (1400, 900)), ("dark", (500, 900))])
def test_the_page_is_light_or_dark_and_as_wide_as_the_window(
    tmp_path: Path, serve: Callable[[Watch], Dashboard], theme: str, size: tuple[int, int]
) -> None:
    url, shot = serve(Watch(a_run(tmp_path))).url, tmp_path / "page.png"
    browse(f"{url}#{theme}", f"--window-size={size[0]},{size[1]}", f"--screenshot={shot}")
    image = (255 * imread(shot)[:, :, :3]).astype(int)
    assert image.shape[:2] == (size[1], size[0])
    assert (image[-1, 1].mean() > 200) == (theme == "light")
    coloured = (image.max(axis=2) - image.min(axis=2) > 60).mean()
    assert coloured > 0.003, "curves are there"
