"""Models for sampling and scoring: from a workdir or any checkpoint, with their decoder."""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from dit_jax import class_names, experiment
from dit_jax.config import default_config
from dit_jax.interop import hub
from dit_jax.interop.autoencoder_kl import load_autoencoder
from dit_jax.interop.models import FoundModel, open_model
from dit_jax.interop.parameters import abstract_params
from dit_jax.launch import arguments, methods, wiring
from dit_jax.launch.sizes import size_overrides
from dit_jax.models import Network
from dit_jax.models.linear import resolve_param_dtype
from dit_jax.models.quantization import STORED
from dit_jax.parallel.distributed import gathered
from dit_jax.parallel.mesh import DataParallel, put_whole
from dit_jax.parallel.vae import RowDecoder
from dit_jax.programs import Program, Programs
from dit_jax.training import workdir
from dit_jax.training.saved_weights import RunWeights


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A configuration and one set of weights, on the devices.

    Attributes:
        config: the resolved configuration.
        params: the network's parameters.
        weights: their name, 'raw' or an average's.
        step: updates they have seen; 0 where a checkpoint does not say.
        source: where they are from.
        autoencoder: path of the VAE that decodes the model's latents; None for pixels, or unknown.
        class_names: one a label, where they are known.
        quantized_from: a hash of the parameters that were quantised; '' for parameters as read.
    """

    config: ml_collections.ConfigDict
    params: Any
    weights: str
    step: int
    source: str
    autoencoder: Path | None = None
    class_names: tuple[str, ...] = ()
    quantized_from: str = ""

    @property
    def network(self) -> Network:
        """The network the parameters are of."""
        return experiment.build_network(self.config)

    def weights_hash(self) -> str:
        """A hash of all parameters as read, the same on any number of devices."""
        return self.quantized_from or methods.weights_hash(self.params)

    def quantized(self) -> "TrainedModel":
        """The same with the kernels of quantised products in 8 bits, if there are any."""
        if self.config.model.quantization not in STORED:
            return self
        params = jax.jit(self.network.quantize)(self.params)
        return dataclasses.replace(self, params=params, quantized_from=self.weights_hash())


def load_from_arguments(
    args: argparse.Namespace,
    overrides: dict[str, Any],
    check: Callable[[ml_collections.ConfigDict], None] = lambda config: None,
) -> TrainedModel:
    """The model that `add_model_arguments`' options choose.

    Args:
        args: the command line.
        overrides: configuration values to change.
        check: told the model's configuration before its parameters are read.

    Raises:
        ValueError: see `arguments.check_model`.
        WorkdirError, CheckpointError, InteropError: it cannot be read.
    """
    arguments.check_model(args)
    vae = resolve_source(args.vae)
    if args.param_dtype:
        overrides = {**overrides, "model.param_dtype": args.param_dtype}
    if args.quantization:
        overrides = {**overrides, "model.quantization": args.quantization}
    size = (args.height, args.width)
    if args.workdir:
        check(workdir.load_config(args.workdir))
        return load_model(
            args.workdir,
            weights=args.weights,
            step=args.step,
            overrides=overrides,
            vae=vae,
            size=size,
        )
    found = open_model(
        args.init_from,
        weights=args.weights,
        step=args.step,
        num_heads=args.num_heads,
        num_classes=args.num_classes,
        allow_nonfinite=args.allow_nonfinite,
    )
    check(found.config)
    for note in found.notes:
        print(f"note: {note}", flush=True)
    model = load_found(found, overrides=overrides, vae=vae, size=size)
    for note in found.finiteness.note():
        print(f"note: {note}", flush=True)
    return model


def resolve_source(source: str | None) -> Path | None:
    """A local path for a path or 'hub:owner/name'."""
    return hub.resolve(source) if source else None


def load_model(
    directory: Path,
    *,
    weights: str = "",
    step: int | None = None,
    overrides: dict | None = None,
    vae: Path | None = None,
    size: tuple[int | None, int | None] = (None, None),
) -> TrainedModel:
    """Reads what a workdir's newest checkpoint (or that of `step`) holds for sampling.

    Args:
        directory: the workdir.
        weights: 'raw', 'ema' (the first average), or an average's name; empty: as configured.
        step: which checkpoint.
        overrides: configuration values to change, as {'sampling.steps': 50}.
        vae: the decoder of latents, instead of config.autoencoder.path.
        size: (height, width) of its images in pixels; None for the configured one.

    Raises:
        WorkdirError: it is no workdir.
        CheckpointError: it has no such checkpoint or no such weights.
        ValueError: the model makes no images of this size.
    """
    config = workdir.load_config(directory).copy_and_resolve_references()
    autoencoder = vae or (Path(config.autoencoder.path) if config.autoencoder.path else None)
    overrides = {**(overrides or {}), **size_overrides(config, *size, autoencoder)}
    config = _resolved(config, overrides)
    quantization, config.model.quantization = config.model.quantization, "none"
    param_dtype, config.model.param_dtype = config.model.param_dtype, "float32"
    method = experiment.build_method(config)  # of whose state the run's checkpoints are
    config.model.param_dtype = resolve_param_dtype(param_dtype)
    config.model.quantization = quantization
    if config.lora.rank:  # which opens its network, too
        saved = open_model(directory, "dit_jax", weights=weights, step=step)
        stored, put = config.model.param_dtype, _placer(config)
        params = saved.load(lambda path, array: put(array), param_dtype=stored)
    else:
        run = RunWeights(directory, method, weights or config.sampling.weights)
        saved, params = run.load(_placer(config), step, _shapes(config))
    names = class_names.load(directory, config.model.num_classes)
    name = saved.weights if config.lora.rank else saved.name
    return TrainedModel(
        config, params, name, saved.step, str(directory), autoencoder, names
    ).quantized()


def load_found(
    found: FoundModel,
    *,
    overrides: dict | None = None,
    vae: Path | None = None,
    size: tuple[int | None, int | None] = (None, None),
) -> TrainedModel:
    """Reads a model that `interop.open_model` found onto the devices, array by array.

    The arguments are those of `load_model`.
    """
    vae = vae or found.autoencoder
    overrides = {**(overrides or {}), **size_overrides(found.config, *size, vae)}
    config = _resolved(found.config, overrides)
    put, model = _placer(config), config.model
    model.param_dtype = resolve_param_dtype(model.param_dtype, found.param_dtype)
    params = found.load(lambda path, array: put(array), param_dtype=model.param_dtype)
    source = f"{found.kind}:{found.path}"
    return TrainedModel(
        config,
        params,
        found.weights,
        found.step,
        source,
        vae,
        found.class_names,
    ).quantized()


def _resolved(config: ml_collections.ConfigDict, overrides: dict) -> ml_collections.ConfigDict:
    """A model's configuration with other values, on this machine.

    Whether its method can train with the quantisation asked for is no matter here.
    """
    values = _here(wiring.override(config.to_dict(), overrides))
    quantization = values["model"].pop("quantization", "none")
    config = experiment.resolve_config(values)
    config.model.quantization = quantization
    return config


def _here(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration's values with all devices of this machine, not those it was trained on."""
    return {**values, "mesh": default_config().mesh.to_dict()}


def _shapes(config: ml_collections.ConfigDict) -> Any:
    """Of the parameters, unless they are float32 as in every run."""
    if config.model.param_dtype == "float32":
        return None
    return abstract_params(experiment.build_network(config))


def _placer(config: ml_collections.ConfigDict) -> Callable[[np.ndarray], jax.Array]:
    placement = wiring.create_placement(config)
    return lambda array: jax.device_put(array, placement.replicated)


def open_initial(source: str, config: ml_collections.ConfigDict, **options: Any) -> FoundModel:
    """The checkpoint from which a training run of `config` is to start; nothing is read yet.

    Args:
        source: see `interop.open_model`, like `options`. What neither tells, `config` does.
        config: of the run.
        options: for instance num_heads and num_classes.

    Raises:
        ConfigError: the checkpoint's network is another, with the values to set.
        InteropError: it cannot be read.
    """
    found = open_model(source, like=config.model, **options)
    experiment.require_same_network(found.config, config, str(found.path))
    return found


class Decoder:
    """From a model's samples to pictures: a VAE's decoder over all devices, or nothing to do.

    Args:
        config: of the model whose samples they are.
        path: of the VAE; None where the samples are pixels.
        placement: the devices.
        row_devices: split the rows of every image over so many devices, instead of the images over
            all (`parallel.vae`); None for the latter.
        programs: where the compiled decoder is found or kept; None: it is compiled here.

    Raises:
        ValueError: latents and no VAE, or one of another number of channels; rows of pictures that
            are not decoded or decoded in tiles.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        path: Path | None,
        placement: DataParallel,
        *,
        row_devices: int | None = None,
        programs: Programs | None = None,
    ):
        channels, self._programs = config.model.in_channels, programs
        self._settings, self._placement, self.path = config.autoencoder, placement, path
        self._config = config
        self.autoencoder, self.fingerprint, self._by_rows = None, "", None
        if row_devices is not None and (path is None or self._settings.tile):
            reason = "there is no VAE" if path is None else "autoencoder.tile decodes in tiles"
            raise ValueError(f"vae_devices={row_devices} would do nothing: {reason}")
        if path is None:
            if channels not in (1, 3):
                raise ValueError(
                    f"the model makes latents of {channels} channels; give the VAE that decodes "
                    "them: --vae=FOLDER, or --vae=hub:stabilityai/sd-vae-ft-mse"
                )
            return
        several = jax.process_count() > 1  # each reads it, and what they read becomes one array
        self.autoencoder, self._params, self.fingerprint = load_autoencoder(
            path, sharding=None if several else placement.replicated
        )
        if several:
            self._params = jax.tree.map(
                lambda array: put_whole(array, placement.replicated), self._params
            )
        found = self.autoencoder.config.latent_channels
        if found != channels:
            raise ValueError(
                f"the VAE {path} decodes latents of {found} channels, the model makes {channels}"
            )
        if row_devices is not None:
            self._by_rows = RowDecoder(self.autoencoder, row_devices)
            self._params = jax.device_put(self._params, self._by_rows.replicated)
        if programs and self._settings.tile:
            raise ValueError("autoencoder.tile decodes by several programs: leave --programs out")
        self._decode = jax.jit(self._decode_batch)

    def make_ready(self) -> None:
        """Finds or compiles the program of a batch before there is one."""
        for program in self.programs():
            latents = put_whole(program.inputs["latents"], self._batches()[0])
            self._programs.ready(self._program(latents))

    def programs(self, num_devices: int | None = None) -> list[Program]:
        """What decodes a batch, for so many devices (None: for those there are); none of pixels."""
        if self.autoencoder is None:
            return []
        _, size = self._batches(num_devices)
        latent = experiment.build_network(self._config).sample_shape
        return [self._program(np.zeros((size, *latent), np.float32))]

    def _program(self, latents: jax.Array | np.ndarray) -> Program:
        compiled_in = {"autoencoder": self.autoencoder.config, "rows": self._by_rows}
        inputs = {"params": self._params, "latents": latents}
        return Program("decode", self._decode_batch, compiled_in, inputs)

    def _batches(self, num_devices: int | None = None) -> tuple[Any, int]:
        """Where latents go that are decoded at once, and how many they are."""
        devices = 1 if self._by_rows else num_devices or self._placement.num_devices
        sharding = self._by_rows.replicated if self._by_rows else self._placement.split
        return sharding, -(-self._settings.batch_size // devices) * devices

    def _run(self, latents: jax.Array) -> jax.Array:
        if self._programs:
            return self._programs.call(self._program(latents))
        return self._decode(self._params, latents)

    def _decode_batch(self, params, latents):
        decode = self._by_rows or self.autoencoder.decode
        return decode(params, self.autoencoder.from_latents(latents))

    def image_shape(self, sample_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(height, width, channels) of the picture of a sample."""
        if self.autoencoder is None:
            return sample_shape
        factor, channels = self.autoencoder.downsampling_factor, self.autoencoder.config
        return (sample_shape[0] * factor, sample_shape[1] * factor, channels.out_channels)

    def require_rows(self, sample_shape: tuple[int, int, int]) -> None:
        """Refuses samples whose rows do not go over the devices that are to decode them.

        Raises:
            ValueError: with the number of devices that would do.
        """
        if self._by_rows is None:
            return
        try:
            self._by_rows.rows(sample_shape[0])
        except ValueError as error:
            raise ValueError(f"--vae_devices={self._by_rows.devices}: {error}") from error

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """Pictures, float32 in about [-1, 1], of samples [n, h, w, c]; few at a time."""
        if self.autoencoder is None:
            return samples
        if self._settings.tile:
            raw = self.autoencoder.from_latents(samples)
            return self.autoencoder.decode_tiled(self._params, raw, tile=self._settings.tile)
        sharding, size = self._batches()
        pictures = []
        for start in range(0, len(samples), size):
            part = samples[start : start + size]
            filled = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
            placed = put_whole(filled, sharding)
            pictures.append(gathered(self._run(placed))[: len(part)])
        return np.concatenate(pictures)


def provenance(model: TrainedModel, decoder: Decoder | None = None) -> dict[str, Any]:
    """How images were made, for records: source, weights, sampling settings, decoder."""
    record = {
        "experiment": model.config.name,
        "source": model.source,
        "step": model.step,
        "weights": model.weights,
        "weights_hash": model.weights_hash(),
        "model": model.config.model.to_dict(),
        "sampling": model.config.sampling.to_dict(),
        "cache": model.config.cache.to_dict(),
    }
    if decoder:
        height, width, _ = decoder.image_shape(model.network.sample_shape)
        record["image_size"] = height if height == width else [height, width]
    if decoder and decoder.autoencoder:
        record["autoencoder"] = {
            "path": str(decoder.path),
            "sha256": decoder.fingerprint,
            "tile": model.config.autoencoder.tile,
        }
    return record
