"""The host memory that reading a large FLUX transformer takes, over the size of its files.

  python benchmarks/benchmark_loading.py --out=docs/benchmarks/loading.json

Writes random parameters in bfloat16 as diffusers does, in shards with an index, and reads them by
`dit_jax.interop.flux_files.load_flux`, as `FluxPipeline.from_pretrained` does, in a fresh process
for each way of keeping layers. Its peak of resident memory stands beside that of a process that
has opened the same files and read no tensor. By default that is FLUX.1's width with fewer blocks:
2 billion parameters, 4 GB on disk and in memory, removed at the end.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.atomic import check_destination
from dit_jax.evaluation import save_json
from dit_jax.interop import flux
from dit_jax.interop.flux_files import CONFIG, load_flux, open_flux
from dit_jax.interop.parameters import abstract_params, flat_shapes
from dit_jax.interop.table import export_specs
from dit_jax.interop.tensors import write_safetensors
from dit_jax.models import FluxConfig, Network
from turns import peak_resident_bytes

NAME = "diffusion_pytorch_model"
LAYER_LOOPS = ("scan", "unroll")
GOAL = 1.2
_RANDOM_VALUES = 1 << 20


def specs_of(config: FluxConfig) -> dict[str, Any]:
    """The tensors of diffusers' files, by name."""
    shapes = flat_shapes(abstract_params(Network(config)))
    return export_specs(flux.diffusers_table(config), shapes, jnp.bfloat16)


def bytes_of(specs: Mapping[str, Any]) -> int:
    """What tensors take in a file, without its header."""
    return sum(int(np.prod(spec.shape)) * spec.dtype.itemsize for spec in specs.values())


def shards_of(specs: Mapping[str, Any], most: int) -> list[dict[str, Any]]:
    """Tensors in their order, at most so many bytes together, or one alone."""
    shards: list[dict[str, Any]] = [{}]
    for name, spec in specs.items():
        if shards[-1] and bytes_of(shards[-1]) + bytes_of({name: spec}) > most:
            shards.append({})
        shards[-1][name] = spec
    return shards


def write(folder: Path, config: FluxConfig, shard_bytes: int) -> list[Path]:
    """Writes a transformer of random parameters, one tensor in memory at a time.

    Returns:
        The shards.
    """
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(flux.config_to_diffusers(config)))
    values = 0.02 * np.random.default_rng(0).standard_normal(_RANDOM_VALUES, np.float32)
    values = values.astype(jnp.bfloat16)

    def arrays(specs: Mapping[str, Any]) -> Iterator[np.ndarray]:
        return (np.resize(values, spec.shape) for spec in specs.values())

    specs = specs_of(config)
    shards = shards_of(specs, shard_bytes)
    paths, weight_map = [], {}
    for number, shard in enumerate(shards, start=1):
        paths.append(folder / f"{NAME}-{number:05}-of-{len(shards):05}.safetensors")
        write_safetensors(paths[-1], shard, arrays(shard), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, paths[-1].name)
    index = {"metadata": {"total_size": bytes_of(specs)}, "weight_map": weight_map}
    (folder / f"{NAME}.safetensors.index.json").write_text(json.dumps(index))
    return paths


def read(folder: Path, layer_loop: str) -> dict[str, Any]:
    """What this process, which should be fresh, takes to read a transformer ('' to open it)."""
    jnp.zeros(3).block_until_ready()  # the backend's own memory is no reader's
    opened, params = open_flux(folder), {}
    if layer_loop:
        _, params = load_flux(folder, dtype="bfloat16", layer_loop=layer_loop)
        assert opened.param_dtype == "bfloat16"
    leaves = jax.block_until_ready(jax.tree.leaves(params))
    return {
        "parameters": sum(leaf.size for leaf in leaves),
        "parameters_bytes": sum(leaf.nbytes for leaf in leaves),
        "peak_bytes": peak_resident_bytes(),
    }


def measured(folder: Path, layer_loop: str) -> dict[str, Any]:
    """`read` in a process of its own."""
    command = [sys.executable, __file__, f"--read={folder}", f"--layer_loop={layer_loop}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"reading with layer_loop={layer_loop!r} failed; its message is above")
    return json.loads(done.stdout.splitlines()[-1])


def compare(config: FluxConfig, folder: Path, shard_bytes: int) -> dict[str, Any]:
    """Writes, reads, and gives the record."""
    shards = write(folder / "transformer", config, shard_bytes)
    size = sum(path.stat().st_size for path in shards)
    baseline = measured(folder / "transformer", "")["peak_bytes"]
    record: dict[str, Any] = {
        "model": {name: getattr(config, name) for name in ("hidden_size", "depth", "single_depth")},
        "file_bytes": size,
        "shards": len(shards),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "opened_peak_bytes": baseline,
        "readings": {},
    }
    print(f"files {size / 1e9:.3f} GB in {len(shards)} shards; opened {baseline / 1e9:.3f} GB")
    for layer_loop in LAYER_LOOPS:
        found = measured(folder / "transformer", layer_loop)
        record |= {name: found[name] for name in ("parameters", "parameters_bytes")}
        ratios = {
            "peak_over_file": found["peak_bytes"] / size,
            "peak_without_opened_over_file": (found["peak_bytes"] - baseline) / size,
        }
        record["readings"][layer_loop] = {"peak_bytes": found["peak_bytes"], **ratios}
        print(
            f"layer_loop={layer_loop}: {found['parameters'] / 1e9:.3f} billion parameters, peak "
            f"{found['peak_bytes'] / 1e9:.3f} GB, {ratios['peak_over_file']:.3f} of the files "
            f"({ratios['peak_without_opened_over_file']:.3f} without what opening takes; goal: "
            f"below {GOAL})"
        )
    return record


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, and whether the disk has room."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")
    parser.add_argument("--hidden_size", type=int, default=3072, help="a multiple of 128")
    parser.add_argument("--depth", type=int, default=3, help="blocks of two streams")
    parser.add_argument("--single_depth", type=int, default=7, help="blocks of one stream")
    parser.add_argument("--shard_bytes", type=float, default=2e9, help="the most of a shard")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="with room for the files, which are removed at the end",
    )
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)  # of the other process
    parser.add_argument("--layer_loop", choices=["", *LAYER_LOOPS], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.read:
        return args
    if args.hidden_size < 128 or args.hidden_size % 128:
        parser.error(f"--hidden_size={args.hidden_size}: expected a multiple of 128")
    for name in ("depth", "single_depth", "shard_bytes"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}={getattr(args, name)}: expected at least 1")
    if not args.folder.is_dir():
        parser.error(f"--folder={args.folder} is no folder")
    if args.out:
        try:
            check_destination(args.out, overwrite=args.overwrite)
        except OSError as error:
            parser.error(str(error))
    args.config = FluxConfig(
        hidden_size=args.hidden_size,
        num_heads=args.hidden_size // 128,
        depth=args.depth,
        single_depth=args.single_depth,
        param_dtype="bfloat16",
        dtype="bfloat16",
    )
    needed, free = bytes_of(specs_of(args.config)), shutil.disk_usage(args.folder).free
    if needed > free:
        parser.error(
            f"the files take {needed / 1e9:.3f} GB, and {args.folder} has {free / 1e9:.3f} GB "
            "left: give another --folder, or fewer blocks"
        )
    return args


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = parse_arguments(argv)
    if args.read:
        print(json.dumps(read(args.read, args.layer_loop)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        record = compare(args.config, Path(folder), int(args.shard_bytes))
    if args.out:
        save_json(args.out, record, overwrite=args.overwrite)
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
