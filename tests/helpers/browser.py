"""Headless Chromium, driven over two pipes through its DevTools protocol. Needs no library and no network."""

import base64
import fcntl
import json
import os
import shutil
import signal
import subprocess
import time

NAMES = ("chromium", "chromium-browser", "google-chrome")
SWITCHES = (
    "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--disable-background-networking",
    "--disable-component-update", "--no-first-run", "--disable-dev-shm-usage", "--allow-file-access-from-files",
)  # fmt: skip


def program():
    """Where Chromium is, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page at a time; `with Browser(folder) as browser`."""

    def __init__(self, folder, limit=60):
        self._folder, self._limit, self._last, self._rest = folder, limit, 0, b""
        self.events = []

    def __enter__(self):
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (theirs_in, theirs_out)]
        exec_it = 'exec "$@" 3<&{} 4>&{}'.format(*theirs)  # Chromium reads 3 and writes 4
        command = ["bash", "-c", exec_it, "bash", program(), *SWITCHES, f"--user-data-dir={self._folder}"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, pass_fds=theirs, start_new_session=True, **quiet)
        for fd in (theirs_in, theirs_out, *theirs):
            os.close(fd)
        os.set_blocking(self._in, False)
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = None
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")
        return self

    def __exit__(self, *_):
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._in)
        os.close(self._out)

    _session = None

    def ask(self, method, **params):
        """Send a command and return its result. Events in the meantime go to `events`."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        found = self._until(lambda x: x.get("id") == self._last)
        assert "error" not in found, found
        return found["result"]

    def _until(self, wanted):
        end = time.monotonic() + self._limit
        while True:
            while b"\0" in self._rest:
                text, self._rest = self._rest.split(b"\0", 1)
                message = json.loads(text)
                if "method" in message:
                    self.events.append(message)
                if wanted(message):
                    return message
            assert time.monotonic() < end, "Chromium does not answer"
            assert self._process.poll() is None, "Chromium has ended"
            try:
                self._rest += os.read(self._in, 1 << 20)
            except BlockingIOError:
                time.sleep(0.01)

    def open(self, page, width=1280, height=900, dark=False):
        """Load a file and wait until its formulas are typeset."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.ask("Page.navigate", url=page.as_uri())
        self._until(lambda x: x.get("method") == "Page.loadEventFired")
        self.run("window.MathJax && MathJax.startup ? MathJax.startup.promise.then(() => true) : true")

    def run(self, code):
        """The value of a JavaScript expression in the page."""
        found = self.ask("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def picture(self, path, whole=False):
        """A screenshot."""
        path.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot", captureBeyondViewport=whole)["data"]))

    def complaints(self):
        """Errors on the page's console, and requests that failed or went to another host."""
        for event in self.events:
            params = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                yield params["exceptionDetails"].get("text", "")
            elif event["method"] == "Log.entryAdded" and params["entry"]["level"] == "error":
                yield f"{params['entry']['text']} {params['entry'].get('url', '')}"
            elif event["method"] == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
                yield str(params["args"])
            elif event["method"] == "Network.requestWillBeSent":
                url = params["request"]["url"]
                if not url.startswith(("file:", "data:", "blob:", "about:")):
                    yield f"asked for {url}"
            elif event["method"] == "Network.loadingFailed" and not params.get("canceled"):
                yield params["errorText"]
