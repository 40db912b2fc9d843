"""What to change where a plan does not fit; `parallel.planning.plan` makes plans."""

from typing import Any

import ml_collections

from dit_jax import experiment

GIB = 2**30


def suggestions(config: ml_collections.ConfigDict, plan: dict[str, Any]) -> list[str]:
    """Overrides that lower what a device holds, those that help most first."""
    memory, mesh = plan["memory"], plan["mesh"]
    if "fsdp" not in mesh:  # devices share images, not states
        smaller = _smaller_batch(plan)
        return [*smaller, "--config.model.param_dtype=bfloat16 (half the bytes of the parameters)"]
    held = sum(memory["held_bytes"].values())
    replicas = mesh["data"]
    of_state = []
    if replicas > 1:
        saved = held * (1 - 1 / replicas) / GIB
        of_state.append(
            f"--config.mesh.data=1 --config.mesh.fsdp={mesh['fsdp'] * replicas} (the state divided "
            f"over all replicas: about {saved:.1f} GiB less)"
        )
    of_programs = []
    if plan["what"] == "sample":
        of_programs += _smaller_batch(plan)
    else:
        of_programs += _of_activations(config, plan)
    tensor = mesh["tensor"] * 2
    heads = getattr(experiment.build_network(config).config, "num_heads", 0)
    if heads and tensor <= 8 and heads % tensor == 0:
        axis = next((name for name in ("fsdp", "data") if mesh[name] % 2 == 0), None)
        left = {**mesh, axis: mesh[axis] // 2} if axis else mesh
        if axis and min(left["data"], left["fsdp"]) > 1:  # with tensor a mesh that is refused
            left = {**left, "data": 1, "fsdp": left["data"] * left["fsdp"]}
        if axis:
            changed = [f" --config.mesh.{k}={left[k]}" for k in left if left[k] != mesh[k]]
            of_programs.append(
                f"--config.mesh.tensor={tensor}{''.join(changed)} (matrices and their activations "
                "divided within a node)"
            )
    larger = memory["temporary_bytes"] > held
    found = of_programs + of_state if larger else of_state + of_programs
    return found or ["more devices, or a smaller model"]


def _of_activations(config: ml_collections.ConfigDict, plan: dict[str, Any]) -> list[str]:
    found = []
    fitting = next((name for name, remat in plan["remats"].items() if remat["fits"]), None)
    if fitting:
        total = plan["remats"][fitting]["total_bytes"] / GIB
        found.append(f"--config.model.remat={fitting} (compiled too: {total:.1f} GiB in all)")
    elif config.model.remat != "block":
        found.append("--config.model.remat=block (blocks recomputed, a third more arithmetic)")
    parts, local = plan["num_microbatches"], plan["batch_size"] // plan["batch_parts"]
    more = next((n for n in range(2 * parts, local + 1) if local % n == 0), None)
    if more:
        found.append(
            f"--config.training.num_microbatches={more} (activations of {local // more} examples "
            "at once)"
        )
    elif plan["batch_size"] > plan["batch_parts"]:
        found.append(f"--config.training.batch_size={plan['batch_parts']} (an example a device)")
    return found


def _smaller_batch(plan: dict[str, Any]) -> list[str]:
    smaller = plan["batch_size"] // 2
    if smaller == 0 or smaller % plan["batch_parts"]:
        return []
    return [f"--config.sampling.batch_size={smaller} (fewer images at once)"]
