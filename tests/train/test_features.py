"""Looked-up features: equal to computed ones on every family, never stale, refused where they would not be right."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import FAMILIES, VARIANTS

import tarsia.methods  # noqa: F401 (fills the registry)
from tarsia.adapter import Host
from tarsia.core.attach import Part, attach, detach
from tarsia.core.errors import ConfigError, TarsiaError, TrainingError
from tarsia.core.method import find
from tarsia.train import features as module
from tarsia.train import stages
from tarsia.train.features import features
from tarsia.train.store import Store

WIDE = 10**9
KNOWN = {**FAMILIES, **{n: VARIANTS[n] for n in ("llava-siglip-qwen2", "llava-pixtral", "internvl-normed")}}
TOWER_ALONE = ("mllama", "blip_2", "llava-pixtral")
"""Their projector is not kept: it joins rows, has a dropout, or sees pictures end to end."""


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def part(select: str) -> Part:
    return Part("lora", select, find("lora").configure({"rank": 2}))


def full(select: str) -> Part:
    return Part("full", select, find("full").configure({}))


def opened(name: str, *parts: Part, **overrides):
    """A host with patches whose B is not zero, and a batch for it."""
    family = KNOWN[name]
    model, config = family.build(**overrides)
    host = Host.of(model)
    attach(model, host.sites, parts or (part("language.*.{q,v}"),))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
    model.train(name != "blip_2")  # whose decoder and Q-Former have dropouts, which are not in the stage
    return host, batch(family, config)


def batch(family, config, seed: int = 0, pictures: tuple[int, ...] | None = None):
    return family.batch(pictures or ((0, 1, 2) if family.text_only else (1, 2)), seed=seed, config=config)


def step(host, inputs):
    """Logits, and the gradients of all that is trained, by name."""
    logits = host.model(**inputs).logits
    host.model.zero_grad()
    logits.float().logsumexp(-1).mean().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in host.model.named_parameters() if p.grad is not None}


def close(a, b, bound=1e-5):
    assert (a - b).abs().max() <= bound * b.abs().max().clamp(min=1.0)


@pytest.mark.parametrize("projector", [False, True])
@pytest.mark.parametrize("name", KNOWN)
def test_losses_and_gradients_are_those_without_a_cache(name, projector, tmp_path):
    parts = [part("language.*.{q,v}"), *([full("projector")] if projector else [])]
    host, inputs = opened(name, *parts)
    if projector and name.startswith("qwen"):
        # their projector lies inside the tower's module
        with pytest.raises(ConfigError, match="merger") as error, features(host, Store(tmp_path, WIDE)):
            pass
        assert "or vision and projector out of the parts' selections" in str(error.value)
        return
    logits, gradients = step(host, inputs)
    assert gradients
    first = []
    for _ in range(2):  # a cold folder, then a full one in a run of its own
        with features(host, Store(tmp_path, WIDE)) as cache:
            for _ in range(3):  # proved, found, found
                got, theirs = step(host, inputs)
                first = first or [got, theirs]
                close(got, logits)
                assert set(theirs) == set(gradients)
                for key, gradient in gradients.items():
                    close(theirs[key], gradient)
                    assert torch.equal(theirs[key], first[1][key])
                assert torch.equal(got, first[0])
        report = cache.report()
        assert report["found"] and not (report["damaged"] or report["not_looked_up"])
        lower = projector or name in TOWER_ALONE or name.startswith("qwen")
        assert report["stage"] == ("vision tower" if lower else "projector")
    assert report["computed"] == 0
    again, _ = step(host, inputs)
    assert torch.equal(again, logits)


@pytest.mark.parametrize("name", KNOWN)
def test_who_else_is_in_the_batch_changes_no_bit(name, tmp_path):
    family = KNOWN[name]
    host, inputs = opened(name)
    one = batch(family, host.anatomy.config, 0, (1,))
    with features(host, Store(tmp_path / "a", WIDE)) as cold, torch.no_grad():
        wanted = host.model(**inputs).logits
    with features(host, Store(tmp_path / "b", WIDE)) as warm, torch.no_grad():
        host.model(**one)
        host.model(**batch(family, host.anatomy.config, 5))
        for _ in range(2):
            assert torch.equal(host.model(**inputs).logits, wanted)
    # every value that both folders have is the same value
    names = {path.name for path in Path(tmp_path / "a").rglob("*.features")}
    shared = [path for path in Path(tmp_path / "b").rglob("*.features") if path.name in names]
    assert len(shared) == len(names) and cold.computed == len(names) < warm.computed
    for path in shared:
        assert path.read_bytes() == (tmp_path / "a" / path.parent.name / path.name).read_bytes()


def found(host, inputs, folder) -> int:
    with features(host, Store(folder, WIDE)) as cache, torch.no_grad():
        host.model(**inputs)
    return cache.found


def nudged(inputs, key):
    """One entry of the last picture, changed by its last bit."""
    value = inputs[key].clone()
    last = value.flatten()[-1]
    value.view(-1)[-1] = torch.nextafter(last, last + 1)
    return {**inputs, key: value}


def test_a_picture_is_found_again_and_its_neighbour_with_one_other_bit_is_not(tmp_path):
    host, inputs = opened("llava")
    assert (found(host, inputs, tmp_path), found(host, inputs, tmp_path)) == (0, 3)
    assert found(host, nudged(inputs, "pixel_values"), tmp_path) == 2


@pytest.mark.parametrize(
    "name, key, change",
    [
        ("idefics3", "pixel_attention_mask", lambda mask: mask.clone().index_fill_(3, torch.arange(8, 16), 0)),
        ("mllama", "aspect_ratio_ids", lambda ids: torch.where(ids == 2, 3, ids)),
        ("qwen2_vl", "image_grid_thw", lambda grids: grids[:, [0, 2, 1]]),
    ],
)
def test_masks_sizes_and_grids_are_in_the_key(name, key, change, tmp_path):
    host, inputs = opened(name)
    whole = found(host, inputs, tmp_path) or found(host, inputs, tmp_path)
    assert found(host, {**inputs, key: change(inputs[key])}, tmp_path) < whole


def test_weights_are_in_the_key_even_when_they_change_in_the_middle(tmp_path):
    host, inputs = opened("llava")
    with features(host, Store(tmp_path, WIDE)) as cache, torch.no_grad():
        host.model(**inputs)
        host.model.get_parameter("model.vision_tower.encoder.layers.0.mlp.fc1.bias")[0] += 1e-3
        changed = host.model(**inputs).logits
        assert cache.found == 0
    close(host.model(**inputs).logits, changed)


def test_bases_that_share_a_tower_share_its_features(tmp_path):
    ours, inputs = opened("llava", part("language.*.{q,v}"), full("projector"))
    theirs, _ = opened("llava", part("language.*.{q,v}"), full("projector"), text_config={"num_hidden_layers": 2})
    tower = ours.model.get_submodule("model.vision_tower").state_dict()
    theirs.model.get_submodule("model.vision_tower").load_state_dict(tower)
    assert (found(ours, inputs, tmp_path), found(theirs, inputs, tmp_path)) == (0, 3)


def test_dtype_threads_stage_and_layer_are_in_the_key(tmp_path):
    host, inputs = opened("llava")
    assert (found(host, inputs, tmp_path), found(host, inputs, tmp_path)) == (0, 3)
    torch.set_num_threads(2)
    assert found(host, inputs, tmp_path) == 0
    torch.set_num_threads(1)
    lower, _ = opened("llava", full("projector"))
    assert found(lower, inputs, tmp_path) == 0
    other, _ = opened("llava", vision_feature_layer=-3)
    assert found(other, inputs, tmp_path) == 0
    host.model.to(torch.bfloat16)
    assert found(host, {**inputs, "pixel_values": inputs["pixel_values"].bfloat16()}, tmp_path) == 0


def test_another_way_to_compute_the_same_is_in_the_key(tmp_path):
    host, inputs = opened("llava")
    inner = host.model.get_submodule("model.vision_tower.encoder.layers.0.layer_norm1")
    own = inner.forward
    assert (found(host, inputs, tmp_path), found(host, inputs, tmp_path)) == (0, 3)
    inner.__dict__["forward"] = lambda x: own(x)
    assert (found(host, inputs, tmp_path), found(host, inputs, tmp_path)) == (0, 3)
    del inner.__dict__["forward"]
    assert found(host, inputs, tmp_path) == 3


BLIND = {
    "pixels": lambda name, value: name in (0, "pixel_values"),
    "weights": lambda name, value: isinstance(value, torch.Tensor) and str(name).startswith("encoder."),
    "grids": lambda name, value: name == "grid_thw",
}


@pytest.mark.parametrize("blind", BLIND)
def test_a_key_that_leaves_something_out_is_caught(blind, tmp_path, monkeypatch):
    """Planted stale caches: the first look-ups are held to what is computed, so a run stops."""
    feed = module._feed
    monkeypatch.setattr(module, "_feed", lambda d, n, v: None if BLIND[blind](n, v) else feed(d, n, v))
    host, _ = opened("qwen2_vl" if blind == "grids" else "llava")
    picture = {**batch(KNOWN[host.anatomy.name], host.anatomy.config, pictures=(1,))}
    found(host, picture, tmp_path)
    if blind == "weights":
        other, _ = opened("llava", part("language.*.{q,v}"))
        with torch.no_grad():
            other.model.get_parameter("model.vision_tower.encoder.layers.0.mlp.fc1.bias")[0] += 0.1
        host = other
    elif blind == "pixels":
        picture = {**picture, "pixel_values": picture["pixel_values"] + 0.1}
    else:
        picture = {**picture, "image_grid_thw": torch.tensor([[1, 2, 8]])}
    with pytest.raises(TrainingError, match="holds other bits"):
        found(host, picture, tmp_path)


def test_a_split_that_lets_a_picture_see_its_neighbour_is_caught(tmp_path, monkeypatch):
    host, inputs = opened("idefics3")

    def leaky(call):
        keywords = {**call[1], "pixel_values": call[1]["pixel_values"] + call[1]["pixel_values"].mean()}
        return stages._flat((call[0], keywords))

    monkeypatch.setattr(stages, "_FLAT", replace(stages._FLAT, split=leaky))
    with pytest.raises(TrainingError, match="depend on the pictures beside it"):
        found(host, inputs, tmp_path)


def test_a_tower_that_draws_random_numbers_is_caught(tmp_path):
    host, inputs = opened("llava")
    host.model.get_submodule("model.vision_tower").register_forward_hook(lambda *_: torch.rand(1) and None)
    inner = host.model.get_submodule("model.vision_tower.encoder.layers.0.mlp")
    inner.register_forward_hook(lambda module, args, out: out + 0 * torch.rand(1))
    with pytest.raises(TrainingError, match="draws random numbers"):
        found(host, inputs, tmp_path)


@pytest.mark.parametrize(
    "parts, overrides, named",
    [
        ((part("vision.*.{q,v}"),), {}, "v_proj.slot"),
        ((full("vision.0.norm"), part("language.*.q")), {}, "layers.0.layer_norm1.slot"),
        ((part("language.*.q"),), {"vision_config": {"attention_dropout": 0.1}}, "dropout (0.1)"),
    ],
)
def test_a_tower_that_changes_is_refused_with_what_to_do(parts, overrides, named, tmp_path):
    host, _ = opened("llava", *parts, **overrides)
    with pytest.raises(ConfigError, match="can not be kept") as error, features(host, Store(tmp_path, WIDE)):
        pass
    assert named in str(error.value)
    assert "leave features out" in str(error.value)


def test_a_tower_that_is_trained_without_a_patch_is_refused(tmp_path):
    host, _ = opened("llava")
    host.model.get_parameter("model.vision_tower.pre_layrnorm.weight").requires_grad_(True)
    with pytest.raises(ConfigError, match="trained"), features(host, Store(tmp_path, WIDE)):
        pass


def test_a_patch_that_is_put_in_later_acts(tmp_path):
    host, inputs = opened("llava")
    with features(host, Store(tmp_path, WIDE)) as cache:
        for _ in range(2):
            host.model(**inputs)
        attach(host.model, host.sites, [full("vision")], name="other")
        with torch.no_grad():
            for p in host.model.get_submodule("model.vision_tower").parameters():
                if p.requires_grad:
                    p.add_(0.1)
            patched = host.model(**inputs).logits
        assert cache.passed
    assert torch.equal(host.model(**inputs).logits, patched)


def test_the_tower_asked_by_itself_answers_for_itself(tmp_path):
    host, inputs = opened("llava")
    tower = host.model.get_submodule("model.vision_tower")
    wanted = tower(inputs["pixel_values"]).last_hidden_state
    with features(host, Store(tmp_path, WIDE)):
        for _ in range(2):
            host.model(**inputs)
        assert torch.equal(tower(inputs["pixel_values"]).last_hidden_state, wanted)
        assert wanted.abs().max() > 0


def test_suspended_computes_as_without(tmp_path):
    host, inputs = opened("llava")
    with torch.no_grad():
        wanted = host.model(**inputs).logits
        with features(host, Store(tmp_path, WIDE)) as cache:
            host.model(**inputs)
            before = cache.report()
            with cache.suspended():
                assert torch.equal(host.model(**inputs).logits, wanted)
            assert cache.report() == before


def test_nothing_is_left_behind_and_a_wrapper_is_told(tmp_path):
    host, _ = opened("llava")
    before = {path: dict(m.__dict__) for path, m in host.model.named_modules()}
    with features(host, Store(tmp_path, WIDE)):
        pass
    assert all(set(m.__dict__) == set(before[path]) for path, m in host.model.named_modules())
    with pytest.raises(TrainingError, match="something else wraps"), features(host, Store(tmp_path, WIDE)):
        host.model.get_submodule("model.vision_tower").forward = lambda *a, **k: None
    detach(host.model, "default")


def test_weights_that_are_not_in_memory_are_refused(tmp_path):
    host, inputs = opened("llava")
    host.model.get_submodule("model.vision_tower").to("meta")
    with pytest.raises(TarsiaError, match="in memory"):
        found(host, inputs, tmp_path)


def test_one_picture_twice_in_a_batch_is_computed_once(tmp_path):
    host, inputs = opened("llava")
    same = {**inputs, "pixel_values": inputs["pixel_values"][:1].repeat(3, 1, 1, 1)}
    with torch.no_grad():
        plain = host.model(**same).logits
        with features(host, Store(tmp_path, WIDE)) as cache:
            close(host.model(**same).logits, plain)
            close(host.model(**same).logits, plain)
    assert (cache.computed, cache.report()["entries"]) == (1, 1)


def test_without_pictures_nothing_is_looked_up(tmp_path):
    host, _ = opened("llava")
    text = KNOWN["llava"].batch((0, 0))
    assert found(host, text, tmp_path) == 0
    assert not list(tmp_path.rglob("*.features"))


def test_a_damaged_entry_is_computed_to_the_same_bits(tmp_path):
    host, inputs = opened("llava")
    with features(host, Store(tmp_path, WIDE)), torch.no_grad():
        wanted = host.model(**inputs).logits
    for path in tmp_path.rglob("*.features"):
        path.write_bytes(path.read_bytes()[:-7])
    with features(host, Store(tmp_path, WIDE)) as cache, torch.no_grad():
        assert torch.equal(host.model(**inputs).logits, wanted)
    assert cache.report()["damaged"] == 3
    assert any("damaged" in line for line in cache.news())


@pytest.mark.parametrize("name", KNOWN)
def test_what_is_generated_is_what_is_generated_without_a_cache(name, tmp_path):
    host, _ = opened(name)
    host.model.eval()
    count = 1 if FAMILIES.get(name, KNOWN[name]).max_pictures in (1, None) else 2
    inputs = batch(KNOWN[name], host.model.config, pictures=(count, count))
    asked = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = host.model.generate(**inputs, **asked)
    for _ in range(2):
        with features(host, Store(tmp_path, WIDE)) as cache:
            assert host.model.generate(**inputs, **asked).equal(expected)
    assert cache.found
