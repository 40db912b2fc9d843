"""A real browser for tests: Chromium without a window, told what to do by the WebDriver protocol.

Needs chromium and chromedriver of the system, and no package of Python.
"""

import base64
import contextlib
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # as the protocol names it
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, _NAMES)), None)
DRIVER = shutil.which("chromedriver")
missing = (
    "" if BROWSER and DRIVER else "needs chromium and chromedriver (apt install chromium-driver)"
)
CONTROL = "\ue009"
ENTER = "\ue007"


class Browser:
    def __init__(self, driver, session):
        self._base = f"{driver}/session/{session}"

    def _ask(self, path, body=None, method=None):
        return _request(f"{self._base}{path}", body, method)

    def open(self, url):
        self._ask("/url", {"url": url})

    def script(self, text, *arguments):
        return self._ask("/execute/sync", {"script": text, "args": list(arguments)})

    def find(self, selector):
        found = self._ask("/element", {"using": "css selector", "value": selector})
        return found[_ELEMENT]

    def click(self, selector):
        self._ask(f"/element/{self.find(selector)}/click", {})

    def write(self, selector, text):
        element = self.find(selector)
        self._ask(f"/element/{element}/clear", {})
        self._ask(f"/element/{element}/value", {"text": text})

    def press(self, selector, keys):
        """Held together, as CONTROL + ENTER."""
        self._ask(f"/element/{self.find(selector)}/value", {"text": keys})

    def text(self, selector):
        return self._ask(f"/element/{self.find(selector)}/text")

    def value(self, selector):
        return self._ask(f"/element/{self.find(selector)}/property/value")

    def until(self, condition, seconds=60):
        """Waits for an expression of JavaScript to hold, and returns its value."""
        end = time.monotonic() + seconds
        while not (found := self.script(f"return {condition}")):
            assert time.monotonic() < end, f"{condition}: not so\n{self.text('body')}"
            time.sleep(0.05)
        return found

    def resize(self, width, height):
        """Of the page itself, below a window's least width, too."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        command = {"cmd": "Emulation.setDeviceMetricsOverride", "params": metrics}
        self._ask("/goog/cdp/execute", command)

    def screenshot(self, file):
        Path(file).write_bytes(base64.b64decode(self._ask("/screenshot")))

    def log(self):
        """What the page complained of in the console."""
        return [line["message"] for line in self._ask("/se/log", {"type": "browser"})]


@contextlib.contextmanager
def browser(width=1280, height=1000):
    """One with a page of this size, closed afterwards."""
    process = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True)
    session = None
    try:
        for line in process.stdout:
            if "started successfully on port" in line:
                driver = f"http://127.0.0.1:{line.rstrip().rstrip('.').rpartition(' ')[2]}"
                break
        switches = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        options = {
            "goog:chromeOptions": {"binary": BROWSER, "args": switches},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        wanted = {"capabilities": {"alwaysMatch": options}}
        session = _request(f"{driver}/session", wanted)["sessionId"]
        page = Browser(driver, session)
        page.resize(width, height)
        yield page
    finally:
        if session is not None:
            with contextlib.suppress(OSError):
                _request(f"{driver}/session/{session}", method="DELETE")
        process.terminate()
        process.wait(timeout=20)


def _request(url, body=None, method=None):
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        raise AssertionError(json.load(error)["value"]["message"]) from error
