"""Chromium without a window, driven through its DevTools protocol over two pipes, without a package for it."""

import contextlib
import json
import os
import select
import subprocess
import time

from conftest import chromium


class Browser:
    """A headless Chromium; its pages are opened with `page`."""

    def __init__(self, profile):
        to_browser, self.outgoing = os.pipe()
        self.incoming, from_browser = os.pipe()
        options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync --hide-scrollbars"
        options += " --disable-background-networking --disable-component-update --remote-debugging-pipe"
        command = [chromium(), *options.split(), f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(  # Chromium expects the pipes as descriptors 3 and 4
            ["bash", "-c", f'exec "$@" 3<&{to_browser} 4>&{from_browser}', "bash", *command],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self.rest, self.number, self.events = b"", 0, []

    def close(self):
        with contextlib.suppress(OSError, RuntimeError):
            self.call("Browser.close")
        self.process.wait(20)
        os.close(self.outgoing)
        os.close(self.incoming)

    def call(self, method, session=None, **params):
        """The result of a method of the protocol."""
        self.number += 1
        message = dict(id=self.number, method=method, params=params) | (dict(sessionId=session) if session else {})
        os.write(self.outgoing, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive(60)
            if answer.get("id") == message["id"]:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def receive(self, seconds):
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.incoming], [], [], seconds)
            chunk = os.read(self.incoming, 1 << 20) if ready else b""
            if not chunk:
                raise RuntimeError("chromium does not answer")
            self.rest += chunk
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)

    def page(self, url, width=1440, height=900, dark=False):
        """A new page of this size, in a profile of its own."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        page = Page(self, self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])
        page.call("Network.enable")
        page.call("Runtime.enable")
        page.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 760
        )
        scheme = dict(name="prefers-color-scheme", value="dark" if dark else "light")
        page.call("Emulation.setEmulatedMedia", features=[scheme])
        page.call("Page.navigate", url=url)
        page.wait("location.href != 'about:blank' && document.readyState == 'complete'")
        return page


class Page:
    """One page of a Browser."""

    def __init__(self, browser, session):
        self.browser, self.session = browser, session

    def call(self, method, **params):
        return self.browser.call(method, self.session, **params)

    def run(self, code):
        """The value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, (code, answer["exceptionDetails"])
        return answer["result"].get("value")

    def wait(self, code, seconds=60):
        """Wait until an expression is true; returns its value."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := self.run(code):
                return value
            time.sleep(0.05)
        raise AssertionError(f"not within {seconds} s: {code}; the page says “{self.run('document.body.innerText')}”")

    def seen(self, method):
        """The parameters of the events of one kind that have arrived from this page."""
        self.run("1")
        return [
            e["params"] for e in self.browser.events if e.get("sessionId") == self.session and e["method"] == method
        ]
