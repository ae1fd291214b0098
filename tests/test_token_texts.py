"""The texts of an output's tokens are found in the checkpoint of its run, wherever that lies."""

import os
import shutil

import pytest

import tiny_models
import tiny_tokenizers
from noria.checkpoint.checkpoint import open_checkpoint
from noria.checkpoint.convert import convert
from noria.desk.token_texts import token_texts
from noria.errors import InputError
from noria.output.export_openai import NoTexts
from noria.output.export_rows import Origin


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    config = tiny_models.LLAMA | {"vocab_size": 420}
    for name, tokenized in (("model", True), ("bare", False)):
        tiny_models.write_directory(folder / name, config, tiny_models.state(config, seed=len(name)))
        for file, content in tiny_tokenizers.files_of(tiny_tokenizers.gpt2()).items() if tokenized else ():
            (folder / name / file).write_bytes(content)
        convert(folder / name, folder / f"{name}.h5")
    return folder


def hash_of(path):
    checkpoint = open_checkpoint(path)
    checkpoint.close()
    return checkpoint.header_hash


def test_the_checkpoint_is_looked_for_where_its_run_named_it_from_here_and_from_the_output(
    folder, tmp_path, monkeypatch
):
    (tmp_path / "runs").mkdir()
    shutil.copy(folder / "model.h5", tmp_path / "runs" / "model.h5")
    origin = Origin(tmp_path / "runs" / "run.h5", hash_of(folder / "model.h5"), "model.h5")
    monkeypatch.chdir(tmp_path)
    found = token_texts(None)(origin)
    ids = tiny_tokenizers.gpt2().encode("the cat 🧬").ids
    assert b"".join(map(found.spelled, ids)).decode() == "the cat 🧬" and len(ids) > 3
    monkeypatch.chdir(tmp_path / "runs")
    assert token_texts(None)(origin).spelled(0) == found.spelled(0)
    assert token_texts("model.h5")(Origin(tmp_path / "x.h5", origin.checkpoint)).spelled(0) == found.spelled(0)
    # another checkpoint of that name is passed over where the right one is beside the output
    shutil.copy(folder / "bare.h5", tmp_path / "model.h5")
    monkeypatch.chdir(tmp_path)
    assert token_texts(None)(origin).spelled(0) == found.spelled(0)


def test_another_checkpoint_and_none_are_refused_with_the_remedy(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    right = hash_of("model.h5")
    for model, origin, words in (
        (None, Origin(tmp_path / "run.h5", right, "bare.h5"), "bare.h5 is another checkpoint"),
        ("bare.h5", Origin(tmp_path / "run.h5", right, "model.h5"), "bare.h5 is another checkpoint"),
        (None, Origin(tmp_path / "run.h5", right, "gone.h5"), "gone.h5 is not there"),
        (None, Origin(tmp_path / "run.h5", right), "it is not named"),
    ):
        with pytest.raises(
            InputError, match=rf"\({words}\): name it with --model FILE.h5, or --model none writes token_id:N"
        ):
            token_texts(model)(origin)
    os.makedirs(tmp_path / "model.h5")
    with pytest.raises(InputError, match="is not there"):
        token_texts(str(tmp_path / "model.h5"))(Origin(tmp_path / "run.h5", right))


def test_a_checkpoint_without_a_tokenizer_knows_no_texts(folder, tmp_path):
    origin = Origin(tmp_path / "run.h5", hash_of(folder / "bare.h5"), str(folder / "bare.h5"))
    assert isinstance(token_texts(None)(origin), NoTexts)
    assert isinstance(token_texts("none")(Origin(tmp_path / "run.h5")), NoTexts)
