"""Published config.json files: every key is used, known to be without effect, or refused by its name and value."""

import copy
import json
import re
from pathlib import Path

import pytest
from transformers import AutoConfig

import decoders
import families
import mixtures
from counts import some
from noria import kinds
from noria.checkpoint.checkpoint import model_shape
from noria.errors import InputError
from noria.models._refused import OBSTACLES
from published_configs import CONFIGS

WORDS = (
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "activation",
    "scoring_func",
    "topk_method",
    "moe_gate",
)
NEVER_READ = {("gemma2", "hidden_act"), ("starcoder2", "activation_function")}  # beside the key that is


def text_of(config):
    return config.get("text_config", config)


def refused(config, name):
    with pytest.raises(InputError) as error:
        model_shape(config, name)
    message = str(error.value)
    assert "\n" not in message and len(message) < 400
    return message


@pytest.mark.parametrize("name", CONFIGS)
def test_a_published_config_is_taken_with_every_key_that_it_has(name):
    _, shape = model_shape(CONFIGS[name], name)
    assert shape.num_layers and shape.vocab_size


@pytest.mark.parametrize("name", CONFIGS)
def test_a_key_that_nobody_knows_is_refused_by_its_name_and_value(name):
    config = copy.deepcopy(CONFIGS[name])
    text_of(config)["use_unheard_of"] = "attention"
    assert "use_unheard_of is 'attention'" in refused(config, name)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_an_earlier_version_took_has_its_shape_without_the_key_and_a_line_that_names_it(name):
    config, notes = copy.deepcopy(CONFIGS[name]), []
    text_of(config).update({"use_unheard_of": "attention", "more_unheard_of": 2})
    family, shape = model_shape(config, name, notes)
    assert (family, shape) == model_shape(CONFIGS[name], name)
    (note,) = notes
    assert "use_unheard_of is 'attention' (and more_unheard_of): Noria does not" in note and "\n" not in note


ROPES = ("rope_scaling", "rope_parameters")


@pytest.mark.parametrize("name", [name for name in CONFIGS if any(text_of(CONFIGS[name]).get(rope) for rope in ROPES)])
def test_so_has_one_with_a_key_of_its_rope_beside_another(name):
    config, notes = copy.deepcopy(CONFIGS[name]), []
    text = text_of(config)
    rope = next(text[rope] for rope in ROPES if text.get(rope))
    for place in [one for one in rope.values() if isinstance(one, dict)] or [rope]:
        place["unheard_of"] = 1
    text["use_unheard_of"] = "attention"
    assert model_shape(config, name, notes) == model_shape(CONFIGS[name], name)
    assert "unheard_of of rope_scaling is 1: Noria does not" in notes[0] and "use_unheard_of is" in notes[1]
    assert "unheard_of of rope_scaling is 1: Noria does not know what it asks for" in refused(config, name)


@pytest.mark.parametrize("name", CONFIGS)
def test_notes_of_whoever_wrote_a_config_and_ids_of_its_tokenizer_are_taken(name):
    config = copy.deepcopy(CONFIGS[name])
    text_of(config).update({"_model_name_or_path": "a run's own name", "unk_token_id": 0})
    model_shape(config, name)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_word_that_is_not_known_is_refused_by_its_key_and_value(name):
    changed = []
    for key in WORDS:
        config = copy.deepcopy(CONFIGS[name])
        if isinstance(text_of(config).get(key), str) and (name, key) not in NEVER_READ:
            text_of(config)[key] = "unheard_of"
            changed.append((config, key))
    for place in ("rope_scaling", "rope_parameters"):
        config = copy.deepcopy(CONFIGS[name])
        rope = text_of(config).get(place)
        if isinstance(rope, dict):
            for its in [one for one in rope.values() if isinstance(one, dict)] or [rope]:
                its["rope_type"] = "unheard_of"
            changed.append((config, "rope type"))
    config = copy.deepcopy(CONFIGS[name])
    if text_of(config).get("layer_types"):
        text_of(config)["layer_types"][-1] = "unheard_of"
        changed.append((config, "layer_types"))
    for config, words in changed:
        message = refused(config, name)
        assert words in message and ("unheard_of" in message or words == "layer_types"), message


ALL = {**families.CONFIGS, **decoders.CONFIGS, **mixtures.CONFIGS}


@pytest.mark.slow
@pytest.mark.parametrize("name", some(ALL))
def test_every_key_that_transformers_writes_is_taken(name):
    written = AutoConfig.for_model(**ALL[name])
    for config in (written.to_dict(), written.to_diff_dict()):
        _, shape = model_shape(json.loads(json.dumps(config, default=str)), name)
        assert shape.num_layers == model_shape(ALL[name], name)[1].num_layers


def test_each_family_has_a_row_in_the_table_and_each_row_its_test():
    table = (Path(kinds.__file__).parent / "models" / "README.md").read_text()
    rows = re.findall(r"^\|[^|]*\| `(\w+)\.py` \|", table, re.MULTILINE)
    compared = set()
    for configs in (decoders.CONFIGS, mixtures.CONFIGS, families.CONFIGS):
        compared |= {config["model_type"] for config in configs.values()}
    assert sorted(rows) == kinds.names("models")
    assert not {*rows} - compared
    assert not OBSTACLES.keys() & {*rows}
