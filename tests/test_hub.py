"""A run on the Hugging Face Hub, against a stand-in that speaks its HTTP interface on this machine."""

import base64
import contextlib
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import TINY_RUN, assert_one_line, call, make_processed, options
from huggingface_hub import HfApi, close_session, constants

from lib import models
from lib.adapter_files import hub as ours
from lib.errors import UserError

NAME = "lora_weights_rank_32"
TOKEN = "hf_stand_in"


class Hub(BaseHTTPRequestHandler):
    """Who a token belongs to, the making of a repository, and a commit with its large files."""

    def answer(self, status, value=None):
        body = json.dumps(value or {}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def log_message(self, *_):
        pass

    def do_GET(self):
        hub = self.server
        hub.asked.append(f"GET {self.path}")
        if self.path == "/api/whoami-v2":
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.answer(401, {"error": "Invalid credentials"})
            token = {"accessToken": {"role": hub.role}}
            return self.answer(200, {"name": "anna", "orgs": [{"name": "coats"}], "auth": token})
        if self.path == "/api/models/anna/coat" and hub.private is not None:
            return self.answer(200, {"id": "anna/coat", "private": hub.private, "siblings": [], "tags": []})
        return self.answer(404)

    def do_POST(self):
        hub, body = self.server, self.body()
        hub.asked.append(f"POST {self.path}")
        if hub.broken:
            return self.answer(500, {"error": "out of order"})
        if self.path == "/api/repos/create":
            hub.made = json.loads(body)
            return self.answer(200, {"url": f"{hub.address}/anna/coat", "name": "anna/coat"})
        if self.path == "/api/validate-yaml":
            hub.card = json.loads(body)["content"]
            return self.answer(200, {"errors": [], "warnings": []})
        if self.path.startswith("/api/models/anna/coat/preupload/"):
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": f["path"],
                    "shouldIgnore": False,
                    "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                }
                for f in files
            ]
            return self.answer(200, {"files": modes})
        if self.path == "/anna/coat.git/info/lfs/objects/batch":
            objects = [
                dict(one, actions={"upload": {"href": f"{hub.address}/lfs/{one['oid']}"}})
                for one in json.loads(body)["objects"]
            ]
            return self.answer(200, {"transfer": "basic", "objects": objects})
        if self.path.startswith("/api/models/anna/coat/commit/"):
            for line in body.splitlines():
                row = json.loads(line)
                if row["key"] == "file":
                    hub.files[row["value"]["path"]] = base64.b64decode(row["value"]["content"])
                if row["key"] == "lfsFile":
                    hub.files[row["value"]["path"]] = hub.large[row["value"]["oid"]]
            done = {"commitUrl": f"{hub.address}/anna/coat/commit/1", "commitOid": "1", "success": True}
            return self.answer(200, done)
        return self.answer(404)

    def do_PUT(self):
        self.server.large[self.path.rsplit("/", 1)[1]] = self.body()
        self.answer(200)


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.files, server.large, server.asked, server.made = {}, {}, [], None
    server.role, server.broken, server.private = "write", False, None
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def online(hub, monkeypatch, tmp_path):
    """This process as one whose hub is `hub`: a function that takes its address and the token, None for none."""

    def connect(address=hub.address, token=TOKEN, offline=False):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("HF_TOKEN", token or "")
        monkeypatch.setattr(ours, "HfApi", lambda: HfApi(endpoint=address))
        close_session()

    connect()
    yield connect
    close_session()


def train(tmp_path, tiny_model, name=NAME):
    data = make_processed(tmp_path / "data", 4)
    run = dict(base_model=tiny_model, data_dir=data, output_dir=tmp_path / "runs", max_steps=2, run_name=name)
    return call("train.py", *options(**TINY_RUN | run, push_to_hub="anna/coat"))


def test_a_finished_run_is_uploaded(hub, online, tmp_path, tiny_model):
    name = "coat [v2] (a+b)"
    done = train(tmp_path, tiny_model, name)
    assert done.returncode == 0, done.stderr
    assert f"uploaded to {hub.address}/anna/coat" in done.stdout
    made = hub.asked.index("POST /api/repos/create")
    assert hub.asked.index("GET /api/whoami-v2") < made  # and all else that is sent comes later
    assert not [line for line in hub.asked[:made] if line.startswith("POST")]
    assert hub.made["visibility"] == "private"
    assert (hub.made["name"], hub.made["organization"]) == ("coat", "anna")
    folder = tmp_path / "runs" / name
    there = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert hub.files == {name: content for name, content in there.items() if name != "config.json"}
    assert {"README.md", f"{name}.safetensors", "pytorch_lora_weights.safetensors"} <= hub.files.keys()
    assert hub.card.encode() == hub.files["README.md"]  # which the hub has looked at
    assert b'load_lora_weights("anna/coat"' in hub.files["README.md"]
    # Nothing says where things lie on this machine.
    assert not [name for name, content in hub.files.items() if str(tmp_path.parent).encode() in content]
    assert "is public" not in done.stdout


@pytest.mark.parametrize("private", [True, False])
def test_a_public_repository_is_reported_before_training(hub, online, capsys, private):
    hub.private = private
    ours.check_push("anna/coat")
    assert ("anna/coat exists and is public" in capsys.readouterr().out) == (not private)


@pytest.mark.parametrize("token", ["hf_abc\u200bdef", "hf_abc\ndef", "hf_абв", "hf_a b"])
def test_a_token_with_an_odd_character_is_named(monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    for ask in (lambda: ours.check_push("anna/coat"), lambda: models.fetch_model("anna/coat", None, [], False, [])):
        with pytest.raises(UserError, match="HF_TOKEN has .* as its character") as error:
            ask()
        assert "\n" not in str(error.value)
    monkeypatch.setenv("HF_TOKEN", f" {TOKEN}\n")  # as a file's end or a paste leaves it, which the hub's client drops
    assert ours.odd_token() is None


def test_an_upload_that_fails_leaves_the_run_complete(hub, online, tmp_path, tiny_model):
    hub.broken = True
    done = train(tmp_path, tiny_model)
    folder = tmp_path / "runs" / NAME
    assert_one_line(done, f"{folder} is complete", "could not be uploaded to anna/coat")
    assert f"hf upload anna/coat {folder} --exclude config.json" in done.stderr
    assert json.loads((folder / "config.json").read_text())["config"]["push_to_hub"] == "anna/coat"


def closed_port():
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (dict(token=None), "no token for the hub"),
        (dict(token="hf_wrong"), "rejects the token"),
        (dict(role="read"), "can only read"),
        (dict(repository="berta/coat"), "cannot write for berta; the owner can be anna, coats"),
        (dict(repository="coat"), "must be owner/name"),
        (dict(repository="a/b/c"), "is not a repository"),
        (dict(endpoint="closed"), "the hub cannot be reached"),
        (dict(offline=True), "the hub cannot be reached"),
    ],
)
def test_what_is_wrong_is_reported_before_training(hub, online, how, words):
    hub.role = how.get("role", "write")
    address = closed_port() if how.get("endpoint") else hub.address
    online(address, how.get("token", TOKEN), how.get("offline", False))
    with pytest.raises(UserError) as error:
        ours.check_push(how.get("repository", "anna/coat"))
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not [line for line in hub.asked if line.startswith("POST")]


def test_the_script_checks_before_it_trains(online, tmp_path, tiny_model):
    online(token=None)
    done = train(tmp_path, tiny_model)
    assert_one_line(done, "no token for the hub", "hf auth login")
    assert not list((tmp_path / "runs").glob("*"))
    assert "step" not in done.stdout
