"""Files from strangers, opened one after another by a process that its parent watches.

`python -m tests.hostile_files FOLDER` makes and opens every file of `CASES`, and writes a line of
JSON before and after each: {"begun": name}, {"name", "error", "message"}. A case is what makes the
file and returns how to open it; and what the error's message must say ("" where there must be
none).
"""

import json
import os
import struct
import sys
from pathlib import Path

import numpy as np

from tests import hostile_archives as archives
from tests.hostile_archives import GIB, call, entry, integer, state_dict, tensor, text, write_pt

SECRET = "root:x:0:0:the secret of another file"
CASES = {}


def case(says, **options):
    """Registers a maker of a file under its name; for each of `options` once, with its value."""

    def register(make):
        name = make.__name__
        for option, value in options.items():
            expected, *arguments = value if isinstance(value, tuple) else (says, value)
            CASES[f"{name}-{option}"] = (lambda folder, a=arguments: make(folder, *a), expected)
        if not options:
            CASES[name] = (make, says)
        return make

    return register


def opened(path):
    """How a file of tensors is opened, and read."""
    from dit_jax.interop.tensors import open_tensors

    def read():
        file = open_tensors(path)
        for _ in file.read(list(file.specs)):
            pass

    return read


# Files of torch.save.

ONE = tensor(4, (4,), (1,))
BOMB = entry("a/data/0", compressed=archives.zeros(3 * GIB), size=3 * GIB)


@case(
    "",
    beyond_its_tensor=("should have 16 bytes by its tensors' shapes", state_dict(ONE), BOMB),
    in_proportion_to_its_tensor=(
        "would become 3221225472 by decompression",
        state_dict(tensor(3 * GIB // 4, (3 * GIB // 4,), (1,))),
        BOMB,
    ),
    of_no_tensor=(
        "belong to no tensor",
        state_dict(ONE),
        entry("a/data/0", bytes(16)),
        BOMB | {"name": b"a/byteorder"},
    ),
    as_pickle=("describes its tensors in", None, BOMB | {"name": b"a/data.pkl"}),
)
def archive_that_inflates(folder, pickled, *entries):
    path = folder / "a.pt"
    if pickled is None:
        archives.write_zip(path, list(entries))
    else:
        write_pt(path, pickled, *entries)
    return opened(path)


@case(
    "",
    overlapping=(
        "lie over one another",
        [entry("a/data.pkl", bytes(4000)), entry("a/data/0", bytes(4000), offset=0)],
    ),
    of_one_name=("two records of one name", [entry("a/data.pkl"), entry("a/DATA.pkl")]),
    with_untrue_sizes=("size is not true", [entry("a/data.pkl", b"..", size=2**62)]),
    of_400000_records=("has a directory of", [entry(f"a/{i}") for i in range(400_000)]),
    nested=("zip archive, not like a file of torch.save", [entry("a/b.zip", b"PK\3\4")]),
)
def archive(folder, entries):
    archives.write_zip(folder / "a.pt", entries)
    return opened(folder / "a.pt")


def doubled(times: int) -> bytes:
    """Operations for a tuple of two times the same tuple of two times the same ..., as a key."""
    return b"}" + b")" + b"q\0h\0\x86" + b"q\0h\0\x86" * times + b"K\1s"


@case(
    "holds pickled objects|truncated, or no file of torch.save|it is truncated, damaged or no",
    binbytes8=b"\x80\x04\x8e" + struct.pack("<Q", 2**60),
    bytearray8=b"\x80\x05\x96" + struct.pack("<Q", 2**62),
    binunicode8=b"\x80\x04\x8d" + struct.pack("<Q", 2**40),
    long4=b"\x80\x02\x8b\xff\xff\xff\x7f",
    frame=b"\x80\x04\x95" + struct.pack("<Q", 2**61) + b"N.",
    memo=b"\x80\x02]r\xff\xff\xff\xff.",
    hashes=b"\x80\x02" + doubled(60) + b".",
    nesting=b"\x80\x02)" + b"\x85" * 1_000_000 + b".",
    equal_hashes=b"\x80\x02}("
    + b"".join(integer((2**61 - 1) * i) + b"N" for i in range(1, 300_000))
    + b"u.",
    length=state_dict(call("builtins", "bytearray", integer(2**40))),
    codecs=state_dict(
        call("_codecs", "encode", text("x") + text("utf-32")) + b"q\0" + call("torch", "Size")
    ),
    storage=state_dict(call("torch", "FloatStorage", integer(2**40))),
    tensor=state_dict(call("torch", "Tensor", integer(2**40))),
    set_state=state_dict(ONE + b"Nb"),
    beyond_its_storage=state_dict(tensor(4, (2**36,), (1,))),
    expanded=state_dict(tensor(4, (2**20, 2**20), (0, 0))),
)
def pickled(folder, content):
    path = folder / "a.pt"
    write_pt(path, content, entry("a/data/0", bytes(16)))
    (folder / "b.pkl").write_bytes(content)

    def read():
        from dit_jax.interop.edm_pickle import open_network_pickle

        messages = []
        for opening in (opened(path), lambda: open_network_pickle(folder / "b.pkl")):
            try:
                opening()
                messages.append("no error")
            except ValueError as error:
                messages.append(f"{type(error).__name__}: {error}")
        if "no error" not in messages:
            raise ValueError("; ".join(messages))

    return read


# Safetensors and indices.


def header(folder, text_):
    text_ = text_ if isinstance(text_, bytes) else json.dumps(text_).encode()
    path = folder / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(text_)) + text_)
    return opened(path)


def floats(*shape, extent=(0, 0)):
    return {"dtype": "F32", "shape": list(shape), "data_offsets": list(extent)}


@case(
    "",
    of_1000000_entries=("header of .* bytes; at most", 1_000_000),
    of_150000_entries=("150000 tensors in its header", 150_000),
)
def safetensors_header(folder, count):
    one = json.dumps(floats(0)).replace(" ", "")
    return header(folder, ("{" + ",".join(f'"{i}":{one}' for i in range(count)) + "}").encode())


@case(
    "",
    nested=("nested too deeply", b'{"a":' + b"[" * 100_000),
    twice=(
        "is there twice",
        b"{" + b"".join(b'"%d":0,' % i for i in range(90_000)) + b'"89999":0}',
    ),
    absurd=("impossible shape", {"a": floats(2**62, 0)}),
    dimensions=("malformed", {"a": floats(*[10] * 1000)}),
    digits=("cannot be read", b'{"a":{"dtype":"F32","shape":[' + b"9" * 10_000 + b"]}}"),
    named_at_length=("is no name of a tensor", {"module." * 200_000: floats(0)}),
    listed=("is no table of tensors|neither safetensors", b"[" + b" " * 20 + b"]"),
)
def safetensors(folder, content):
    return header(folder, content)


@case(
    "",
    listed=("weight_map", {"weight_map": ["a"]}),
    outside=("shards must lie in its own folder", {"weight_map": {"a": "../x.safetensors"}}),
    typed=("shards must lie in its own folder", {"weight_map": {"a": 3}}),
    nested=("nested too deeply", b'{"a":' * 100_000),
    endless=("number without end", b'{"a": ' + b"9" * 100_000 + b"}"),
    long=("is longer than", b'{"a": "' + b"x" * 20_000_000 + b'"}'),
)
def index(folder, content):
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    (folder / "a.safetensors.index.json").write_bytes(content)
    return opened(folder / "a.safetensors.index.json")


# What is no regular file, and links.


@case(
    "not a regular file|does not exist|holds no .safetensors",
    fifo=os.mkfifo,
    device=lambda path: path.symlink_to("/dev/zero"),
    folder=os.mkdir,
    circle=lambda path: path.symlink_to(path.name),
)
def irregular(folder, make):
    path = folder / "a.pt"
    make(path)

    def read():
        from dit_jax.data.records.reader import read_header
        from dit_jax.evaluation.files import load_adm_npz
        from dit_jax.evaluation.reference import load_reference
        from dit_jax.interop.edm_pickle import open_network_pickle
        from dit_jax.interop.models import open_model
        from dit_jax.untrusted import read_json

        readers = [opened(path), lambda: open_model(path), lambda: open_network_pickle(path)]
        readers += [lambda: read_header(path), lambda: load_adm_npz(path)]
        readers += [lambda: load_reference(path, None), lambda: read_json(path)]
        messages = []
        for reader in readers:
            try:
                reader()
                return
            except (ValueError, OSError) as error:
                messages.append(f"{type(error).__name__}: {error}")
        raise ValueError("; ".join(messages))

    return read


def diffusers_folder(folder, **changes):
    """A transformer's folder of diffusers with a small weights file."""
    from dit_jax.interop.tensors import TensorSpec, write_safetensors

    values = {"_class_name": "DiTTransformer2DModel", "num_layers": 1, "sample_size": 8}
    values |= {"num_attention_heads": 2, "attention_head_dim": 8} | changes
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(values))
    specs = {"transformer_blocks.0.a": TensorSpec((2,), np.float32)}
    weights = folder / "diffusion_pytorch_model.safetensors"
    write_safetensors(weights, specs, iter([np.zeros(2, np.float32)]))
    return weights


def model(path):
    def read():
        from dit_jax.interop.models import open_model

        open_model(path).load()

    return read


@case("", file=("link out of", "weights"), folder=("link out of", "folder"))
def linked_outside(folder, what):
    weights = diffusers_folder(folder / "model" / "transformer")
    (folder / "secret").mkdir()
    secret = folder / "secret" / weights.name
    secret.write_text(SECRET)
    if what == "weights":
        weights.unlink()
        weights.symlink_to(secret)
    else:
        (folder / "model" / "transformer").rename(folder / "secret" / "transformer")
        (folder / "model" / "transformer").symlink_to(folder / "secret" / "transformer")
    (folder / "model" / "model_index.json").write_text("{}")
    return model(folder / "model")


@case("no format known here")
def text_named_as_checkpoint(folder):
    (folder / "a.pt").write_text(SECRET)
    return opened(folder / "a.pt")


@case("")
def hub_cache_is_readable(folder):
    revision = folder / "models--a--b" / "snapshots" / ("0" * 40)
    weights = diffusers_folder(revision / "transformer")
    blobs = folder / "models--a--b" / "blobs"
    blobs.mkdir()
    for file in (weights, revision / "transformer" / "config.json"):
        file.rename(blobs / file.name)
        file.symlink_to(Path("../../../blobs") / file.name)

    def read():
        from dit_jax.interop.claims import read_object

        opened(revision / "transformer")()
        read_object(revision / "transformer" / "config.json", revision)

    return read


@case(
    "",
    layers=("num_layers=1000000000, but .* holds only 1 tensor:", {"num_layers": 10**9}),
    heads=("num_attention_heads=10{15}, but", {"num_attention_heads": 10**15}),
    side=("sample_size=1000000000; at most", {"sample_size": 10**9}),
    word=("num_layers='28'; expected an integer", {"num_layers": "28"}),
    infinite=("norm_eps=inf; expected a finite number", {"norm_eps": float("inf")}),
    negative=("patch_size=-2; expected an integer", {"patch_size": -2}),
)
def diffusers_config(folder, changes):
    diffusers_folder(folder / "model", **changes)
    return model(f"diffusers:{folder / 'model'}")


@case("", listed=("holds a list; expected an object", b"[]"), nested=("nested", b"[" * 100_000))
def diffusers_config_text(folder, content):
    diffusers_folder(folder / "model")
    (folder / "model" / "config.json").write_bytes(content)
    return model(f"diffusers:{folder / 'model'}")


@case(
    "",
    layers=("layers_per_block=1000000000, but", {"layers_per_block": 10**9}),
    widths=("expected a list of integers", {"block_out_channels": [64] * 1000}),
)
def autoencoder(folder, changes):
    weights = diffusers_folder(folder / "vae")
    values = {"_class_name": "AutoencoderKL", "norm_num_groups": 1} | changes
    (weights.parent / "config.json").write_text(json.dumps(values))

    def read():
        from dit_jax.interop.autoencoder_kl import load_autoencoder

        load_autoencoder(weights.parent)

    return read


@case("num_train_timesteps=10{12}; at most")
def scheduler(folder):
    from dit_jax.interop.schedulers import process_from_scheduler

    return lambda: process_from_scheduler({"num_train_timesteps": 10**12}, "scheduler")


@case(
    "",
    listed=("holds a list", "[]"),
    typed=("learning_rate=.* is of type tuple", '{"optimizer": {"learning_rate": []}}'),
    endless=("is of type int", '{"optimizer": {"learning_rate": 1' + "0" * 400 + "}}"),
    nested=("nested too deeply", '{"a":' * 200 + "1" + "}" * 200),
)
def workdir(folder, content):
    (folder / "config.json").write_text(content)

    def read():
        from dit_jax.training.workdir import WorkdirError, load_config

        try:
            load_config(folder)
        except WorkdirError as error:
            raise ValueError(str(error)) from error

    return read


# Data.


def latents_header():
    """A set of one shard, as it should be."""
    shard = {"count": 2}
    for part in ("latents", "labels"):
        shard |= {f"{part}_file": f"s.{part}.npy", f"{part}_bytes": 0, f"{part}_sha256": "0" * 64}
    texts = ("vae_name", "vae_sha256", "source_name", "source_fingerprint")
    return {name: "x" for name in texts} | {
        "format": "dit_jax.latents",
        "version": 1,
        "scaling_factor": 1.0,
        "shift_factor": 0.0,
        "latent_shape": [2, 2, 1],
        "dtype": "float32",
        "kind": "samples",
        "flip": "none",
        "split": "train",
        "num_classes": 2,
        "class_names": [],
        "count": 2,
        "shards": [shard],
    }


@case(
    "",
    sound=("", {}, {}),
    outside=("shards must lie in its own folder", {}, {"latents_file": "../outside.npy"}),
    absolute=("shards must lie in its own folder", {}, {"labels_file": "/etc/passwd"}),
    string=("shards is 'x'; expected a list of objects", {"shards": "x"}, {}),
    strings=("expected a list of objects", {"shards": ["x"]}, {}),
    missing=("missing fields", {}, {"latents_file": None}),
    shape=("latent_shape is .*; expected a list of 3", {"latent_shape": [2**40, 2**40, 4]}, {}),
    negative=("latent_shape is .*; expected a list of 3", {"latent_shape": [-1, 2, 2]}, {}),
    large=("beyond any use", {"latent_shape": [2**14, 2**14, 4]}, {}),
    count=("expected an integer from", {"count": 10**15}, {"count": 10**15}),
    counts=("counts 10 images, its shards 2", {"count": 10}, {}),
    scale=("scaling_factor is nan; expected a finite number", {"scaling_factor": float("nan")}, {}),
    zero=("scaling_factor is 0", {"scaling_factor": 0}, {}),
    word=("scaling_factor is '1'", {"scaling_factor": "1"}, {}),
    classes=("num_classes is", {"num_classes": 10**12}, {}),
    bytes=("contradicts itself", {}, {"latents_bytes": 10**9}),
    listed=("holds a list; expected an object", None, {}),
)
def latents(folder, changes, shard):
    content = latents_header()
    arrays = {"latents": np.zeros((2, 1, 2, 2, 1), np.float32), "labels": np.zeros(2, np.int32)}
    for part, array in arrays.items():
        np.save(folder / f"s.{part}.npy", array)
        content["shards"][0][f"{part}_bytes"] = (folder / f"s.{part}.npy").stat().st_size
    for name, value in shard.items():
        content["shards"][0][name] = value
        if value is None:
            del content["shards"][0][name]
    content = [] if changes is None else content | changes
    (folder / "header.json").write_text(json.dumps(content))
    return open_set(folder)


def open_set(folder):
    def read():
        from dit_jax.data.latents import open_latents

        open_latents("train", path=str(folder)).batch(np.arange(2))

    return read


@case(
    "", pickle=("not a plain .npy", "pickle"), link=("link out of", "link"), fifo=("pipe", "fifo")
)
def latents_shard(folder, what):
    latents(folder, {}, {})
    shard = folder / "s.latents.npy"
    size = shard.stat().st_size
    shard.unlink()
    if what == "link":
        (folder.parent / "outside.npy").write_bytes(bytes(size))
        shard.symlink_to(folder.parent / "outside.npy")
    elif what == "fifo":
        os.mkfifo(shard)
    else:
        shard.write_bytes(b"\x80\x02cposix\nsystem\n".ljust(size, b"."))
    return open_set(folder)


def records_header():
    """A set of one shard as it should be, of the format of now."""
    stored = {"bytes": 0, "sha256": "0" * 64}
    plain = {"versions": [], "posterior": False, "shift": 0.0, "scale": 1.0, "condition": False}
    return {
        "format": "dit_jax.records",
        "version": 1,
        "kind": "latents",
        "fields": {
            "latents": plain | {"shape": [2, 2, 1], "dtype": "float32"},
            "label": plain | {"shape": [], "dtype": "int32", "condition": True},
            "text": plain | {"shape": [None, 2], "dtype": "bfloat16", "condition": True},
        },
        "provenance": {},
        "split": "train",
        "num_classes": 2,
        "class_names": [],
        "shard_size": 2,
        "nulls": {"text": {"file": stored | {"name": "n.npy"}, "shape": [1, 2]}},
        "count": 2,
        "shards": [
            {
                "count": 2,
                "files": {n: stored | {"name": f"{n}.npy"} for n in ("latents", "label", "text")},
                "shapes": {"text": [3, 2]},
            }
        ],
    }


SHARD, FIELD = ("shards", 0), ("fields", "latents")


@case(
    "",
    sound=("", (), None),
    listed=("holds a list; expected an object", None, None),
    later=("version 2; this code reads version 1", ("version",), 2),
    format=("is not the header of a set of records", ("format",), ["dit_jax.records"]),
    other=("the header says", (*FIELD, "shape"), [2, 2]),
    kind=("holds pairs, not latents", ("kind",), "pairs"),
    path=("small letters, digits and _", ("kind",), "../pairs"),
    field=("expected an object", (*FIELD,), 3),
    no_field=("missing fields", ("fields",), {}),
    many=("more than 32 fields", ("fields",), {f"a{i}": {} for i in range(10**4)}),
    dtype=("dtype must be one of", (*FIELD, "dtype"), "object"),
    shape=("shape is .*; expected a list of at most", (*FIELD, "shape"), [2**40, 2, 1]),
    axes=("shape is .*; expected a list of at most", (*FIELD, "shape"), [1] * 20),
    negative=("shape is .*; expected a list of at most", (*FIELD, "shape"), [-2, 2, 1]),
    large=("beyond any use", (*FIELD, "shape"), [2**14, 2**14, 4]),
    nan=("scale is nan; expected a finite number", (*FIELD, "scale"), float("nan")),
    zero=("make nothing of a number", (*FIELD, "scale"), 0.0),
    shift=("shift is inf; expected a finite number", (*FIELD, "shift"), float("inf")),
    posterior=("posterior is 1; expected true or false", (*FIELD, "posterior"), 1),
    versions=("versions of a record", (*FIELD, "versions"), ["x"] * 10**4),
    label=("the field label must be", ("fields", "label", "dtype"), "float32"),
    count=("expected an integer from", (*SHARD, "count"), 10**15),
    counts=("counts 10 records, its shards 2", ("count",), 10),
    classes=("num_classes is", ("num_classes",), 10**12),
    names=("1 class_names for 2 classes", ("class_names",), ["a"]),
    strings=("expected a list of objects", ("shards",), ["x"]),
    file=("expected an object", (*SHARD, "files", "label"), "label.npy"),
    outside=("lie in its own folder", (*SHARD, "files", "label", "name"), "../outside.npy"),
    absolute=("lie in its own folder", (*SHARD, "files", "text", "name"), "/etc/passwd"),
    bytes=("contradicts itself", (*SHARD, "files", "latents", "bytes"), 10**9),
    no_shape=("missing fields", (*SHARD, "shapes"), {}),
    other_shape=("the field's shape is", (*SHARD, "shapes", "text"), [3, 5]),
    open_shape=("the field's shape is", (*SHARD, "shapes", "text"), [None, 2]),
    large_text=("beyond any use", (*SHARD, "shapes", "text"), [2**14, 2]),
    null=("lie in its own folder", ("nulls", "text", "file", "name"), "../outside.npy"),
    null_shape=("null value of", ("nulls", "text", "shape"), [2]),
    null_size=("the header says", ("nulls", "text", "shape"), [10, 2]),
    null_of=("null value of shape", ("nulls",), {"x": {"file": {}, "shape": [1]}}),
)
def records(folder, place, value):
    content = records_header()
    if place and place[-1] == "text" and value == [2**14, 2]:
        content["fields"]["text"]["shape"] = [None, 2**14]
        value = [2**14, 2**14]
    shard = content["shards"][0]["files"]
    for name, array in (
        ("latents", np.zeros((2, 2, 2, 1), np.float32)),
        ("label", np.zeros(2, np.int32)),
        ("text", np.zeros((2, 3, 2), np.uint16)),
        ("n", np.zeros((1, 2), np.uint16)),
    ):
        np.save(folder / f"{name}.npy", array)
        stored = shard[name] if name in shard else content["nulls"]["text"]["file"]
        stored["bytes"] = (folder / f"{name}.npy").stat().st_size
    if place:
        *parents, last = place
        part = content
        for key in parents:
            part = part[key]
        part[last] = value
    (folder / "header.json").write_text(json.dumps([] if place is None else content))
    return open_set(folder)


@case(
    "",
    shards=("shards is 'x'; expected a list of objects", {"shards": "x"}),
    times=("times is .*; expected a list of finite", {"times": [1.0, float("inf")]}),
    process=("process is 3; expected an object", {"process": 3}),
    outside=("shards must lie in its own folder", {}),
)
def pairs(folder, changes):
    stored = {"name": "../x.npy", "bytes": 1, "sha256": "0" * 64}
    content = {"format": "dit_jax.pairs", "version": 1, "teacher_source": "x", "teacher_hash": "x"}
    content |= {"process": {}, "sampling": {}, "times": [1.0, 0.0], "path_times": [1.0]}
    content |= {"start_scale": 1.0, "seed": 0, "batch_size": 1, "sample_shape": [2, 2, 1]}
    content |= {"num_classes": 0, "dtype": "float32", "count": 1}
    shard = {"count": 1, "noise": stored, "x0": stored, "labels": stored, "path": None}
    (folder / "header.json").write_text(json.dumps(content | {"shards": [shard]} | changes))

    def read():
        from dit_jax.data.pairs import open_pairs

        open_pairs("train", path=str(folder))

    return read


def npy(dtype, *shape) -> bytes:
    """The header of a .npy file."""
    text_ = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text_)) + text_


def inflating(name, dtype="|u1", shape=(3 * GIB,)) -> dict:
    """An array that becomes 3 GiB by decompression."""
    begin = archives.zlib.compressobj(9, archives.zlib.DEFLATED, -15)
    head = npy(dtype, *shape)
    compressed = begin.compress(head) + begin.flush(archives.zlib.Z_FULL_FLUSH)
    compressed += archives.zeros(3 * GIB)
    return entry(f"{name}.npy", compressed=compressed, size=len(head) + 3 * GIB)


@case(
    "",
    inflating=("would become", [inflating("labels")]),
    lying=("its size is not that of its header", [entry("labels.npy", npy("<i4", 2**40))]),
    objects=("Python objects", [entry("labels.npy", npy("|O", 2) + b"\x80\x02]q.")]),
)
def npz(folder, entries):
    archives.write_zip(folder / "train.npz", [entry("jpeg.npy", npy("|u1", 0)), *entries])

    def read():
        from dit_jax.data.jpeg_npz import open_jpeg_npz

        open_jpeg_npz("train", path=str(folder / "{split}.npz"))

    return read


@case("", arrays=("would become", "load_adm_npz"), stream=("is damaged", "NpzImages"))
def samples(folder, reader):
    path = folder / "a.npz"
    shape = (1, 2**15, 2**15, 3)
    archives.write_zip(path, [inflating("arr_0", shape=shape)])

    def read():
        from dit_jax import evaluation

        found = getattr(evaluation, reader)(path)
        for _ in found.batches(64):
            pass

    return read


@case("'metadata'", metadata=[("metadata", "[]")], none=[])
def reference(folder, arrays):
    path = folder / "a.npz"
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3), **{k: np.array(v) for k, v in arrays})

    def read():
        from dit_jax.evaluation.reference import load_reference

        load_reference(path, None)

    return read


def png(path, width, height) -> None:
    """A picture of one colour, of 8 bits and one channel."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc(kind + data))

    crc = archives.zlib.crc32
    size = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = archives.zlib.compress(bytes(min((width + 1) * height, 2**24)))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


@case("", bomb=("65535 x 65535|exceeds limit", 65535), large=("pixels", 9000), sound=("", 8))
def image_folder(folder, side):
    for name in ("a", "b"):
        (folder / name).mkdir()
        (folder / name / "loop").symlink_to(folder)
        (folder / name / "again").symlink_to(folder / name)
        png(folder / name / "1.png", side, side)
        os.mkfifo(folder / name / "2.png")

    def read():
        from dit_jax.data.image_folder import open_image_folder
        from dit_jax.evaluation import FolderImages

        source = open_image_folder("train", path=str(folder), verify="full")
        # The links lead to the other class as well: each picture once a class.
        if len(source) != 4 or FolderImages(folder).count != 2:
            raise AssertionError(f"{len(source)} images")

    return read


def main(root: Path) -> None:
    """Opens every file; see the module."""
    import torch  # noqa: F401 (before the first case, whose time it would take)

    import dit_jax.interop.autoencoder_kl
    import dit_jax.interop.models  # noqa: F401

    chosen = sys.argv[2:] or CASES
    print(json.dumps({"begun": None}), flush=True)
    for number, name in enumerate(chosen):
        make, _ = CASES[name]
        folder = root / str(number) / "folder"
        folder.mkdir(parents=True)
        print(json.dumps({"begun": name}), flush=True)
        found = {"name": name, "error": "", "message": ""}
        try:
            make(folder)()
        except BaseException as error:
            found |= {"error": type(error).__name__, "message": str(error)}
            found["known"] = isinstance(error, ValueError | OSError)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
