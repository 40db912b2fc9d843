"""launch/extract_features.py of captioned images: embeddings beside latents."""

import dataclasses
import shutil
import types

import jax
import numpy as np
import pytest

from dit_jax import data, experiment
from dit_jax.config import ConfigError
from dit_jax.configs import flux_dev_sft
from dit_jax.data import captioned_digits, open_source
from dit_jax.interop.autoencoder_kl import save_autoencoder
from dit_jax.interop.flux_files import save_flux
from dit_jax.interop.models import open_model
from dit_jax.interop.parameters import flatten
from dit_jax.interop.pixel_autoencoder import pixel_autoencoder
from dit_jax.interop.text_encoders import load_text_encoder
from dit_jax.interop.tokenizer_files import load_tokenizer
from dit_jax.launch import extract_features, extraction, training
from dit_jax.models import FluxConfig, Network
from dit_jax.pipelines.small_text import write_text_encoders
from tests.compilations import compilations
from tests.data.test_captioned_folder import write
from tests.data.test_captioned_shards import pack

LONG = "four and five side by side " * 3
CAPTIONS = {f"{i}.png": text for i, text in enumerate(captioned_digits.all_captions()[8:13])}
CAPTIONS["5.png"] = LONG


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """The folder of a pipeline's encoders, its VAE the identity."""
    folder = tmp_path_factory.mktemp("pipeline")
    texts = captioned_digits.all_captions()
    write_text_encoders(folder, texts, text_dim=16, pooled_dim=8, max_length=10)
    save_autoencoder(folder / "vae", *pixel_autoencoder(1))
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write(tmp_path_factory.mktemp("images"), CAPTIONS, size=(16, 8))


def extract(images, pipeline, out, *more, given=("text_length=8", "text_dtype=float32")):
    options = ["data=captioned_folder", f"path={images}", f"vae={pipeline}", "batch_size=8"]
    options += [f"text_encoders={pipeline}", f"out={out}", *given, *more]
    extract_features.main([f"--{option}" for option in options])


@pytest.fixture(scope="module")
def features(images, pipeline, tmp_path_factory):
    out = tmp_path_factory.mktemp("features") / "made"
    extract(images, pipeline, out, "dtype=float32", "kind=samples")
    return out


def states(pipeline, prompts):
    """T5's states and CLIP's vectors, computed by hand."""
    made = []
    for title, encoder, tokenizer, length in (
        ("T5", "text_encoder_2", "tokenizer_2", 8),
        ("CLIP", "text_encoder", "tokenizer", None),
    ):
        encoder, params = load_text_encoder(pipeline / encoder)
        ids = load_tokenizer(pipeline / tokenizer, title)(prompts, length).ids
        made.append(jax.jit(encoder.encode)(params, ids))
    return np.asarray(made[0].tokens), np.asarray(made[1].pooled)


def test_batches_hold_the_embeddings_of_their_captions(features, pipeline, images):
    source = open_source("latents", "train", path=str(features), verify_checksums=True)
    assert source.info.conditions == ("text", "pooled") and source.info.num_classes == 0
    text, pooled = states(pipeline, [*CAPTIONS.values(), ""])
    order = np.array([4, 0, 5])
    batch = source.batch(order)
    np.testing.assert_allclose(batch["text"], text[order], atol=1e-5)
    np.testing.assert_allclose(batch["pooled"], pooled[order], atol=1e-5)
    np.testing.assert_allclose(batch["image"][:, 0, 0, 0], order * 12 / 127.5 - 1, atol=0.02)
    nulls = source.info.null_conditions
    np.testing.assert_allclose(nulls["text"], text[-1], atol=1e-5)
    np.testing.assert_allclose(nulls["pooled"], pooled[-1], atol=1e-5)
    # What drops a caption, and what tells two apart: no two are alike, nor is their order lost.
    distances = np.abs(text[:, None] - text[None]).max(axis=(2, 3)) + np.eye(len(text))
    assert distances.min() > 0.1
    header = source.records.header
    assert header.fields["latents"].versions == ("plain",)
    settings = header.provenance["settings"]
    assert settings["text_length"] == 8 and len(settings["text_sha256"]) == 64


def test_empty_captions_are_told(capsys):
    source = types.SimpleNamespace(captions=("a cat", " \n", ""), describe=lambda i: f"{i}.png")
    source.used = np.array([0, 2])
    texts = types.SimpleNamespace(name="tiny", t5=types.SimpleNamespace(length=8))
    texts.cut_captions = lambda *arguments: ()
    extraction.tell_of_captions(texts, source)
    assert "note: 1 of 2 captions is empty, as dropped captions are; the first is of 1.png" in (
        capsys.readouterr().out
    )


def test_captions_that_are_too_long_are_told_and_shards_are_as_folders(
    images, pipeline, features, tmp_path, capsys
):
    files = [
        pair
        for name, text in CAPTIONS.items()
        for pair in ((name, (images / name).read_bytes()), (f"{name[0]}.txt", text.encode()))
    ]
    shard = pack(tmp_path / "pictures-000.tar", files)
    options = ("data=captioned_shards", f"path={shard.parent}/pictures-{{000..000}}.tar")
    with compilations("_states") as compiled:
        extract(images, pipeline, tmp_path / "out", *options, given=("text_length=8",))
    assert len(compiled) == 1  # of captions, and of the null value
    out = capsys.readouterr().out
    assert "6 different captions, told by" in out
    for title, length in (("CLIP", 10), ("T5", 8)):
        assert f"note: 1 of 6 captions is longer than {title}'s {length} tokens and cut" in out
    assert "5.png" in out and "--config=configs/flux_tiny.py" in out
    # Nothing is published that takes states of these sizes.
    sizes = "--config.model.flux.text_dim=16 --config.model.flux.pooled_dim=8"
    assert sizes in out and "--init_from" not in out
    source = open_source("latents", "train", path=str(tmp_path / "out"))
    assert source.records.header.fields["text"].dtype == "bfloat16"
    of_folder = open_source("latents", "train", path=str(features))
    order = np.arange(len(CAPTIONS))
    ours, theirs = source.batch(order), of_folder.batch(order)
    np.testing.assert_array_equal(ours["pooled"], theirs["pooled"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["text_length=1"], "--text_length=1: expected 2 to 512 tokens"),
        (
            ["text_encoders=IMAGES"],
            "lacks text_encoder/, text_encoder_2/, tokenizer/, tokenizer_2/",
        ),
        (["text_encoders=none/of/these"], "none/of/these does not exist"),
        (["data=image_folder"], "--text_encoders does nothing with --data=image_folder"),
        (["path=none/of/these"], "image folder none/of/these does not exist"),
    ],
)
def test_what_cannot_be_done_is_refused(images, pipeline, tmp_path, capsys, options, message):
    options = [option.replace("IMAGES", str(images)) for option in options]
    if not options[0].startswith("path="):  # said before the VAE is looked for
        options.append("vae=no/such/vae")
    with pytest.raises(SystemExit) as ended:
        extract(images, pipeline, tmp_path / "out", *options)
    assert ended.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_captions_need_encoders(images, pipeline, tmp_path, capsys):
    options = ["data=captioned_folder", f"path={images}", "vae=no/vae", f"out={tmp_path}"]
    with pytest.raises(SystemExit):
        extract_features.main([f"--{option}" for option in options])
    assert "--data=captioned_folder needs --text_encoders=PIPELINE" in capsys.readouterr().err


def tiny(recipe, features, **values):
    """An experiment of configs/ with a tiny network."""
    config = recipe.get_config()
    sizes = {"hidden_size": 32, "depth": 1, "single_depth": 1, "num_heads": 2}
    config.model.flux.update(text_dim=16, pooled_dim=8, layer_loop="scan", **sizes)
    config.model.update(input_size=(8, 16), in_channels=1, remat="none")
    config.training.update(num_steps=2, batch_size=8, tensorboard=False)
    config.data.latents.path = str(features)
    config.update_from_flattened_dict(values)
    return config


@pytest.fixture(scope="module")
def dev(tmp_path_factory):
    """The folder of a tiny FLUX.1 dev as diffusers saves it."""
    config = FluxConfig(
        image_size=(8, 16),
        in_channels=1,
        hidden_size=32,
        depth=1,
        single_depth=1,
        num_heads=2,
        text_dim=16,
        pooled_dim=8,
        guidance_embedding=True,
    )
    network = Network(config)
    folder = tmp_path_factory.mktemp("flux") / "dev"
    save_flux(folder, network, jax.jit(network.init)(jax.random.key(0)))
    return folder


def test_flux_dev_is_fine_tuned_on_them_from_a_diffusers_folder(features, dev, tmp_path):
    options = {"method.label_dropout": 0.5, "data.guidance": 2.0, "optimizer.learning_rate": 0.01}
    config = tiny(flux_dev_sft, features, **options)
    training.run(config, tmp_path / "run", init_from=str(dev))
    start, end = open_model(str(dev)), open_model(str(tmp_path / "run"))
    assert end.config.data.guidance == 2.0 and end.step == 2
    before, after = start.load(), end.load()
    moved = {
        path for path, leaf in flatten(after) if np.abs(leaf - dict(flatten(before))[path]).max()
    }
    assert {"final_layer.linear.kernel", "final_layer.adaLN_modulation.kernel"} <= moved
    missing = tiny(
        flux_dev_sft, "", **{"model.flux.guidance_embedding": False, "data.guidance": 2.0}
    )
    with pytest.raises(ConfigError, match=r"--data=captioned_folder --path=PICTURES"):
        training.run(missing, tmp_path / "none")
    missing.data.latents.path = str(features)
    with pytest.raises(ConfigError, match=r"config\.data\.guidance=2\.0 would do nothing"):
        training.run(missing, tmp_path / "none")


def test_what_does_not_fit_a_networks_text_is_refused_with_what_to_set(features):
    wrong = {"model.flux.text_dim": 24, "model.flux.pooled_dim": 12}
    config = experiment.resolve_config(tiny(flux_dev_sft, features, **wrong))
    sizes = r"config\.model\.flux\.text_dim=16 and config\.model\.flux\.pooled_dim=8"
    with pytest.raises(ConfigError, match=f"set {sizes}, or choose data"):
        experiment.open_data(config, "train")


def test_the_command_that_trains_on_them_has_the_sizes_of_the_network(
    features, pipeline, dev, tmp_path
):
    header = open_source("latents", "train", path=str(features)).records.header
    sizes = ["--config.model.flux.text_dim=16", "--config.model.flux.pooled_dim=8"]
    found = extract_features.captioned_training(str(pipeline), header)
    assert found == ("flux_tiny", sizes)
    whole = tmp_path / "whole"
    shutil.copytree(pipeline, whole)
    shutil.copytree(dev, whole / "transformer")
    (whole / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    name, (start, *options) = extract_features.captioned_training(str(whole), header)
    assert (name, start) == ("flux_dev_sft", f"--init_from={whole}")
    config = flux_dev_sft.get_config()
    values = dict(option.removeprefix("--config.").split("=") for option in options)
    config.model.in_channels = 1
    config.update_from_flattened_dict({key: int(value) for key, value in values.items()})
    experiment.require_same_network(open_model(str(dev)).config, config, "dev")
    published = {"text": data.Field((8, 4096), "bfloat16"), "pooled": data.Field((768,), "float32")}
    header = dataclasses.replace(header, fields={**header.fields, **published}, nulls={})
    found = extract_features.captioned_training(str(pipeline), header)
    assert found == ("flux_dev_sft", ["--init_from=hub:black-forest-labs/FLUX.1-dev"])
