import json
import shutil
import sys

import numpy as np
import pytest
import transformers

from dit_jax.interop.tensors import InteropError
from dit_jax.interop.tokenizer_files import CLIP, T5, load_tokenizer
from tests.tokenizers import PROMPTS, write_clip, write_t5

CLASSES = {CLIP: transformers.CLIPTokenizer, T5: transformers.T5TokenizerFast}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    write_clip(root / CLIP)
    write_t5(root / T5)
    return root


@pytest.mark.parametrize(("kind", "length"), [(CLIP, 77), (CLIP, 20), (T5, 256), (T5, 30)])
def test_ids_are_those_of_transformers(folders, tmp_path, kind, length):
    theirs = CLASSES[kind].from_pretrained(folders / kind)
    ours = load_tokenizer(folders / kind, kind)
    assert ours.max_length == {CLIP: 77, T5: 512}[kind] and ours.vocab_size == len(theirs)
    theirs.save_pretrained(tmp_path / "saved")  # of CLIP as tokenizer.json
    assert (tmp_path / "saved" / "tokenizer.json").is_file()
    wanted = theirs(PROMPTS, padding="max_length", max_length=length, truncation=True)
    for tokenizer in (ours, load_tokenizer(tmp_path / "saved", kind)):
        found = tokenizer(PROMPTS, length)
        assert found.ids.dtype == np.int32 and found.ids.shape == (len(PROMPTS), length)
        np.testing.assert_array_equal(found.ids, wanted.input_ids)
        np.testing.assert_array_equal(found.mask, np.asarray(wanted.attention_mask, bool))


@pytest.mark.parametrize("kind", [CLIP, T5])
def test_what_does_not_fit_is_told(folders, kind):
    tokenizer = load_tokenizer(folders / kind, kind)
    whole = tokenizer(PROMPTS, 400)
    assert not any(whole.cut)
    prompt = PROMPTS[-1]
    found = tokenizer(["a cat", prompt], 24)
    assert found.cut[0] == "" and prompt.endswith(found.cut[1] + " ") and found.mask[1].all()
    kept = prompt.removesuffix(" ").removesuffix(found.cut[1])
    np.testing.assert_array_equal(found.ids[1][:20], tokenizer([kept], 24).ids[0][:20])


def test_without_a_limit_prompts_are_as_long_as_the_longest(folders, tmp_path):
    shutil.copytree(folders / T5, tmp_path / T5)
    options = json.loads((tmp_path / T5 / "tokenizer_config.json").read_text())
    options["model_max_length"] = int(1e30)  # how transformers says that there is none
    (tmp_path / T5 / "tokenizer_config.json").write_text(json.dumps(options))
    tokenizer = load_tokenizer(tmp_path / T5, T5)
    assert tokenizer.max_length is None
    found = tokenizer(["a", "a cat"])
    assert found.mask[1].all() and not found.mask[0].all()


@pytest.mark.parametrize("kind", [CLIP, T5])
def test_a_saved_tokenizer_has_the_same_files(folders, tmp_path, kind):
    load_tokenizer(folders / kind, kind).save(tmp_path / "again")
    saved = {file.name: file.read_bytes() for file in (tmp_path / "again").iterdir()}
    assert saved == {file.name: file.read_bytes() for file in (folders / kind).iterdir()}


def changed(folders, tmp_path, kind, name, content):
    """A tokenizer's folder with one file changed, or left out."""
    shutil.copytree(folders / kind, tmp_path / kind)
    file = tmp_path / kind / name
    file.unlink() if content is None else file.write_text(content)
    return tmp_path / kind


@pytest.mark.parametrize(
    ("kind", "name", "content", "message"),
    [
        (CLIP, "merges.txt", None, "has neither tokenizer.json nor merges.txt"),
        (CLIP, "vocab.json", None, "has neither tokenizer.json nor vocab.json"),
        (CLIP, "vocab.json", '{"a": "b"}', "is no vocabulary"),
        (CLIP, "vocab.json", '{"a": 1}', "has no token '<|startoftext|>'"),
        (CLIP, "merges.txt", "a b c", "merges.txt, line 1: expected two tokens"),
        (CLIP, "merges.txt", "never seen", "vocab.json and merges.txt do not fit"),
        (T5, "tokenizer_config.json", '{"pad_token": "?!"}', "has no token '?!' to pad"),
        (T5, "tokenizer.json", None, "has no tokenizer.json: it holds no T5 tokenizer"),
        (T5, "tokenizer.json", '{"model": 1}', "is no tokenizer that tokenizers reads"),
    ],
)
def test_files_that_are_missing_or_wrong_are_errors(
    folders, tmp_path, kind, name, content, message
):
    folder = changed(folders, tmp_path, kind, name, content)
    with pytest.raises(InteropError) as caught:
        load_tokenizer(folder, kind)
    assert message in str(caught.value)


def test_pieces_alone_are_an_error_that_says_how_to_convert_them(folders, tmp_path):
    folder = changed(folders, tmp_path, T5, "tokenizer.json", None)
    (folder / "spiece.model").write_bytes(b"pieces")
    with pytest.raises(InteropError, match=r"spiece.model alone.*save_pretrained\("):
        load_tokenizer(folder, T5)
    with pytest.raises(InteropError, match="there is no folder"):
        load_tokenizer(folder / "none", T5)


def test_wrong_calls_and_a_missing_library_are_errors(folders, monkeypatch):
    tokenizer = load_tokenizer(folders / CLIP, CLIP)
    with pytest.raises(ValueError, match="expected a list of strings"):
        tokenizer("a cat")
    with pytest.raises(ValueError, match="max_length=2: a prompt has 2 special tokens"):
        tokenizer(["a cat"], 2)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install 'dit-jax\[text\]'"):
        load_tokenizer(folders / CLIP, CLIP)
