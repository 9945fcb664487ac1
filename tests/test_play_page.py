"""The page of play.py: over HTTP, and in a headless Chromium."""

import json
import re
import shutil
import threading
import urllib.error
import urllib.request

import pytest
import torch
from conftest import assert_one_line, call, chromium, options
from headless import Browser
from test_play import FIRST, SECOND, play_config, request

from lib.errors import UserError
from lib.play.server import Server
from lib.play.studio import Studio


@pytest.fixture(scope="module")
def config(tiny_model, tmp_path_factory):
    return play_config(tiny_model, tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def at_work(config):
    return Studio(config, torch.device("cpu"))


@pytest.fixture(scope="module")
def server(at_work, config):
    with Server(config) as server:
        worker = threading.Thread(target=server.serve, args=(at_work,), daemon=True)
        worker.start()
        yield server
        server.turns.stop()
        worker.join(20)


def ask(server, path, body=None, **headers):
    """(status, headers, content) of a request."""
    headers = {"Content-Type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
    try:
        with urllib.request.urlopen(urllib.request.Request(server.url + path, body, headers), timeout=60) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as problem:
        return problem.code, problem.headers, problem.read()


def lines(content):
    return [json.loads(line) for line in content.splitlines()]


def test_images_over_http(server, config):
    assert server.url.startswith("http://127.0.0.1:")
    state = json.loads(ask(server, "state")[2])
    assert state["adapters"] == [FIRST, SECOND] and state["seeds"] == "42" and state["problem"] is None
    events = lines(ask(server, "generate", request())[2])
    assert events[-1] == dict(done=True)
    images = [event["image"] for event in events if "image" in event]
    assert [(image["column"], image["seed"]) for image in images] == [(0, "42"), (1, "42")]
    status, headers, png = ask(server, images[1]["url"])
    assert (status, headers["Content-Type"], png[:4]) == (200, "image/png", b"\x89PNG")
    (folder,) = (event["saved"] for event in lines(ask(server, "save", request())[2]) if "saved" in event)
    assert folder.startswith(config["output_dir"])
    for body, words in ((request(seeds="x"), "is no seed"), (b" " * 70_000, "does not understand"), (b"", "does not")):
        (event,) = lines(ask(server, "generate", body)[2])
        assert words in event["error"]


def test_only_its_own_page_is_served(server):
    own = server.url.rstrip("/")
    assert ask(server, "state", Origin=own)[0] == 200
    assert ask(server, "state", Host=f"localhost:{server.server_port}")[0] == 200
    assert ask(server, "state", Host="elsewhere.example")[0] == 403  # a name that was pointed here
    assert ask(server, "generate", request(), Origin="http://elsewhere.example")[0] == 403
    assert ask(server, "generate", request(), Content_Type="text/plain")[0] == 403
    assert ask(server, "../studio.py")[0] == ask(server, "images/x.png")[0] == ask(server, "save/x", b"{}")[0] == 404
    for path in ("", "page.css", "page.js"):
        status, headers, content = ask(server, path)
        assert status == 200 and "default-src 'none'" in headers["Content-Security-Policy"]
        assert b"http" not in content  # no address of another machine


def test_a_port_that_is_taken_and_a_host_that_is_not_here(server, config):
    with pytest.raises(UserError, match=f"port {server.server_port}: Address already in use; choose others"):
        Server(config | dict(port=server.server_port))
    with pytest.raises(UserError, match="cannot listen on 203.0.113.9, port 0"):
        Server(config | dict(host="203.0.113.9"))


def test_other_hosts_are_announced(config, capsys):
    with Server(config | dict(host="0.0.0.0")):
        assert "note: whoever reaches 0.0.0.0 can generate images here" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--lora-dir", "/nowhere"], "/nowhere: no such folder"),
        (["--second-lora-dir", "/nowhere"], "/nowhere: no such folder"),
        (["--seeds", "9"], "seeds is 9, but must be a whole number from 1 to 8"),
        (["--port", "70000"], "port is 70000"),
        (["--resolution", "100"], "multiple of 8"),
        (["--lora-dir", "tests", "--port", "0", "--demo"], "tests: no adapter in it"),
    ],
)
def test_wrong_options_get_one_line(given, words):
    assert_one_line(call("play.py", *given), words)


def test_the_script_loads_says_where_the_page_is_and_ends_with_ctrl_c(config, monkeypatch):
    asked_of = []

    def serve(server, studio):
        asked_of.append(studio)
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "serve", serve)
    keys = "base_model", "lora_dir", "output_dir", "resolution", "port"
    done = call("play.py", *options(**{key: config[key] for key in keys}))
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"http://127\.0\.0\.1:\d+/  \(open it in a browser", done.stdout)
    assert done.stdout.endswith("stopped\n")
    assert len(asked_of[0].choices()) == 2


# ---- the page in a browser ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if chromium() is None:
        pytest.skip("no Chromium on this machine")
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


DONE = "/^Done/.test(at('status').textContent) && !document.querySelector('.pending')"
SOURCES = "[...document.querySelectorAll('#columns section:not(.unused) img')].map(image => image.src)"


def change(page, field, value, event="change"):
    page.run(f"at('{field}').value = {json.dumps(value)}; at('{field}').dispatchEvent(new Event('{event}')); 1")


def test_the_page_shows_both_sides_and_the_slider_changes_one(browser, server):
    page = browser.page(server.url)
    page.wait(DONE)
    before = page.run(SOURCES)
    assert len(before) == 2 and all(page.run("[...document.images].slice(0, 2).map(image => image.naturalWidth)"))
    change(page, "scale", "0.5", "input")
    page.wait(f"{SOURCES}[1] != '{before[1]}'")
    after = page.run(SOURCES)
    assert after[0] == before[0]
    page.run("at('more').click()")
    page.wait(f"{SOURCES}.length == 3 && {SOURCES}.every(Boolean)")
    page.run("at('save').click()")
    page.wait("/^Saved in /.test(at('status').textContent)")
    requests = [event["request"]["url"] for event in page.seen("Network.requestWillBeSent")]
    assert len(requests) > 6
    assert all(url.startswith((server.url, "data:")) for url in requests), requests
    assert page.seen("Runtime.exceptionThrown") == []


def test_two_people_at_once_both_get_their_images(browser, server):
    pages = [browser.page(server.url), browser.page(server.url, 390, 844)]
    for number, page in enumerate(pages):
        change(page, "seeds", f"{7 + number}, 9")
    for page in pages:
        page.wait(DONE)
        assert page.run(f"{SOURCES}.length == 4 && {SOURCES}.every(Boolean)")
        assert page.run("document.documentElement.scrollWidth <= innerWidth")


def test_what_goes_wrong_is_said_on_the_page(browser, server, config, tmp_path):
    page = browser.page(server.url)
    page.wait(DONE)
    bad = "at('status').classList.contains('bad') && !document.querySelector('.pending') && at('status').textContent"
    for field, value, words in (("prompt", " ", "prompt is empty"), ("seeds", "<b>x", "“<b>x” is no seed")):
        kept = page.run(f"at('{field}').value")
        page.run(f"at('{field}').value = {json.dumps(value)}; at('generate').click()")
        page.wait(f"({bad} || '').includes({json.dumps(words)})")
        page.run(f"at('{field}').value = {json.dumps(kept)}; 1")
    shutil.move(f"{config['lora_dir']}/{SECOND}", tmp_path / "away")
    try:
        change(page, "adapter", SECOND)
        page.wait(f"({bad} || '').includes('{SECOND} is no longer in')")
    finally:
        shutil.move(tmp_path / "away", f"{config['lora_dir']}/{SECOND}")
    change(page, "adapter", SECOND)
    page.wait(DONE)


@pytest.mark.skipif(chromium() is None, reason="no Chromium on this machine")
def test_a_server_that_ended_is_named(browser, at_work, config):
    with Server(config) as server:
        worker = threading.Thread(target=server.serve, args=(at_work,), daemon=True)
        worker.start()
        page = browser.page(server.url)
        page.wait(DONE)
        server.turns.stop()
        worker.join(20)
    page.run("at('generate').click()")
    page.wait("at('status').textContent == 'The server does not answer. Is play.py still running?'")
