"""What the page asks the server: a plan, and the state of the job that runs."""

from __future__ import annotations

import asyncio

from aiohttp import web
from server import PromptServer

from ..kernels.selection.selection import LAYERS
from .live import live_states
from .options import MATMUL_NAMES, recipe
from .plan import PARTS, NoSuchFile, OutsideModels, make_plan

LONGEST_TEXT = 4096

CHOICES = ("format", "layers", "keep", "only", "layout", "matmul")
"""The node inputs that a plan depends on."""

routes = PromptServer.instance.routes


class BadRequest(ValueError):
    """A request that no page of this pack would send."""


@routes.get("/stochastic_fp8/live")
async def get_live(request: web.Request) -> web.Response:
    """The last message of each job of the running prompt."""
    return web.json_response(live_states())


@routes.post("/stochastic_fp8/plan")
async def post_plan(request: web.Request) -> web.Response:
    """{"file", "part", and any of CHOICES and "requantize"} -> make_plan's answer, or {"error": one line}."""
    try:
        arguments = _plan_arguments(await _json_object(request))
        return web.json_response(await asyncio.to_thread(make_plan, *arguments))
    except BadRequest as error:
        return _refusal(400, error)
    except NoSuchFile as error:
        return _refusal(404, error)
    except OutsideModels as error:
        return _refusal(403, error)
    except ValueError as error:
        return _refusal(422, error)


async def _json_object(request: web.Request) -> dict:
    try:
        body = await request.json()
    except ValueError as error:
        raise BadRequest("the body is no JSON") from error
    if not isinstance(body, dict):
        raise BadRequest("the body is no JSON object")
    return body


def _plan_arguments(body: dict) -> tuple:
    file, part, requantize = body.pop("file", ""), body.pop("part", "file"), body.pop("requantize", False)
    unknown = [name for name in body if name not in CHOICES]
    if unknown:
        raise BadRequest(f"unknown: {', '.join(unknown)}; known are file, part, requantize, {', '.join(CHOICES)}")
    texts = {"file": file, "part": part, **body}
    wrong = [name for name, text in texts.items() if not isinstance(text, str) or len(text) > LONGEST_TEXT]
    if wrong:
        raise BadRequest(f"{', '.join(wrong)}: not a text of at most {LONGEST_TEXT} characters")
    for name, table in (("part", PARTS), ("layers", LAYERS), ("matmul", MATMUL_NAMES)):
        if texts.get(name, next(iter(table))) not in table:
            raise BadRequest(f"{name} is one of {', '.join(table)}")
    return file, part, recipe(**body), requantize is True


def _refusal(status: int, error: ValueError) -> web.Response:
    return web.json_response({"error": str(error)}, status=status)
