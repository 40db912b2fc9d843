"""What training DiT-XL/2 needs of H100s that are not there, by rematerialisation policy.

  python benchmarks/training_memory.py --out=docs/benchmarks/training_memory

Compiles the training update for each policy and number of devices by launch/plan.py, which takes
JAX's CUDA plugin (the extra 'plan') and no GPU, and writes OUT.json and OUT.md: memory by XLA's own
account, how often products and attention run (nothing is computed twice where that is as without
rematerialisation), and the time that is predicted. Nothing is measured.
"""

import argparse
import itertools
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from dit_jax.evaluation import save_json
from dit_jax.parallel.planning.compilers import missing_plugin
from dit_jax.training.remat_choice import POLICIES

GIB = 2**30
ROOT = Path(__file__).parents[1]
COLUMNS = (
    "devices",
    "policy",
    "averages",
    "arguments, GiB",
    "temporaries, GiB",
    "in all, GiB",
    "matrix products",
    "attention, forward + backward",
    "*predicted* step, ms",
    "*predicted* MFU",
)


def plan(config: str, devices: int, remat: str, averages: str) -> dict[str, Any]:
    """The plan of one update, as launch/plan.py writes it."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "plan.json")
        options = [f"--config={config}", f"--devices={devices}", f"--out={out}"]
        options += ["--accelerator=h100", f"--config.model.remat={remat}"]
        options += [f"--config.ema.dtype={averages}"]
        command = [sys.executable, str(ROOT / "launch/plan.py"), *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{shlex.join(command)} failed:\n{done.stderr.strip()}")
        return json.loads(out.read_text())


def row_of(found: dict[str, Any], remat: str, averages: str) -> dict[str, Any]:
    """What the table says of a plan."""
    program = found["programs"]["train"]
    kernels = program["predicted"]["kernels"]

    def runs(*beginnings: str) -> int:
        return round(sum(k["count"] for name, k in kernels.items() if name.startswith(beginnings)))

    return {
        "devices": found["devices"],
        "policy": remat,
        "averages": averages,
        "arguments_bytes": program["memory"]["arguments"],
        "temporary_bytes": program["memory"]["temporaries"],
        "total_bytes": found["memory"]["total_bytes"],
        "fits": found["memory"]["fits"],
        "products": runs("cuBLASLt"),
        "attention_forward": runs("cuDNN attention") - runs("cuDNN attention backward"),
        "attention_backward": runs("cuDNN attention backward"),
        "predicted_seconds": found["predicted"]["seconds"],
        "predicted_mfu": found["predicted"]["mfu"],
        "kernels": {
            name: {key: k[key] for key in ("count", "seconds", "bytes")}
            for name, k in kernels.items()
        },
        "jax": found["versions"]["jax"],
    }


def table_of(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    for row in rows:
        sizes = [row[f"{kind}_bytes"] / GIB for kind in ("arguments", "temporary", "total")]
        lines.append(
            (
                str(row["devices"]),
                f"`{row['policy']}`",
                row["averages"],
                f"{sizes[0]:.1f}",
                f"{sizes[1]:.1f}",
                f"{sizes[2]:.1f}" + ("" if row["fits"] else " (too much)"),
                str(row["products"]),
                f"{row['attention_forward']} + {row['attention_backward']}",
                f"{1e3 * row['predicted_seconds']:.0f}",
                f"{row['predicted_mfu']:.0%}",
            )
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="OUT.json and OUT.md are written.")
    parser.add_argument("--config", default="configs/dit_xl2.py", help="The experiment.")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8], help="H100s.")
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), choices=POLICIES)
    parser.add_argument(
        "--averages",
        nargs="+",
        default=["float32"],
        choices=("float32", "bfloat16"),
        help="What weights' averages are stored in (config.ema.dtype).",
    )
    options = parser.parse_args()
    if reason := missing_plugin():
        parser.error(f"compiles for GPUs: {reason}")
    rows = []
    for devices, averages, remat in itertools.product(
        options.devices, options.averages, options.policies
    ):
        found = plan(options.config, devices, remat, averages)
        rows.append(row_of(found, remat, averages))
        print(table_of(rows[-1:]).splitlines()[-1], flush=True)
    save_json(options.out.with_suffix(".json"), {"rows": rows}, overwrite=True)
    command = shlex.join(["python", "benchmarks/training_memory.py", *sys.argv[1:]])
    text = (
        f"# Memory of training, by what is kept for the backward pass\n\n`{command}`\n"
        f"({Path(options.config).stem}, compiled for H100 without one by jax {rows[0]['jax']}; "
        "memory is XLA's own account of a device,\ntimes are *predicted* from peaks, nothing was "
        f"measured; all figures are in the JSON beside this)\n\n{table_of(rows)}\n"
    )
    options.out.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
