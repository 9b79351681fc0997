"""Whatever is broken in a folder is an error that says so; nothing is read by halves."""

import json
import random
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tarsia.adapter import load, open_base, put, save
from tarsia.core import seal
from tarsia.core.attach import detach
from tarsia.core.errors import AdapterError, TarsiaError

TENSORS, CONFIG, OURS = "adapter_model.safetensors", "adapter_config.json", "tarsia.json"


@pytest.fixture
def folder(make, tmp_path):
    save(make(probed=True), tmp_path / "a")
    return tmp_path / "a"


def edit(path, change):
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(text(fields))


def text(fields):
    """JSON, with the seal put right that tarsia.json has: what is looked at here lies behind it."""
    if not isinstance(fields, dict) or "seal" not in fields:
        return json.dumps(fields)
    return seal.sealed(json.dumps({**fields, "seal": seal.BLANK}))


def test_truncated_anywhere(folder):
    whole = (folder / TENSORS).read_bytes()
    for length in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        (folder / TENSORS).write_bytes(whole[:length])
        with pytest.raises(AdapterError, match="truncated"):
            load(folder)


def test_one_changed_byte(folder):
    content = bytearray((folder / TENSORS).read_bytes())
    content[-5] ^= 1
    (folder / TENSORS).write_bytes(content)
    with pytest.raises(AdapterError, match="changed since"):
        load(folder)


@pytest.mark.parametrize("name", [TENSORS, CONFIG, "probe.safetensors"])
def test_a_missing_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(AdapterError, match="missing"):
        load(folder)


@pytest.mark.parametrize("name", [CONFIG, OURS])
@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_broken_json(folder, name, text):
    (folder / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(AdapterError, match=name):
        load(folder)


def test_every_field_of_tarsia_json_is_needed(folder):
    whole = json.loads((folder / OURS).read_text())
    for key in whole.keys() - {"tarsia"}:
        (folder / OURS).write_text(text({k: v for k, v in whole.items() if k != key}))
        with pytest.raises(AdapterError, match=r"incomplete|another format"):
            load(folder)


def test_a_later_format(folder):
    edit(folder / OURS, lambda fields: fields.update(format=2))
    with pytest.raises(AdapterError, match="another format"):
        load(folder)


def test_tensors_that_are_not_listed(folder):
    edit(folder / OURS, lambda fields: fields["patches"].popitem())
    with pytest.raises(AdapterError, match="left over"):
        load(folder)


def test_tensors_that_are_not_there(folder):
    def add(fields):
        fields["patches"]["model.x"] = {"method": "full", "constants": {}, "tensors": {"weight": "x.weight"}}

    edit(folder / OURS, add)
    with pytest.raises(AdapterError, match="missing"):
        load(folder)


@pytest.mark.parametrize(
    "change, match",
    [
        ({"lora_alpha": 5}, "scale"),
        ({"r": 2}, "rank"),
        ({"use_rslora": True}, "scale"),
        ({"target_modules": ["q_proj"]}, "target_modules"),
        ({"modules_to_save": None}, "modules_to_save"),
        ({"use_dora": True}, "use_dora"),
        ({"peft_type": "TARSIA"}, "peft_type"),
        ({"rank_pattern": {"(": 1}}, "regular expression"),
    ],
)
def test_the_two_descriptions_must_agree(folder, change, match):
    edit(folder / CONFIG, lambda fields: fields.update(change))
    with pytest.raises(AdapterError, match=match):
        load(folder)


def test_values_that_are_no_numbers(make, tmp_path):
    adapter = make()
    next(iter(adapter.patches.values())).tensors["weight"][0, 0] = torch.nan
    with pytest.raises(AdapterError, match="no numbers"):
        save(adapter, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_card_that_is_no_json(make, tmp_path):
    for value in (float("nan"), object(), {1, 2}):
        with pytest.raises(AdapterError, match=r"tarsia\.json can not be written"):
            save(make(card={"x": value}), tmp_path / "a")
        assert list(tmp_path.iterdir()) == []


def test_pickles_are_never_read(folder, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    (folder / TENSORS).unlink()
    (folder / OURS).unlink()
    torch.save({"x": Bomb()}, folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match="pickle"):
        load(folder)
    assert not (tmp_path / "exploded").exists()


def test_no_folder(tmp_path):
    with pytest.raises(AdapterError, match="no such adapter"):
        load(tmp_path / "nowhere")
    with pytest.raises(AdapterError, match="missing"):
        load(tmp_path)


# A folder that PEFT made has no digests: the checks stand on names, shapes and the configuration.


@pytest.fixture
def foreign(folder):
    (folder / OURS).unlink()
    (folder / "probe.safetensors").unlink()
    return folder


def test_without_a_base_it_means_nothing(foreign):
    with pytest.raises(AdapterError, match="against its base"):
        load(foreign)


def test_it_says_that_the_base_is_not_verified(foreign, host):
    adapter = load(foreign, host)
    assert adapter.fingerprint is None
    assert "unverified base" in adapter.card["base"]


def broken(foreign, host, change, match):
    tensors = load_file(foreign / TENSORS)
    change(tensors)
    save_file(tensors, foreign / TENSORS, metadata={"format": "pt"})
    with pytest.raises(AdapterError, match=match):
        load(foreign, host)


LOW = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_{}.weight"
FULL = "base_model.model.model.multi_modal_projector.linear_1.weight"


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda t: t.pop(LOW.format("A")), "Half of the update"),
        (lambda t: (t.pop(LOW.format("A")), t.pop(LOW.format("B"))), "no tensor in the file"),
        (lambda t: t.pop(FULL), "missing model.multi_modal_projector.linear_1.weight"),
        (lambda t: t.update({LOW.format("A").replace(".0.", ".9."): torch.ones(3, 32)}), "does not have"),
        (lambda t: t.update({"base_model.model.model.stray.weight": torch.ones(3)}), "does not have"),
        (lambda t: t.update({FULL.replace("linear_1", "linear_3"): torch.ones(3)}), "does not have"),
        (lambda t: t.update({LOW.format("A"): t[LOW.format("B")], LOW.format("B"): t[LOW.format("A")]}), "swapped"),
        (lambda t: t.update({LOW.format("A"): t[LOW.format("A")][:, 1:].contiguous()}), "another shape"),
        (lambda t: t.update({LOW.format("B"): t[LOW.format("B")][1:].contiguous()}), "another shape"),
        (lambda t: t.update({LOW.format("A"): torch.ones(3)}), "another shape"),
        (lambda t: t.update({"base_model.model.model.language_model.layers.0.mlp": torch.ones(3)}), "module's name"),
        (lambda t: t.update({LOW.format("A"): torch.ones(5, 32), LOW.format("B"): torch.ones(32, 5)}), "another shape"),
        (lambda t: t.update({FULL: t[FULL].T.contiguous()}), "another shape"),
        (lambda t: t[LOW.format("A")].fill_(torch.inf), "no numbers"),
        (lambda t: t.update({LOW.format("B").replace("weight", "bias"): torch.ones(32)}), "bias of lora_B"),
        (
            lambda t: t.update({LOW.format("A").replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(9)}),
            "DoRA",
        ),
        (
            lambda t: t.update({LOW.format("A").replace("lora_A.weight", "lora_embedding_A"): torch.ones(9)}),
            "embedding",
        ),
        (lambda t: t.update({LOW.format("A").replace("A.weight", "A.other.weight"): torch.ones(3, 32)}), "Two tensors"),
        (lambda t: t.update({LOW.format("A").replace("q_proj", "k_proj"): torch.ones(3, 32)}), "Half of the update"),
        (
            lambda t: t.update(
                {
                    k.replace("q_proj", "k_proj"): v.clone()
                    for k, v in t.items()
                    if ".0.self_attn.q_proj" in k and "A" in k
                }
                | {LOW.format("B").replace("q_proj", "k_proj"): torch.ones(16, 3)}
            ),
            "does not speak of",
        ),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(96, 32)}), "does not speak of"),
    ],
)
def test_a_foreign_file_with_a_fault(foreign, host, change, match):
    broken(foreign, host, change, match)


def test_a_foreign_file_that_is_truncated(foreign, host):
    content = (foreign / TENSORS).read_bytes()
    (foreign / TENSORS).write_bytes(content[:-1])
    with pytest.raises(AdapterError, match="truncated"):
        load(foreign, host)


def test_a_copy_of_the_bases_own_tensor_is_left_out(foreign, host):
    """PEFT likes to save embeddings beside an update."""
    tensors = load_file(foreign / TENSORS)
    head = host.model.get_parameter("lm_head.weight").detach()
    save_file(tensors | {"base_model.model.lm_head.base_layer.weight": head.clone()}, foreign / TENSORS)
    assert "lm_head" not in load(foreign, host).patches


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_a_copy_of_the_bases_own_buffer_is_left_out(foreign, host, prefix):
    host.model.model.multi_modal_projector.register_buffer("running", torch.ones(3))
    tensors, key = load_file(foreign / TENSORS), f"{prefix}model.multi_modal_projector.running"
    save_file(tensors | {key: torch.ones(3)}, foreign / TENSORS)
    assert all("running" not in path for path in load(foreign, host).patches)
    save_file(tensors | {key: torch.zeros(3)}, foreign / TENSORS)
    with pytest.raises(AdapterError, match="not the base's"):
        load(foreign, host)


@pytest.mark.parametrize("shape", [(3,), (), (3, 32, 1)])
def test_factors_of_another_number_of_dimensions(make, host, shape):
    adapter = make()
    path, low = next((path, patched) for path, patched in adapter.patches.items() if patched.method == "lora")
    for tensors in ({**low.tensors, "A": torch.ones(shape)}, {**low.tensors, "B": torch.ones(shape)}):
        with pytest.raises(AdapterError, match="does not fit"):
            put(host, replace(adapter, patches={path: replace(low, tensors=tensors)}), "x")


def test_a_base_of_another_name(foreign, checkpoint):
    base = open_base(str(checkpoint), processor=False)
    edit(foreign / CONFIG, lambda fields: fields.update(base_model_name_or_path="someone/llava-1.5-7b"))
    with pytest.raises(AdapterError, match="another name"):
        load(foreign, base)
    assert load(foreign, base, allow=("base name",)).card["base_name"] == "someone/llava-1.5-7b"
    edit(foreign / CONFIG, lambda fields: fields.update(base_model_name_or_path="/elsewhere/base/"))
    load(foreign, base)


# Whatever else stands in the JSON files, the answer is a refusal or the same adapter, never another exception.

JUNK = (None, True, 0, -1, 1e999, 0.5, "", "(", "x", [], [1], ["x"], [[]], {}, {"x": 1}, {"(": "x"})


def nodes(value, path=()):
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from nodes(value[key], (*path, key))


def with_junk(value, path, junk):
    if not path:
        return junk
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[path[0]] = with_junk(value[path[0]], path[1:], junk)
    return copied


@pytest.mark.parametrize("name, ours", [(OURS, True), (CONFIG, True), (CONFIG, False)])
def test_junk_in_every_place(folder, host, name, ours):
    if not ours:
        (folder / OURS).unlink()
    whole = json.loads((folder / name).read_text())
    refused, seen, draw = 0, set(), random.Random(0)
    for path in nodes(whole):
        # one list element or one site stands for all of its kind
        kind = tuple("*" if isinstance(key, int) or "." in key else key for key in path)
        if kind in seen:
            continue
        seen.add(kind)
        for junk in draw.sample(JUNK, 3):
            (folder / name).write_text(text(with_junk(whole, path, junk)))
            try:
                adapter = load(folder, host)
                if ours:
                    put(host, adapter, "x")
                    detach(host.model, "x")
            except TarsiaError:
                refused += 1
    assert refused > len(seen)


def test_junk_in_the_table_of_a_tensor_file(foreign, host):
    content = (foreign / TENSORS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    table = json.loads(content[8 : 8 + length])
    first = sorted(table)[1]
    for path in ((), (first,), (first, "data_offsets"), (first, "dtype"), (first, "shape"), ("__metadata__",)):
        for junk in JUNK:
            header = json.dumps(with_junk(table, path, junk)).encode()
            (foreign / TENSORS).write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
            if path == ("__metadata__",):
                continue
            with pytest.raises(AdapterError):
                load(foreign, host)
