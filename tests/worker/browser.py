"""A real Chromium, driven by chromedriver's own protocol, W3C WebDriver over HTTP on loopback."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conftest import wait_until

APT = "apt-get install -y chromium chromium-driver"
# As a closed network and a container need it; it resolves no name and so can reach loopback alone.
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
         "--autoplay-policy=no-user-gesture-required",
         "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
KEYS = {"tab": "\ue004", "enter": "\ue007", "escape": "\ue00c", "control": "\ue009",
        "right": "\ue014", "left": "\ue012", "space": " "}
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # what W3C WebDriver calls an element's id


def is_missing() -> bool:
    return not (shutil.which("chromium") and shutil.which("chromedriver"))


class Browser:
    """One session; scripts get `$`, the page's own `document.getElementById`."""

    def __init__(self, port: int, downloads: Path):
        self.base, self.downloads = f"http://127.0.0.1:{port}", downloads
        options = {"args": [*FLAGS, f"--user-data-dir={downloads / 'profile'}"],
                   "prefs": {"download.default_directory": str(downloads)}}
        made = self.ask("POST", "/session", {"capabilities": {"alwaysMatch": {
            "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}}})
        self.base += f"/session/{made['sessionId']}"
        self.cdp("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))

    def ask(self, method: str, path: str, payload: object = None) -> Any:
        data = None if payload is None else json.dumps(payload).encode()
        request = urllib.request.Request(self.base + path, data, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return json.load(reply)["value"]
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(json.load(error)["value"]["message"]) from None

    def cdp(self, command: str, **params: object) -> Any:
        return self.ask("POST", "/goog/cdp/execute", {"cmd": command, "params": params})

    def open(self, url: str) -> None:
        self.ask("POST", "/url", {"url": url})

    def run(self, script: str, *args: object) -> Any:
        """The value of a function's body, which may wait for promises."""
        script = f"const $ = id => document.getElementById(id); {script}"
        return self.ask("POST", "/execute/sync", {
            "script": f"return (async (...args) => {{ {script} }})(...arguments)", "args": args})

    def until(self, script: str, *args: object, seconds: float = 30.0) -> Any:
        return wait_until(lambda: self.run(f"return {script}", *args), script, seconds)

    def find(self, selector: str) -> str:
        return self.ask("POST", "/element", {"using": "css selector", "value": selector})[ELEMENT]

    def click(self, selector: str) -> None:
        """As a person does: refused where something else covers it."""
        self.ask("POST", f"/element/{self.find(selector)}/click", {})

    def type(self, text: str, *, over: str = "") -> None:
        """Into `over`, which is emptied before, else to whatever has the focus."""
        if over:
            self.ask("POST", f"/element/{self.find(over)}/clear", {})
            self.ask("POST", f"/element/{self.find(over)}/value", {"text": text})
        else:
            self.press(*text)

    def press(self, *keys: str, held: str = "") -> None:
        strokes = [{"type": kind, "value": KEYS.get(key, key)}
                   for key in keys for kind in ("keyDown", "keyUp")]
        if held:
            strokes = [{"type": "keyDown", "value": KEYS[held]}, *strokes,
                       {"type": "keyUp", "value": KEYS[held]}]
        self.ask("POST", "/actions", {"actions": [
            {"type": "key", "id": "keyboard", "actions": strokes}]})

    def look(self, width: int, height: int, *, dark: bool = False) -> None:
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=height,
                 deviceScaleFactor=1, mobile=width < 600)
        self.cdp("Emulation.setEmulatedMedia", features=[
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])

    def screenshot(self) -> bytes:
        return base64.b64decode(self.ask("GET", "/screenshot"))

    def complaints(self) -> list[str]:
        """What the console has said since the last look: errors, and what the policy refused."""
        return [entry["message"] for entry in self.ask("POST", "/se/log", {"type": "browser"})
                if entry["level"] == "SEVERE"]


@contextlib.contextmanager
def chromium(downloads: Path) -> Iterator[Browser]:
    driver = subprocess.Popen(["chromedriver", "--port=0"], text=True, stdout=subprocess.PIPE)
    assert driver.stdout
    try:
        line = next(said for said in driver.stdout if "successfully on port" in said)
        browser = Browser(int(line.rstrip(".\n").rpartition(" ")[2]), downloads)
        yield browser
        browser.ask("DELETE", "")
    finally:
        driver.terminate()
        driver.wait(20)
