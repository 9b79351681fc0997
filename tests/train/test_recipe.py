"""A recipe is checked wholly before anything is loaded, and its hash is of what it means."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tarsia.core.errors import ConfigError
from tarsia.train.reading import size
from tarsia.train.recipe import Recipe, differences

VALUES = {
    "model": "mini-1",
    "parts": [
        {"method": "lora", "select": "language", "rank": 4, "lr": 1e-3},
        {"method": "full", "select": "projector"},
    ],
    "data": {"train": [{"path": "task.jsonl", "weight": 0.9}, {"path": "talk.jsonl", "weight": 0.1}]},
    "steps": 10,
    "out": "out",
}


def lora(**options):
    return {"parts": [{"method": "lora", "select": "language", **options}]}


REFUSED = {
    "unknown key": ({"stepz": 3}, "stepz", "did you mean steps"),
    "unknown key of a source": ({"data": {"train": [{"pth": "a"}]}}, "data.train.0.pth", "did you mean path"),
    "unknown key of data": ({"data": {"train": [{"path": "a"}], "evals": []}}, "data.evals", "did you mean eval"),
    "unknown option": (lora(rnk=3), "'rnk'", "did you mean rank"),
    "unknown method": ({"parts": [{"method": "lorra", "select": "language"}]}, "lorra", "did you mean lora"),
    "text for a number": ({"steps": "10"}, "'steps'", "valid integer"),
    "true for a number": ({"batch": True}, "'batch'", "valid integer"),
    "text for an option": (lora(alpha="much"), "'alpha'", "valid number"),
    "text for a flag": ({"checkpointing": "yes"}, "'checkpointing'", "valid boolean"),
    "rank 0": (lora(rank=0), "A rank", "at least 1"),
    "length 0": (
        {"parts": [{"method": "lora", "select": "vision"}, {"method": "prompt", "select": "language", "length": 0}]},
        "parts.1.length: 0 (method prompt)",
        "change parts.1.length",
    ),
    "reduction -1": (
        {"parts": [{"method": "pfeiffer", "select": "language", "reduction": -1, "bias": True}]},
        "parts.0.reduction: -1 (method pfeiffer)",
        "change parts.0.reduction, or leave it out for the method's default",
    ),
    "two options that do not agree": (
        {"parts": [{"method": "prompt", "select": "language", "start": "random", "text": "see"}]},
        "parts.0.text",
        "or neither",
    ),
    "no parts": ({"parts": []}, "'parts'", "at least 1"),
    "no sources": ({"data": {"train": []}}, "'data.train'", "at least 1"),
    "negative weight": ({"data": {"train": [{"path": "a", "weight": -1}]}}, "weight", "greater than or equal"),
    "all weights 0": ({"data": {"train": [{"path": "a", "weight": 0}]}}, "weight 0", "above 0"),
    "two sources of one name": ({"data": {"train": [{"path": "a/x.jsonl"}, {"path": "b/x.jsonl"}]}}, "one name", "x"),
    "steps and epochs": ({"epochs": 2}, "either steps or epochs", "epochs 2"),
    "neither": ({"steps": None}, "either steps or epochs", "neither"),
    "half a step of warm-up": ({"warmup": 2.5}, "warm-up", "2.5"),
    "a decay that is none": ({"decay": "cosin"}, "'decay'", "did you mean cosine?"),
    "a decay like no other": ({"decay": 3}, "'decay'", "allowed: cosine, linear, constant"),
    "an option that is none": (lora(scaling="alpha/r"), "no option 'scaling'", "alpha, alphas, dropout, rank, ranks"),
    "a word for a table": ({"features": "yes"}, "'features'", "write its keys below it: path, limit"),
    "a size below 0": ({"features": {"path": "x", "limit": -5}}, "'features.limit'", "give more than 0"),
    "a part without keys": ({"parts": ["lora"]}, "'parts.0'", "write its keys below it: method, select, lr"),
    "one part, no list": ({"parts": "lora"}, "'parts'", "to do:   write a list"),
    "a source of no rows": ({"data": {"train": [{"path": "a", "limit": 0}]}}, "'data.train.0.limit'", "more than 0"),
    "a stream without an end": (
        {"data": {"train": [{"path": "a", "streaming": True}]}},
        "can not be used: streaming is for",
        "limit",
    ),
    "beta 1": ({"betas": [0.9, 1]}, "betas", "less than 1"),
    "no rate": ({"parts": [{"method": "lora", "select": "language", "lr": 0}]}, "lr", "greater than 0"),
    "no number at all": (
        {"parts": [{"method": "lora", "select": "language", "lr": float("nan")}]},
        "holds text",
        "Out of range",
    ),
}


@pytest.mark.parametrize("change, names, helps", REFUSED.values(), ids=REFUSED.keys())
def test_refusals_name_the_key_and_help(change, names, helps):
    with pytest.raises(ConfigError) as caught:
        Recipe.of(VALUES | change)
    assert names in str(caught.value)
    assert helps in str(caught.value)


@pytest.mark.parametrize(
    "key, values, do",
    [
        ("batch", (True, "8", 2.5), "write a whole number, without quotes"), ("batch", (0, -3), "give more than 0"),
        ("clip", ("much", [1]), "write a number, without quotes"), ("seed", (-1,), "give 0 or more"),
        ("checkpointing", ("yes", 1), "write true or false"), ("variables", ("x",), "a table of keys and values"),
        ("betas", ([0.9, 1],), "give less than 1"), ("betas", ([0.9] * 3,), "no more than 2"),
        ("model", (3,), "write a text"), ("out", ("",), "not empty"),
        ("data", (3,), "below it: train, eval, mix"),
    ],
)  # fmt: skip
def test_a_wrong_type_or_range_says_what_to_write(key, values, do):
    for value in values:
        with pytest.raises(ConfigError) as caught:
            Recipe.of(VALUES | {key: value})
        assert key in caught.value.what
        assert do in (caught.value.do or ""), value


def test_a_missing_key_is_named():
    with pytest.raises(ConfigError, match="'out' is missing"):
        Recipe.of({key: value for key, value in VALUES.items() if key != "out"})


def test_the_hash_is_of_the_meaning():
    ours = Recipe.of(VALUES).hash
    assert Recipe.of(dict(reversed(VALUES.items()))).hash == ours
    assert Recipe.of(VALUES | {"batch": 8, "warmup": 0.03}).hash == ours, "defaults that are written out"
    assert Recipe.of(VALUES | {"out": "elsewhere", "threads": 2, "device": "cpu"}).hash == ours
    assert Recipe.of(VALUES | lora(alpha=16)).hash == Recipe.of(VALUES | lora(alpha=16.0)).hash
    mapped = [{"path": "a", "columns": columns} for columns in ({"x": "1", "y": "2"}, {"y": "2", "x": "1"})]
    hashes = {Recipe.of(VALUES | {"data": {"train": [source]}}).hash for source in mapped}
    assert len(hashes) == 1, "the order of a source's columns means nothing"
    held = {"eval": [{"path": "held"}]}
    assert Recipe.of(VALUES | {"save_every": 7, "eval_every": 3, "data": VALUES["data"] | held}).hash == ours
    for data in ({"mix": "weighted"}, {"train": [{"path": "other"}]}, {"train": [{"path": "a", "weight": 0.5}]}):
        assert Recipe.of(VALUES | {"data": VALUES["data"] | data}).hash != ours, data
    for change in ({"seed": 1}, {"steps": 11}, lora(rank=4, lr=1e-3), {"clip": None}, {"precision": "float32"}):
        assert Recipe.of(VALUES | change).hash != ours, change


def test_the_order_inside_a_methods_table_counts():
    first, second = {"*.q_proj": 2, "*proj": 4}, {"*proj": 4, "*.q_proj": 2}
    assert Recipe.of(VALUES | lora(ranks=first)).hash != Recipe.of(VALUES | lora(ranks=second)).hash


def test_the_kind_of_4_bits_alone_stands_for_its_table():
    for recipe in (Recipe.of(VALUES | {"four_bits": "fp4"}), Recipe.of(VALUES, ["four_bits=fp4"])):
        assert recipe == Recipe.of(VALUES | {"four_bits": {"kind": "fp4"}})
        assert recipe.resolved["four_bits"] == {"kind": "fp4", "nested": True, "select": None}
    with pytest.raises(ConfigError, match="'four_bits' can not be used") as caught:
        Recipe.of(VALUES, ["four_bits=nf5"])
    assert (caught.value.allowed, caught.value.do) == ("nf4, fp4, int4", "did you mean nf4?")
    with pytest.raises(ConfigError, match="write its keys below it: kind, nested, select"):
        Recipe.of(VALUES, ["four_bits=4"])


def test_what_is_no_yaml_is_told_on_a_line_with_its_place(tmp_path):
    with pytest.raises(ConfigError, match="no value") as caught:
        Recipe.of(VALUES, ["four_bits={kind: nf4"])
    assert caught.value.given == "'{kind: nf4', line 1, column 11: expected ',' or '}', but got the end"
    with pytest.raises(ConfigError, match="not YAML") as caught:
        Recipe.load(write(tmp_path / "r.yaml", "steps: 3\n  batch: 2\n"))
    assert caught.value.given == f"{tmp_path / 'r.yaml'}, line 2, column 8: mapping values are not allowed here"
    with pytest.raises(ConfigError, match="not YAML") as caught:
        Recipe.load(write(tmp_path / "r.yaml", "steps: \x00"))
    assert "special characters" in caught.value.given and "\n" not in caught.value.given


def test_overrides_reach_into_lists():
    recipe = Recipe.of(VALUES, ["parts.0.lr=1e-4", "data.train.1.weight=0.25", "steps=null", "epochs=2", "clip=null"])
    assert (recipe.parts[0].lr, recipe.data.train[1].weight, recipe.epochs, recipe.clip) == (1e-4, 0.25, 2.0, None)
    assert Recipe.of(VALUES, ["parts.0.ranks={'*.q_proj': 2}"]).parts[0].configure().ranks == {"*.q_proj": 2}


@pytest.mark.parametrize(
    "override, names",
    [
        ("parts.5.lr=1", "0..1"), ("parts.x.lr=1", "0..1"), ("steps", "key=value"), ("=3", "key=value"),
        ("a..b=3", "key=value"),
        ("stps=3", "did you mean steps"), ("steps.more=3", "holds no others"), ("dta.train=1", "did you mean data"),
        ("parts.0.lr=[", "no value"),
    ],
)  # fmt: skip
def test_bad_overrides_are_refused(override, names):
    with pytest.raises(ConfigError, match=names):
        Recipe.of(VALUES, [override])


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_file_gives_the_same_recipe(tmp_path):
    assert Recipe.load(write(tmp_path / "r.yaml", yaml.safe_dump(VALUES))) == Recipe.of(VALUES)


def test_yaml_numbers_are_numbers_and_words_are_words(tmp_path):
    text = yaml.safe_dump({k: v for k, v in VALUES.items() if k not in ("model", "steps")})
    recipe = Recipe.load(write(tmp_path / "r.yaml", text + "weight_decay: 1e-4\nsteps: 12\nmodel: no\n"))
    assert (recipe.weight_decay, recipe.steps, recipe.model) == (1e-4, 12, "no")


@pytest.mark.parametrize(
    "text, names",
    [
        ("steps: 1\nsteps: 2\n", "stands twice"), ("- 1\n", "table of keys"), ("a: [", "not YAML"),
        ("1: 2\n", "A key is a text"), ("steps: !!int abc\n", "not YAML"),
        ("out: !!python/object/apply:os.getcwd []\n", "not YAML"), ("", "table of keys"),
    ],
)  # fmt: skip
def test_files_that_are_no_recipe(tmp_path, text, names):
    with pytest.raises(ConfigError, match=names):
        Recipe.load(write(tmp_path / "r.yaml", text))


def test_a_missing_file():
    with pytest.raises(ConfigError, match="can not be read"):
        Recipe.load("nowhere.yaml")


def test_steps_from_epochs_and_warm_up():
    recipe = Recipe.of(VALUES | {"steps": None, "epochs": 1.5, "batch": 4, "accumulate": 2})
    assert recipe.steps_for(100) == 19
    assert (recipe.warmup_steps(100), Recipe.of(VALUES | {"warmup": 7}).warmup_steps(10)) == (3, 7)
    with pytest.raises(ConfigError, match="as long as the run"):
        Recipe.of(VALUES | {"warmup": 10}).warmup_steps(10)


def test_rates_have_a_table_and_parts_their_own():
    recipe = Recipe.of(VALUES)
    assert [part.rate for part in recipe.parts] == [1e-3, 2e-5]


def test_differences_are_named():
    ours, theirs = Recipe.of(VALUES | {"seed": 3, "out": "x"}).resolved, Recipe.of(VALUES).resolved
    assert differences(ours, theirs) == ("seed: 0 -> 3",)


def test_a_recipe_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Recipe.of(VALUES).steps = 3


def test_an_override_of_steps_takes_the_place_of_epochs_and_the_reverse():
    lasting = {key: value for key, value in VALUES.items() if key != "steps"} | {"epochs": 3}
    assert (Recipe.of(lasting, ["steps=6"]).steps, Recipe.of(lasting, ["steps=6"]).epochs) == (6, None)
    assert (Recipe.of(VALUES, ["epochs=2"]).steps, Recipe.of(VALUES, ["epochs=2"]).epochs) == (None, 2)
    with pytest.raises(ConfigError, match="either steps or epochs"):
        Recipe.of(VALUES, ["epochs=2", "steps=3"])
    with pytest.raises(ConfigError, match="either steps or epochs"):
        Recipe.of(VALUES, ["steps=null"])


@pytest.mark.parametrize("given", ["0.1", "0.0001kB", "9" * 400 + "GB"])
def test_a_size_of_no_byte_or_of_more_than_there_can_be_is_none(given: str) -> None:
    with pytest.raises(ConfigError, match="no size"):
        size(given, "features.limit")
