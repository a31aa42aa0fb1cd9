"""The routes behind the panels: the plan of a node, and the messages of the running job."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web
from comfy.cli_args import args
from server import PromptServer

from ..kernels import Recipe
from ..kernels.errors import PatternError, StochasticFP8Error
from ..kernels.selection.patterns import check_length
from ..kernels.selection.selection import LAYERS
from .live import last_messages, summaries_of_prompt
from .options import MATMUL_NAMES, patterns, recipe
from .plan import PARTS, NoSuchFile, make_plan

MAX_BODY = 1 << 20
"""Bytes of a request. LONGEST_PATTERNS characters fit, even where JSON escapes each one."""

MAX_TEXT_LENGTH = 4096
"""Characters of a text in a request, other than patterns."""

PATTERNS = ("keep", "only")

LIMITS = ("size_limit", "target_quality")

SWITCHES = ("requantize", "for_another_comfyui")

PLAN_INPUTS = ("format", "rounding", "layers", *PATTERNS, "layout", "matmul", *LIMITS)
"""The node inputs that a plan depends on, besides the file, the switches and the calibration."""

routes = PromptServer.instance.routes


class BadRequest(ValueError):
    """A request that no page of this pack sends."""

    def __init__(self, text: str, status: int = 400):
        super().__init__(text)
        self.status = status


@routes.get("/stochastic_fp8/live")
async def get_live(request: web.Request) -> web.Response:
    """The last message of each node of the running prompt."""
    return web.json_response(last_messages.of_running_prompts())


@routes.get("/stochastic_fp8/summaries")
async def get_summaries(request: web.Request) -> web.Response:
    """?prompt=ID -> the summaries of its nodes by node id, from this run or one with the same inputs."""
    return web.json_response(summaries_of_prompt(request.query.get("prompt", "")))


@routes.post("/stochastic_fp8/plan")
async def post_plan(request: web.Request) -> web.Response:
    """{"file", "part", SWITCHES, and any of PLAN_INPUTS} -> make_plan's answer, or why there is none.

    {"unmatched": one line} for patterns that match nothing, such as a name that is half typed. {"error": one line} for
    a plan that cannot be made, and with a status of 4xx for a request that the page does not send.
    """
    try:
        _check_origin(request)
        arguments = _plan_arguments(await _json_object(request))
        return web.json_response(await asyncio.to_thread(make_plan, *arguments))
    except BadRequest as error:
        return _refusal(error.status, error)
    except PatternError as error:
        return web.json_response({"unmatched": _one_line(error)})
    except NoSuchFile as error:
        return _refusal(404, error)
    except (StochasticFP8Error, ValueError, OSError) as error:
        return web.json_response({"error": _one_line(error)})


def _check_origin(request: web.Request) -> None:
    """Raises BadRequest for a request that a page of another site sent, or one without a site (`Origin: null`).

    As in ComfyUI, ports count only where both sides name one.
    """
    origin = request.headers.get("Origin")
    if origin is None or origin == args.enable_cors_header:
        return
    try:
        page = urlsplit(origin)
        names = [request.headers.get(name, "").split(",")[0] for name in ("Host", "X-Forwarded-Host")]
        hosts = [urlsplit(f"//{name.strip()}") for name in names]
        same = any(
            page.hostname == host.hostname and (page.port == host.port or None in (page.port, host.port))
            for host in hosts
            if page.hostname
        )
    except ValueError:  # not an address
        same = False
    if not same and args.enable_cors_header != "*":
        raise BadRequest("the request comes from a page of another site", 403)


async def _json_object(request: web.Request) -> dict[str, Any]:
    if request.content_type != "application/json":
        raise BadRequest("the body is not JSON: its Content-Type must be application/json", 415)
    text = bytearray()
    async for chunk in request.content.iter_chunked(1 << 16):
        text += chunk
        if len(text) > MAX_BODY:
            raise BadRequest(f"the body has more than {MAX_BODY:,} bytes", 413)
    try:
        body = json.loads(text)
    except RecursionError:
        raise BadRequest("the body is nested too deeply") from None
    except ValueError as error:
        raise BadRequest("the body is not valid JSON") from error
    if not isinstance(body, dict):
        raise BadRequest("the body is not a JSON object")
    return body


def _plan_arguments(body: dict[str, Any]) -> tuple[str, str, Recipe, bool, str, bool]:
    """The arguments of make_plan. Raises BadRequest, and ValueError for a choice that Recipe does not know."""
    file, part, calibration = body.pop("file", ""), body.pop("part", "file"), body.pop("calibration", "")
    switches = {name: body.pop(name, False) for name in SWITCHES}
    unknown = [name for name in body if name not in PLAN_INPUTS]
    if unknown:
        known = ", ".join(("file", "part", "calibration", *SWITCHES, *PLAN_INPUTS))
        raise BadRequest(f"unknown fields: {', '.join(unknown)}; the known ones are {known}")
    wrong = [name for name, switch in switches.items() if not isinstance(switch, bool)]
    if wrong:
        raise BadRequest(f"{', '.join(wrong)}: must be true or false")
    numbers = {name: body.pop(name) for name in LIMITS if name in body}
    if any(type(number) not in (int, float) for number in numbers.values()):
        raise BadRequest(f"{', '.join(numbers)}: must be a number")
    texts = {"file": file, "part": part, "calibration": calibration, **body}
    wrong = [name for name, text in texts.items() if not isinstance(text, str)]
    if wrong:
        raise BadRequest(f"{', '.join(wrong)}: must be a text")
    long = [name for name, text in texts.items() if name not in PATTERNS and len(text) > MAX_TEXT_LENGTH]
    if long:
        raise BadRequest(f"{', '.join(long)}: must be a text of at most {MAX_TEXT_LENGTH} characters")
    try:
        check_length(pattern for name in PATTERNS for pattern in patterns(body.get(name, "")))
    except PatternError as error:
        raise BadRequest(str(error)) from error
    for name, table in (("part", PARTS), ("layers", LAYERS), ("matmul", MATMUL_NAMES)):
        if texts.get(name, next(iter(table))) not in table:
            raise BadRequest(f"{name} must be one of {', '.join(table)}")
    chosen = recipe(**body, **numbers)
    return file, part, chosen, switches["requantize"], calibration, switches["for_another_comfyui"]


def _refusal(status: int, error: Exception) -> web.Response:
    return web.json_response({"error": _one_line(error)}, status=status)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).splitlines())
