"""launch/serve.py: the server, asked over HTTP. The page itself: test_serve_browser.py."""

import io
import json
import re
import signal
import socket

import numpy as np
import pytest
from PIL import Image

from dit_jax import FluxPipeline
from dit_jax.interop.lora import save_lora
from dit_jax.launch import picture_queue, serve
from tests.launch import conftest
from tests.launch.served import Painter, served
from tests.models.test_lora import drawn
from tests.references import diffusers_flux_pipeline

pytest.importorskip("starlette", reason="needs the extra 'serve'")
pytest.importorskip("uvicorn", reason="needs the extra 'serve'")

SMALL = {"height": 32, "width": 48, "steps": 2}


@pytest.fixture(scope="module")
def site():
    with served(Painter(), "--height=32", "--width=32") as client:
        yield client


@pytest.fixture
def slow():
    with served(Painter(gate=True), "--height=32", "--width=32") as client:
        yield client


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux") / "tiny"
    diffusers_flux_pipeline.create().save_pretrained(folder)
    return folder


def test_the_page_is_complete_and_asks_nobody_else(site):
    for address in ("/", "/page.css", "/page.js", "/icon.svg"):
        status, headers, content = site.ask(address)
        assert status == 200 and "default-src 'self'" in headers["Content-Security-Policy"]
        elsewhere = re.findall(rb"https?://[^\s\"']+", content)
        assert set(elsewhere) <= {b"http://www.w3.org/2000/svg"}
    status, found = site.json("/api/pipeline")
    assert status == 200 and found["title"] == "FLUX.1 test" and found["name"] == "folder"
    assert not found["guided"] and found["side_multiple"] == 16
    defaults = {"height": 32, "width": 32, "steps": 4, "guidance_scale": None, "lora": {}}
    assert found["defaults"] == defaults
    assert site.ask("/etc/passwd")[0] == 404


def test_pictures_say_how_they_were_made(site):
    job = site.make(prompt="a “cat”, 猫", seed=7, num_images=2, **SMALL)
    assert job["state"] == "done" and job["elapsed"] >= 0 and not job["notes"]
    files = [site.ask(address)[2] for address in job["images"]]
    first, second = (Image.open(io.BytesIO(file)) for file in files)
    assert first.size == (48, 32) and np.asarray(first).std(axis=(0, 1)).max() == 0
    assert np.asarray(first)[0, 0].tolist() != np.asarray(second)[0, 0].tolist()
    assert second.text["Description"] == "a “cat”, 猫" and "dit-jax" in second.text["Software"]
    record = {**job["settings"], "image": 1, "pipeline": "FLUX.1 test"}
    assert json.loads(second.text["dit_jax"]) == record
    again = site.make(prompt="a dog", seed=7, **SMALL)
    assert np.array_equal(
        np.asarray(first), Image.open(io.BytesIO(site.ask(again["images"][0])[2]))
    )
    compiled = site.json("/api/pipeline")[1]["compiled"]
    assert SMALL in compiled
    state = site.json("/api/images?after=0")[1]
    assert [job["id"] for job in state["jobs"]][-2:] == [again["id"] - 1, again["id"]]
    assert not site.json(f"/api/images?after={state['version']}")[1]["jobs"]
    assert site.ask(f"/api/images/{job['id']}/2.png")[0] == 404


@pytest.mark.parametrize(
    ("body", "setting", "message"),
    [
        ({"height": 500}, "height", "height=500, width=32: expected multiples of 16, for instance"),
        ({"width": 40}, "width", "expected multiples of 16"),
        ({"width": 4096, "height": 2048}, "width", "8,388,608 pixels: expected at most 4,194,304"),
        ({"width": 0}, "width", "width: 0 given, expected at least 1"),
        ({"height": ""}, "height", "height: nothing is given"),
        ({"height": "32"}, "height", 'height: "32" given, expected at least 1'),
        ({"height": 1e999}, "height", "height: Infinity given"),
        ({"steps": 201}, "steps", "steps: 201 given, expected at least 1 and at most 200"),
        ({"steps": True}, "steps", "steps: true given"),
        ({"num_images": 17}, "num_images", "at most 16"),
        ({"seed": 2**32}, "seed", "seed: 4294967296 given"),
        ({"seed": [[1]] * 50}, "seed", "..."),
        ({"guidance_scale": 3}, "guidance_scale", "FLUX.1 test is not told a guidance scale"),
        ({"prompt": 3}, "prompt", "prompt: expected text, not 3"),
        ({"prompt": "a" * 10_001}, "prompt", "10,001 characters, expected at most 10,000"),
        (
            {"lora": {"style": 1}},
            "lora",
            "'style' was not loaded (launch/serve.py --lora=FILE): there",
        ),
        ({"lora": 3}, "lora", "lora: 3 given, expected weights by name"),
        ({"prompt": "\ud800 x"}, "prompt", "without lone surrogates"),
        ({"promt": "a"}, "", "unknown setting 'promt'; did you mean prompt?"),
    ],
)
def test_what_cannot_be_made_is_refused(site, body, setting, message):
    status, answer = site.json("/api/images", {"prompt": "a cat", **body})
    assert status == 400 and answer["setting"] == setting, answer
    assert message in answer["error"]


def test_requests_that_are_none_are_refused(site):
    assert "none is given" in site.json("/api/images", {})[1]["error"]
    for body, message in ((b"{", "not JSON"), (b"[1]", "expected an object"), (b"\xff", "no text")):
        status, answer = site.json("/api/images", body)
        assert status == 400 and message in answer["error"]
    status, answer = site.json("/api/images", {"prompt": "a" * 70_000})
    assert status == 413 and "65,536 bytes" in answer["error"]
    status, answer = site.json("/api/images", {"prompt": "a"}, **{"Content-Type": "text/plain"})
    assert status == 415 and "expected application/json" in answer["error"]
    # A name that somebody else made to lead here.
    assert site.ask("/api/images", Host="evil.example")[0] == 400
    assert site.json("/api/images?after=-1")[0] == 400
    assert site.json("/api/images/99")[0] == site.json("/api/images/99", None, "DELETE")[0] == 404


def test_a_guided_pipeline_is_told_the_scale():
    with served(Painter(guided=True), "--height=32", "--width=32") as client:
        assert client.json("/api/pipeline")[1]["defaults"]["guidance_scale"] == 3.5
        client.make(prompt="a", **SMALL)
        client.make(prompt="a", guidance_scale=2, **SMALL)
        assert [call["guidance_scale"] for call in client.pipeline.calls] == [3.5, 2]
        status, answer = client.json("/api/images", {"prompt": "a", "guidance_scale": -1})
        assert status == 400 and "expected at least 0" in answer["error"]


def test_grey_pictures_are_grey(site, monkeypatch):
    monkeypatch.setattr(site.pipeline, "decode", lambda latents: latents[..., :1])
    job = site.make(prompt="a", **SMALL)
    assert Image.open(io.BytesIO(site.ask(job["images"][0])[2])).mode == "L", job


def test_adapters_are_used_with_the_weights_asked_for():
    painter = Painter(lora={"style": 0.8, "detail": 1.0})
    with served(painter, "--height=32", "--width=32") as client:
        assert client.json("/api/pipeline")[1]["defaults"]["lora"] == painter.adapters.weights
        for weights in ({}, {"style": 0}, {"style": 0.5, "detail": 0}):
            job = client.make(prompt="a", lora=weights)
        assert job["settings"]["lora"] == {"style": 0.5, "detail": 0}
        used = [call["lora"] for call in painter.calls]
        assert used == [{"style": 0.8, "detail": 1.0}, {"detail": 1.0}, {"style": 0.5}]
        error = client.json("/api/images", {"prompt": "a", "lora": {"stile": 1}})[1]["error"]
        assert error.endswith("did you mean style?")
        error = client.json("/api/images", {"prompt": "a", "lora": {"style": ""}})[1]["error"]
        assert error == "lora: nothing is given, expected a finite number"


def test_others_wait_and_can_be_cancelled(slow, monkeypatch):
    monkeypatch.setattr(picture_queue, "MAX_WAITING", 2)
    painter = slow.pipeline
    submit = {"prompt": "a cat", "num_images": 2}
    first = slow.json("/api/images", submit)[1]["id"]
    assert painter.began.acquire(timeout=60)  # of two
    running = slow.json(f"/api/images/{first}")[1]
    assert running["state"] == "running" and running["position"] is None
    assert running["stage"] == "compiling for 32 wide, 32 high, 4 steps"
    second, third = (slow.json("/api/images", submit)[1] for _ in range(2))
    assert (second["position"], third["position"]) == (1, 2)
    status, answer = slow.json("/api/images", submit)
    assert status == 429 and "2 others are waiting" in answer["error"]
    version = slow.json("/api/images")[1]["version"]
    status, answer = slow.json(f"/api/images/{second['id']}", None, "DELETE")
    assert status == 200 and answer["state"] == "cancelled"
    changed = slow.json(f"/api/images?after={version}")[1]["jobs"]
    assert [(job["state"], job["position"]) for job in changed] == [
        ("cancelled", None),
        ("waiting", 1),
    ]
    assert slow.json(f"/api/images/{second['id']}", None, "DELETE")[0] == 409
    assert slow.json(f"/api/images/{first}", None, "DELETE")[0] == 200  # after this picture
    painter.go.release()
    job = slow.finished(first)
    assert job["state"] == "cancelled" and len(job["images"]) == 1
    assert painter.began.acquire(timeout=60)
    third = slow.json(f"/api/images/{third['id']}")[1]
    assert third["stage"] == "making picture 1 of 2"
    painter.go.release()
    assert painter.began.acquire(timeout=60)
    third = slow.json(f"/api/images/{third['id']}")[1]
    assert third["stage"] == "making picture 2 of 2" and third["expected"] > 0
    status, answer = slow.json(f"/api/images/{third['id']}", None, "DELETE")
    assert status == 409 and "cannot be interrupted" in answer["error"]
    painter.go.release()
    assert slow.finished(third["id"])["state"] == "done"
    slow.json("/api/images", {"prompt": "a", "height": 64})
    assert painter.began.acquire(timeout=60)
    assert slow.json("/api/images")[1]["jobs"][-1]["expected"] > 0  # as the last compilation


def test_faults_and_warnings_are_told_and_the_next_picture_is_made(site, capsys):
    painter = site.pipeline
    painter.fault = ValueError("needs 3 devices")
    assert site.make(prompt="a")["error"] == "needs 3 devices"
    painter.fault = MemoryError()
    error = site.make(prompt="a")["error"]
    assert "memory ran out while making a picture, 32 wide, 32 high: ask for a smaller" in error
    painter.fault = TypeError("a bug")
    job = site.make(prompt="a")
    assert job["state"] == "failed" and job["error"] == "TypeError: a bug"
    assert "Traceback" in capsys.readouterr().err
    painter.fault = None
    job = site.make(prompt="a" * 100 + "the rest")
    assert job["state"] == "done"
    assert job["notes"] == ["T5 takes 100 of it; this was cut off: 'the rest'"]


def test_the_oldest_pictures_are_forgotten(monkeypatch):
    monkeypatch.setattr(picture_queue, "_MAX_JOBS", 2)
    with served(Painter()) as client:
        for _ in range(4):
            client.make(prompt="a", **SMALL)
        state = client.json("/api/images")[1]
        assert state["oldest"] == 3 and [job["id"] for job in state["jobs"]] == [3, 4]
        monkeypatch.setattr(picture_queue, "_MAX_BYTES", 1)
        client.make(prompt="a", **SMALL)
        assert client.json("/api/images")[1]["oldest"] == 5
        assert client.ask("/api/images/4/0.png")[0] == 404


def test_cancelled_jobs_are_forgotten_while_one_is_made(slow, monkeypatch):
    monkeypatch.setattr(picture_queue, "_MAX_JOBS", 3)
    running = slow.json("/api/images", {"prompt": "a"})[1]["id"]
    assert slow.pipeline.began.acquire(timeout=60)
    waiting = slow.json("/api/images", {"prompt": "a"})[1]["id"]
    for _ in range(4):
        number = slow.json("/api/images", {"prompt": "a"})[1]["id"]
        status, answer = slow.json(f"/api/images/{number}", None, "DELETE")
        assert status == 200 and answer["state"] == "cancelled"
    state = slow.json("/api/images")[1]
    places = [(job["id"], job["position"]) for job in state["jobs"]]
    assert places == [(running, None), (waiting, 1), (number, None)]


@pytest.mark.filterwarnings("ignore:.*this was cut off")
def test_a_real_pipeline_gives_what_python_gives(folder, tmp_path):
    pipe = FluxPipeline.from_pretrained(folder)
    network = pipe.parts.transformer
    save_lora(tmp_path / "style.safetensors", network, drawn(network, 0, rank=2, spread=0.3))
    pipe.load_lora_weights(tmp_path / "style.safetensors", 0.5)
    options = ("--max_sequence_length=24", "--steps=2", "--height=8", "--width=12")
    with served(pipe, *options, "--compile", "8x12") as client:
        jobs = [
            client.make(prompt="a cat " * 30, num_images=2, seed=3),
            client.make(prompt="a cat", seed=3, lora={"style": 0}),
        ]
        assert jobs[0]["id"] == 2 and jobs[0]["settings"]["lora"] == {"style": 0.5}
        assert all(job["state"] == "done" for job in jobs), jobs
        assert [note.partition(" of a")[0] for note in jobs[0]["notes"]] == [
            "T5 takes 24 tokens",
            "CLIP takes 77 tokens",
        ]
        compiled = client.json("/api/images/1")[1]
        assert compiled["kind"] == "compile" and not compiled["images"]
        files = [client.ask(address)[2] for job in jobs for address in job["images"]]
    made = [np.asarray(Image.open(io.BytesIO(file))) for file in files]
    sizes = {"height": 8, "width": 12, "num_inference_steps": 2, "max_sequence_length": 24}
    wanted = [pipe("a cat", seed=3, **sizes).images[0]]
    pipe.set_adapters("style", 0.5)
    for number in range(2):
        wanted.append(pipe("a cat " * 30, seed=3, first_image=number, **sizes).images[0])
    for found, image in zip(made, (*wanted[1:], wanted[0]), strict=True):
        assert np.array_equal(found, np.asarray(image))
    assert np.abs(made[0].astype(int) - made[2]).max() > 5


def test_compiled_ahead_into_a_folder(tmp_path):
    class Compiled(Painter):
        def compile(self, **options):
            self.calls.append(options)

    pipeline = Compiled()
    pipeline.execution.programs = tmp_path
    with served(pipeline, "--compile", "64", "32x48") as client:
        client.finished(2)
    sizes = [
        (call["height"], call["width"], call["num_inference_steps"]) for call in pipeline.calls
    ]
    assert sizes == [(64, 64, 4), (32, 48, 4)]


def test_ctrl_c_ends_it_at_once_even_while_it_compiles(folder):
    options = ("--port=0", "--height=8", "--compile", "8x8")
    process = conftest.start("serve", folder, *options, interruptible=True)
    line = process.stdout.readline()
    assert re.search(r"FLUX .* of tiny: http://127.0.0.1:\d+ \(Ctrl-C ends\)", line), line
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.strip() == "interrupted"
    assert "compiled" not in out


def refusal(capsys, *options):
    with pytest.raises(SystemExit) as ended:
        serve.main([*options])
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_command_lines_that_cannot_be_are_refused(folder, capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = refusal(capsys, "none/of/these", f"--port={port}")
    assert f"--port={port} cannot be listened at (address already in use): choose another" in error
    assert "--host=192.0.2.1" in refusal(capsys, "x", "--host=192.0.2.1", "--port=0")
    assert "none/of/these does not exist" in refusal(capsys, "none/of/these", "--port=0")
    assert "at most 65535" in refusal(capsys, "x", "--port=65536")
    assert "is of --lora" in refusal(capsys, "x", "--lora_ignore_text_encoders")
    assert "--patch_devices would do nothing" in refusal(capsys, "x", "--patch_devices=2")
    error = refusal(capsys, str(folder), "--port=0", "--compile", "8x8", "10x8")
    assert "--compile=10x8: height=10, width=8: expected multiples of 4" in error
    error = refusal(capsys, str(folder), "--port=0", "--height=4096", "--width=4096")
    assert "expected at most 4,194,304" in error
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    error = refusal(capsys, "x")
    assert (
        "the page needs starlette and uvicorn and tokenizers: pip install 'dit-jax[serve]'" in error
    )


def test_a_server_opened_to_others_warns(capsys, monkeypatch):
    from dit_jax.launch import prompting, serving

    monkeypatch.setattr(prompting, "open_pipeline", lambda args: Painter())
    monkeypatch.setattr(picture_queue.PictureQueue, "work", lambda queue: None)
    assert "ended by itself" in refusal(capsys, "a/folder", "--host=0.0.0.0", "--port=0")
    monkeypatch.setattr(serving, "serve", lambda *arguments: print("served"))
    with pytest.raises(SystemExit):
        serve.main(["a/folder", "--host=0.0.0.0", "--port=0"])
    said = capsys.readouterr()
    assert "warning: --host=0.0.0.0 opens this server to whoever reaches" in said.err
    assert [serving.is_private(host) for host in ("::1", "127.0.0.2", "localhost", "10.0.0.1")] == [
        *(True, True, True, False)
    ]
