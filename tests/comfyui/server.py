"""Starts a real ComfyUI for tests and talks to it over its HTTP API and websocket.

    with ComfyUIServer(folder) as server:
        entry = server.queue(prompt)          # the prompt in API format
        images = server.files(entry)

Uses the ComfyUI that tests/tools/environment.py built, or the one that COMFYUI_DIR and COMFYUI_PYTHON name.
It computes on the CPU, unless COMFYUI_DEVICE is "gpu". COMFYUI_ARGUMENTS are added to its command line.
"""

import asyncio
import contextlib
import ctypes
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from pathlib import Path

import aiohttp
from PIL import Image

PACK_ROOT = Path(__file__).resolve().parents[2]
PACK_FOLDER = "stochastic-fp8"
TEST_NODES = Path(__file__).resolve().parent / "test_nodes"
HOST = "127.0.0.1"
START_SECONDS = 120
STOP_SECONDS = 10
LISTED_AFTER_SECONDS = 0.6
"""ComfyUI lists a new file after half a second at the latest; a fast test is sooner."""

_TEXT_MESSAGE = 3
_FINAL_EVENTS = {"execution_success", "execution_error", "execution_interrupted"}
_NOWHERE = f"http://{HOST}:9"  # a proxy that refuses every connection


class ServerError(Exception):
    """ComfyUI did not start, died, or did not answer in time."""


class PromptRejected(Exception):
    """ComfyUI refused a prompt before running it. ``node_errors``: node id -> what is wrong."""

    def __init__(self, answer):
        self.error = answer.get("error", {})
        self.node_errors = answer.get("node_errors", {})
        super().__init__(json.dumps(answer, indent=1))


class ExecutionError(Exception):
    """A node raised. Carries the exception's ``message``, its ``type``, the ``node_id`` and the ``traceback``."""

    def __init__(self, data):
        self.message = data.get("exception_message", "").strip()
        self.type = data.get("exception_type", "")
        self.node_id = data.get("node_id")
        self.node_type = data.get("node_type")
        self.traceback = "".join(data.get("traceback", ()))
        super().__init__(f"{self.node_type} (node {self.node_id}): {self.type}: {self.message}\n{self.traceback}")


class ExecutionInterrupted(Exception):
    """The run was cancelled."""


def comfyui_dir():
    """The folder of the ComfyUI under test."""
    return Path(os.environ.get("COMFYUI_DIR") or PACK_ROOT / ".build" / "comfyui").resolve()


def comfyui_python():
    """The interpreter that runs it. Not resolved: the link is what selects the virtual environment."""
    return Path(os.environ.get("COMFYUI_PYTHON") or PACK_ROOT / ".build" / "venv" / "bin" / "python").absolute()


def comfyui_version(folder=None):
    """The version of the ComfyUI under test as a tuple of integers, such as (0, 3, 75)."""
    text = ((folder or comfyui_dir()) / "comfyui_version.py").read_text()
    return tuple(int(part) for part in re.search(r'"(\d+(?:\.\d+)*)', text).group(1).split("."))


class ComfyUIServer:
    """One ComfyUI process with its own base directory, in which the pack and the test-only nodes are installed."""

    def __init__(self, base, *, arguments=(), environment=None, with_pack=True, with_test_nodes=True):
        """``base``: the folder for models, input, output and custom_nodes. ``arguments``: for its command line."""
        self.base = Path(base)
        self.log_file = self.base / "comfyui.log"
        self.version = comfyui_version()
        self.on_cpu = os.environ.get("COMFYUI_DEVICE") != "gpu"
        self.port = None
        self.arguments = (*os.environ.get("COMFYUI_ARGUMENTS", "").split(), *arguments)
        self._environment = environment or {}
        self._packs = {PACK_FOLDER: PACK_ROOT} if with_pack else {}
        if with_test_nodes:
            self._packs["test-nodes"] = TEST_NODES
        self._process = None

    # --- life cycle

    def __enter__(self):
        return self.start()

    def __exit__(self, *exception):
        self.stop()

    def start(self, attempts=3):
        """Start ComfyUI and wait until it answers. Tries again if another program takes the free port first."""
        self._prepare_base()
        for attempt in range(attempts):
            self.port = _free_port()
            self._launch()
            try:
                self._wait_until_ready()
                return self
            except ServerError:
                self.stop()
                if attempt + 1 == attempts or "address already in use" not in self.log().lower():
                    raise
            except BaseException:
                self.stop()
                raise
        return self

    def stop(self):
        """End the process and its children. Does nothing if there is none."""
        process, self._process = self._process, None
        if process is None:
            return
        for stop_signal in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, stop_signal)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
                return

    def _prepare_base(self):
        for folder in ("models", "input", "output", "temp", "custom_nodes", "user/default"):
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        for name, source in self._packs.items():
            link = self.base / "custom_nodes" / name
            if not link.exists():
                link.symlink_to(source, target_is_directory=True)
        settings = {"Comfy.TutorialCompleted": True}
        (self.base / "user" / "default" / "comfy.settings.json").write_text(json.dumps(settings))

    def _launch(self):
        command = [comfyui_python(), "main.py", "--listen", HOST, "--port", self.port]
        command += ["--cpu"] * self.on_cpu
        command += ["--disable-auto-launch", "--disable-api-nodes", "--base-directory", self.base]
        command += ["--database-url", f"sqlite:///{self.base}/user/comfyui.db", *self.arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        environment |= {"HTTP_PROXY": _NOWHERE, "HTTPS_PROXY": _NOWHERE, "NO_PROXY": HOST, **self._environment}
        with self.log_file.open("wb") as log:
            self._process = subprocess.Popen(
                [str(part) for part in command],
                cwd=comfyui_dir(),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )

    def _wait_until_ready(self):
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise ServerError(f"ComfyUI ended with exit code {self._process.returncode}:\n{self.log()[-4000:]}")
            with contextlib.suppress(OSError):
                self.get("/system_stats", timeout=5)
                return
            time.sleep(0.1)
        raise ServerError(f"ComfyUI did not answer within {START_SECONDS} s:\n{self.log()[-4000:]}")

    # --- what it offers

    @property
    def url(self):
        return f"http://{HOST}:{self.port}"

    @property
    def pid(self):
        return self._process.pid

    @property
    def output(self):
        """The folder that save nodes write to."""
        return self.base / "output"

    def models(self, kind):
        """The folder of one kind of model ("diffusion_models", "vae", …), created when missing."""
        folder = self.base / "models" / kind
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def log(self):
        """Everything that ComfyUI has printed, without colours."""
        text = self.log_file.read_text(errors="replace") if self.log_file.exists() else ""
        return re.sub(r"\x1b\[[0-9;]*m", "", text)

    def get(self, path, *, timeout=60, **query):
        """GET a route; JSON answers come parsed, others as bytes. Raises urllib.error.HTTPError on 4xx and 5xx."""
        if query:
            path += "?" + urllib.parse.urlencode(query)
        return self._request(urllib.request.Request(self.url + path), timeout)

    def post(self, path, data=None, *, timeout=60):
        """POST JSON to a route; the answer comes as from ``get``."""
        body = json.dumps(data).encode()
        headers = {"Content-Type": "application/json"}
        return self._request(urllib.request.Request(self.url + path, body, headers, method="POST"), timeout)

    def _request(self, request, timeout):
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=timeout) as answer:
            body = answer.read()
            is_json = answer.headers.get_content_type() == "application/json"
            return json.loads(body) if is_json and body else body

    def object_info(self, node=None):
        """ComfyUI's description of every node type, or of one."""
        return self.get(f"/object_info/{node}")[node] if node else self.get("/object_info")

    def interrupt(self):
        """Cancel what is running."""
        self.post("/interrupt", {})

    def free(self):
        """Make ComfyUI forget loaded models and cached results. It does so after a prompt at the latest: one is run."""
        self.post("/free", {"unload_models": True, "free_memory": True})
        image = {"class_type": "EmptyImage", "inputs": {"width": 1, "height": 1, "batch_size": 1, "color": 0}}
        self.queue({"1": image, "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}})

    def view(self, image):
        """The picture that an entry of ``outputs[node]["images"]`` names, as a PIL image."""
        picture = Image.open(io.BytesIO(self.get("/view", **image)))
        picture.load()
        return picture

    def files(self, entry, node=None, kind="images"):
        """Paths of the files that a finished run reports, of all nodes or of one."""
        outputs = entry["outputs"]
        reports = [outputs[str(node)]] if node is not None else outputs.values()
        folders = {"output": self.output, "temp": self.base / "temp", "input": self.base / "input"}
        return [
            folders[file["type"]] / file["subfolder"] / file["filename"]
            for report in reports
            for file in report.get(kind, ())
        ]

    # --- running prompts

    def queue(self, prompt, *, timeout=120, on_event=None, workflow=None):
        """Run a prompt (API format) to its end and return its history entry.

        ``on_event(type, data)`` sees every websocket message of the run ("progress", "progress_text", "executing", …)
        and may call ``interrupt``. ``workflow``: the UI-format graph, for save nodes to embed.

        Raises: PromptRejected, ExecutionError, ExecutionInterrupted, ServerError.
        """
        return asyncio.run(self._queue(prompt, timeout, on_event, workflow))

    async def _queue(self, prompt, timeout, on_event, workflow):
        client = uuid.uuid4().hex
        request = {"prompt": prompt, "client_id": client}
        if workflow is not None:
            request["extra_data"] = {"extra_pnginfo": {"workflow": workflow}}
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"{self.url}/ws?clientId={client}", max_msg_size=0) as websocket,
        ):
            prompt_id = self._submit(request)
            try:
                async with asyncio.timeout(timeout):
                    event, data = await self._follow(websocket, prompt_id, on_event)
                    entry = await self._history(prompt_id)
            except TimeoutError as error:
                self.interrupt()
                raise ServerError(f"no end after {timeout} s:\n{self.log()[-4000:]}") from error
        if event == "execution_error":
            raise ExecutionError(data)
        if event == "execution_interrupted":
            raise ExecutionInterrupted(data.get("node_type"))
        return entry

    def _submit(self, request):
        deadline = time.monotonic() + LISTED_AFTER_SECONDS
        while True:
            try:
                return self._accepted(request)
            except PromptRejected as rejected:
                if "value_not_in_list" not in str(rejected) or time.monotonic() > deadline:
                    raise
            time.sleep(0.1)

    def _accepted(self, request):
        try:
            answer = self.post("/prompt", request)
        except urllib.error.HTTPError as error:
            raise PromptRejected(json.loads(error.read())) from error
        if answer.get("node_errors"):  # some outputs are fine, others are not: a test wants all of them
            self.post("/queue", {"delete": [answer["prompt_id"]]})
            raise PromptRejected(answer)
        return answer["prompt_id"]

    async def _follow(self, websocket, prompt_id, on_event):
        async for message in websocket:
            if message.type is not aiohttp.WSMsgType.TEXT:
                text = _progress_text(message.data) if message.type is aiohttp.WSMsgType.BINARY else None
                if text and on_event is not None:
                    on_event("progress_text", text)
                continue  # other binary messages are previews
            event = json.loads(message.data)
            kind, data = event["type"], event.get("data") or {}
            if data.get("prompt_id", prompt_id) != prompt_id:
                continue
            if on_event is not None:
                on_event(kind, data)
            if kind in _FINAL_EVENTS:
                return kind, data
        raise ServerError(f"ComfyUI closed the connection:\n{self.log()[-4000:]}")

    async def _history(self, prompt_id):
        """The history entry of a finished run. ComfyUI adds it a moment after the final message."""
        while not (history := self.get(f"/history/{prompt_id}")):
            await asyncio.sleep(0.01)
        return history[prompt_id]


def _progress_text(message):
    """The node and the text of a binary message that shows text on a node; None for any other message."""
    kind, length = struct.unpack_from(">II", message)
    if kind != _TEXT_MESSAGE:
        return None
    return {"node": message[8 : 8 + length].decode(), "text": message[8 + length :].decode()}


def _free_port():
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def _die_with_parent():
    """Let Linux end ComfyUI when the test process ends, even when that is killed."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
