"""Compiling samplers for GPUs that are not here: the work of launch/compile.py --accelerator."""

import argparse
import dataclasses
import os

# JAX's CUDA plugin starts without a GPU, and what is computed here is computed on the CPU.
_ENVIRONMENT = {
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "JAX_PLATFORMS": "cpu",
}


def set_environment() -> None:
    """What JAX has to find when it loads."""
    os.environ.update(_ENVIRONMENT)


def run(args: argparse.Namespace) -> None:
    """Keeps the programs of a command line of samples for `args.devices` of `args.accelerator`.

    Raises:
        ValueError: the plugin is not installed; options that do not go together.
    """
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    from dit_jax import experiment, programs
    from dit_jax.launch import arguments, loading, sampling, wiring
    from dit_jax.parallel.planning import compilers
    from dit_jax.quantities import counted

    if missing := compilers.missing_plugin():
        raise ValueError(f"--accelerator={args.accelerator}: {missing}")
    parallel, folder = wiring.image_parallel(args), sampling.open_programs(args.programs)
    compiler = compilers.GpuCompiler(args.accelerator, args.devices or 1)
    devices = compiler.devices()

    def keep(program: programs.Program, shardings: dict) -> None:
        whole = NamedSharding(placement.mesh, PartitionSpec())

        def shaped(leaf, sharding):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        inputs = {
            name: jax.tree.map(shaped, value, shardings[name])
            if name in shardings
            else jax.tree.map(lambda leaf: shaped(np.asarray(leaf), whole), value)
            for name, value in program.inputs.items()
        }
        program = dataclasses.replace(program, inputs=inputs)
        folder.compile_for(program, programs.devices_of(inputs), compilers.GPU_OPTIONS)

    with compiler.targeting():
        overrides = arguments.sampling_overrides(args)
        model = loading.load_from_arguments(
            args, overrides, lambda config: sampling.require_labels(args, config)
        )
        placement = wiring.create_placement(model.config, devices)
        here = wiring.create_placement(model.config)
        decoder = loading.Decoder(model.config, model.autoencoder, here, programs=folder)
        labels = sampling.choose_labels(args, model.config.model.num_classes, model.class_names)
        plan, batch_size = experiment.build_sampling(model.config), model.config.sampling.batch_size
        whole = jax.tree.map(lambda _: placement.replicated, model.params)
        if parallel:
            parallel = dataclasses.replace(parallel, devices=tuple(devices))
            placement = sampling.distribute(parallel, plan, min(len(labels), batch_size))
            plan, whole = placement.plan, placement.param_shardings(model.params)
        indices = np.arange(wiring.whole_batch(labels, batch_size, placement), dtype=np.uint32)
        with placement.tracing():
            program = plan.program(model.params, args.seed, indices, labels[indices % len(labels)])
            keep(program, {"params": whole, "indices": placement.split})
        for program in decoder.programs(placement.num_devices):
            params = jax.tree.map(lambda _: placement.replicated, program.inputs["params"])
            keep(program, {"params": params, "latents": placement.split})
    print(
        f"samples of {counted(len(indices), 'image')} at once start from {args.programs} on "
        f"{len(devices)} x {devices[0].device_kind}; never run there, as none is here"
    )
