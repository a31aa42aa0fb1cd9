"""Damaged requests to the plan route of a real ComfyUI are answered with 200 or 4xx, and the server goes on."""

import json
import random
import urllib.error
import urllib.request

import pytest
from comfyui.pack import Bench
from hostile.amounts import amount
from hostile.damage import Document, damaged_bytes

REQUESTS = amount(300, 10_000)
TYPES = ("application/json",) * 6 + ("text/plain", "multipart/form-data", "application/json; charset=utf-16", "")
ORIGINS = (None,) * 6 + ("null", "http://a.example", "http://127.0.0.1", "\xff", "x")
REFUSED = ("null", "http://a.example")
"""Origins of other sites."""


def status(server, body, headers):
    """The status of the answer to one request; the body of a refusal is one line of JSON."""
    request = urllib.request.Request(f"{server.url}/stochastic_fp8/plan", body, headers, method="POST")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=30) as answer:
            json.loads(answer.read())
            return answer.status
    except urllib.error.HTTPError as error:
        text = error.read()
        if error.headers.get_content_type() == "application/json":
            assert "\n" not in json.loads(text)["error"]
        return error.code


@pytest.mark.comfyui
@pytest.mark.timeout(600)
def test_damaged_requests_are_refused(comfyui):
    bench = Bench(comfyui)
    bench.model_file("sd3")
    document = Document(
        {
            "file": "diffusion_models/sd3.safetensors",
            "part": "file",
            "requantize": False,
            "format": "float8_e4m3fn",
            "layers": "auto",
            "keep": "final_layer\njoint_blocks.-1",
            "only": "",
            "layout": "native",
            "matmul": "full precision",
        }
    )
    assert status(comfyui, document.text.encode(), {"Content-Type": "application/json"}) == 200
    found = {}
    for number in range(REQUESTS):
        rng = random.Random(f"request {number}")
        body = document.damaged(rng).encode()
        if rng.random() < 0.3:
            body = damaged_bytes(rng, body)
        headers, origin = {"Content-Type": rng.choice(TYPES)}, rng.choice(ORIGINS)
        if origin is not None:
            headers["Origin"] = origin
        answer = status(comfyui, body, headers)
        found[answer] = found.get(answer, 0) + 1
        assert answer == 200 or 400 <= answer < 500, f"request {number}: {answer} for {body!r} with {headers}"
        assert answer != 200 or origin not in REFUSED, f"request {number}: accepted from {origin}"
    print(found)
    assert found.get(200, 0) and len(found) > 2, found
    assert status(comfyui, document.text.encode(), {"Content-Type": "application/json"}) == 200
