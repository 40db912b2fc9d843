"""Converts a model between this library, PyTorch state dicts and diffusers.

  python launch/convert.py --from=dit_pt --to=dit_jax DiT-XL-2-256x256.pt models/dit_xl2
  python launch/convert.py --from=dit_jax --to=diffusers runs/dit_xl2 exported \\
      --vae=hub:stabilityai/sd-vae-ft-ema
  python launch/convert.py --to=dit_pt hub:facebook/DiT-XL-2-256 dit_xl2.pt --allow_inexact
  python launch/convert.py --to=diffusers --dtype=bfloat16 --pipeline=FLUX.1-dev runs/flux tuned
  python launch/convert.py --to=lora runs/flux_dev_lora style.safetensors

Kinds: dit_jax (a run's workdir, or a folder converted to), dit_pt (facebookresearch/DiT, fast-DiT),
sit_pt (SiT), diffusers (a pipeline's folder or its transformer's, of DiT or FLUX), edm_pt (a state
dict of EDM), flux_pt (flux1-*.safetensors), to read only, edm_pkl (a network pickle of EDM), and
what DIT_JAX_EXTENSIONS registers. Parameters pass one at a time; nothing in a file is executed; the
destination appears whole or not at all.
"""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from dit_jax.launch import argument_types, arguments, command

if TYPE_CHECKING:
    from dit_jax.interop.export import Summary


LORA = "lora"  # of a run that trained one, for PEFT; such a run is written merged as other kinds


def registered_kinds() -> tuple[str, ...]:
    """The kinds of state dicts that modules from outside register, where any are named."""
    if not os.environ.get("DIT_JAX_EXTENSIONS"):
        return ()
    from dit_jax.interop.kinds import registered

    with command.readable_errors():
        return tuple(registered())


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    outside = registered_kinds()
    parser = argument_types.Parser(description=__doc__)
    parser.add_argument("source", metavar="SRC", help="a path, or hub:owner/name[@revision][:path]")
    parser.add_argument("destination", metavar="DST", type=Path)
    parser.add_argument(
        "--from", dest="source_kind", default="auto", choices=["auto", *arguments.KINDS, *outside]
    )
    destinations = (*arguments.DESTINATIONS, LORA, *outside)
    parser.add_argument("--to", dest="kind", required=True, choices=destinations)
    parser.add_argument(
        "--dtype", default="float32", choices=arguments.DTYPES, help="of the tensors"
    )
    parser.add_argument("--weights", default="", help="ema, raw, model or an average's name")
    parser.add_argument(
        "--step", type=argument_types.count_or_none, help="of a workdir: which checkpoint"
    )
    parser.add_argument(
        "--num_heads", type=argument_types.count, help="of a .pt of a width not in the paper"
    )
    parser.add_argument(
        "--num_classes",
        type=argument_types.count_or_none,
        help="of a .pt whose class table may have a null class or not",
    )
    parser.add_argument(
        "--time_frequency_spacing",
        default="",
        choices=["", "original", "diffusers"],
        help="where it is known to be another than the format's own code computes",
    )
    parser.add_argument("--vae", help="VAE of a pipeline: a diffusers folder or hub:owner/name")
    parser.add_argument(
        "--pipeline",
        help="of FLUX: a pipeline's folder or hub:owner/name, whose other parts go with this "
        "transformer into a whole pipeline",
    )
    parser.add_argument("--class_names", type=Path, help="JSON list of names, for a pipeline")
    parser.add_argument("--metrics", type=Path, help="an evaluation's JSON, for the model card")
    parser.add_argument(
        "--allow_inexact", action="store_true", help="write what the other side computes otherwise"
    )
    parser.add_argument(
        "--allow_nonfinite", action="store_true", help="convert NaN and infinity as they are"
    )
    parser.add_argument("--dry_run", action="store_true", help="check everything, write nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier conversion")
    parser.add_argument("--traceback", action="store_true", help="show stack traces of errors")
    return parser.parse_args(argv)


def _read_json(path: Path | None, kind: type):
    if path is None:
        return None
    from dit_jax.untrusted import read_json

    return read_json(path, kind)


def show(summary: "Summary", dry_run: bool) -> str:
    """The summary as a table, and the notes."""
    from dit_jax.quantities import table

    rows = [
        ("kind", summary.kind),
        ("tensors", f"{summary.tensors:,}"),
        ("parameters", f"{summary.parameters:,}"),
        ("dtype", summary.dtype),
        ("sha256", summary.sha256 or "(dry run: nothing was written)"),
    ]
    notes = "".join(f"note: {note}\n" for note in summary.notes)
    verb = "would write" if dry_run else "wrote"
    return f"{notes}{verb} {summary.path}\n{table(rows)}"


# Options that mean nothing for an adapter.
_OF_MODELS = (
    "num_heads",
    "num_classes",
    "time_frequency_spacing",
    "vae",
    "pipeline",
    "class_names",
)
_OF_MODELS += ("metrics", "allow_inexact", "allow_nonfinite", "dry_run")


def convert_adapter(args: argparse.Namespace) -> None:
    """Writes the adapter of a run for PEFT and diffusers (docs/lora.md)."""
    given = [f"--{name}" for name in _OF_MODELS if arguments.is_given(getattr(args, name))]
    if given or args.source_kind not in ("auto", "dit_jax"):
        raise ValueError(
            f"{', '.join(given) or '--from'}: would do nothing with --to={LORA}, which is of a "
            "run's workdir"
        )
    from dit_jax.interop.lora import save_lora
    from dit_jax.interop.lora_runs import open_adapter

    network, adapter = open_adapter(Path(args.source), args.weights, args.step)
    options = {"dtype": args.dtype, "overwrite": args.overwrite}
    save_lora(args.destination, network, adapter, **options)
    layers = ", ".join(adapter.factors)
    print(f"wrote {args.destination}: a LoRA of rank {adapter.rank} of {layers}")


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = parse_arguments(argv)
    with command.readable_errors(traceback=args.traceback):
        if args.kind == LORA:
            convert_adapter(args)
            return
        from dit_jax.interop.export import write_model
        from dit_jax.interop.models import open_model
        from dit_jax.launch import loading

        model = open_model(
            args.source,
            kind=args.source_kind,
            weights=args.weights,
            step=args.step,
            num_heads=args.num_heads,
            num_classes=args.num_classes,
            allow_nonfinite=args.allow_nonfinite,
            time_frequency_spacing=args.time_frequency_spacing,
        )
        print(f"read {model.path} as {model.kind}{model.chosen_weights}", flush=True)
        print(f"converting to {args.kind}, {args.dtype}: {args.destination}", flush=True)
        with command.cleaning_up():
            summary = write_model(
                model,
                args.kind,
                args.destination,
                dtype=args.dtype,
                autoencoder=loading.resolve_source(args.vae),
                pipeline=args.pipeline,
                class_names=_read_json(args.class_names, list) or (),
                metrics=_read_json(args.metrics, dict),
                allow_inexact=args.allow_inexact,
                overwrite=args.overwrite,
                dry_run=args.dry_run,
            )
        print(show(summary, args.dry_run))


def start() -> None:
    """Runs the command line of this process."""
    command.run(main)


if __name__ == "__main__":
    start()
