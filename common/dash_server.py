"""The page and the numbers of one run over HTTP, by the standard library.

    /               the page: one document, its style and its code inside it
    /api/status     this moment            } JSON with an ETag: whoever has seen it gets a 304
    /api/series     the curves             }
    /api/rollouts   the last groups        }
    /metrics        Prometheus' text
    /healthz        that the server lives

For a folder of runs / is their list, and all but /healthz is behind /NAME.

Nothing can be changed through it. A request under a name that is not ours is refused on loopback: a
stranger's page that points its own name at 127.0.0.1 could read along otherwise. The page loads
nothing from anywhere and runs no code but its own, by its Content-Security-Policy.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import socket
import socketserver
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from urllib.parse import unquote, urlsplit

import msgspec

from common import dash_runs, prometheus
from common.dash_state import Watch
from common.errors import ConfigError

log = logging.getLogger("isentrope.dash")
HERE = Path(__file__).parent / "dash"
IDLE_S = 30.0  # a connection that says nothing is closed


class Reply(NamedTuple):
    kind: str  # Content-Type
    body: bytes


Routes = dict[str, Callable[[], Reply]]


def is_loopback(host: str) -> bool:
    """By address; of names only `localhost`, which RFC 6761 reserves."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Dashboard(ThreadingHTTPServer):
    """Listens once it is made; `serve_forever` answers. Raises ConfigError: the address is taken,
    or is none."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self, watch: Watch | Path, host: str, port: int, metrics_only: bool = False
    ) -> None:
        """`watch`: one run, or a folder of them."""
        self.guarded = is_loopback(host)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._document, self.policy = document()
        self._metrics_only = metrics_only
        self._folder = watch if isinstance(watch, Path) else None
        self._runs: dict[str, Routes] = {}
        self.routes: Routes = {
            "/healthz": lambda: Reply("text/plain; charset=utf-8", b"ok\n"),
            **(self._list(watch) if isinstance(watch, Path) else self._of(watch)),
        }
        try:
            super().__init__((host, port), Answer)
        except (OSError, OverflowError) as error:
            raise ConfigError(f"cannot listen on {host}:{port}: {error}") from None

    def route(self, path: str) -> Callable[[], Reply] | None:
        """Who answers to a path; None: nobody."""
        found = self.routes.get(path)
        if found is not None or self._folder is None:
            return found
        name, slash, rest = unquote(path[1:]).partition("/")
        if name not in dash_runs.found(self._folder):
            return None
        if name not in self._runs:
            self._runs[name] = self._of(Watch(self._folder / name))
        return self._runs[name].get(f"{slash}{rest}")

    def _list(self, folder: Path) -> Routes:
        style = (HERE / "page.css").read_text(encoding="utf-8")
        return {"/": lambda: Reply("text/html; charset=utf-8", dash_runs.page(folder, style))}

    def _of(self, watch: Watch) -> Routes:
        """One run's."""
        numbers: Routes = {
            "/metrics": lambda: Reply(prometheus.CONTENT_TYPE, watch.metrics().encode())
        }
        if self._metrics_only:
            return numbers
        return {
            **numbers,
            "/": lambda: Reply("text/html; charset=utf-8", self._document),
            "/api/status": lambda: _json(watch.status()),
            "/api/series": lambda: _json(watch.series()),
            "/api/rollouts": lambda: _json(watch.rollouts()),
        }

    def server_bind(self) -> None:
        """Without a look at the name service, which HTTPServer would ask for our name."""
        socketserver.TCPServer.server_bind(self)

    @property
    def url(self) -> str:
        host, port = str(self.server_address[0]), self.server_address[1]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


class Answer(BaseHTTPRequestHandler):
    server: Dashboard
    protocol_version = "HTTP/1.1"
    server_version = "isentrope"
    sys_version = ""
    timeout = IDLE_S
    HEADERS: ClassVar = {
        "Cache-Control": "no-cache",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
    }

    def do_GET(self) -> None:
        if self.server.guarded and not is_loopback(_name(self.headers.get("Host", ""))):
            self._send(
                HTTPStatus.FORBIDDEN, _words("this page answers to names of loopback only\n")
            )
            return
        route = self.server.route(urlsplit(self.path).path)
        if route is None:
            self._send(HTTPStatus.NOT_FOUND, _words("there is nothing here\n"))
            return
        reply = route()
        tag = f'"{hashlib.sha256(reply.body).hexdigest()[:24]}"'
        seen = self.headers.get("If-None-Match") == tag
        self._send(HTTPStatus.NOT_MODIFIED if seen else HTTPStatus.OK, reply, tag)

    do_HEAD = do_GET

    def _send(self, code: HTTPStatus, reply: Reply, tag: str = "") -> None:
        self.send_response(code)
        headers = {**self.HEADERS, "Content-Security-Policy": self.server.policy}
        headers |= {"ETag": tag} if tag else {}
        if code != HTTPStatus.NOT_MODIFIED:
            headers |= {"Content-Type": reply.kind, "Content-Length": str(len(reply.body))}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD" and code != HTTPStatus.NOT_MODIFIED:
            self.wfile.write(reply.body)

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)


def document() -> tuple[bytes, str]:
    """The page in one piece, and the policy that lets exactly this style and this code run."""
    style = (HERE / "page.css").read_text(encoding="utf-8")
    code = "".join((HERE / name).read_text(encoding="utf-8") for name in ("charts.js", "page.js"))
    frame = (HERE / "page.html").read_text(encoding="utf-8")
    page = frame.replace("/*STYLE*/", style).replace("/*CODE*/", code)
    policy = (
        f"default-src 'none'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        f"frame-ancestors 'none'; script-src {_digest(code)}; style-src {_digest(style)}"
    )
    return page.encode(), policy


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _json(value: Any) -> Reply:
    return Reply("application/json", msgspec.json.encode(value))


def _words(text: str) -> Reply:
    return Reply("text/plain; charset=utf-8", text.encode())


def _name(host: str) -> str:
    """Of a Host header, without the port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
