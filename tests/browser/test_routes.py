"""The routes behind the panels: what they refuse and what they answer."""

import json
import struct
import urllib.error
import urllib.request

import pytest
import tiny_models
from safetensors.torch import load_file
from stochastic_fp8_pack.kernels.calibration.file import save_calibration
from stochastic_fp8_pack.kernels.calibration.moments import Calibration
from stochastic_fp8_pack.kernels.calibration.sensitivity import LayerEffect, RoundingErrors, Sensitivity


@pytest.fixture(scope="module")
def server(comfyui, tmp_path_factory):
    """The server with a model, links to models elsewhere and to nothing, and files of other kinds."""
    folder = comfyui.models("diffusion_models")
    tiny = tiny_models.write_sd3(folder / "routes.safetensors")
    outside = tmp_path_factory.mktemp("outside")
    tiny_models.write_sd3(outside / "secret.safetensors")
    (folder / "outward.safetensors").symlink_to(outside / "secret.safetensors")
    (folder / "outward").symlink_to(outside, target_is_directory=True)
    (folder / "inward.safetensors").symlink_to(tiny)
    (folder / "dangling.safetensors").symlink_to(folder / "secret_nothing.safetensors")
    (folder / "text.safetensors").symlink_to("/etc/passwd")
    (folder / "device.safetensors").symlink_to("/dev/zero")
    (folder / "pickle.ckpt").write_bytes(b"no")
    (folder / "broken.safetensors").write_bytes(b"no")
    blocks = {
        f"blocks.{i}.{name}": (32, 32) for i in range(500) for name in ("a.weight", "b.weight", "c.weight", "d.bias")
    }
    tiny_models.save(tiny_models.state_dict(blocks), folder / "wide.safetensors")
    return comfyui


def plan(server, file="diffusion_models/routes.safetensors", **choices):
    return server.post("/stochastic_fp8/plan", {"file": file, **choices})


def refusal(server, body):
    """The status and the reason of a request that must fail."""
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.post("/stochastic_fp8/plan", body)
    answer = json.loads(refused.value.read())
    assert answer.keys() == {"error"}
    assert "\n" not in answer["error"]
    return refused.value.code, answer["error"]


def failure(server, **body):
    """The reason for which there is no plan of a request that the page may send."""
    answer = server.post("/stochastic_fp8/plan", body)
    assert answer.keys() == {"error"}
    assert "\n" not in answer["error"]
    return answer["error"]


def send(server, body=None, **headers):
    """The status of a request with this body (by default one that gives a plan) and these headers."""
    if body is None:
        body = json.dumps({"file": "diffusion_models/routes.safetensors"}).encode()
    headers = {"Content-Type": "application/json"} | {name.replace("_", "-"): text for name, text in headers.items()}
    request = urllib.request.Request(f"{server.url}/stochastic_fp8/plan", body, headers, method="POST")
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize(
    "file",
    [
        "diffusion_models/../../../etc/passwd",
        "diffusion_models/../diffusion_models/routes.safetensors",
        "diffusion_models/%2e%2e/routes.safetensors",
        "/etc/passwd",
        "/etc/hosts.safetensors",
        "custom_nodes/routes.safetensors",
        "diffusion_models/pickle.ckpt",
        "diffusion_models/absent.safetensors",
        "diffusion_models",
        "",
    ],
)
def test_only_listed_safetensors_files_are_read(server, file):
    status, reason = refusal(server, {"file": file})
    assert status == 404
    assert str(server.base) not in reason


@pytest.mark.parametrize("file", ["outward", "outward/secret", "inward"])
def test_a_link_is_followed_as_the_loaders_do(server, file):
    """Many people keep their models on another disk."""
    assert plan(server, f"diffusion_models/{file}.safetensors")["family"] == "sd3"


@pytest.mark.parametrize("file", ["dangling", "device"])
def test_a_link_to_no_regular_file(server, file):
    status, reason = refusal(server, {"file": f"diffusion_models/{file}.safetensors"})
    assert status == 404
    assert "leads nowhere" in reason
    assert "secret" not in reason


def test_a_link_to_another_kind_of_file_shows_nothing_of_it(server):
    reason = failure(server, file="diffusion_models/text.safetensors")
    assert "text.safetensors" in reason
    assert "root" not in reason
    assert "passwd" not in reason


LONG = "a" * 4097
FILE = "diffusion_models/routes.safetensors"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ([], "the body is not a JSON object"),
        ({"file": 3}, "file: must be a text"),
        ({"file": [FILE]}, "file: must be a text"),
        ({"file": LONG}, "file: must be a text of at most 4096 characters"),
        ({"file": FILE, "format": ["float8_e4m3fn"]}, "format: must be a text"),
        ({"file": FILE, "layout": {"native": 1}}, "layout: must be a text"),
        ({"file": FILE, "format": LONG}, "format: must be a text of at most 4096 characters"),
        ({"file": FILE, "keep": "*." * 32769}, "the patterns have 65,538 characters together"),
        ({"file": FILE, "keep": "a" * 40000, "only": "b" * 30000}, "at most 65,536 are allowed"),
        ({"file": FILE, "path": "/etc"}, "unknown fields: path"),
        ({"file": FILE, "part": "vae"}, "part must be one of file, model, clip"),
        ({"file": FILE, "part": []}, "part: must be a text"),
        ({"file": FILE, "layers": "none"}, "layers"),
        ({"file": FILE, "matmul": "int8"}, "matmul"),
        ({"file": FILE, "requantize": "yes"}, "requantize: must be true or false"),
        ({"file": FILE, "for_another_comfyui": 1}, "for_another_comfyui: must be true or false"),
        ({"file": FILE, "size_limit": "12"}, "size_limit: must be a number"),
        ({"file": FILE, "target_quality": True}, "target_quality: must be a number"),
        ({"file": FILE, "calibration": 3}, "calibration: must be a text"),
    ],
)
def test_malformed_requests_are_refused(server, body, reason):
    status, said = refusal(server, body)
    assert status == 400
    assert reason in said


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff\xfe{", b"[" * 500_000, b'{"a":' * 200_000, b'{"file":' + b"1" * 5000 + b"}", b"\xed\xa0\x80"],
)
def test_bodies_that_cannot_be_parsed(server, body):
    assert send(server, body) == 400
    assert server.get("/stochastic_fp8/live") == []


def test_a_large_body_is_not_read_to_its_end(server):
    assert send(server, b'{"file": "' + b"a" * (1 << 21) + b'"}') == 413


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_only_json_is_read(server, kind):
    """A page of another site can send these without asking the server first."""
    assert send(server, Content_Type=kind) == 415
    assert send(server, Content_Type="application/json; charset=utf-8") == 200


def test_pages_of_other_sites_are_refused(server):
    port = server.port
    own = [f"http://127.0.0.1:{port}", f"https://127.0.0.1:{port}", "http://127.0.0.1"]
    foreign = [
        "null",
        "",
        "file://",
        "http://example.com",
        f"http://127.0.0.1.example.com:{port}",
        "http://127.0.0.1:1",
    ]
    foreign += [f"http://localhost:{port}", "nonsense", f"http://127.0.0.1:{port}@example.com"]
    assert [send(server, Origin=origin) for origin in own] == [200] * len(own)
    assert [send(server, Origin=origin) for origin in foreign] == [403] * len(foreign)


def test_a_page_behind_a_proxy(server):
    headers = {"Host": "comfyui:8188", "Origin": "https://images.example.com"}
    assert send(server, **headers) == 403
    assert send(server, **headers, X_Forwarded_Host="images.example.com") == 200


def test_patterns_of_many_stars(server):
    """As regular expressions, these would take hours and exceed the request's time limit."""
    assert "matches no tensor" in plan(server, keep="*a" * 30_000)["unmatched"]
    assert plan(server, keep=f"joint_blocks.0.{'*' * 60_000}.attn")["quantized"]["count"] == 9


def test_a_plan_that_fails_gives_the_reason(server):
    assert failure(server, file="diffusion_models/broken.safetensors").startswith("broken.safetensors: ")


def test_every_pattern_without_a_match_is_named(server):
    """Without an HTTP error, since the user may still type."""
    answer = plan(server, keep="joint_block foo")
    assert answer.keys() == {"unmatched"}
    assert "did you mean joint_blocks" in answer["unmatched"]
    assert "pattern 'foo' matches no tensor" in answer["unmatched"]
    assert "and 2 more patterns" in plan(server, keep=" ".join(f"foo{i}" for i in range(7)))["unmatched"]


def test_what_fails_or_harms_in_the_running_comfyui_is_a_problem(server):
    assert plan(server)["problems"] == []
    assert "nothing to quantize" in plan(server, part="model", keep="*")["problems"][0]
    legacy = {"format": "float8_e5m2", "layout": "legacy"}
    harmful, elsewhere = plan(server, **legacy), plan(server, **legacy, for_another_comfyui=True)
    assert len(harmful["problems"]) == 1
    assert "garbage" in " ".join(harmful["problems"] + harmful["elsewhere"])
    assert "garbage" not in " ".join(harmful["notes"])
    assert elsewhere["problems"] == []


def test_summaries_of_an_unknown_prompt(server):
    assert server.get("/stochastic_fp8/summaries?prompt=unknown") == {}
    assert server.get("/stochastic_fp8/summaries") == {}


@pytest.fixture(scope="module")
def calibration_file(server):
    """The name of a calibration with an effect per layer, and of one without; the model's layers do not matter."""
    errors = RoundingErrors(*({"float8_e4m3fn": 0.02, "float8_e5m2": 0.04} for _ in range(2)))
    shapes = load_file(server.models("diffusion_models") / "routes.safetensors")
    effects = {name: LayerEffect(1e-5 * (1 + i % 5), errors) for i, name in enumerate(sorted(shapes))}
    folder = server.models("fp8_calibrations")
    save_calibration(Calibration({}, "", Sensitivity(effects, 1.0, 2)), folder / "effects.safetensors", overwrite=True)
    save_calibration(Calibration({}), folder / "nothing.safetensors", overwrite=True)
    return "fp8_calibrations/effects.safetensors"


@pytest.mark.parametrize("part", ["model", "file"])
def test_measured_layers_are_planned_with_a_listed_calibration(server, calibration_file, part):
    choices = {"part": part, "layers": "measured", "rounding": "nearest", "calibration": calibration_file}
    answer = plan(server, size_limit=0.003, **choices)
    assert answer["bytes_after"] <= 2e6
    assert any("stay as they are, chosen by measured effect per byte" in note for note in answer["notes"])
    kept = [row["reason"]["kind"] for row in answer["kept"]]
    assert "effect" in kept
    assert plan(server, target_quality=100, **choices)["bytes_after"] > answer["bytes_after"]


def test_measured_layers_that_cannot_be_planned(server, calibration_file):
    choices = {"file": FILE, "layers": "measured", "size_limit": 0.003}
    assert "connect Layer Sensitivity" in failure(server, **choices)
    assert refusal(server, {**choices, "calibration": "fp8_calibrations/../effects.safetensors"})[0] == 404
    assert refusal(server, {**choices, "calibration": "loras/effects.safetensors"})[0] == 404
    reason = failure(server, **choices, calibration="fp8_calibrations/nothing.safetensors")
    assert "measure them with Layer Sensitivity, or press Run" in reason
    choices["size_limit"] = 0.001
    assert "is too small" in failure(server, **choices, calibration=calibration_file)
    assert "measured" in failure(server, file=FILE, size_limit=3)


def test_a_plan_counts_every_tensor_and_byte(server):
    answer = plan(server, part="model", keep="joint_blocks.0", format="float8_e4m3fn")
    size = (server.models("diffusion_models") / "routes.safetensors").stat().st_size
    assert answer["source"] == "routes.safetensors"
    assert size - 8192 < answer["bytes_before"] == 2_542_208 < size
    assert answer["quantized"]["count"] == 5
    assert answer["quantized"]["count"] + sum(row["count"] for row in answer["kept"]) == 51
    assert {"pattern": "joint_blocks.0", "count": 10, "yours": True} in answer["hits"]


def test_a_checkpoint_is_planned_by_part(server):
    folder = server.models("checkpoints")
    tiny_models.write_sd3_checkpoint(folder / "routes_all.safetensors")
    file = "checkpoints/routes_all.safetensors"
    model, clip = (plan(server, file, part=part) for part in ("model", "clip"))
    assert (model["family"], model["quantized"]["count"]) == ("sd3", 13)
    assert (clip["quantized"]["count"], clip["bytes_after"]) == (0, clip["bytes_before"])
    reason = clip["kept"][0]["reason"]
    assert reason.keys() == {"kind", "pattern", "preset", "text"}
    assert "no FP8 detection for CLIP-L" in reason["text"]


def test_a_plan_of_two_thousand_tensors_lists_each_kind_once(server):
    answer = plan(server, "diffusion_models/wide.safetensors", keep="blocks.7")
    rows = [answer["quantized"], *answer["kept"]]
    assert sum(row["count"] for row in rows) == 2000
    assert sum(len(row["names"]) for row in rows) <= 20


def test_a_plan_reads_only_the_header(server):
    """The file has 64 GB, nearly all of it sparse. Reading it would exceed the request's time limit."""
    path = server.models("diffusion_models") / "hole.safetensors"
    size = 1 << 36
    header = json.dumps(
        {"blocks.0.a.weight": {"dtype": "BF16", "shape": [size >> 11, 1 << 10], "data_offsets": [0, size]}}
    ).encode()
    try:
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(8 + len(header) + size)
        answer = plan(server, f"diffusion_models/{path.name}", layers="all_linear")
    finally:
        path.unlink()
    assert (answer["bytes_before"], answer["quantized"]["count"]) == (size, 1)


def test_no_job_is_listed_when_none_runs(server):
    assert server.get("/stochastic_fp8/live") == []
