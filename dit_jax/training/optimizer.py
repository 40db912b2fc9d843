"""Optimizers and learning-rate schedules, by optax."""

import math

import jax
import optax

SCHEDULES = ("constant", "cosine", "linear")


def learning_rate_schedule(
    learning_rate: float,
    *,
    schedule: str = "constant",
    warmup_steps: int = 0,
    num_steps: int = 0,
    final_learning_rate: float = 0.0,
) -> optax.Schedule:
    """Linear warm-up from 0 to `learning_rate`, then constant, or decay to the final rate.

    Args:
        learning_rate: peak rate.
        schedule: 'constant', 'cosine' or 'linear'.
        warmup_steps: updates of the warm-up; 0 for none.
        num_steps: updates in all; where 'cosine' and 'linear' end. A warm-up that is not shorter
            becomes a tenth of them (`fitted_warmup`).
        final_learning_rate: rate at `num_steps` of 'cosine' and 'linear'.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"optimizer.schedule={schedule!r}: expected one of {SCHEDULES}")
    if not 0 < learning_rate < math.inf:
        raise ValueError(
            f"optimizer.learning_rate={learning_rate}: expected above 0, and not infinite"
        )
    if warmup_steps < 0:
        raise ValueError(f"optimizer.warmup_steps={warmup_steps}: expected 0 or more")
    warmup_steps = fitted_warmup(schedule, warmup_steps, num_steps)
    rest = {
        "constant": lambda: optax.constant_schedule(learning_rate),
        "linear": lambda: optax.linear_schedule(
            learning_rate, final_learning_rate, num_steps - warmup_steps
        ),
        "cosine": lambda: optax.cosine_decay_schedule(
            learning_rate, num_steps - warmup_steps, final_learning_rate / learning_rate
        ),
    }[schedule]()
    if not warmup_steps:
        return rest

    # The first update already moves: rate (i + 1) / warmup_steps of the peak at update i.
    warmup = optax.linear_schedule(learning_rate / warmup_steps, learning_rate, warmup_steps - 1)
    return optax.join_schedules([warmup, rest], [warmup_steps])


def fitted_warmup(schedule: str, warmup_steps: int, num_steps: int) -> int:
    """`warmup_steps`, or a tenth of a run too short to decay after so many.

    A constant rate has no end, so a run that stops within its warm-up may be continued later.
    """
    if schedule == "constant" or warmup_steps < num_steps:
        return warmup_steps
    return num_steps // 10


def create_optimizer(
    name: str,
    schedule: optax.Schedule,
    *,
    weight_decay: float = 0.0,
    gradient_clip_norm: float = 0.0,
    **parameters: float,
) -> optax.GradientTransformation:
    """AdamW, RAdam or Lion with decoupled weight decay, after clipping by global norm.

    Args:
        name: 'adamw', 'radam' or 'lion'.
        schedule: learning rate by update.
        weight_decay: decoupled; 0 for none.
        gradient_clip_norm: largest global gradient norm; 0 for no clipping.
        **parameters: of the optimizer: beta1, beta2 and, but for Lion, epsilon.
    """
    b1, b2 = parameters.pop("beta1"), parameters.pop("beta2")
    if name == "adamw":
        update = optax.adamw(
            schedule, b1, b2, parameters.pop("epsilon"), weight_decay=weight_decay, mask=_decays
        )
    elif name == "radam":
        update = optax.chain(
            optax.scale_by_radam(b1, b2, parameters.pop("epsilon")),
            optax.add_decayed_weights(weight_decay, _decays),
            optax.scale_by_learning_rate(schedule),
        )
    elif name == "lion":
        update = optax.lion(schedule, b1, b2, weight_decay=weight_decay, mask=_decays)
    else:
        raise ValueError(f"optimizer.name={name!r}: expected 'adamw', 'radam' or 'lion'")
    if parameters:
        raise ValueError(f"optimizer {name!r} does not take {sorted(parameters)}")
    clip = optax.clip_by_global_norm(gradient_clip_norm) if gradient_clip_norm else optax.identity()
    return optax.chain(clip, update)


def _decays(params):
    """Which parameters decay: all but frequencies, which are drawn once and never trained."""

    def decays(path, leaf):
        return getattr(path[-1], "key", None) != "freqs" if path else True

    return jax.tree_util.tree_map_with_path(decays, params)
