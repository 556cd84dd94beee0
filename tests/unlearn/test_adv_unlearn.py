"""AdvUnlearn: the target of ESD, the attack, what is retained, and a UNet that stays to the bit."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tasks.core import loop, networks
from tasks.core.dataset import Dataset
from tasks.core.denoise import text_denoiser
from tasks.core.errors import UserError
from tasks.core.text_to_image import TextDenoiser
from tasks.unlearn import adv_unlearn as adv

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPTS = [f"a photo of a {name}" for name in NAMES]


def model(seed: int = 0, words: tuple[str, ...] = (), spare: int = 4) -> TextDenoiser:
    with loop.seeded(seed):
        return text_denoiser((1, 8, 8), PROMPTS, words, channels=8, levels=20, spare=spare)


def bytes_of(part: torch.nn.Module) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in part.state_dict().items()}


@pytest.fixture
def sets(tiny: Dataset) -> tuple[Dataset, Dataset]:
    train = tiny.split("train")
    return train.where(train.labels() == 3), train.where(train.labels() != 3)


def test_the_target_lies_as_far_on_the_other_side_of_no_prompt() -> None:
    empty, conditional = torch.tensor([2.0, -1.0]), torch.tensor([5.0, -1.0])
    assert adv.esd_target(empty, conditional, 1.0).tolist() == [-1.0, -1.0]
    assert adv.esd_target(empty, conditional, 0.0).tolist() == [2.0, -1.0]


def test_pictures_begin_with_noise_and_go_down_through_levels_of_the_model() -> None:
    net = model()
    met = set()
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        noisy, levels = adv.noisy_pictures(net, net.encode(PROMPTS[:3]), guidance=3, steps=4, generator=generator)
        assert noisy.shape == (4, 3, 1, 8, 8)
        assert levels[0] > levels[1] > levels[2] > levels[3] >= 0
        met.update(levels.tolist())
    assert met == set(range(20))


def test_without_guidance_the_pictures_are_on_the_way_to_what_the_model_draws() -> None:
    net = model()
    for seed in range(20):  # until no level is left out at the top
        noisy, levels = adv.noisy_pictures(net, net.encode(PROMPTS[:2]), guidance=1, steps=4, generator=torch.Generator().manual_seed(seed))
        if levels[0] == 19:
            break
    else:
        raise AssertionError("no seed begins at the highest level")
    with torch.no_grad():
        clean = net.clean(noisy[-1], net(noisy[-1], levels[-1:].expand(2), net.encode(PROMPTS[:2])), levels[-1:].expand(2))
        wanted = net._descend(noisy[0], net.encode(PROMPTS[:2]), 4)
    torch.testing.assert_close(clean.clamp(-1, 1), wanted, atol=1e-4, rtol=1e-4)


def test_a_picture_is_taken_with_the_level_it_is_at() -> None:
    noisy = torch.arange(3.0).view(3, 1, 1, 1, 1).expand(3, 2, 1, 1, 1)
    found, levels = adv.drawn_from((noisy, torch.tensor([0, 10, 20])), 50, torch.Generator().manual_seed(0))
    assert torch.equal(found.flatten() * 10, levels.float())
    assert set(levels.tolist()) == {0, 10, 20}


# the attack


def attack(net: TextDenoiser, original: TextDenoiser, fast: bool, steps: int, lr: float = 0.02) -> tuple[torch.Tensor, float]:
    """A prefix, and how far the prediction under it is from the original's on all the pictures."""
    tokens, wanted = net.diffuser.tokens([PROMPTS[3]]), original.encode([PROMPTS[3]]).detach()
    pictures = adv.noisy_pictures(original, wanted.expand(16, -1, -1), guidance=3, steps=4, generator=torch.Generator().manual_seed(1))
    how = {"prefix": 1, "batch": 8, "steps": steps, "lr": lr, "fast": fast, "generator": torch.Generator().manual_seed(2)}
    found = adv.attacked(net, original, tokens, wanted, pictures, **how)
    noisy, levels = pictures[0].flatten(0, 1), pictures[1].repeat_interleave(16)
    with torch.no_grad():
        own = net(noisy, levels, net.encode_prefixed(found, tokens).expand(64, -1, -1))
        return found, float(F.mse_loss(own, original(noisy, levels, wanted.expand(64, -1, -1))))


def pair() -> tuple[TextDenoiser, TextDenoiser]:
    original = model()
    net = copy.deepcopy(original).requires_grad_(False)
    with torch.no_grad(), loop.seeded(5):
        for weights in net.text.parameters():
            weights.add_(0.1 * torch.randn_like(weights))
    return net, original.requires_grad_(False)


def test_an_attack_lowers_its_loss_and_more_steps_do_so_further() -> None:
    net, original = pair()
    losses = [attack(net, original, False, steps, lr)[1] for steps, lr in ((1, 1e-9), (20, 0.02), (80, 0.02))]
    assert losses[2] < losses[1] < losses[0]


def test_the_fast_attack_goes_as_far_in_every_value_along_the_sign_alone() -> None:
    net, original = pair()
    start, before = attack(net, original, False, 1, 1e-9)
    found, after = attack(net, original, True, 10, 0.01)
    moved = (found - start).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.1), atol=1e-5, rtol=1e-4)
    assert after < before


# what is retained


def test_retaining_costs_nothing_before_the_first_update_and_something_after() -> None:
    net, original = pair()
    how = {"guidance": 3.0, "steps": 2}
    same = adv.retain_loss(original, original, original, PROMPTS[:4], **how, generator=torch.Generator().manual_seed(0))
    other = adv.retain_loss(net, original, original, PROMPTS[:4], **how, generator=torch.Generator().manual_seed(0))
    assert float(same) == 0
    assert float(other) > 0


def test_texts_that_name_the_concept_are_screened_and_such_as_only_hold_its_letters_are_not() -> None:
    texts = ["a photo of a Three", "threefold", "a three, drawn", "seven"]
    assert adv.screened(texts, ["three"]) == ["threefold", "seven"]


def test_prompts_to_retain_are_of_the_classes_there_and_of_captions_that_the_model_knows(sets) -> None:
    retain = sets[1].where(np.isin(sets[1].labels(), [1, 5]))
    known = "a photo of the digit five"  # a caption of the rows; the other class's is not known
    assert adv.retain_prompts(model(words=(known,)), 3, retain) == ["a photo of a five", "a photo of a one", known]


# the whole


def test_only_the_text_encoder_changes_and_the_model_given_stays(sets) -> None:
    given = model()
    before = bytes_of(given)
    first, second = (adv.adv_unlearn(given, *sets, adv.SMOKE, seed=4) for _ in range(2))
    other = adv.adv_unlearn(given, *sets, adv.SMOKE, seed=5)
    assert bytes_of(given) == before
    assert bytes_of(first) == bytes_of(second) != bytes_of(other)
    assert bytes_of(first.unet) == bytes_of(given.unet)
    changed = [ours != theirs for ours, theirs in zip(bytes_of(first.text).values(), bytes_of(given.text).values(), strict=True)]
    assert np.mean(changed) > 0.8
    assert [p.requires_grad for p in first.parameters()] == [p.requires_grad for p in given.parameters()]


@pytest.mark.parametrize("change", [{"attack": "fast"}, {"attack": "none"}, {"pictures": "original"}, {"prefix": 2}, {"warm_up": 1.0}])
def test_every_setting_counts(sets, change) -> None:
    plain, changed = (adv.adv_unlearn(model(), *sets, cfg) for cfg in (adv.SMOKE, adv.SMOKE.model_copy(update=change)))
    assert bytes_of(plain.text) != bytes_of(changed.text)


def test_no_attack_is_the_same_as_a_warm_up_without_end(sets) -> None:
    none, warm = (adv.adv_unlearn(model(), *sets, adv.SMOKE.model_copy(update=c)) for c in ({"attack": "none"}, {"warm_up": 1.0}))
    assert bytes_of(none) == bytes_of(warm)


def test_the_prediction_under_the_concept_comes_nearer_to_the_target(sets) -> None:
    given = model().requires_grad_(False)
    cfg = adv.Config(steps=40, attack="none", retain_weight=0, sampling_steps=4, lr=3e-3)
    net = adv.adv_unlearn(given, *sets, cfg)
    noisy, levels = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 20
    with torch.no_grad():
        own, empty = (given(noisy, levels, given.encode([text]).expand(64, -1, -1)) for text in (PROMPTS[3], ""))
        found = net(noisy, levels, net.encode([PROMPTS[3]]).expand(64, -1, -1))
    target = adv.esd_target(empty, own, 1.0)
    assert F.mse_loss(found, target) < 0.5 * F.mse_loss(own, target)


# mistakes


def test_a_classifier_is_refused(sets) -> None:
    net = networks.convnet((1, 8, 8), 10, widths=(4, 6), hidden=8, mean=0.3, std=0.4)
    with pytest.raises(UserError, match="takes a text-to-image model, and this is a 'convnet': train one by `retort train --generator`"):
        adv.adv_unlearn(net, *sets, adv.SMOKE)


def test_rows_of_two_classes_or_of_none_are_not_one_concept(sets) -> None:
    with pytest.raises(UserError, match="of 9 classes; adv_unlearn forgets one class"):
        adv.adv_unlearn(model(), sets[1], sets[0], adv.SMOKE)
    with pytest.raises(UserError, match="of 0 classes"):
        adv.adv_unlearn(model(), sets[0].without_labels(), sets[1], adv.SMOKE)


def test_a_class_cannot_be_forgotten_and_retained(sets) -> None:
    with pytest.raises(UserError, match=f"retain set has {len(sets[0])} rows of the class to forget"):
        adv.adv_unlearn(model(), sets[0], sets[0], adv.SMOKE)


def test_a_label_beyond_the_models_classes_is_named(sets) -> None:
    with loop.seeded(0):
        small = text_denoiser((1, 8, 8), PROMPTS[:2], channels=8, levels=20)
    with pytest.raises(UserError, match="label 3 of the forget set does not fit the model, which has 2"):
        adv.adv_unlearn(small, *sets, adv.SMOKE)


def test_without_a_prompt_to_retain_the_term_must_be_off(sets) -> None:
    hidden = sets[1].without_labels()
    with pytest.raises(UserError, match="no prompt to retain"):
        adv.adv_unlearn(model(), sets[0], hidden, adv.SMOKE)
    adv.adv_unlearn(model(), sets[0], hidden, adv.SMOKE.model_copy(update={"retain_weight": 0.0}))


def test_a_prefix_that_would_push_the_prompt_out_is_refused(sets) -> None:
    with pytest.raises(UserError, match="there is no room for 5"):
        adv.adv_unlearn(model(), *sets, adv.SMOKE.model_copy(update={"prefix": 5}))


def test_more_steps_of_sampling_than_the_model_has_levels_are_refused(sets) -> None:
    with pytest.raises(UserError, match="sampling_steps is 21; the model has 20"):
        adv.adv_unlearn(model(), *sets, adv.SMOKE.model_copy(update={"sampling_steps": 21}))


def test_a_run_that_diverges_says_so(sets) -> None:
    with pytest.raises(UserError, match="'unlearn' diverged"):
        adv.adv_unlearn(model(), *sets, adv.SMOKE.model_copy(update={"lr": 1e30}))
