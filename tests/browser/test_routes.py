"""The routes behind the panels: what they refuse, what they tell, and how fast."""

import json
import urllib.error

import psutil
import pytest
import tiny_models


@pytest.fixture(scope="module")
def server(comfyui, tmp_path_factory):
    """The server with a model, a link that leads out of its folders, one that does not, and files of other kinds."""
    folder = comfyui.models("diffusion_models")
    tiny = tiny_models.write_sd3(folder / "routes.safetensors")
    outside = tiny_models.write_sd3(tmp_path_factory.mktemp("outside") / "secret.safetensors")
    (folder / "outward.safetensors").symlink_to(outside)
    (folder / "inward.safetensors").symlink_to(tiny)
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
    return refused.value.code, answer["error"]


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


def test_a_link_out_of_the_model_folders_is_refused(server):
    status, reason = refusal(server, {"file": "diffusion_models/outward.safetensors"})
    assert status == 403
    assert "leads out of ComfyUI's model folders" in reason
    assert "secret" not in reason
    assert plan(server, "diffusion_models/inward.safetensors")["family"] == "sd3"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ([], "the body is no JSON object"),
        ({"file": 3}, "file: not a text"),
        ({"file": "x", "keep": "a" * 5000}, "keep: not a text of at most 4096 characters"),
        ({"file": "x", "path": "/etc"}, "unknown: path"),
        ({"file": "x", "part": "vae"}, "part is one of file, model, clip"),
        ({"file": "x", "layers": "none"}, "layers"),
        ({"file": "x", "matmul": "int8"}, "matmul"),
    ],
)
def test_malformed_requests_are_refused(server, body, reason):
    status, said = refusal(server, body)
    assert status == 400
    assert reason in said


def test_what_cannot_be_planned_says_why(server):
    file = "diffusion_models/routes.safetensors"
    assert refusal(server, {"file": "diffusion_models/broken.safetensors"})[0] == 422
    status, reason = refusal(server, {"file": file, "keep": "joint_block"})
    assert (status, "did you mean joint_blocks" in reason) == (422, True)


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
    assert "no FP8 detection for CLIP-L" in clip["kept"][0]["reason"]


def test_two_thousand_tensors_are_planned_in_a_fifth_of_a_second(server):
    """In the server's own time, which does not depend on what else the machine does."""
    process = psutil.Process(server.pid)
    times = []
    for _ in range(5):
        before = sum(process.cpu_times()[:2])
        answer = plan(server, "diffusion_models/wide.safetensors", keep="blocks.7")
        times.append(sum(process.cpu_times()[:2]) - before)
    assert answer["quantized"]["count"] + sum(row["count"] for row in answer["kept"]) == 2000
    assert min(times) <= 0.2


def test_nothing_is_told_of_jobs_when_none_runs(server):
    assert server.get("/stochastic_fp8/live") == []
