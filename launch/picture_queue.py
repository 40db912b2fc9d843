"""Pictures that are asked for, made one at a time, and kept: what launch/serve.py shows."""

import collections
import contextlib
import dataclasses
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dit_jax.evaluation import to_uint8
from dit_jax.launch.picture_settings import Settings, png
from dit_jax.launch.prompting import SMALLER
from dit_jax.launch.spelling import spelled
from dit_jax.pipelines.flux import FluxPipeline
from dit_jax.quantities import counted
from dit_jax.training import memory

MAX_WAITING = 32  # jobs
_MAX_JOBS = 500  # that are remembered
_MAX_BYTES = 512 << 20  # of pictures that are kept
FINISHED = ("done", "failed", "cancelled")


class QueueError(Exception):
    """Something that cannot be done now: the queue is full, or the job is past it."""


@dataclasses.dataclass(eq=False)
class Job:
    """Pictures asked for, or a size to compile for.

    Attributes:
        number: from 1 on.
        settings: of the pictures.
        compiles: whether it is made for its programs alone.
        state: 'waiting', 'running' or one of `FINISHED`.
        stage: of a running one, in words.
        expected: seconds that the stage takes, about; None where nothing like it was done yet.
        began: when the stage did, on the clock `time.monotonic`.
        seconds: that it took, once it is finished.
        images: PNG files.
        notes: what a person should know, as what was cut off a prompt.
        error: why it failed.
        stops: whether no further picture is wanted.
        version: of the queue at its last change.
    """

    number: int
    settings: Settings
    compiles: bool = False
    state: str = "waiting"
    stage: str = ""
    expected: float | None = None
    began: float = 0.0
    seconds: float | None = None
    images: list[bytes] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    error: str = ""
    stops: bool = False
    version: int = 0


class PictureQueue:
    """Jobs in the order they came. `work` makes them in one thread, the rest is for any.

    Args:
        pipeline: that makes the pictures.
        max_sequence_length: of the pipeline's call.
        announce: told of every job that ends, a line.
    """

    def __init__(
        self,
        pipeline: FluxPipeline,
        max_sequence_length: int | None = None,
        announce: Callable[[str], None] = lambda line: None,
    ):
        self._pipeline, self._length, self._announce = pipeline, max_sequence_length, announce
        self._jobs: collections.OrderedDict[int, Job] = collections.OrderedDict()
        self._changes = threading.Condition()
        self._version = self._count = 0
        self._closed = False
        self._seconds: dict[tuple[int, int, int], float] = {}  # a picture took, by its program
        self._compile_seconds: float | None = None  # the last time

    def submit(self, settings: Settings, *, compiles: bool = False) -> Job:
        """Adds a job.

        Raises:
            QueueError: too many are waiting.
        """
        with self._changes:
            if len(self._waiting()) >= MAX_WAITING:
                raise QueueError(f"{MAX_WAITING} others are waiting: try again when one is made")
            self._count += 1
            job = self._jobs[self._count] = Job(self._count, settings, compiles)
            self._changed(job)
            return job

    def cancel(self, number: int) -> Job:
        """Takes a waiting job out, or ends a running one after the picture that is being made.

        Raises:
            KeyError: there is no such job.
            QueueError: it is finished, or at its last picture, which cannot be interrupted.
        """
        with self._changes:
            job = self._jobs[number]
            if job.state in FINISHED:
                raise QueueError(f"number {number} is {job.state} already")
            if job.state == "running":
                if len(job.images) + 1 >= job.settings.num_images:
                    raise QueueError("the last picture is being made: that cannot be interrupted")
                job.stops = True
            else:
                job.state, job.seconds = "cancelled", 0.0
                self._forget(job)
            self._changed(job)
            return job

    def image(self, number: int, index: int) -> bytes:
        """A PNG file.

        Raises:
            LookupError: there is none.
        """
        with self._changes:
            return self._jobs[number].images[index]

    def compiled(self) -> list[tuple[int, int, int]]:
        """(height, width, steps) that start at once."""
        with self._changes:
            return list(self._seconds)

    def job(self, number: int) -> dict[str, Any]:
        """A job as JSON.

        Raises:
            KeyError: there is none.
        """
        with self._changes:
            return self._described(self._jobs[number], self._positions())

    def state(self, after: int = 0) -> dict[str, Any]:
        """Version, number of the oldest job that is remembered, and jobs changed after a version,
        as JSON."""
        with self._changes:
            places = self._positions()
            changed = [job for job in self._jobs.values() if job.version > after]
            jobs = [self._described(job, places) for job in changed]
            oldest = next(iter(self._jobs), 1)
            return {"version": self._version, "oldest": oldest, "jobs": jobs}

    def close(self) -> None:
        """Ends `work` after the job that is being made."""
        with self._changes:
            self._closed = True
            self._changes.notify_all()

    def work(self) -> None:
        """Makes one job after another until the queue is closed."""
        while (job := self._next()) is not None:
            began = time.monotonic()
            try:
                self._make(job)
            except Exception as error:
                if not isinstance(error, ValueError):
                    traceback.print_exc()
                kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
                self._finish(job, "failed", began, error=spelled(f"{kind}{error}"))
            else:
                self._finish(job, "cancelled" if job.stops else "done", began)

    def _next(self) -> Job | None:
        with self._changes:
            self._changes.wait_for(lambda: self._closed or self._waiting())
            if self._closed:
                return None
            job = self._waiting()[0]
            job.state, job.began = "running", time.monotonic()
            self._changed(job)
            return job

    def _make(self, job: Job) -> None:
        settings, pipeline = job.settings, self._pipeline
        length = {"max_sequence_length": self._length}
        what = f"making a picture, {settings.size}"
        remedy = "ask for a smaller one, or restart the server with --vae_tile=64; "
        with self._warnings_as_notes(job), memory.exhaustion_explained(what, remedy + SMALLER):
            self._use_adapters(settings)
            pipeline.check(1, **settings.call, **length)
            if job.compiles and pipeline.execution.programs is not None:
                self._compile(job, length)
                return
            if settings.program not in self._seconds:
                self._stage(job, self._compiling(settings), self._compile_seconds)
            else:
                self._stage(job, "reading the prompt")
            text, pooled = pipeline.encode_prompt(settings.prompt, **length)
            embeds = {"prompt_embeds": text, "pooled_prompt_embeds": pooled}
            for index in range(settings.num_images):
                if job.stops:
                    return
                self._paint(job, index, {**embeds, **settings.call, **length})

    def _use_adapters(self, settings: Settings) -> None:
        """Weights of LoRA are values alone: nothing is compiled for them."""
        weights = {name: float(weight) for name, weight in settings.lora.items() if weight}
        if weights != self._pipeline.adapters.weights:
            self._pipeline.set_adapters(list(weights), list(weights.values()))

    def _compile(self, job: Job, length: dict[str, Any]) -> None:
        settings, began = job.settings, time.monotonic()
        self._stage(job, self._compiling(settings), self._compile_seconds)
        sizes = {key: value for key, value in settings.call.items() if key != "guidance_scale"}
        self._pipeline.compile(**sizes, **length)
        with self._changes:
            self._compile_seconds = time.monotonic() - began
            self._seconds.setdefault(settings.program, 0.0)

    def _paint(self, job: Job, index: int, options: dict[str, Any]) -> None:
        """One picture: any number of them meets the same program."""
        settings, began = job.settings, time.monotonic()
        first = settings.program not in self._seconds
        of = f" {index + 1} of {settings.num_images}" if settings.num_images > 1 else ""
        if not first:
            expected = self._seconds[settings.program] or None
            self._stage(job, f"making picture{of}" if of else "making the picture", expected)
        options = {"seed": settings.seed, "first_image": index, **options}
        latents = self._pipeline(output_type="latent", **options).images
        pixels = to_uint8(self._pipeline.decode(latents))[0]
        file = None if job.compiles else png(pixels, settings, index, self._pipeline.title)
        with self._changes:
            seconds = time.monotonic() - (job.began if first else began)
            if first:
                self._compile_seconds = seconds
            # What the first took tells nothing of the next one, which does not compile.
            self._seconds[settings.program] = 0.0 if first else seconds
            if file is not None:
                job.images.append(file)
            self._changed(job)

    def _compiling(self, settings: Settings) -> str:
        return f"compiling for {settings.size}, {counted(settings.steps, 'step')}"

    def _stage(self, job: Job, stage: str, expected: float | None = None) -> None:
        with self._changes:
            job.stage, job.expected, job.began = stage, expected, time.monotonic()
            self._changed(job)

    def _finish(self, job: Job, state: str, began: float, error: str = "") -> None:
        with self._changes:
            job.state, job.error, job.stage = state, error, ""
            job.seconds = time.monotonic() - began
            self._forget(job)
            self._changed(job)
        made = f"compiled {job.settings.size}" if job.compiles else f"picture {job.number}"
        line = f"{made}: {error}" if error else f"{made}: {state}, {job.seconds:.1f} s"
        self._announce(line)

    def _forget(self, latest: Job) -> None:
        """Lets the oldest finished jobs go where there are too many of them or of their bytes.

        That which has just ended stays, and the newest.
        """
        sizes = {n: sum(map(len, job.images)) for n, job in self._jobs.items()}
        total = sum(sizes.values())
        for number, job in list(self._jobs.items())[:-1]:
            if len(self._jobs) <= _MAX_JOBS and total <= _MAX_BYTES:
                return
            if job.state in FINISHED and job is not latest:
                total -= sizes[number]
                del self._jobs[number]

    def _waiting(self) -> list[Job]:
        return [job for job in self._jobs.values() if job.state == "waiting"]

    def _positions(self) -> dict[int, int]:
        """Places in the queue from 1 on, by jobs' numbers."""
        return {job.number: place for place, job in enumerate(self._waiting(), 1)}

    def _changed(self, job: Job) -> None:
        """Counts a change, of those that wait, too: their places may be others."""
        self._version += 1
        for other in (job, *self._waiting()):
            other.version = self._version
        self._changes.notify_all()

    def _described(self, job: Job, positions: Mapping[int, int]) -> dict[str, Any]:
        running = job.state == "running"
        images = range(len(job.images))
        return {
            "id": job.number,
            "kind": "compile" if job.compiles else "images",
            "settings": dataclasses.asdict(job.settings),
            "state": job.state,
            "position": positions.get(job.number),
            "stage": job.stage,
            "elapsed": time.monotonic() - job.began if running else job.seconds,
            "expected": job.expected if running else None,
            "images": [f"/api/images/{job.number}/{index}.png" for index in images],
            "notes": list(job.notes),
            "error": job.error,
        }

    @contextlib.contextmanager
    def _warnings_as_notes(self, job: Job) -> Iterator[None]:
        def note(message: Any, category: type[Warning], *rest: Any, **_: Any) -> None:
            with self._changes:
                if issubclass(category, UserWarning) and str(message) not in job.notes:
                    job.notes.append(str(message))
                    self._changed(job)
            if not issubclass(category, UserWarning):
                print(f"warning: {message}", file=sys.stderr, flush=True)

        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = note
            yield
