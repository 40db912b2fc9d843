"""The web page of a pretrained pipeline and its JSON API: the work of launch/serve.py."""

import argparse
import contextlib
import ipaddress
import secrets
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import dit_jax
from dit_jax.launch import picture_settings, prompting, wiring
from dit_jax.launch.picture_queue import MAX_WAITING, PictureQueue, QueueError
from dit_jax.launch.picture_settings import Reader, SettingError, Settings
from dit_jax.launch.spelling import spelled
from dit_jax.named_options import options_named
from dit_jax.pipelines.flux import FluxPipeline
from dit_jax.untrusted import parse_json

_PAGE = Path(__file__).parent / "page"
_FILES = {  # of the page, by their address
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
MAX_BODY = 64 << 10  # bytes of a request
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class Site:
    """What requests are answered with.

    Args:
        queue: that makes pictures.
        reader: of their settings.
        name: of the pipeline, for the page.
    """

    def __init__(self, queue: PictureQueue, reader: Reader, name: str):
        self._queue, self._reader, self._name = queue, reader, name
        self._session = secrets.token_hex(8)  # numbers of jobs begin anew with the server

    def app(self, hosts: list[str]) -> Starlette:
        """The application, for requests to one of these hosts ('*' for any)."""
        routes = [self._file(address) for address in _FILES]
        routes += [
            Route("/api/pipeline", self.pipeline),
            Route("/api/images", self.state),
            Route("/api/images", self.submit, methods=["POST"]),
            Route("/api/images/{number:int}", self.job),
            Route("/api/images/{number:int}", self.cancel, methods=["DELETE"]),
            Route("/api/images/{number:int}/{index:int}.png", self.image),
        ]
        # A page elsewhere whose name is made to lead to this machine is not answered.
        guard = Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)
        return Starlette(routes=routes, middleware=[guard])

    def _file(self, address: str) -> Route:
        name, kind = _FILES[address]
        content = (_PAGE / name).read_bytes()

        async def answer(request: Request) -> Response:
            return Response(content, media_type=kind, headers=_HEADERS)

        return Route(address, answer)

    async def pipeline(self, request: Request) -> Response:
        """What there is, its defaults and limits."""
        pipeline, defaults = self._reader.pipeline, self._reader.defaults
        return _json(
            {
                "title": pipeline.title,
                "name": self._name,
                "version": dit_jax.__version__,
                "session": self._session,
                "guided": pipeline.is_guided,
                "side_multiple": pipeline.side_multiple,
                "defaults": {
                    "steps": defaults.steps,
                    "guidance_scale": defaults.guidance_scale,
                    "height": defaults.height,
                    "width": defaults.width,
                    "lora": defaults.lora,
                },
                "limits": {
                    "prompt": picture_settings.MAX_PROMPT,
                    "pixels": self._reader.max_pixels,
                    "steps": picture_settings.MAX_STEPS,
                    "num_images": picture_settings.MAX_IMAGES,
                    "waiting": MAX_WAITING,
                    "request_bytes": MAX_BODY,
                },
                "compiled": [
                    {"height": height, "width": width, "steps": steps}
                    for height, width, steps in self._queue.compiled()
                ],
            }
        )

    async def state(self, request: Request) -> Response:
        """Jobs that changed after the version that is given."""
        after = request.query_params.get("after", "0")
        if not after.isdecimal() or len(after) > 18:
            return _refusal(400, f"after={after!r}: expected a version, a whole number")
        return _json({"session": self._session, **self._queue.state(int(after))})

    async def submit(self, request: Request) -> Response:
        """Adds a job."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip()
        if kind != "application/json":  # which pages elsewhere may not send without being allowed
            return _refusal(415, f"Content-Type {kind or 'none'}: expected application/json")
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY:
                return _refusal(413, f"the request is larger than {MAX_BODY:,} bytes")
        try:
            settings = self._reader(parse_json(bytes(body), "the request"))
            job = self._queue.submit(settings)
        except SettingError as error:
            return _refusal(400, str(error), error.setting)
        except ValueError as error:
            return _refusal(400, str(error))
        except QueueError as error:
            return _refusal(429, str(error))
        return _json(self._queue.job(job.number), 202)

    async def job(self, request: Request) -> Response:
        """One job."""
        try:
            return _json(self._queue.job(request.path_params["number"]))
        except KeyError:
            return _unknown(request)

    async def cancel(self, request: Request) -> Response:
        """Takes a job out of the queue."""
        number = request.path_params["number"]
        try:
            self._queue.cancel(number)
            return _json(self._queue.job(number))
        except KeyError:
            return _unknown(request)
        except QueueError as error:
            return _refusal(409, str(error))

    async def image(self, request: Request) -> Response:
        """A picture."""
        number, index = request.path_params["number"], request.path_params["index"]
        try:
            content = self._queue.image(number, index)
        except LookupError:
            return _unknown(request)
        name = f'inline; filename="dit-jax-{number}-{index}.png"'
        headers = {**_HEADERS, "Content-Disposition": name}
        return Response(content, media_type="image/png", headers=headers)


def run(args: argparse.Namespace, listening: socket.socket) -> None:
    """Serves what the command line asks for, until a signal ends the process.

    Args:
        args: the command line.
        listening: where requests come.
    """
    pipeline = prompting.open_pipeline(args)
    app, queue = prepare(args, pipeline)
    if not is_private(args.host):
        print(f"warning: {_opened(args.host)}", file=sys.stderr, flush=True)
    serve(app, listening, queue)
    name = name_of(args.pretrained)
    print(f"{pipeline.title} of {name}: {address_of(listening)} (Ctrl-C ends)", flush=True)
    queue.work()
    raise OSError("the server ended by itself")


def prepare(args: argparse.Namespace, pipeline: FluxPipeline) -> tuple[Starlette, PictureQueue]:
    """The application of a command line, and the queue whose work is to be done.

    Raises:
        ValueError: the defaults of the page, or sizes to compile for, cannot be made.
    """
    reader = Reader(pipeline, defaults_of(args, pipeline), args.max_pixels)
    reader.check(reader.defaults)
    length = args.max_sequence_length
    with options_named(wiring.PARALLEL_FLAGS):
        pipeline.check(1, **reader.defaults.call, max_sequence_length=length)
    queue = PictureQueue(pipeline, length, lambda line: print(line, flush=True))
    for settings in sizes_to_compile(args, reader):
        queue.submit(settings, compiles=True)
    hosts = ["localhost", "127.0.0.1", "[::1]", "::1", args.host]
    site = Site(queue, reader, name_of(args.pretrained))
    return site.app(hosts if is_private(args.host) else ["*"]), queue


def serve(
    app: Starlette, listening: socket.socket, queue: PictureQueue
) -> tuple[uvicorn.Server, threading.Thread]:
    """Answers requests in a thread: the main one makes pictures, and signals stay this command's.

    Returns the server and its thread once it does; the queue is closed where the server ends.
    """
    options = {"log_config": None, "access_log": False, "lifespan": "off", "ws": "none"}
    server = uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=1, **options))

    def answer() -> None:
        try:
            server.run(sockets=[listening])
        finally:
            queue.close()

    thread = threading.Thread(target=answer, name="server", daemon=True)
    thread.start()
    while thread.is_alive() and not server.started:
        time.sleep(0.005)
    return server, thread


def defaults_of(args: argparse.Namespace, pipeline: FluxPipeline) -> Settings:
    """What the page begins with."""
    height, width = pipeline.picture_size(args.height, args.width)
    steps, guidance = args.steps or pipeline.default_steps, args.guidance_scale
    if guidance is None:
        guidance = pipeline.default_guidance
    return Settings("", height, width, steps, guidance, 0, 1, dict(pipeline.adapters.weights))


def sizes_to_compile(args: argparse.Namespace, reader: Reader) -> list[Settings]:
    """Settings of --compile.

    Raises:
        ValueError: a size that cannot be made.
    """
    if len(args.compile) > MAX_WAITING:
        raise ValueError(f"--compile: {len(args.compile)} sizes, expected at most {MAX_WAITING}")
    found = []
    for size in args.compile:
        height, width = size if isinstance(size, tuple) else (size, size)
        given = {"prompt": "", "height": height, "width": width}
        try:
            found.append(reader(given))
        except SettingError as error:
            raise ValueError(f"--compile={height}x{width}: {error}") from error
    return found


def name_of(pretrained: str) -> str:
    """What the page calls a pipeline: its folder's name, not where that is."""
    return pretrained if pretrained.startswith("hub:") else Path(pretrained).resolve().name


def is_private(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def address_of(listening: socket.socket) -> str:
    """The page's URL."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _opened(host: str) -> str:
    return (
        f"--host={host} opens this server to whoever reaches this machine: they can make pictures "
        "and see all that were made; there is no password and no encryption"
    )


def _json(content: Any, status: int = 200) -> Response:
    return JSONResponse(content, status, headers=_HEADERS)


def _refusal(status: int, message: str, setting: str = "") -> Response:
    return _json({"error": spelled(message), "setting": setting}, status)


def _unknown(request: Request) -> Response:
    return _refusal(404, f"{request.url.path}: there is no such picture (any more)")
