"""What the names in a file of a LoRA say: of which module, and which part of a change it is.

PEFT and diffusers (`transformer.MODULE.lora_A.weight`), diffusers before PEFT
(`MODULE.lora.down.weight`), kohya (`lora_unet_MODULE.lora_down.weight`, points in MODULE written as
underscores, and `.alpha`) and XLabs (`double_blocks.0.processor.qkv_lora1.down.weight`). What is of
a text encoder has a prefix of its own: `text_encoder.` or `lora_te1_`.
"""

import dataclasses
import re
from collections.abc import Collection, Iterable

from dit_jax.quantities import spelled_numbers

_FACTOR = re.compile(
    r"(?P<module>.+?)\.(?P<kind>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up|down|up"
    r"|lora_linear_layer\.down|lora_linear_layer\.up)(\.(?P<adapter>[^.]+))?\.weight"
)
_KINDS = {"lora_A": "a", "lora_down": "a", "lora.down": "a", "down": "a"}
_KINDS |= {"lora_B": "b", "lora_up": "b", "lora.up": "b", "up": "b"}
_KINDS |= {"lora_linear_layer.down": "a", "lora_linear_layer.up": "b"}  # diffusers' of CLIP
# What may stand before the name of a module.
_PREFIXES = (
    "base_model.model.",
    "transformer.",
    "model.diffusion_model.",
    "diffusion_model.",
    "unet.",
    "model.",
    "lora_unet_",
    "lora_transformer_",
)
TRANSFORMER, CLIP, T5 = "transformer", "clip", "t5"
_TEXT_ENCODER = re.compile(
    r"(base_model\.model\.)?(text_encoders?(_\d)?[._]|lora_te\d?_|te\d?[._]|text_model\.|t5xxl[._])"
)
# Of FLUX's two. kohya's T5 is the third, as its second is Stable Diffusion 3's other CLIP.
_TEXT_ENCODERS = {
    CLIP: re.compile(
        r"(base_model\.model\.)?(text_encoder\.|lora_te1?_|te1?[._]|(?=text_model\.)"
        r"|text_encoders\.clip_l\.(transformer\.)?)"
    ),
    T5: re.compile(
        r"(base_model\.model\.)?(text_encoder_2\.|lora_te[23]_|te[23][._]|t5xxl[._]"
        r"|text_encoders\.t5xxl\.(transformer\.)?)"
    ),
}
# Changes that are none of low rank added to a weight.
_OTHERS = (
    (r"\.(lora_magnitude_vector(\.\w+)?(\.weight)?|dora_scale)", "DoRA"),
    (r"\.hada_\w+", "LoHa"),
    (r"\.lokr_\w+", "LoKr"),
    (r"\.(oft_\w+|boft_\w+)(\.\w+)*", "OFT"),
    (r"\.(lora_mid\.weight|lora_t\w*)", "a LoRA of convolutions with a core (LoCon)"),
    (r"\.(lora_B|lora_up)(\.\w+)?\.bias", "a LoRA that changes biases"),
    (r"\.(diff|diff_b)", "whole differences of weights"),
)
_XLABS_STREAMS = {"1": "img", "2": "txt"}
_NUMBER = re.compile(r"(?<=[._])\d+(?=[._])")

# What a file's names are of, the most telling first.
_FAMILIES = (
    ("FLUX.2", r"(double|single)_stream_modulation|to_qkv_mlp_proj"),
    (
        "HunyuanVideo",
        r"(double|single)_blocks[._]\d+[._](img_mlp[._]fc|txt_mlp[._]fc|img_attn_q_norm)",
    ),
    ("Qwen-Image", r"transformer_blocks[._]\d+[._](img|txt)_(mlp|mod)"),
    ("FLUX.1", r"(^|[._])(single_transformer_blocks|single_blocks|double_blocks)[._]\d+[._]"),
    ("Wan", r"(^|[._])blocks[._]\d+[._](self|cross)_attn[._]"),
    (
        "Stable Diffusion 3",
        r"joint_blocks[._]\d+[._]|transformer_blocks[._]\d+[._]attn[._](add_\w_proj|to_add_out)",
    ),
    (
        "Stable Diffusion XL",
        r"^(lora_te2_|text_encoder_2\.)|(down|up|input|output)_blocks.*transformer_blocks[._][2-9]",
    ),
    ("Stable Diffusion", r"(^|[._])((down|up|mid)_blocks?|(input|output|middle)_blocks?)[._]"),
    (
        "DiT or PixArt",
        r"(^|[._])blocks[._]\d+[._](attn|mlp|adaLN)|transformer_blocks[._]\d+[._]attn1",
    ),
    ("a language model", r"(^|[._])layers[._]\d+[._]self_attn[._]"),
)


@dataclasses.dataclass(frozen=True)
class Part:
    """What one tensor is.

    Attributes:
        kind: 'a', 'b' or 'alpha'; 'other' of another kind of change; 'none' of names that no tool
            writes.
        module: as the file spells it, of a text encoder without what tells that it is one; of an
            'other' what kind of change it is.
        owner: `TRANSFORMER`, or whatever network it is that the file is for; `CLIP` or `T5`; '' of
            another text encoder.
    """

    kind: str
    module: str
    owner: str = TRANSFORMER


def part_of(name: str) -> Part:
    """What a tensor of this name is."""
    if not _TEXT_ENCODER.match(name):
        return _part_of(name, TRANSFORMER)
    for owner, prefix in _TEXT_ENCODERS.items():
        if match := prefix.match(name):
            return _part_of(name[match.end() :], owner)
    return _part_of(name, "")


def _part_of(name: str, owner: str) -> Part:
    for pattern, what in _OTHERS:
        if re.fullmatch(rf".+{pattern}", name):
            return Part("other", what, owner)
    if match := _FACTOR.fullmatch(name):
        return Part(_KINDS[match["kind"]], match["module"], owner)
    if name.endswith(".alpha"):
        return Part("alpha", name.removesuffix(".alpha"), owner)
    return Part("none", name, owner)


def spellings(module: str) -> Iterable[tuple[str, ...]]:
    """What a module may be called in the network, one thing after another left out before it.

    Yields:
        Names: several where one adapter changes several modules side by side.
    """
    while True:
        yield _xlabs(module) or (module,)
        prefix = next((prefix for prefix in _PREFIXES if module.startswith(prefix)), None)
        if prefix is None:
            return
        module = module.removeprefix(prefix)


def _xlabs(module: str) -> tuple[str, ...] | None:
    """The modules that XLabs' attention processors of FLUX change."""
    if match := re.fullmatch(r"double_blocks\.(\d+)\.processor\.(qkv|proj)_lora([12])", module):
        layer, what, stream = match.groups()
        return (f"double_blocks.{layer}.{_XLABS_STREAMS[stream]}_attn.{what}",)
    if match := re.fullmatch(r"single_blocks\.(\d+)\.processor\.(qkv|proj)_lora", module):
        layer, what = match.groups()
        if what == "proj":
            return (f"single_blocks.{layer}.linear2",)
        return tuple(f"single_transformer_blocks.{layer}.attn.to_{part}" for part in "qkv")
    return None


def family_of(names: Collection[str]) -> str | None:
    """The family of models that an adapter with these names is for, if it is known."""
    for family, pattern in _FAMILIES:
        if any(re.search(pattern, name) for name in names):
            return family
    return None


def in_first_layer(name: str) -> str:
    """The name of the same module in a stack's layer 0."""
    return _NUMBER.sub("0", name, count=1)


def grouped(names: Iterable[str]) -> list[str]:
    """Names for a message, those that differ in the first number alone as one."""
    groups: dict[str, list[int]] = {}
    for name in names:
        match = _NUMBER.search(name)
        pattern = name if match is None else f"{name[: match.start()]}{{}}{name[match.end() :]}"
        groups.setdefault(pattern, []).extend([] if match is None else [int(match[0])])
    return [
        pattern.replace("{}", spelled_numbers(found), 1) if found else pattern
        for pattern, found in groups.items()
    ]
