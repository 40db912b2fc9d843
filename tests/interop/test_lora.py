"""LoRA files against PEFT on diffusers' FLUX: every module, every tool's names, there and back."""

import copy
import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from dit_jax.interop.flux import original_table
from dit_jax.interop.flux_files import load_flux
from dit_jax.interop.lora import (
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    load_lora,
    load_loras,
    save_lora,
)
from dit_jax.interop.lora_targets import export_targets, targets_of
from dit_jax.interop.tensors import InteropError
from dit_jax.interop.text_encoders import load_text_encoder
from dit_jax.models import DiTConfig, FluxConfig, Network, lora
from dit_jax.models.text import CLIPTextConfig, TextEncoder
from tests.compilations import compilations
from tests.models.test_flux import random_request
from tests.models.test_lora import CONFIGS, drawn
from tests.references import diffusers_flux, torch_dit, transformers_text

DEV = FluxConfig.from_name("flux_tiny", guidance_embedding=True)
SOME = r"(single_)?transformer_blocks\.1\.(attn\.(to_q|to_v|add_k_proj)|proj_mlp|ff\.net\.2)"


@dataclasses.dataclass
class Models:
    """diffusers' model with two adapters, ours read from its folder, and the adapters' files."""

    theirs: object
    network: Network
    params: dict
    files: dict
    request: object
    apply: object

    def expected(self, **weights):
        self.theirs.set_adapters(list(weights), list(weights.values()))
        return diffusers_flux.evaluate(self.theirs, self.request)

    def attached(self, *adapters):
        """With the same structure whatever the adapters, so that there is one program."""
        layers = lora.layer_shapes(self.network)
        return lora.attach(self.network, self.params, adapters, rank=24, layers=layers)


def add_adapter(model, name, seed, **options):
    import peft

    model.add_adapter(peft.LoraConfig(**options), adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".{name}." in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.12)
    return peft.utils.get_peft_model_state_dict(model, adapter_name=name)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    import diffusers

    folder = tmp_path_factory.mktemp("lora")
    model = diffusers_flux.create_model(DEV)
    model.save_pretrained(folder / "model")
    network, params = load_flux(folder / "model", layer_loop="scan")
    linear = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)]
    one = {"r": 3, "lora_alpha": 6, "target_modules": linear}
    patterns = {"rank_pattern": {"proj_mlp": 4}, "alpha_pattern": {"proj_mlp": 2}}
    patterns["alpha_pattern"] |= {"single_transformer_blocks.1.proj_mlp": 5}  # too late: unused
    two = {"r": 2, "lora_alpha": 3, "target_modules": SOME, "use_rslora": True, **patterns}
    files = {}
    for seed, (name, options) in enumerate({"one": one, "two": two}.items()):
        state = add_adapter(model, name, seed, **options)
        diffusers.FluxPipeline.save_lora_weights(
            folder / name, state, transformer_lora_adapter_metadata=dict(options)
        )
        files[name] = folder / name
    request = random_request(DEV, (4, 6))
    return Models(model, network, params, files, request, jax.jit(network.apply))


def tensors(adapter, places):
    """An adapter as (module, A, B) by names of other libraries."""
    for target in places:
        if target.ours in adapter.factors:
            pair = adapter.factors[target.ours]
            if target.layer is not None:
                pair = [factor[target.layer] for factor in pair]
            yield target.module, *target.their_factors(*pair)


def changes(adapter):
    return {path: np.matmul(a, b) for path, (a, b) in adapter.factors.items()}


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for path, change in wanted.items():
        np.testing.assert_allclose(found[path], change, atol=1e-6, err_msg=path)


def test_outputs_are_those_of_peft_and_adapters_are_swapped_without_a_compilation(models):
    one, two = (load_lora(models.files[name], models.network) for name in ("one", "two"))
    assert one.factors.keys() == lora.layer_shapes(models.network).keys()
    assert one.factors["single_blocks.linear1"][0].shape == (2, 32, 12)
    base = models.apply(models.params, models.request).out
    with compilations("apply") as compiled:
        for weights in ({"one": 0.7}, {"one": 0.5, "two": -1.5}, {"two": 1.0}):
            chosen = [({"one": one, "two": two}[name], weight) for name, weight in weights.items()]
            params = models.attached(*chosen)
            found, expected = models.apply(params, models.request).out, models.expected(**weights)
            assert np.abs(expected - base).max() > 0.05
            np.testing.assert_allclose(found, expected, atol=1e-4)
            merged = models.apply(lora.merge(params), models.request).out
            np.testing.assert_allclose(merged, expected, atol=1e-4)
    assert len(compiled) == 1


def test_ours_is_loaded_by_diffusers(models, tmp_path):
    import diffusers

    paths = [p for p in lora.layer_shapes(models.network) if "blocks" in p or p == "x_embedder"]
    adapter = drawn(models.network, 5, paths=paths)
    file = tmp_path / "ours.safetensors"
    save_lora(file, models.network, adapter)
    state, alphas, metadata = diffusers.FluxPipeline.lora_state_dict(
        file, return_alphas=True, return_lora_metadata=True
    )
    assert not alphas and not metadata
    diffusers.FluxPipeline.load_lora_into_transformer(
        state, alphas, models.theirs, adapter_name="ours"
    )
    found = models.apply(models.attached((adapter, 0.8)), models.request).out
    np.testing.assert_allclose(found, models.expected(ours=0.8), atol=1e-4)
    models.theirs.delete_adapters("ours")
    again = load_lora(file, models.network)
    assert again.rank == adapter.rank  # one a for queries, keys and values, as it was
    same(changes(again), changes(adapter))
    with pytest.raises(FileExistsError):
        save_lora(file, models.network, adapter)


def original_targets(models):
    return list(targets_of(models.network, original_table(models.network.config)))


def kohya(models):
    """Adapter 'one', of the original code's modules, with alpha, under kohya's names."""
    adapter, found = load_lora(models.files["one"], models.network), {}
    for module, a, b in tensors(adapter, original_targets(models)):
        name = f"lora_unet_{module.replace('.', '_')}"
        found[f"{name}.lora_down.weight"], found[f"{name}.lora_up.weight"] = a, b * len(a)
        found[f"{name}.alpha"] = np.asarray(1.0, np.float32)
    return found, changes(adapter)


def xlabs(models):
    """Factors of attention alone, XLabs' names; and what they change in our layers."""
    random, found, wanted = np.random.default_rng(0), {}, {}
    dim = DEV.hidden_size

    def draw(name, ins, outs):
        a, b = random.normal(size=(2, ins)), random.normal(size=(outs, 2))
        found[f"{name}.down.weight"] = a.astype(np.float32)
        found[f"{name}.up.weight"] = b.astype(np.float32)
        return (b @ a).T

    for i in range(2):
        for number, stream in (("1", "image"), ("2", "text")):
            for what, outs in (("qkv", 3 * dim), ("proj", dim)):
                change = draw(f"double_blocks.{i}.processor.{what}_lora{number}", dim, outs)
                wanted.setdefault(f"double_blocks.{stream}.attn.{what}", []).append(change)
        change = draw(f"single_blocks.{i}.processor.qkv_lora", dim, 3 * dim)
        change = np.pad(change, ((0, 0), (0, 4 * dim)))
        wanted.setdefault("single_blocks.linear1", []).append(change)
        change = draw(f"single_blocks.{i}.processor.proj_lora", 5 * dim, dim)
        wanted.setdefault("single_blocks.linear2", []).append(change)
    return found, {path: np.stack(layers) for path, layers in wanted.items()}


def comfy(models):
    found, wanted = kohya(models)
    names = {f"lora_unet_{t.module.replace('.', '_')}": t.module for t in original_targets(models)}
    return {
        f"diffusion_model.{names[key.partition('.')[0]]}.{key.partition('.')[2]}": value
        for key, value in found.items()
    }, wanted


def before_peft(models):
    adapter, found = load_lora(models.files["two"], models.network), {}
    for module, a, b in tensors(adapter, export_targets(models.network)):
        found[f"transformer.{module}.lora.down.weight"] = a
        found[f"transformer.{module}.lora.up.weight"] = b
    return found, changes(adapter)


@pytest.mark.parametrize("written", [kohya, xlabs, comfy, before_peft])
def test_the_files_of_other_tools_hold_the_same(models, tmp_path, written):
    found, wanted = written(models)
    save_file(found, tmp_path / "x.safetensors")
    same(changes(load_lora(tmp_path / "x.safetensors", models.network)), wanted)
    torch.save({k: torch.tensor(v) for k, v in found.items()}, tmp_path / "x.pt")
    same(changes(load_lora(tmp_path / "x.pt", models.network)), wanted)


def test_kohyas_and_xlabs_files_are_read_as_diffusers_reads_them(models, tmp_path):
    """It knows `linear1` of the published width alone, and no alpha of the final layer."""
    import diffusers

    for written in (kohya, xlabs):
        found, wanted = written(models)
        found = {k: torch.tensor(v) for k, v in found.items()}
        found = {k: v for k, v in found.items() if "linear1" not in k and "final" not in k}
        state = diffusers.FluxPipeline.lora_state_dict(found)
        save_file({k: v.numpy().copy() for k, v in state.items()}, tmp_path / "d.safetensors")
        again = changes(load_lora(tmp_path / "d.safetensors", models.network))
        assert len(again) >= len(wanted) - 3
        for path, change in again.items():
            np.testing.assert_allclose(change, wanted[path], atol=1e-5, err_msg=path)


def test_an_adapter_of_a_dit_is_loaded_by_peft(tmp_path):
    import peft

    config = DiTConfig(image_size=4, hidden_size=16, depth=2, num_heads=2, num_classes=3)
    network, paths = Network(config), ["x_embedder", "blocks.attn.qkv", "final_layer.linear"]
    adapter = drawn(network, 3, paths=paths)
    save_lora(tmp_path / "dit", network, adapter)
    same(changes(load_lora(tmp_path / "dit", network)), changes(adapter))
    model = torch_dit.DiT(input_size=4, hidden_size=16, depth=2, num_heads=2, num_classes=3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    merged = peft.PeftModel.from_pretrained(model, tmp_path / "dit").merge_and_unload()
    change = changes(adapter)
    for i in range(2):
        name = f"blocks.{i}.attn.qkv.weight"
        found = (merged.state_dict()[name] - before[name]).numpy()
        np.testing.assert_allclose(found.T, change["blocks.attn.qkv"][i], atol=1e-6)
    name = "x_embedder.proj.weight"
    found = (merged.state_dict()[name] - before[name]).numpy()
    found = found.transpose(2, 3, 1, 0).reshape(-1, 16)
    np.testing.assert_allclose(found, change["x_embedder"], atol=1e-6)


def lacking(models):
    found = before_peft(models)[0]
    found.pop("transformer.transformer_blocks.1.attn.to_q.lora.up.weight")
    return found


def deeper(models):
    return {
        key.replace("blocks.1.", f"blocks.{i}."): value
        for key, value in before_peft(models)[0].items()
        for i in (1, 2, 3)
    }


def much_deeper(models):
    found = before_peft(models)[0]
    name = "transformer.transformer_blocks.1.attn.to_q.lora."
    own = {key: value for key, value in found.items() if key.startswith(name)}
    return {key.replace("blocks.1.", "blocks.9."): value for key, value in own.items()}


def wider(models):
    return {key: np.concatenate([v, v], 1) for key, v in before_peft(models)[0].items()}


def with_more(**more):
    def written(models):
        return before_peft(models)[0] | {k.replace("__", "."): np.ones(1, "f") for k in more}

    return written


def of_sdxl(models):
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight"
    return {name: np.ones((2, 4), "f"), name.replace("down.w", "up.w"): np.ones((4, 2), "f")}


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (lacking, "half a pair: transformer.transformer_blocks.1.attn.to_q.lora.down.weight"),
        (
            deeper,
            "not in the network: transformer.single_transformer_blocks.{2..3}.attn.to_q",
        ),
        (wider, "expected [r, 32] and [32, r]"),
        (of_sdxl, ": it is an adapter of Stable Diffusion (it has lora_unet_"),
        (with_more(lora_te1_text__alpha=1), "also changes a text encoder (1 tensor"),
        (with_more(x__dora_scale=1), "is DoRA, of which there is no code here"),
        (with_more(x__hada_w1_a=1), "is LoHa"),
        (with_more(something=1), "not in the network: something"),
        (lambda models: {"weight": np.ones(3, "f")}, "none of its tensors is for it"),
        (
            lambda models: {k: np.full_like(v, np.nan) for k, v in before_peft(models)[0].items()},
            "NaN or infinity",
        ),
        (
            lambda models: {
                f"base_model.model.{k.removeprefix('transformer.')}": v
                for k, v in before_peft(models)[0].items()
            },
            "whose adapter_config.json is not beside it",
        ),
    ],
)
def test_errors_of_what_does_not_match(models, tmp_path, written, message):
    save_file(written(models), tmp_path / "x.safetensors")
    with pytest.raises(InteropError) as caught:
        load_lora(tmp_path / "x.safetensors", models.network)
    assert message in str(caught.value)


def test_nan_is_read_where_it_is_allowed(models, tmp_path):
    file, (name, *_) = before_peft(models)[0], before_peft(models)[0]
    save_file(file | {name: np.full_like(file[name], np.nan)}, tmp_path / "x.safetensors")
    with pytest.warns(UserWarning, match="NaN or infinity in 1 tensor: transformer"):
        adapter = load_lora(tmp_path / "x.safetensors", models.network, allow_nonfinite=True)
    assert sum(np.isnan(a).any() or np.isnan(b).any() for a, b in adapter.factors.values()) == 1


def test_blocks_beyond_the_depth_are_no_other_familys(models, tmp_path):
    for number, written in enumerate((deeper, much_deeper)):
        save_file(written(models), tmp_path / f"{number}.safetensors")
        with pytest.raises(InteropError) as caught:
            load_lora(tmp_path / f"{number}.safetensors", models.network)
        assert "not in the network: transformer." in str(caught.value)
        assert "names are those" not in str(caught.value) and "DiT" not in str(caught.value)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_adapters_of_every_network_come_back_as_they_were(tmp_path, name):
    network = Network(CONFIGS[name])
    adapter = drawn(network)
    file = tmp_path / ("x.safetensors" if name == "flux" else "x")
    save_lora(file, network, adapter)
    same(changes(load_lora(file, network)), changes(adapter))
    with pytest.raises(InteropError, match="the adapter changes no layer"):
        save_lora(tmp_path / f"none{file.suffix}", network, lora.Adapter({}))


def test_a_configuration_without_alpha_has_that_of_peft(tmp_path):
    import peft

    network = Network(CONFIGS["dit"])
    adapter = drawn(network, paths=["blocks.attn.proj"])
    save_lora(tmp_path / "x", network, adapter)
    values = json.loads((tmp_path / "x" / PEFT_CONFIG).read_text())
    alpha = peft.LoraConfig().lora_alpha
    assert values.pop("lora_alpha") == adapter.rank != alpha
    for given in (values, values | {"lora_alpha": None}):
        (tmp_path / "x" / PEFT_CONFIG).write_text(json.dumps(given))
        found = changes(load_lora(tmp_path / "x", network))["blocks.attn.proj"]
        expected = changes(adapter)["blocks.attn.proj"] * alpha / adapter.rank
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_errors_of_other_networks_and_names(models, tmp_path):
    dit = Network(DiTConfig(image_size=4, hidden_size=16, depth=2, num_heads=2, num_classes=3))
    with pytest.raises(
        InteropError, match=r"LoRA of this network, DiT.*names are those of FLUX\.1"
    ):
        load_lora(models.files["one"], dit)
    with pytest.raises(InteropError, match="does not exist"):
        load_lora(tmp_path / "nothing.safetensors", dit)
    with pytest.raises(InteropError, match=r"is a file, NAME\.safetensors"):
        save_lora(tmp_path / "folder", models.network, drawn(models.network))
    with_text, _ = before_peft(models)
    with_text["lora_te1_text_model.alpha"] = np.ones(1, "f")
    save_file(with_text, tmp_path / "x.safetensors")
    read = load_lora(tmp_path / "x.safetensors", models.network, ignore_text_encoders=True)
    assert len(read.factors) == 4
    save_lora(tmp_path / "dit", dit, drawn(dit))
    values = json.loads((tmp_path / "dit" / PEFT_CONFIG).read_text())
    (tmp_path / "dit" / PEFT_CONFIG).write_text(json.dumps(values | {"use_dora": True}))
    with pytest.raises(InteropError, match="use_dora: no plain LoRA"):
        load_lora(tmp_path / "dit", dit)
    (tmp_path / "dit" / PEFT_WEIGHTS).write_bytes(b"PK")
    with pytest.raises(InteropError):
        load_lora(tmp_path / "dit", dit)


def t5_files(factors):
    """T5's factors, as tools name them: (tensors of a file, whether there is a scale)."""
    points, underscores = {}, {}
    for name, array in factors.items():
        module, part = name.removeprefix("base_model.model.").split(".lora_")
        down = {"A.weight": "lora_down", "B.weight": "lora_up"}[part]
        points[f"{module}.{down}.weight"] = array
        underscores[f"{module.replace('.', '_')}.{down}.weight"] = array
        underscores[f"{module.replace('.', '_')}.alpha"] = np.asarray(6, np.float32)
    yield {f"lora_te3_{name}": array for name, array in underscores.items()}, True
    yield {f"lora_te2_{name}": array for name, array in underscores.items()}, True
    yield {f"text_encoder_2.{name}": array for name, array in points.items()}, False
    prefix = "text_encoders.t5xxl.transformer."
    yield {f"{prefix}{name}": array for name, array in points.items()}, False


def test_t5_changes_as_in_peft_whatever_tool_wrote_it(models, tmp_path):
    import peft

    model = copy.deepcopy(transformers_text.t5(num_layers=1))
    model.save_pretrained(tmp_path / "t5")
    encoder, params = load_text_encoder(tmp_path / "t5", dtype="float32")
    linear = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)]
    config = {"r": 3, "lora_alpha": 6, "target_modules": linear}
    theirs = peft.get_peft_model(model, peft.LoraConfig(**config)).eval()
    generator, factors = torch.Generator().manual_seed(0), {}
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            factors[name.replace(".default", "")] = parameter.detach().numpy()
    ids = np.random.default_rng(0).integers(3, 60, (2, 12))
    with torch.no_grad():
        wanted = theirs(torch.tensor(ids)).last_hidden_state.numpy()
    networks, found = {"transformer": models.network, "t5": encoder}, []
    for tensors, is_scaled in t5_files(factors):
        save_file(tensors, tmp_path / "x.safetensors")
        read = load_loras(tmp_path / "x.safetensors", networks)
        assert read.keys() == {"t5"}  # it changes nothing else
        found.append(read["t5"])
        scale = 1 if is_scaled else 2
        same({k: scale * v for k, v in changes(found[-1]).items()}, changes(found[0]))
    assert found[0].factors.keys() == lora.layer_shapes(encoder).keys()
    adapted, encode = lora.attach(encoder, params, [(found[0], 1.0)]), jax.jit(encoder.encode)
    np.testing.assert_allclose(encode(adapted, ids).tokens, wanted, atol=1e-4)
    np.testing.assert_allclose(encode(lora.merge(adapted), ids).tokens, wanted, atol=1e-4)
    assert np.abs(encode(params, ids).tokens - wanted).max() > 0.1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lora_te1_text_model_encoder_layers_9_mlp_fc1.alpha", "not in CLIP: lora_te1_text"),
        ("text_encoder.text_projection.lora_A.weight", "not in CLIP: text_encoder.text_pro"),
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight", "half a pair: text_e"),
        ("text_encoder.something", "not in CLIP: text_encoder.something"),
        ("text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.alpha", "does not have (1 tensor"),
        ("text_encoder_3.x.lora_A.weight", "a text encoder that the pipeline does not have"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.dora_scale", "is DoRA"),
    ],
)
def test_what_no_text_encoder_has_is_an_error(models, tmp_path, name, message):
    tensors = before_peft(models)[0] | {name: np.ones((2, 32), "f")}
    save_file(tensors, tmp_path / "x.safetensors")
    config = CLIPTextConfig(70, 32, 48, 2, 4, 12)
    networks = {"transformer": models.network, "clip": TextEncoder(config)}
    with pytest.raises(InteropError) as caught:
        load_loras(tmp_path / "x.safetensors", networks)
    assert message in str(caught.value)
    ignoring = {"ignore_text_encoders": True}
    assert load_loras(tmp_path / "x.safetensors", networks, **ignoring).keys() == {"transformer"}


def test_one_change_of_a_module_is_all_that_a_file_may_have(models, tmp_path):
    networks = {
        "transformer": models.network,
        "clip": TextEncoder(CLIPTextConfig(70, 32, 48, 2, 4, 12)),
    }
    theirs, kohyas = (
        {
            f"{module}.{ending}.weight": np.ones(shape, "f")
            for ending, shape in zip(endings, ((2, 32), (48, 2)), strict=True)
        }
        for module, endings in (
            ("text_encoder.text_model.encoder.layers.0.mlp.fc1", ("lora_A", "lora_B")),
            ("lora_te1_text_model_encoder_layers_0_mlp_fc1", ("lora_down", "lora_up")),
        )
    )
    file = tmp_path / "x.safetensors"
    for tensors in (theirs, kohyas):
        save_file(tensors, file)
        assert load_loras(file, networks).keys() == {"clip"}
        with pytest.raises(InteropError, match="changes nothing but text encoders"):
            load_loras(file, networks, ignore_text_encoders=True)
    save_file(theirs | kohyas, file)
    with pytest.raises(InteropError, match=r"changes .*fc1 twice, as .*fc1 and as .*fc1"):
        load_loras(file, networks)
