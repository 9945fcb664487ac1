"""The page over HTTP, by Python's own server: no package more, and nothing on the page from another machine.

    GET  /                  the page, /page.css, /page.js
    GET  /state             what it shows at first, and the adapters to choose from
    GET  /images/<sha256>.png
    POST /generate /save    settings as JSON; the answer is a JSON object a line, as things happen (lib/play/turns.py)

(Gradio would be the usual choice. Its newest release 6.31 needs a Pillow older than the one that this project is tested
with, and its pages load fonts and scripts from elsewhere.)
"""

import contextlib
import http.server
import ipaddress
import json
import queue
import select
import socket
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit

from lib.errors import UserError
from lib.play.asked import read_request
from lib.play.saved import save
from lib.play.turns import Turns

PAGE = Path(__file__).parent / "page"
FILES = {"/": "page.html", "/page.css": "page.css", "/page.js": "page.js"}
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
# The browser itself refuses everything that does not come from this server.
POLICY = "default-src 'none'; img-src 'self' data:; style-src 'self'; script-src 'self'; connect-src 'self'; "
POLICY += "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
STREAM = "application/x-ndjson"
MOST_READ = 2**20  # bytes of a request; a page sends a few thousand


class Server(http.server.ThreadingHTTPServer):
    """Listens on the host and port of `config` from its creation; `serve` answers. Raises UserError if it cannot."""

    daemon_threads = True

    def __init__(self, config):
        self.config, self.turns, self.studio = config, Turns(), None
        self.address_family = socket.AF_INET6 if ":" in config["host"] else socket.AF_INET
        try:
            super().__init__((config["host"], config["port"]), Handler)
        except (OSError, UnicodeError) as problem:
            reason = getattr(problem, "strerror", None) or problem
            raise UserError(
                f"cannot listen on {config['host']}, port {config['port']}: {reason}; choose others with --host, --port"
            ) from None
        if not is_loopback(config["host"]):
            print(
                f"note: whoever reaches {config['host']} can generate images here and save them; there is no password"
            )

    @property
    def url(self):
        host = f"[{self.config['host']}]" if ":" in self.config["host"] else self.config["host"]
        return f"http://{host}:{self.server_port}/"

    def serve(self, studio):
        """Answers until an interrupt, or until `turns.stop`. Requests are read in threads; the calling thread generates."""
        self.studio = studio
        threading.Thread(target=self.serve_forever, daemon=True).start()
        try:
            self.turns.run()
        finally:
            self.shutdown()

    def handle_error(self, request, client_address):
        """A connection that breaks is not worth a traceback."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class Handler(http.server.BaseHTTPRequestHandler):
    """One request."""

    timeout = 60  # seconds for a client to send its request

    def do_GET(self):
        path = self.path.partition("?")[0]
        if not self.is_welcome():
            self.refuse(403)
        elif path in FILES:
            file = PAGE / FILES[path]
            self.answer(file.read_bytes(), f"{TYPES[file.suffix]}; charset=utf-8")
        elif path == "/state":
            self.answer(self.state(), "application/json")
        elif path.startswith("/images/") and (png := self.server.studio.cache.find(Path(path).stem)):
            self.answer(png, "image/png", "private, max-age=86400, immutable")  # the name is the content's digest
        else:
            self.refuse(404)

    def do_POST(self):
        path, length = self.path.partition("?")[0], self.headers.get("Content-Length", "")
        length = int(length) if length.isdecimal() else 0
        body = self.rfile.read(
            min(length, MOST_READ)
        )  # even if it is refused: what is unread would reset the connection
        if not self.is_welcome() or self.headers.get_content_type() != "application/json":
            self.refuse(403)  # another site's page can send a form, but no JSON
        elif path not in ("/generate", "/save"):
            self.refuse(404)
        else:
            try:
                asked = read_request(body)
            except UserError as problem:  # said at once, not after the wait for a turn
                self.answer(json.dumps(dict(error=str(problem))).encode() + b"\n", STREAM)
            else:
                self.stream(lambda say: self.work(asked, path == "/save", say))

    def is_welcome(self):
        """Whether a request comes from this server's own page, under an address of this machine: neither from a page of
        another site nor under a foreign name that was pointed to this address."""
        host = self.headers.get("Host", "")
        origin = self.headers.get("Origin")
        with contextlib.suppress(ValueError):
            name = urlsplit(f"//{host}").hostname or ""
            known = {"localhost", socket.gethostname().lower(), self.server.config["host"].lower()}
            return (name in known or is_address(name)) and origin in (None, f"http://{host}")
        return False

    def state(self):
        """What the page shows at first, as JSON."""
        config, studio = self.server.config, self.server.studio
        try:
            adapters, second, problem = list(studio.choices()), studio.second(), None
        except UserError as error:
            adapters, second, problem = [], None, " ".join(str(error).split())
        keys = ("prompt", "steps", "guidance_scale")
        seeds = ", ".join(str(config["seed"] + number) for number in range(config["seeds"]))
        state = {key: config[key] for key in keys} | dict(seeds=seeds, adapters=adapters, problem=problem)
        return json.dumps(state | dict(second_adapter=second, base_model=config["base_model"])).encode()

    def work(self, asked, saving, say):
        """Generates what a page has asked for; then saves it, if that is asked too."""
        studio = self.server.studio
        sheet, loaded = studio.generate(asked, say)
        if saving:
            say(saved=str(save(asked, sheet, loaded, self.server.config, studio.device)))

    # ---- HTTP ----------------------------------------------------------------------------------

    def begin(self, status, kind, caching="no-store"):
        self.send_response(status)
        for name, value in (
            ("Content-Type", kind),
            ("Cache-Control", caching),
            ("Content-Security-Policy", POLICY),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),
        ):
            self.send_header(name, value)

    def answer(self, content, kind, caching="no-store"):
        self.begin(200, kind, caching)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def refuse(self, status):
        self.begin(status, "text/plain")
        self.end_headers()

    def stream(self, work):
        """Queues `work` and sends its events, a JSON object a line, as they come. If the page leaves, or asks for
        something else, the work is cancelled."""
        self.begin(200, STREAM)
        self.end_headers()
        job, waited = self.server.turns.submit(work), None
        try:
            while True:
                try:
                    event = job.events.get(timeout=0.2)
                except queue.Empty:
                    waits_for = self.server.turns.waits_for(job)
                    event = dict(status=waits_for) if waits_for and waits_for != waited else None
                    waited = waits_for
                if event:
                    self.wfile.write(json.dumps(event).encode() + b"\n")
                    if "done" in event or "error" in event:
                        return
                if self.is_gone():
                    return
        except OSError:
            pass  # the page is gone
        finally:
            job.cancelled.set()

    def is_gone(self):
        """Whether the other end has closed the connection."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)

    def log_message(self, *args):
        """No line for each request."""


def is_address(name):
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(host):
    return host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)
