"""Folders of FLUX pipelines as diffusers saves them, looked at without reading weights.

A transformer that was trained here goes back into one: the other components are copied as they are.
"""

import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from dit_jax.interop import flux, hub
from dit_jax.interop.autoencoder_kl import read_autoencoder_config
from dit_jax.interop.claims import read_object
from dit_jax.interop.tensors import InteropError
from dit_jax.interop.text_encoders import CLIP, T5, read_text_config
from dit_jax.models import FluxConfig
from dit_jax.quantities import format_bytes
from dit_jax.untrusted import check_regular, check_within, shown, walk_files

INDEX = "model_index.json"
CLASSES = ("FluxPipeline", "FluxKontextPipeline")
# Folders by what they hold, as diffusers calls them, and the classes that model_index.json names.
COMPONENTS = {
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "T5EncoderModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "tokenizer_2": ("transformers", "T5TokenizerFast"),
    "transformer": ("diffusers", "FluxTransformer2DModel"),
    "vae": ("diffusers", "AutoencoderKL"),
}
TRANSFORMER = "transformer"


def check_index(folder: Path, without: Collection[str] = (), hint: str = "") -> bool:
    """Refuses what is no whole FLUX pipeline; tells whether it is one that edits images.

    Args:
        folder: the pipeline's.
        without: components that are not asked for.
        hint: where else to go with a folder that is no pipeline's.

    Raises:
        InteropError: it has no index, is another class's, or lacks components.
    """
    if not (folder / INDEX).is_file():
        if (folder.absolute().parent / INDEX).is_file():
            hint = f"{folder} is a part of one: give {folder.parent}"
        raise InteropError(
            f"{folder} has no {INDEX}: expected the folder of a diffusers pipeline, as "
            f"FluxPipeline.save_pretrained writes it{'. ' if hint else ''}{hint}"
        )
    name = read_object(folder / INDEX, folder).get("_class_name")
    if name not in CLASSES:
        raise InteropError(
            f"{folder} is a {shown(name)} ({INDEX}): FluxPipeline reads {' and '.join(CLASSES)}"
        )
    missing = [p for p in COMPONENTS if p not in without and not (folder / p).is_dir()]
    if missing:
        raise InteropError(
            f"{folder} lacks {', '.join(f'{part}/' for part in missing)}: a FLUX pipeline has "
            f"{', '.join(f'{part}/' for part in COMPONENTS)}"
        )
    return name == CLASSES[1]


def check_widths(folder: Path, network: FluxConfig, whose: str = "the transformer") -> None:
    """Refuses a network that cannot be told what a pipeline's encoders say, or draws other latents.

    Args:
        folder: the pipeline's.
        network: the transformer.
        whose: it is, for messages.

    Raises:
        InteropError: they do not go together.
    """
    clip = read_text_config(folder / "text_encoder", kind=CLIP, within=folder)
    t5 = read_text_config(folder / "text_encoder_2", kind=T5, within=folder)
    vae = read_autoencoder_config(folder / "vae")
    for theirs, part, ours, takes in (
        (clip.hidden_size, "text_encoder's width", network.pooled_dim, "pooled_projection_dim"),
        (t5.d_model, "text_encoder_2's width", network.text_dim, "joint_attention_dim"),
        (vae.latent_channels, "vae's latent channels", network.in_channels, "in_channels / 4"),
    ):
        if theirs != ours:
            raise InteropError(
                f"{folder}: the {part} is {theirs}, {whose}'s {takes} {ours}: they are not "
                "of the same pipeline"
            )


def check_guidance(folder: Path, network: FluxConfig, whose: str) -> None:
    """Refuses a pipeline whose own transformer is of another kind: its scheduler's times are, too.

    Args:
        folder: the pipeline's.
        network: what takes its place.
        whose: that is, for messages.

    Raises:
        InteropError: one is told a guidance scale, the other is not.
    """
    where = folder / TRANSFORMER / "config.json"
    if not where.is_file():
        return
    values = read_object(where, folder)
    flux.check_diffusers_types(values, where)
    own = flux.config_from_diffusers(values, where=where)
    if own.guidance_embedding != network.guidance_embedding:
        told = {True: "is told a guidance scale (dev)", False: "is told none (schnell)"}
        raise InteropError(
            f"{folder}: its transformer {told[own.guidance_embedding]}, {whose} "
            f"{told[network.guidance_embedding]}: their schedulers differ. Give the pipeline that "
            "it was trained from"
        )


@dataclass(frozen=True)
class OtherParts:
    """A pipeline but for its transformer.

    Attributes:
        folder: the pipeline's.
        files: all that belongs to it, relative to that.
    """

    folder: Path
    files: tuple[Path, ...]

    @property
    def nbytes(self) -> int:
        """Of all files."""
        return sum((self.folder / file).stat().st_size for file in self.files)

    def copy(self, into: Path) -> None:
        """Copies them, byte for byte."""
        # No hard links: whoever saves over a file in place would change the other pipeline, too.
        for file in self.files:
            (into / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.folder / file, into / file)

    def require_space(self, destination: Path, weights: int) -> None:
        """Refuses a disk without the room for these and for weights of so many bytes.

        Raises:
            OSError: how much there is, and how much is needed.
        """
        needed, free = self.nbytes + weights, shutil.disk_usage(destination.parent).free
        if needed > free:
            raise OSError(
                f"{destination.parent} has {format_bytes(free)} free; the pipeline needs "
                f"{format_bytes(needed)}. Make room, choose another place, or --dtype=bfloat16"
            )


def open_others(source: str | Path, network: FluxConfig) -> OtherParts:
    """The components of a pipeline that a transformer of ours goes into.

    Args:
        source: the pipeline's folder, which may lack transformer/, or hub:owner/name.
        network: that transformer.

    Raises:
        InteropError: it is no FLUX pipeline, lacks a component, or does not go with the network.
    """
    wanted = tuple(name for name in COMPONENTS if name != TRANSFORMER)
    folder = hub.resolve(str(source), wanted).expanduser()
    if not folder.is_dir():
        kind = "is not a folder" if folder.exists() else "does not exist"
        raise InteropError(f"--pipeline={source} {kind}: expected a FLUX pipeline's folder")
    check_index(folder, without=(TRANSFORMER,))
    check_widths(folder, network, "this model")
    check_guidance(folder, network, "this model")
    parts = [name for name in _listed(folder) if name != TRANSFORMER]
    missing = [f"{name}/" for name in parts if not (folder / name).is_dir()]
    if missing:
        raise InteropError(f"{folder} lacks {', '.join(missing)}, which its {INDEX} names")
    files = [
        Path(below, name)
        for part in parts
        for below, names in walk_files(folder, part)
        for name in names
    ]
    licences = sorted(file.name for file in folder.glob("LICENSE*"))
    files = [Path(INDEX), *map(Path, licences), *files]
    for file in files:
        check_within(folder / file, folder)
        check_regular(folder / file)
    return OtherParts(folder, tuple(files))


def _listed(folder: Path) -> list[str]:
    """The components that the index names, but for those that are null."""
    index = read_object(folder / INDEX, folder)
    return [
        name
        for name, value in sorted(index.items())
        if isinstance(value, list) and value and value[0] is not None and name.isidentifier()
    ]
