"""FLUX pipelines in diffusers' folders: checked as a whole before any weights are read."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from dit_jax.atomic import atomic_folder, check_destination
from dit_jax.interop import hub
from dit_jax.interop.autoencoder_kl import (
    load_autoencoder,
    save_autoencoder,
)
from dit_jax.interop.claims import read_object
from dit_jax.interop.flux_files import (
    load_flux,
    load_found_flux,
    open_flux,
    require_flux,
    save_flux,
)
from dit_jax.interop.flux_pipelines import (
    CLASSES,
    COMPONENTS,
    INDEX,
    TRANSFORMER,
    check_guidance,
    check_index,
    check_widths,
)
from dit_jax.interop.models import FoundModel, open_model
from dit_jax.interop.schedulers import (
    FlowTimes,
    flow_times_from_scheduler,
    flow_times_to_scheduler,
)
from dit_jax.interop.tensors import InteropError
from dit_jax.interop.text_encoders import (
    CLIP,
    T5,
    load_text_encoder,
    read_text_config,
    save_text_encoder,
)
from dit_jax.interop.tokenizer_files import load_tokenizer
from dit_jax.models import AutoencoderKL, Network
from dit_jax.models.linear import resolve_dtype, resolve_param_dtype
from dit_jax.models.quantization import STORED
from dit_jax.nearest import one_of
from dit_jax.pipelines.divided import Divided
from dit_jax.pipelines.text import TextPart, check_vocabulary

DTYPES = ("auto", "float32", "bfloat16")  # of products; T5's states go beyond float16
RULES = {"clip": "clip_text", "t5": "t5_encoder"}  # how text encoders are divided over devices
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", re.ASCII)


@dataclasses.dataclass(frozen=True, eq=False)
class FluxParts:
    """What a pipeline is made of.

    Attributes:
        transformer: the network.
        params: its parameters.
        clip: the encoder of the pooled vector.
        t5: the encoder of the tokens.
        vae: from latents to pixels and back.
        vae_params: its parameters.
        times: of the scheduler.
        kontext: whether it was saved as a pipeline that edits images.
    """

    transformer: Network
    params: Any
    clip: TextPart
    t5: TextPart
    vae: AutoencoderKL
    vae_params: Any
    times: FlowTimes
    kontext: bool = False


def resolve(source: str | Path, without: tuple[str, ...] = ()) -> Path:
    """The folder of a path, 'hub:owner/name[@revision]', or 'owner/name' where no such path is.

    Args:
        source: one of these.
        without: components that are not fetched from the hub.

    Raises:
        InteropError: it is neither, or cannot be fetched.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    text = str(source)
    if _REPOSITORY.fullmatch(text):
        text = f"{hub.PREFIX}{text}"
    if not text.startswith(hub.PREFIX):
        raise InteropError(
            f"{source} does not exist: expected the folder of a diffusers pipeline, or "
            "hub:owner/name"
        )
    return hub.resolve(text, tuple(name for name in COMPONENTS if name not in without))


def load(
    source: str | Path,
    *,
    dtype: str = "auto",
    param_dtype: str = "auto",
    quantization: str = "none",
    layer_loop: str = "auto",
    attention: str = "auto",
    offload: bool = False,
    transformer: str | Path | FoundModel | None = None,
    divided: Divided | None = None,
) -> FluxParts:
    """Reads a pipeline; see `flux.FluxPipeline.from_pretrained`."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: {one_of(dtype, DTYPES)}")
    found = _find_transformer(transformer)
    without = () if found is None else (TRANSFORMER,)
    folder = resolve(source, without)
    kontext = check_index(folder, without, "For other models see --init_from")
    times = flow_times_from_scheduler(*_scheduler_config(folder))
    tokenizers = {
        name: load_tokenizer(folder / name, kind, within=folder)
        for name, kind in (("tokenizer", "CLIP"), ("tokenizer_2", "T5"))
    }
    _check_configs(folder, tokenizers, found)
    if param_dtype == "auto" and resolve_dtype(dtype).name == "bfloat16":
        param_dtype = "bfloat16"
    execution = {"dtype": dtype, "param_dtype": param_dtype}
    loops = {"layer_loop": layer_loop, "attention": attention}
    if offload and divided:
        raise ValueError("offload keeps the encoders' weights on the host, a mesh divides them")

    def put(name: str) -> Any:
        return None if divided is None else divided.put(name)

    options = {"quantization": quantization, "put": put("flux"), **execution, **loops}
    read = load_flux(folder, **options) if found is None else load_found_flux(found, **options)
    network, params = read[0], _quantized(*read, divided)
    # Left where they are read, they are on the device while they are the inputs of a program.
    on_host = (lambda path, array: array) if offload else None
    texts = [
        TextPart(
            title,
            output,
            tokenizers[tokenizer],
            *load_text_encoder(
                folder / encoder,
                kind=kind,
                within=folder,
                put=on_host or put(name),
                **execution,
                **loops,
            ),
        )
        for title, output, kind, name, encoder, tokenizer in (
            ("CLIP", "pooled", CLIP, RULES["clip"], "text_encoder", "tokenizer"),
            ("T5", "tokens", T5, RULES["t5"], "text_encoder_2", "tokenizer_2"),
        )
    ]
    vae, vae_params, _ = load_autoencoder(folder / "vae", **execution)
    return FluxParts(network, params, *texts, vae, vae_params, times, kontext)


def _quantized(network: Network, params: Any, divided: Divided | None) -> Any:
    """Parameters in 8 bits where the network's products are."""
    if network.config.quantization not in STORED:
        return params
    where = {}
    if divided is not None:
        shapes = jax.eval_shape(network.quantize, params)
        where["out_shardings"] = divided.shardings("flux", shapes)
    return jax.jit(network.quantize, **where)(params)


def _find_transformer(given: str | Path | FoundModel | None) -> FoundModel | None:
    """A transformer instead of the pipeline's, refused before anything else is looked at."""
    if given is None:
        return None
    found = given if isinstance(given, FoundModel) else open_model(str(given))
    require_flux(found)
    return found


def assemble(folder: str | Path, transformer: Network, params: Any, times: FlowTimes) -> FluxParts:
    """The parts of a pipeline whose transformer was trained here.

    Args:
        folder: text_encoder/, text_encoder_2/, tokenizer/, tokenizer_2/ and vae/, of another
            pipeline or by themselves.
        transformer: the network.
        params: its parameters.
        times: at which it is to be evaluated.

    Raises:
        InteropError: a component is missing, or another model's.
    """
    folder = Path(folder)
    texts = [
        TextPart(
            title,
            output,
            load_tokenizer(folder / tokenizer, title, within=folder),
            *load_text_encoder(folder / encoder, kind=kind, within=folder),
        )
        for title, output, kind, encoder, tokenizer in (
            ("CLIP", "pooled", CLIP, "text_encoder", "tokenizer"),
            ("T5", "tokens", T5, "text_encoder_2", "tokenizer_2"),
        )
    ]
    vae, vae_params, _ = load_autoencoder(folder / "vae")
    return FluxParts(transformer, params, *texts, vae, vae_params, times)


def _scheduler_config(folder: Path) -> tuple[Mapping[str, Any], str]:
    file = folder / "scheduler" / "scheduler_config.json"
    return read_object(file, folder), str(file)


def _check_configs(folder: Path, tokenizers: Mapping[str, Any], found: FoundModel | None) -> None:
    """Refuses components that do not go together."""
    network = open_flux(folder).config if found is None else found.network.config
    clip = read_text_config(folder / "text_encoder", kind=CLIP, within=folder)
    t5 = read_text_config(folder / "text_encoder_2", kind=T5, within=folder)
    if found is None:
        check_widths(folder, network)
    else:
        check_widths(folder, network, str(found.path))
        check_guidance(folder, network, str(found.path))
    check_vocabulary(folder, "CLIP", tokenizers["tokenizer"], clip.vocab_size)
    check_vocabulary(folder, "T5", tokenizers["tokenizer_2"], t5.vocab_size)
    longest = tokenizers["tokenizer"].max_length
    if longest != clip.max_length:
        raise InteropError(
            f"{folder}: CLIP's tokenizer makes prompts of {longest} tokens (model_max_length), its "
            f"encoder has positions for {clip.max_length}"
        )


def save(folder: str | Path, parts: FluxParts, *, overwrite: bool = False) -> None:
    """Writes a pipeline; see `flux.FluxPipeline.save_pretrained`."""
    folder = Path(folder)
    check_destination(folder, overwrite=overwrite)
    if parts.transformer.config.quantization in STORED:
        raise InteropError(
            "a pipeline of quantised weights is for sampling: load it with quantization='none' to "
            "save it"
        )
    vae_dtype = resolve_param_dtype(parts.vae.config.param_dtype)
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        save_flux(temporary / "transformer", parts.transformer, parts.params)
        for text, encoder, tokenizer in (
            (parts.clip, "text_encoder", "tokenizer"),
            (parts.t5, "text_encoder_2", "tokenizer_2"),
        ):
            save_text_encoder(temporary / encoder, text.encoder, text.params)
            text.tokenizer.save(temporary / tokenizer)
        save_autoencoder(
            temporary / "vae", parts.vae, parts.vae_params, dtype=jax.numpy.dtype(vae_dtype)
        )
        (temporary / "scheduler").mkdir()
        index = {"_class_name": CLASSES[parts.kontext], "_diffusers_version": "0.32.0"}
        index |= {name: list(classes) for name, classes in sorted(COMPONENTS.items())}
        for file, values in (
            ("scheduler/scheduler_config.json", flow_times_to_scheduler(parts.times)),
            (INDEX, index),
        ):
            (temporary / file).write_text(json.dumps(values, indent=2) + "\n")
