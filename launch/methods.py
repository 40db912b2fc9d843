"""The models that methods read besides data: opened, checked, recorded."""

import dataclasses
import hashlib
import json
import shlex
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from dit_jax import experiment
from dit_jax.config import ConfigError, differences
from dit_jax.data import Pairs, Source
from dit_jax.interop.kinds import kinds
from dit_jax.interop.models import FoundModel, open_configured
from dit_jax.models.linear import resolve_param_dtype
from dit_jax.training.checkpoints import fingerprint
from dit_jax.training.lora import BASE
from dit_jax.training.method import Method

FROZEN_FILE = "frozen.json"


@dataclasses.dataclass(frozen=True)
class FrozenModels:
    """The models a method reads and never trains.

    Attributes:
        models: by the method's name for them.
        start: the one whose parameters the student starts from, if any.
        param_dtype: what the network of a LoRA is stored in; others are float32.
    """

    models: dict[str, FoundModel]
    start: FoundModel | None = None
    param_dtype: str = "float32"

    def load(self, put: Any) -> dict[str, Any]:
        """Their parameters, each through `put(path, array)` as it is read; {} if there are none."""
        return {
            name: model.load(put, param_dtype=self.param_dtype if name == BASE else "float32")
            for name, model in self.models.items()
        }


def open_frozen(config: ml_collections.ConfigDict, method: Method) -> FrozenModels:
    """Opens what `method` needs besides data; nothing is read yet.

    Raises:
        ConfigError: a path is missing, or the model there is not what the student expects.
        InteropError: it cannot be read, or lacks the weights asked for.
    """
    models = {}
    for name in method.frozen_names:
        key, source, weights = _source(config, name)
        if not source:
            what = f"method.name={config.method.name!r}"
            if name == BASE:
                what = f"lora.rank={config.lora.rank}"
            raise ConfigError(
                f"config.{what} needs a trained model: set "
                f"--config.{key}=[KIND:]SOURCE, for instance the workdir of a training run"
            )
        models[name] = _open(config, key, source, weights)
    stored = resolve_param_dtype(config.model.param_dtype)
    return FrozenModels(models, _start(config, models), stored)


def _start(config: ml_collections.ConfigDict, models: dict[str, FoundModel]) -> FoundModel | None:
    """The model whose parameters the student starts from."""
    starts, path = config.teacher.initialize_student, config.teacher.path
    if "teacher" not in models and path and (config.method.name == "denoising" or not starts):
        raise ConfigError(
            f"config.teacher.path={path!r} would do nothing: config.method.name="
            f"{config.method.name!r} does not ask a teacher. To start from a model use --init_from"
        )
    if not starts:
        return None
    if "stage1" in models:  # which has learned more of what the student shall
        return models["stage1"]
    if path and "teacher" not in models:
        return _open(config, "teacher.path", path, config.teacher.weights)
    return models.get("teacher")


def _source(config: ml_collections.ConfigDict, name: str) -> tuple[str, str, str]:
    """(configuration key, source, weights) of a frozen model."""
    if name == "teacher":
        return "teacher.path", config.teacher.path, config.teacher.weights
    if name == BASE:
        return "lora.base", config.lora.base, config.lora.weights
    section = config.method[config.method.name]
    weights = section.get(f"{name}_weights", "ema")
    return f"method.{config.method.name}.{name}", section[name], weights


def _require_there(key: str, source: str) -> None:
    """Refuses a model of a path that is not there, with the command that trains it if one does."""
    kind, colon, rest = source.partition(":")
    bare = rest if colon and kind in kinds() else source
    path = Path(bare)
    if bare.startswith("hub:") or path.exists():
        return
    message = f"config.{key}={source}: there is no such model"
    experiments = Path(__file__).parents[1] / "configs" / f"{path.name}.py"
    if experiments.is_file():
        command = f"python launch/train.py --config=configs/{path.name}.py --workdir={path}"
        message += f" yet; train it first: {command}, or"
    else:
        message += ":"
    raise ConfigError(f"{message} set --config.{key} to a trained one (a workdir, hub:..., a file)")


def _open(config: ml_collections.ConfigDict, key: str, source: str, weights: str) -> FoundModel:
    _require_there(key, source)
    found = open_configured(source, weights, config.model)
    student = config.copy_and_resolve_references()
    with student.unlocked():
        if key == "teacher.path":
            student.model.second_time = found.config.model.second_time
    experiment.require_same_network(found.config, student, f"config.{key}={source}")
    found = _sized(found, config)
    sizes = [experiment.build_network(c).sample_shape[:2] for c in (found.config, config)]
    if sizes[0] != sizes[1] and key != "lora.base":  # whose parameters do not depend on it
        raise ConfigError(
            f"config.{key}={source} is a model of inputs of {sizes[0][0]} x {sizes[0][1]}, the "
            f"student's are of {sizes[1][0]} x {sizes[1][1]}: set "
            f"--{experiment.size_setting(config, sizes[0])}"
        )
    scale = config.teacher.guidance_scale
    if key == "teacher.path" and scale != 1.0 and (reason := experiment.unguidable(found.config)):
        raise ConfigError(f"config.teacher.guidance_scale={scale}, of {source}, {reason}")
    _require_same_process(found, config, f"config.{key}={source}")
    return found


def _sized(found: FoundModel, config: ml_collections.ConfigDict) -> FoundModel:
    """The model at the student's size, where its file tells none: FLUX's from outside do not."""
    if found.kind == "dit_jax" or found.config.model.name != "flux":
        return found
    sized = found.config.copy_and_resolve_references()
    with sized.unlocked():
        sized.model.image_size = config.model.image_size
        sized.model.input_size = config.model.input_size
    return dataclasses.replace(found, config=sized)


def _require_same_process(found: FoundModel, config: ml_collections.ConfigDict, source: str):
    name = found.config.process.name
    there, here = {"name": name}, {"name": config.process.name}
    if name == here["name"]:
        there, here = (c.process[name].to_dict() for c in (found.config, config))
    changed = differences(there, here)
    if changed:
        prefix = "" if "name" in changed else f"{name}."
        listed = "\n".join(
            f"  config.process.{prefix}{key} is {new!r}, the model's {old!r}: "
            + shlex.quote(f"--config.process.{prefix}{key}={old}")
            for key, (old, new) in changed.items()
        )
        raise ConfigError(f"{source} was trained on another process:\n{listed}")


def weights_hash(params: Any) -> str:
    """A hash of all parameters' values, the same on any number of devices and in any dtype."""
    leaves = jax.tree.leaves(params)
    if all(leaf.dtype == jnp.float32 for leaf in leaves):
        sums = fingerprint(params)
    else:  # one by one: not all of them in float32 at once
        sums = [fingerprint(leaf.astype(jnp.float32))[0] for leaf in leaves]
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()[:16]


def require_teacher_of_pairs(source: Source, frozen: dict[str, Any], models: FrozenModels) -> None:
    """Refuses a teacher that is not the one that made the pairs of `source`, if it has pairs.

    Raises:
        ValueError: with both hashes.
    """
    if isinstance(source, Pairs) and "teacher" in frozen:
        path = str(models.models["teacher"].path)
        source.require_teacher(weights_hash(frozen["teacher"]), path)


def frozen_record(directory: Path, frozen: dict[str, Any], models: FrozenModels) -> str:
    """The text of the workdir's `FROZEN_FILE`, which says what models are used; '' for none.

    Raises:
        ConfigError: the run was begun with another model.
    """
    file = directory / FROZEN_FILE
    record = {
        name: {
            "source": str(models.models[name].path),
            "weights": models.models[name].weights,
            "step": models.models[name].step,
            "fingerprint": fingerprint(tree),
        }
        for name, tree in frozen.items()
    }
    if file.exists():
        before = json.loads(file.read_text())
        for name, entry in record.items():
            if name in before and before[name]["fingerprint"] != entry["fingerprint"]:
                raise ConfigError(
                    f"{directory} was begun with another {name}, {before[name]['source']} (weights "
                    f"{before[name]['weights']}, step {before[name]['step']}): give that one, or "
                    "another --workdir"
                )
        return file.read_text()
    return json.dumps(record, indent=2) + "\n" if record else ""
