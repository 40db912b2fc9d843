"""What README and docs show works: Python runs, commands have the flags given, links lead on."""

import ast
import dataclasses
import re
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.config import default_config, flatten
from dit_jax.interop.export import write_model
from dit_jax.interop.flux_files import open_flux
from dit_jax.interop.lora import save_lora
from dit_jax.interop.models import open_model
from dit_jax.launch.spelling import experiments
from dit_jax.models import DiTConfig, Network, Request
from tests.interop.test_edm import write_pickle
from tests.interop.test_models import in_memory
from tests.models.test_lora import drawn
from tests.references import diffusers_flux_pipeline

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_FENCE = re.compile(r"```.*?```", re.DOTALL)
_COMMAND = re.compile(r"python (?=(?:launch|benchmarks)/)|\bdit-jax (?=[a-z])")
_LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
TINY = DiTConfig(
    image_size=8, in_channels=1, hidden_size=32, depth=1, num_heads=4, learn_sigma=False
)


def blocks(language):
    """(document and line, text) of every block of a language."""
    for path in DOCUMENTS:
        text = path.read_text()
        for match in _BLOCK.finditer(text):
            if match[1] == language:
                line = text.count("\n", 0, match.start()) + 2
                yield f"{path.relative_to(ROOT)}:{line}", match[2]


def test_the_table_of_experiments_has_them_all():
    rows = re.findall(r"^\| (`[^|]*\.py`) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    listed = []
    for name in re.findall(r"`([\w{},]+)\.py`", " ".join(rows)):
        start, *choices = re.split("[{},]", name)
        listed += [f"{start}{choice}" for choice in choices if choice] or [name]
    assert sorted(listed) == experiments()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with small models under the names that the documents use."""
    folder = tmp_path_factory.mktemp("home")
    published = DiTConfig(hidden_size=384, depth=1, num_heads=6)
    write_model(in_memory(published)[0], "dit_pt", folder / "DiT-XL-2-256x256.pt")
    write_model(in_memory(TINY)[0], "diffusers", folder / "exported")
    digits = dataclasses.replace(TINY, num_classes=10)
    model, _ = in_memory(digits, process={"name": "flow"})
    config = model.config.copy_and_resolve_references()
    config.sampling.update(solver="euler", steps=2, guidance_scale=1.5)
    write_model(dataclasses.replace(model, config=config), "dit_jax", folder / "runs/digits")
    diffusers_flux_pipeline.create(guidance=False).save_pretrained(folder / "FLUX.1-schnell")
    network = Network(open_flux(folder / "FLUX.1-schnell").config)
    for name in ("style", "detail"):
        save_lora(folder / f"{name}.safetensors", network, drawn(network))
    return folder


@pytest.mark.parametrize("place,text", [pytest.param(*b, id=b[0]) for b in blocks("python")])
def test_python_runs(place, text, home, monkeypatch):
    monkeypatch.chdir(home)
    scope = {}
    text = text.replace("1024", "16")  # pixels, of which the small models are not made
    exec(compile(text, place, "exec"), scope)
    for name in ("out", "images"):
        assert np.isfinite(np.asarray(scope.get(name, 0.0))).all()


def test_a_unet_opened_in_python_is_applied(tmp_path):
    """As docs/interop.md shows; layers of U-Nets ask more of arrays than DiT's."""
    model = open_model(write_pickle(tmp_path / "x.pkl", "ddpmpp"))
    params = model.load()
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
    x = jnp.zeros((1, *model.network.sample_shape))
    label = {"label": jnp.zeros(1, jnp.int32)} if "label" in model.network.conditions else {}
    out = model.network.apply(params, Request(x, jnp.zeros(1), label)).out
    assert out.shape == x.shape


def commands():
    """(document, words) of every command line of launch/, benchmarks/ and dit-jax."""
    for path in DOCUMENTS:
        text = path.read_text().replace("\\\n", " ")
        lines = [line for block in _BLOCK.finditer(text) for line in block[2].splitlines()]
        lines += re.findall(rf"`([^`\n]*(?:{_COMMAND.pattern})[^`\n]*)`", _FENCE.sub("", text))
        for line in lines:
            if found := _COMMAND.search(line):
                rest = re.sub(r"[\[\]|<>]", " ", line[found.end() :])
                words = shlex.split(rest, comments=True)
                if found[0].startswith("dit-jax"):
                    words[0] = f"launch/{words[0].replace('-', '_')}.py"
                yield path.relative_to(ROOT), words


def options_of(command):
    """Names of the flags that a command defines, by itself or in a module it imports."""
    text = (ROOT / command).read_text()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module == "dit_jax.launch":
            for name in node.names:
                text += (ROOT / "launch" / f"{name.name}.py").read_text()
    for name in re.findall(r"^import (benchmark_\w+|same_noise)$", text, re.MULTILINE):
        text += (ROOT / "benchmarks" / f"{name}.py").read_text()
    return set(re.findall(r"""(?:"--|DEFINE_\w+\(\s*")(\w+)""", text)) | {"help"}


def test_commands_have_the_flags_that_documents_give_them():
    keys = {f"config.{key}" for key, _ in flatten(default_config())}
    wrong, count = [], 0
    for document, (script, *words) in commands():
        if not (ROOT / script).is_file():
            wrong.append(f"{document}: there is no {script}")
            continue
        known = options_of(script)
        for word in words:
            flag, _, value = word.removeprefix("--").partition("=")
            if not word.startswith("--") or flag == "config.KEY":
                continue
            count += 1
            if flag.startswith("config."):
                if flag not in keys:
                    wrong.append(f"{document}: {script} --{flag}: no such key")
            elif flag not in known:
                wrong.append(f"{document}: {script} has no --{flag}")
            elif flag == "config" and re.fullmatch(r"configs/[^{]*|[a-z]\w*", value):
                known_file = (ROOT / value).is_file() or value in experiments()
                wrong += [] if known_file else [f"{document}: there is no {value}"]
    assert not wrong, "\n".join(wrong)
    assert count > 100  # they were found at all


def test_links_lead_to_files():
    wrong = [
        f"{path.relative_to(ROOT)}: {target}"
        for path in DOCUMENTS
        for target in _LINK.findall(_FENCE.sub("", path.read_text()))
        if "://" not in target and not (path.parent / target).exists()
    ]
    assert not wrong, "\n".join(wrong)
