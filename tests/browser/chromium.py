"""A Chromium that tests control through playwright-core in a node process (driver.mjs).

    with Browser() as page:
        page.goto(server.url)
        page.locator("button").click()
        assert page.evaluate("document.title") == "ComfyUI"

Names and arguments are playwright's, of a Page, Locator, Mouse and Keyboard. Every host but 127.0.0.1 is blocked.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

from comfyui.server import HOST, PACK_ROOT

NODE_MODULES = PACK_ROOT / ".build" / "node" / "node_modules"
DRIVER = Path(__file__).with_name("driver.mjs")
OURS = ("/extensions/stochastic-fp8/", "/stochastic_fp8/")
"""In the addresses of our files and our routes."""


class BrowserError(Exception):
    """A failed call, with playwright's message."""


class Target:
    """Something with methods in the node process."""

    def __init__(self, browser, target, selector=None):
        self._browser, self._target, self._selector = browser, target, selector

    def __getattr__(self, name):
        def call(*args):
            return self._browser.call(self._target, self._selector, name, args)

        return call


class Browser(Target):
    """One page; its own methods are those of playwright's Page."""

    def __init__(self):
        super().__init__(self, "page")
        self.mouse, self.keyboard = Target(self, "mouse"), Target(self, "keyboard")
        self._process = None

    def __enter__(self):
        command = ["node", DRIVER, NODE_MODULES, shutil.which("chromium"), HOST]
        environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __exit__(self, *exception):
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def call(self, target, selector, name, args):
        """One call in the node process. Raises BrowserError with playwright's message."""
        request = {"target": target, "selector": selector, "name": name, "args": args}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise BrowserError(f"the browser's process ended during {name}")
        answer = json.loads(line)
        if "error" in answer:
            raise BrowserError(f"{name} {selector or ''}: {answer['error']}")
        return answer["result"]

    def locator(self, selector):
        return Target(self, "locator", selector)

    def wait(self, expression):
        """Wait until a JavaScript expression is true."""
        self.waitForFunction(expression)

    def take_log(self):
        """Errors of our files, failed requests to our routes, and the hosts that were blocked, since the last call."""
        log = Target(self, "log").take()
        return [error for error in log["errors"] if any(part in error for part in OURS)], log["blocked"]
