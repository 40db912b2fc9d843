"""Host memory of converting a checkpoint of a billion parameters, from and to every format.

  python benchmarks/study_conversion.py --folder=/tmp/conversion

Writes random weights of a DiT of depth 28 and width 1408 (4 GB in float32) and converts them in
turn, each time in a process of its own, whose largest resident memory is what counts. The bound is
1.3 times the largest tensor group (all layers' modulation kernels) and 1 GiB for Python and
libraries.
"""

import argparse
import filecmp
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from dit_jax.evaluation import save_json
from dit_jax.interop.dit import original_table
from dit_jax.interop.parameters import abstract_params, flat_shapes
from dit_jax.interop.table import export_specs
from dit_jax.interop.tensors import write_pt
from dit_jax.launch import argument_types, wiring
from dit_jax.models import DiTConfig, Network
from dit_jax.quantities import table

# (source kind, source, destination kind, destination)
STEPS = (
    ("dit_pt", "random.pt", "dit_jax", "ours"),
    ("dit_jax", "ours", "diffusers", "diffusers"),
    ("diffusers", "diffusers", "dit_pt", "back.pt"),
)
GIB = 1 << 30


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argument_types.Parser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="12 GB are written there")
    parser.add_argument("--depth", type=argument_types.count, default=28)
    parser.add_argument("--hidden_size", type=argument_types.count, default=1408)
    parser.add_argument("--out", type=argument_types.json_file, help="JSON of the figures")
    parser.add_argument("--convert", nargs=4, help=argparse.SUPPRESS)  # one step, in its process
    parser.add_argument("--traceback", action="store_true", help="show stack traces of errors")
    return parser.parse_args(argv)


def write_random(path: Path, config: DiTConfig) -> None:
    """A state dict in the original layout, tensor by tensor."""
    names, generator = original_table(config), np.random.default_rng(0)
    specs = export_specs(names, flat_shapes(abstract_params(Network(config))))
    constants = {constant.theirs: constant.value for constant in names.constants}
    arrays = (
        constants[name]()
        if name in constants
        else generator.standard_normal(spec.shape, dtype=np.float32) * np.float32(0.02)
        for name, spec in specs.items()
    )
    write_pt(path, specs, arrays)


def convert(kind: str, source: str, to_kind: str, destination: str) -> None:
    """One conversion; prints its time and the process's largest resident memory as JSON."""
    from dit_jax.interop.export import write_model
    from dit_jax.interop.models import open_model

    began = time.perf_counter()
    heads = {"num_heads": 16} if kind == "dit_pt" else {}
    summary = write_model(open_model(source, kind, **heads), to_kind, destination)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        json.dumps(
            {"seconds": time.perf_counter() - began, "peak": peak, **vars(summary)}, default=str
        )
    )


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = parse_arguments(argv)
    if args.convert:
        convert(*args.convert)
        return
    with wiring.readable_errors(traceback=args.traceback):
        config = DiTConfig(depth=args.depth, hidden_size=args.hidden_size)
        shapes = flat_shapes(abstract_params(Network(config)))
        sizes = {path: 4 * int(np.prod(shape)) for path, shape in shapes.items()}
        largest = max(sizes, key=sizes.get)
        bound = 1.3 * sizes[largest] + GIB
        if args.folder.exists():
            raise FileExistsError(f"{args.folder} exists; give the name of a new folder")
        args.folder.mkdir(parents=True)
        try:
            write_random(args.folder / "random.pt", config)
            results = []
            for kind, source, to_kind, destination in STEPS:
                paths = (kind, args.folder / source, to_kind, args.folder / destination)
                command = [sys.executable, __file__, f"--folder={args.folder}", "--convert"]
                out = subprocess.run(
                    [*command, *map(str, paths)], check=True, stdout=subprocess.PIPE, text=True
                ).stdout
                found = json.loads(out.splitlines()[-1])
                results.append({"from": kind, "to": to_kind, **found})
            same = filecmp.cmp(args.folder / "random.pt", args.folder / "back.pt", False)
        finally:
            shutil.rmtree(args.folder, ignore_errors=True)
        record = {
            "parameters": sum(sizes.values()) // 4,
            "largest_group": {"path": largest, "bytes": sizes[largest]},
            "bound_bytes": bound,
            "results": results,
            "last_file_equals_first": same,
        }
        if args.out:
            save_json(args.out, record, overwrite=True)
        rows = [
            (f"{r['from']} -> {r['to']}", f"{r['peak'] / GIB:.2f} GiB  {r['seconds']:.0f} s")
            for r in results
        ]
        rows.append(("bound: 1.3 x largest group + 1 GiB", f"{bound / GIB:.2f} GiB"))
        rows.append(("the last file equals the first", str(same)))
        print(f"{record['parameters']:,} parameters; largest group {largest}")
        print(table(rows))


if __name__ == "__main__":
    main()
