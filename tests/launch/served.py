"""The page of launch/serve.py for tests: on a pipeline that draws at once, or on a real one."""

import contextlib
import json
import threading
import types
import urllib.error
import urllib.request
import warnings

import numpy as np

from dit_jax import FluxPipeline
from dit_jax.launch import serve


class Painter(FluxPipeline):
    """Paints a plane of one colour, which the seed decides.

    With `gate`, a picture waits for `go` and says that it has begun.
    """

    def __init__(self, *, guided=False, gate=False, fault=None, lora=None):
        transformer = types.SimpleNamespace(
            config=types.SimpleNamespace(guidance_embedding=guided, title="FLUX.1 test")
        )
        vae = types.SimpleNamespace(downsampling_factor=8)
        self.parts = types.SimpleNamespace(transformer=transformer, vae=vae)
        self.execution = types.SimpleNamespace(programs=None)
        self.began, self.go, self.fault = threading.Semaphore(0), threading.Semaphore(0), fault
        self.gate, self.calls = gate, []
        self.adapters = types.SimpleNamespace(weights=dict(lora or {}))

    def set_adapters(self, adapter_names, adapter_weights):
        self.adapters.weights = dict(zip(adapter_names, adapter_weights, strict=True))

    def check(self, draws=1, **settings):
        return ()

    def encode_prompt(self, prompt, prompt_2=None, *, max_sequence_length=None):
        if len(prompt) > 100:
            warnings.warn(f"T5 takes 100 of it; this was cut off: {prompt[100:]!r}", stacklevel=2)
        return np.zeros((1, 1, 1)), np.zeros((1, 1))

    def __call__(self, prompt=None, *, height, width, seed, first_image, **options):
        used = {"height": height, "width": width, "seed": seed, "lora": self.adapters.weights}
        self.calls.append({**used, **options})
        if self.gate:
            self.began.release()
            assert self.go.acquire(timeout=60)
        if self.fault:
            raise self.fault
        colour = np.random.default_rng((seed, first_image)).uniform(-1, 1, 3)
        pixels = np.broadcast_to(colour, (1, height, width, 3))
        return types.SimpleNamespace(images=pixels.astype(np.float32))

    def decode(self, latents):
        return latents


class Client:
    """Speaks to a server."""

    def __init__(self, url, pipeline, queue):
        self.url, self.pipeline, self.queue = url, pipeline, queue

    def ask(self, path, body=None, method=None, **headers):
        """(status, headers, content) of an answer; `body` is sent as JSON if it is no bytes."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **headers}
        request = urllib.request.Request(f"{self.url}{path}", data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read()

    def json(self, path, body=None, method=None, **headers):
        """(status, content)."""
        status, _, content = self.ask(path, body, method, **headers)
        return status, json.loads(content)

    def make(self, **settings):
        """The job of pictures, finished."""
        status, job = self.json("/api/images", settings)
        assert status == 202, job
        return self.finished(job["id"])

    def finished(self, number):
        with self.queue._changes:
            ended = self.queue._changes.wait_for(
                lambda: self.queue._jobs[number].state in ("done", "failed", "cancelled"), 120
            )
            assert ended
        return self.json(f"/api/images/{number}")[1]


@contextlib.contextmanager
def served(pipeline, *options):
    """A server of `launch/serve.py DIR options`, in this process."""
    from dit_jax.launch import serving

    args = serve.parse_arguments(["a/folder", "--port=0", *options])
    app, queue = serving.prepare(args, pipeline)
    listening = serve.listen_at(args.host, args.port)
    server, thread = serving.serve(app, listening, queue)
    worker = threading.Thread(target=queue.work, daemon=True)
    worker.start()
    try:
        yield Client(serving.address_of(listening), pipeline, queue)
    finally:
        queue.close()
        for _ in range(100 if getattr(pipeline, "gate", False) else 0):
            pipeline.go.release()
        worker.join(60)
        server.should_exit = True
        thread.join(60)
