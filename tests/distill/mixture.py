"""A bench on which the ideal answer is known: Gaussian mixtures in the plane.

Points are images of one pixel with two channels. `MixtureNetwork` is the exact denoiser of a
mixture in closed form, as a teacher without parameters; `MlpNetwork` is a student that learns in
seconds. Both have the face of `dit_jax.models.Network`.
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dit_jax import conditions as conditions_lib
from dit_jax.denoiser import Denoiser
from dit_jax.diffusion.process import DDPM, Process
from dit_jax.diffusion.samplers import make_solver, schedule
from dit_jax.distill.student import Student, Teacher
from dit_jax.models import Result
from dit_jax.sampling import Sampler, image_keys
from dit_jax.training.ema import EMA
from tests.compilations import OPTIMIZED


@dataclasses.dataclass(frozen=True)
class GaussianMixture:
    """Equally likely isotropic Gaussians; component k is class k.

    Attributes:
        means: of the components.
        std: of each of them.
    """

    means: tuple[tuple[float, float], ...] = ((0.6, 0.6), (-0.6, 0.2), (0.1, -0.7))
    std: float = 0.12

    @property
    def num_components(self) -> int:
        return len(self.means)

    def batch(self, key, n: int) -> dict[str, Any]:
        """Points as a batch of images, and their components as labels."""
        label_key, noise_key = jax.random.split(key)
        label = jax.random.randint(label_key, (n,), 0, self.num_components)
        noise = jax.random.normal(noise_key, (n, 2))
        points = jnp.asarray(self.means)[label] + self.std * noise
        return {"image": points[:, None, None], "conditions": {"label": label}}

    def x0(self, process: Process, x, t, label=None):
        """E[x0 | x] at time t, exactly; with labels of the components alone, else of the mixture.

        A label of `num_components` stands for none.
        """
        points = x.reshape(-1, 2)
        alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
        means = jnp.asarray(self.means)
        variance = (alpha * self.std) ** 2 + sigma**2  # [b, 1]
        difference = points[:, None] - alpha[:, :, None] * means[None]  # [b, k, 2]
        logits = -0.5 * jnp.square(difference).sum(-1) / variance
        if label is not None:
            known = label[:, None] < self.num_components
            wrong = jnp.arange(self.num_components)[None] != label[:, None]
            logits = jnp.where(known & wrong, -jnp.inf, logits)
        weights = jax.nn.softmax(logits, axis=-1)[..., None]
        gain = (alpha * self.std**2 / variance)[:, :, None]
        posterior = means[None] + gain * difference
        return (weights * posterior).sum(1).reshape(x.shape)


@dataclasses.dataclass(frozen=True)
class MixtureNetwork:
    """The network that a perfectly trained one would be: no parameters, exact answers."""

    mixture: GaussianMixture
    process: Process
    conditional: bool = False
    has_dropout = False
    learn_sigma = False
    sample_shape = (1, 1, 2)
    feature_shapes = ()
    flops_per_example = 1.0

    @property
    def num_classes(self) -> int:
        return self.mixture.num_components if self.conditional else 0

    def init(self, key):
        return {}

    @property
    def conditions(self):
        return conditions_lib.class_label(self.num_classes)

    def apply(self, params, request):
        raise NotImplementedError("see ExactDenoiser, which knows the noisy x itself")


@dataclasses.dataclass(frozen=True)
class ExactDenoiser(Denoiser):
    """A `Denoiser` whose raw output is exact: computed from x and t, not from network inputs."""

    def raw(self, params, request):
        x, t = request.x, request.t
        label = request.conditions.get("label") if self.network.num_classes else None
        x0 = self.network.mixture.x0(self.process, x, t, label)
        eps = self.process.convert(x0, "x0", "eps", x, t)
        return Result(self.process.target(x0, eps, t))


@dataclasses.dataclass(frozen=True)
class MlpNetwork:
    """A small MLP on (x, time features, second time features, class), with hidden features."""

    width: int = 128
    depth: int = 3
    num_classes: int = 0
    second_time: bool = False
    time_scale: float = 1.0  # of network times: 1 for those of order one
    has_dropout = False
    learn_sigma = False
    sample_shape = (1, 1, 2)

    @property
    def conditions(self):
        second_time = conditions_lib.second_time() if self.second_time else {}
        return {**conditions_lib.class_label(self.num_classes), **second_time}

    @property
    def feature_shapes(self):
        return ((1, 1, self.width),) * self.depth

    @property
    def flops_per_example(self) -> float:
        return 2.0 * self.width**2 * self.depth

    def init(self, key):
        sizes = [2 + 16 * (1 + self.second_time) + self.num_classes, *[self.width] * self.depth]
        keys = jax.random.split(key, self.depth + 1)
        layers = {
            f"layer{i}": {
                "kernel": jax.random.normal(keys[i], (n, m)) * (2.0 / n) ** 0.5,
                "bias": jnp.zeros(m),
            }
            for i, (n, m) in enumerate(itertools.pairwise(sizes))
        }
        last = 0.1 * jax.random.normal(keys[-1], (self.width, 2)) / self.width**0.5
        return {**layers, "last": {"kernel": last, "bias": jnp.zeros(2)}}

    def _times(self, t):
        angles = self.time_scale * t[:, None] * 2.0 ** jnp.arange(-3, 5)[None]
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)

    def apply(self, params, request):
        x, t, conditions = request.x, request.t, request.conditions
        conditions_lib.check(self.conditions, conditions)
        h = [x.reshape(-1, 2), self._times(t)]
        if self.second_time:
            h.append(self._times(t - conditions.get("r", t)))
        if self.num_classes:
            h.append(jax.nn.one_hot(conditions["label"], self.num_classes))
        h = jnp.concatenate(h, -1)
        hidden = []
        for i in range(self.depth):
            layer = params[f"layer{i}"]
            h = jax.nn.silu(h @ layer["kernel"] + layer["bias"][None])
            hidden.append(h[:, None, None])
        out = h @ params["last"]["kernel"] + params["last"]["bias"][None]
        out = out.reshape(x.shape)
        return Result(out, tuple(hidden[i] for i in request.features))


def exact_teacher(
    process: Process, mixture: GaussianMixture | None = None, *, conditional=False, **guidance
) -> Teacher:
    """The ideal teacher of a mixture; its parameters are {}."""
    mixture = mixture or GaussianMixture()
    return Teacher(
        ExactDenoiser(MixtureNetwork(mixture, process, conditional), process), **guidance
    )


def mlp_student(
    process: Process,
    *,
    learning_rate: float = 1e-3,
    steps: int = 2000,
    decay: float = 0.99,
    optimizer: optax.GradientTransformation | None = None,
    label_dropout: float = 0.0,
    num_microbatches: int = 1,
    **network: Any,
) -> Student:
    """An MLP student with one average, Adam with cosine decay."""
    schedule = optax.cosine_decay_schedule(learning_rate, steps)
    return Student(
        Denoiser(MlpNetwork(**network), process),
        optimizer or optax.chain(optax.clip_by_global_norm(10.0), optax.adam(schedule)),
        (EMA(decay=decay),),
        label_dropout,
        num_microbatches,
    )


def train(
    method: Any,
    *,
    steps: int,
    batch_size: int = 256,
    mixture: GaussianMixture | None = None,
    frozen: Any = None,
    params: Any = None,
    seed: int = 0,
    batch=None,
):
    """Runs `method` on fresh batches of the mixture; returns (state, last metrics by phase)."""
    mixture = mixture or GaussianMixture()
    draw = batch or (lambda key: mixture.batch(key, batch_size))
    root = jax.random.key(seed)
    state = jax.jit(method.init)(root, params, frozen)

    def update(phase):
        def function(state, root, frozen):  # the key is an argument: all seeds share a program
            key = jax.random.fold_in(root, state.step)
            data_key, update_key = jax.random.split(key)
            return method.update(state, draw(data_key), update_key, frozen, phase)

        return jax.jit(function, donate_argnums=0, compiler_options=OPTIMIZED)

    updates = {phase: update(phase) for phase in method.phases}
    metrics = {}
    for step in range(steps):
        phase = method.phase(step)
        state, metrics[phase] = updates[phase](state, root, frozen)
    return state, metrics


def sample_points(
    denoiser: Denoiser,
    params: Any,
    *,
    solver: str = "consistency",
    steps: int = 1,
    times=None,
    count: int = 2048,
    labels=None,
    seed: int = 1,
    guidance_scale: float = 1.0,
):
    """Points [count, 2] by the project's own sampler."""
    sampler = Sampler(denoiser, make_solver(solver))
    if times is None:
        spacing = "trailing" if isinstance(denoiser.process, DDPM) else None
        times = schedule(denoiser.process, steps, spacing)
    times = np.asarray(times, np.float32)
    if denoiser.network.num_classes and labels is None:
        labels = np.arange(count) % denoiser.network.num_classes
    keys = image_keys(seed, np.arange(count))
    return sampler(params, keys, labels, times, guidance_scale).reshape(count, 2)


def sliced_wasserstein(a, b, *, directions: int = 64) -> float:
    """Sliced 2-Wasserstein distance between two equally large sets of points [n, 2]."""
    angles = np.pi * (np.arange(directions) + 0.5) / directions
    projections = np.stack([np.cos(angles), np.sin(angles)])
    projected_a = np.sort(np.asarray(a, np.float64) @ projections, axis=0)
    projected_b = np.sort(np.asarray(b, np.float64) @ projections, axis=0)
    return float(np.sqrt(np.mean(np.square(projected_a - projected_b))))


def data_points(count: int = 2048, mixture: GaussianMixture | None = None, seed: int = 2):
    """Points [count, 2] of the mixture itself, as many of each component."""
    mixture = mixture or GaussianMixture()
    label = jnp.arange(count) % mixture.num_components
    noise = jax.random.normal(jax.random.key(seed), (count, 2))
    return jnp.asarray(mixture.means)[label] + mixture.std * noise


def undistilled_distance(process: Process, mixture: GaussianMixture | None = None) -> float:
    """Distance of the exact denoiser's own one-step samples from the data: what to improve on."""
    denoiser = exact_teacher(process, mixture).denoiser
    steps = {"solver": "euler", "steps": 1}
    return sliced_wasserstein(sample_points(denoiser, {}, **steps), data_points(mixture=mixture))
