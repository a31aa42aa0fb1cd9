"""Starts ComfyUI's code in a process of its own, which builds and loads models on request."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from comfyui.server import comfyui_dir, comfyui_python

WORKER = Path(__file__).parent / "worker.py"


class Worker:
    """A process with ComfyUI imported. Starts on first use, and again if it has died."""

    def __init__(self, base):
        self.base = base
        self.log_file = base / "worker.log"
        self._process = None

    def call(self, name, **arguments):
        """The result of one of worker.py's functions. Fails the test with its traceback, or with the log."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        try:
            self._process.stdin.write(json.dumps({"call": name, "arguments": arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BaseException:  # a test that ran out of time: its answer would be taken for the next one's
            self._process.kill()
            raise
        answer = json.loads(line) if line else {"error": f"ComfyUI's process ended:\n{self.log()[-4000:]}"}
        if "error" in answer:
            pytest.fail(answer["error"], pytrace=False)
        return answer["result"]

    def log(self):
        return self.log_file.read_text(errors="replace")

    def stop(self):
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _start(self):
        self._process = subprocess.Popen(
            [comfyui_python(), WORKER, self.base],
            cwd=comfyui_dir(),
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log_file.open("a"),
            text=True,
        )


@pytest.fixture(scope="session")
def worker(tmp_path_factory):
    worker = Worker(tmp_path_factory.mktemp("families"))
    yield worker
    worker.stop()


def pytest_terminal_summary(terminalreporter):
    """The slowest plan of real size: a figure to look at, not a test."""
    seconds = {
        report.nodeid.rpartition("[")[2].rstrip("]"): dict(report.user_properties)["plan_seconds"]
        for report in terminalreporter.getreports("passed")
        if "plan_seconds" in dict(report.user_properties)
    }
    if seconds:
        slowest = max(seconds, key=seconds.get)
        terminalreporter.write_line(
            f"plans of {len(seconds)} models of real size: at most {seconds[slowest]:.2f} s ({slowest})"
        )
