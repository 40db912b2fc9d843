"""The README.md of an exported model: what it is, how it was made, how to use it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dit_jax.interop.found_model import FoundModel, no_guidance


def model_card(
    model: FoundModel,
    kind: str,
    notes: Sequence[str],
    sha256: str,
    metrics: Mapping[str, Any] | None,
    *,
    whole: bool = False,
) -> str:
    """Markdown that names data, training steps, measured scores and what differs.

    Args:
        model: what was written.
        kind: as which.
        notes: what differs.
        sha256: of its weights.
        metrics: an evaluation's record.
        whole: of a FLUX, whether its other components are there.
    """
    config, network = model.config, model.network.config
    height, width = network.input_size
    told_text = "text" in network.conditions
    use = _OWN_USE
    if kind == "diffusers":
        use = (
            (_FLUX_PIPELINE_USE if whole else _FLUX_USE)
            if told_text
            else _diffusers_use(1 if no_guidance(model) else 1.5)
        )
    lines = [
        "---",
        "library_name: " + ("diffusers" if kind == "diffusers" else "dit-jax"),
        f"pipeline_tag: {'text-to-image' if told_text else 'unconditional-image-generation'}",
        "---",
        "",
        f"# {config.name or 'A diffusion model'}",
        "",
        f"{network.title}, on inputs of {height}x{width}x{network.in_channels}; "
        f"{model.network.num_classes or 'no'} classes. Converted by dit-jax from {model.kind}.",
        "",
        "| | |",
        "|---|---|",
        f"| data | {_data(config) if model.step else 'not recorded in the source'} |",
        f"| training steps | {model.step or 'not recorded in the source'} |",
        f"| weights | {model.weights} |",
        f"| process | {config.process.name} |",
        f"| learned variance | {network.learn_sigma} |",
        *_time_frequency_spacing(network),
        f"| sha256 of the weights file | {sha256} |",
        "",
        "## Scores",
        "",
        *_scores(metrics),
        "",
        "## Differences to know",
        "",
        *([f"- {note}" for note in notes] or ["None."]),
        "",
        "## Use",
        "",
        *use,
    ]
    return "\n".join(lines) + "\n"


def _time_frequency_spacing(network: Any) -> list[str]:
    spacing = getattr(network, "time_frequency_spacing", None)
    return [] if spacing is None else [f"| time-frequency spacing | {spacing} |"]


def _data(config: Any) -> str:
    name = config.data.name
    options = config.data[name].to_dict() if name in config.data else {}
    source = options.get("dataset") or options.get("path")
    return f"{name} ({source})" if source else name


def _scores(metrics: Mapping[str, Any] | None) -> list[str]:
    if not metrics:
        return ["None were given."]
    return ["```json", json.dumps(metrics.get("scores", metrics), indent=2), "```"]


def _diffusers_use(guidance_scale: float) -> list[str]:
    call = f"class_labels=[0, 1], guidance_scale={guidance_scale}, num_inference_steps=50"
    return [
        "```python",
        "from diffusers import DiTPipeline",
        "",
        'pipeline = DiTPipeline.from_pretrained("path/to/this/folder")',
        f"images = pipeline({call}).images",
        "```",
        "",
        "If the time-frequency spacing above is `original`, plain diffusers computes another",
        "function; with dit-jax installed:",
        "",
        "```python",
        "from dit_jax.interop.pipelines import load_pipeline",
        "",
        'pipeline = load_pipeline("path/to/this/folder")',
        "```",
    ]


_FLUX_USE = [
    "```python",
    "from diffusers import FluxPipeline, FluxTransformer2DModel",
    "",
    'transformer = FluxTransformer2DModel.from_pretrained("path/to/this/folder")',
    'pipeline = FluxPipeline.from_pretrained("path/to/a/pipeline", transformer=transformer)',
    "```",
]

_FLUX_PIPELINE_USE = [
    "```python",
    "from diffusers import FluxPipeline",
    "",
    'pipeline = FluxPipeline.from_pretrained("path/to/this/folder")',
    "```",
    "",
    "or, with dit-jax installed, `from dit_jax import FluxPipeline`.",
]

# A card goes where there is no checkout: by the command of an installation.
_OWN_USE = [
    "With dit-jax installed (in a checkout of it: `python launch/sample.py`):",
    "",
    "```",
    "dit-jax sample --init_from=path/to/this/folder --out=samples.png",
    "```",
]
