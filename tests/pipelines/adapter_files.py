"""LoRA files for a pipeline, of its transformer and of CLIP."""

import numpy as np
from safetensors.numpy import load_file, save_file

from dit_jax.interop.lora import save_lora
from tests.models.test_lora import drawn


def write_adapters(folder, clip, transformer):
    """'one' changes the transformer and CLIP, 'two' the transformer, kohya's 'three' CLIP alone.

    Args:
        folder: of the files.
        clip: transformers' model.
        transformer: our network.

    Returns:
        Their paths.
    """
    files = [folder / f"{name}.safetensors" for name in ("one", "two", "three")]
    for seed, file in enumerate(files[:2]):
        save_lora(file, transformer, drawn(transformer, seed, rank=3 + seed, spread=0.2))
    tensors, kohya = load_file(files[0]), {}
    for name, a, b in _factors(clip, ("_proj", "fc1", "fc2")):
        name = f"text_model.{name}"
        tensors |= {
            f"text_encoder.{name}.lora_A.weight": a,
            f"text_encoder.{name}.lora_B.weight": b,
        }
        name = f"lora_te1_{name.replace('.', '_')}"
        kohya |= {f"{name}.lora_down.weight": a[::-1].copy(), f"{name}.lora_up.weight": b}
        kohya[f"{name}.alpha"] = np.asarray(1.5, np.float32)
    save_file(tensors, files[0])
    save_file(kohya, files[2])
    return files


def write_t5_adapter(folder, t5):
    """kohya's file of two modules a block of transformers' T5."""
    tensors = {}
    for name, a, b in _factors(t5, (".o", ".wi_0")):
        name = f"lora_te3_{name.replace('.', '_')}"
        tensors |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}
    save_file(tensors, folder / "t5.safetensors")
    return folder / "t5.safetensors"


def _factors(model, ends):
    random = np.random.default_rng(0)
    for name, module in model.named_modules():
        if name.endswith(ends):
            shapes = (2, module.in_features), (module.out_features, 2)
            yield name, *(0.5 * random.normal(size=shape).astype(np.float32) for shape in shapes)
