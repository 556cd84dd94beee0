"""Diffusion with text conditions: prompts and tokens, the denoising target, guidance, images in and out, and the network of it all."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.core import loop, networks
from tasks.core.denoise import denoise, denoising_target, guided, pixel_frechet, prompt, text_denoiser
from tasks.core.errors import UserError
from tasks.core.text_to_image import Diffuser, TextDenoiser, block_widths, build, make_tokenizer, quiet, word_merges

PROMPTS = ["a photo of a cat", "a photo of a dog"]


@pytest.fixture
def model() -> Diffuser:
    with quiet(), loop.seeded(0):
        return build((1, 8, 8), PROMPTS, channels=8, prediction="v_prediction")


# prompts and tokens


def test_a_prompt_names_the_domain_and_the_class():
    assert prompt("handwritten", "zero") == "a handwritten photo of a zero"


def test_a_prompt_without_a_domain_has_no_hole():
    assert prompt("", "ankle boot") == "a photo of a ankle boot"


def test_every_word_of_the_prompts_is_one_token_and_an_unknown_word_is_spelt():
    tokenizer = make_tokenizer(["a photo of a T-shirt/top", "an inked photo"])
    assert tokenizer.tokenize("a inked T-shirt") == ["a</w>", "inked</w>", "t</w>", "-</w>", "shirt</w>"]
    assert tokenizer.tokenize("xyz") == ["x", "y", "z</w>"]


def test_words_that_share_pieces_are_whole_all_the_same():
    words = ["of", "phone", "photo", "roof", "wo", "two", "to", "a"]
    assert make_tokenizer([" ".join(words)]).tokenize(" ".join(words)) == [f"{word}</w>" for word in words]


@given(st.lists(st.text("abc", min_size=1, max_size=6), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_any_words_are_whole_and_get_the_same_numbers_each_time(words):
    text = " ".join(words)
    first, second = make_tokenizer([text]), make_tokenizer([text])
    assert first.tokenize(text) == [f"{word}</w>" for word in words]
    assert first(text)["input_ids"] == second(text)["input_ids"]


def test_merges_are_worked_by_hand():
    assert word_merges(["of", "roof"]) == [("o", "f</w>"), ("r", "o"), ("ro", "of</w>")]


def test_token_rows_are_as_long_as_the_longest_prompt(model):
    tokens = model.tokens(["a photo of a cat", ""])
    assert tokens.shape == (2, 7)  # start, five words, end
    assert tokens[1].tolist() == [0, 1, 1, 1, 1, 1, 1]


def test_equal_prompts_get_equal_conditions_and_others_do_not(model):
    with torch.no_grad():
        found = model.conditions(model.tokens([PROMPTS[0], PROMPTS[1], PROMPTS[0]]))
    assert torch.equal(found[0], found[2])
    assert not torch.allclose(found[0], found[1])


# the denoising target


def test_velocity_is_worked_by_hand_from_the_schedulers_own_noise_levels():
    scheduler = DDPMScheduler(num_train_timesteps=4, trained_betas=[0.1, 0.2, 0.3, 0.4], prediction_type="v_prediction")
    clean, noise = torch.full((1, 1, 2, 2), 2.0), torch.full((1, 1, 2, 2), -1.0)
    kept = 0.9 * 0.8 * 0.7  # share of the signal's variance that is left at level 2
    wanted = kept**0.5 * -1.0 - (1 - kept) ** 0.5 * 2.0
    found = denoising_target(scheduler, clean, noise, torch.tensor([2]))
    assert torch.allclose(found, torch.full_like(clean, wanted), atol=1e-6)


@pytest.mark.parametrize(("kind", "wanted"), [("epsilon", -1.0), ("sample", 2.0)])
def test_the_target_is_the_noise_or_the_image_where_the_scheduler_says_so(kind, wanted):
    scheduler = DDPMScheduler(prediction_type=kind)
    found = denoising_target(scheduler, torch.tensor([[[[2.0]]]]), torch.tensor([[[[-1.0]]]]), torch.tensor([5]))
    assert found.item() == wanted


def test_an_unknown_kind_of_prediction_is_refused():
    scheduler = DDPMScheduler(prediction_type="flow")
    with pytest.raises(UserError, match="'flow'; valid: epsilon"):
        denoising_target(scheduler, torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), torch.tensor([0]))


# guidance


@torch.no_grad()
def parts(model: Diffuser) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    noisy = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    return noisy, torch.tensor(50), model.conditions(model.tokens(PROMPTS)), model.conditions(model.tokens([""]))


@torch.no_grad()
def test_guidance_one_is_the_conditional_prediction(model):
    noisy, level, conditions, empty = parts(model)
    assert torch.equal(guided(model, noisy, level, conditions, empty, 1.0), model.unet(noisy, level, conditions).sample)


@torch.no_grad()
def test_guidance_three_goes_three_times_as_far_from_the_empty_prompt(model):
    noisy, level, conditions, empty = parts(model)
    conditional, unconditional = model.unet(noisy, level, conditions).sample, model.unet(noisy, level, empty.repeat(2, 1, 1)).sample
    found = guided(model, noisy, level, conditions, empty, 3.0)
    assert torch.allclose(found, 3 * conditional - 2 * unconditional, atol=1e-5)
    assert not torch.allclose(found, conditional, atol=1e-5)


# images in and out


@given(st.sampled_from([1, 3]), st.integers(8, 64), st.integers(8, 64))
@settings(max_examples=25, deadline=None)
def test_images_of_any_size_are_padded_to_what_the_levels_need_and_cropped_back(channels, height, width):
    step = 2 ** (len(block_widths(8, height, width)) - 1)
    size = (-(-height // step) * step, -(-width // step) * step)
    model = Diffuser(torch.nn.Identity(), None, None, None, None, (channels, height, width), size, padded=True)
    images = np.random.default_rng(0).integers(0, 256, (2, channels, height, width), dtype=np.uint8)
    latents = model.to_latents(images, torch.Generator())
    assert latents.shape[2] % step == latents.shape[3] % step == 0
    assert float(latents.abs().max()) <= 1
    assert np.array_equal(model.to_images(latents), images)


def test_levels_grow_with_the_image():
    assert block_widths(16, 8, 8) == (16, 32)
    assert block_widths(16, 28, 28) == (16, 32, 64)
    assert block_widths(16, 64, 20) == (16, 32, 64, 64)


# the distance


def test_the_distance_of_two_gaussians_is_worked_by_hand():
    # two uncorrelated pixels: both means differ by .2, and the second one's deviation is twice as large
    ours = np.array([[0, 0], [0, 102], [102, 0], [102, 102]], dtype=np.uint8).reshape(4, 1, 1, 2)
    theirs = np.array([[51, 0], [51, 204], [153, 0], [153, 204]], dtype=np.uint8).reshape(4, 1, 1, 2)
    deviation = 0.2 * (4 / 3) ** 0.5
    assert pixel_frechet(ours, theirs) == pytest.approx(0.2**2 + 0.2**2 + deviation**2, rel=1e-5)


def test_a_set_has_no_distance_to_itself_and_one_image_has_none_to_any():
    images = np.random.default_rng(0).integers(0, 256, (40, 3, 12, 12), dtype=np.uint8)
    assert pixel_frechet(images, images) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="two images"):
        pixel_frechet(images[:1], images)


# the network


@pytest.fixture(scope="module")
def net() -> TextDenoiser:
    with loop.seeded(0):
        return text_denoiser((1, 7, 7), PROMPTS, ["a drawing of a cat"], channels=8)


def test_a_network_is_rebuilt_from_its_description_and_draws_the_same(net):
    again = networks.build(net.arch)
    again.load_state_dict(net.state_dict())
    first, second = (one.draw(torch.tensor([0, 1]), steps=2, generator=torch.Generator().manual_seed(1)) for one in (net, again))
    assert first.shape == (2, 1, 7, 7)
    assert first.dtype == torch.uint8
    assert torch.equal(first, second)
    assert not torch.equal(first[0], first[1])


def test_copies_and_pickles_have_parts_of_their_own(net):
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert other.diffuser.unet is other.unet
        assert other.unet is not net.unet
        assert torch.equal(other.encode(PROMPTS), net.encode(PROMPTS))


def test_the_conditions_of_a_label_are_those_of_its_prompt(net):
    assert torch.equal(net.conditions(torch.tensor([1, 0, 1])), net.encode([PROMPTS[1], PROMPTS[0], PROMPTS[1]]))
    with pytest.raises(ValueError, match="labels are 0 to 1; there are 0 to 2"):
        net.conditions(torch.tensor([0, 2]))


def test_noise_levels_are_those_of_the_scheduler_it_is_trained_with(net):
    assert torch.allclose(net.abar, net.diffuser.scheduler.alphas_cumprod, atol=1e-6)


def test_noise_and_velocity_are_told_of_the_same_picture():
    """With v = sqrt(abar) noise - sqrt(1 - abar) picture, the noise is sqrt(abar) v + sqrt(1 - abar) noisy."""
    with loop.seeded(0):
        of_velocity = text_denoiser((1, 8, 8), PROMPTS, channels=8, levels=10)
    clean, noise, levels = torch.full((2, 1, 8, 8), 0.4), torch.full((2, 1, 8, 8), -0.7), torch.tensor([2, 6])
    share = of_velocity.abar[levels][:, None, None, None]
    of_velocity.predict = lambda *_: share.sqrt() * noise - (1 - share).sqrt() * clean  # a perfect network
    assert torch.allclose(of_velocity(of_velocity.noised(clean, noise, levels), levels, torch.empty(0)), noise, atol=1e-6)


def test_a_prefix_of_known_words_is_those_words(net):
    tokens = net.diffuser.tokens(["of a dog"])
    before = net.text.embeddings.token_embedding(net.diffuser.tokens(["a photo"])[:, 1:3])
    assert torch.allclose(net.encode_prefixed(before, tokens), net.encode([PROMPTS[1]]), atol=1e-6)
    assert torch.equal(net.encode_prefixed(before[:, :0], tokens), net.encode(["of a dog"]))


def test_the_whole_pads_odd_sizes_and_learns_by_the_denoising_loss():
    with loop.seeded(0) as generator:
        net = text_denoiser((1, 7, 7), PROMPTS, channels=8)
        images = np.zeros((8, 1, 7, 7), np.uint8)
        images[4:] = 255
        tokens = net.diffuser.tokens([PROMPTS[label] for label in (0, 0, 0, 0, 1, 1, 1, 1)])
        how = {"batch": 8, "lr": 3e-3, "weight_decay": 0.0, "prompt_dropout": 0.0, "generator": generator, "what": "t"}
        losses = denoise(net.diffuser, images, tokens, list(net.parameters()), steps=120, **how)
    drawn = net.draw(torch.tensor([0, 1]), generator=torch.Generator().manual_seed(0)).float().mean((1, 2, 3))
    assert losses[-1] < losses[0] / 2
    assert float(drawn[0]) + 50 < float(drawn[1])


@pytest.mark.parametrize(("change", "said"), [({"betas": [0.1, 0.2]}, "has 'cosine'"), ({"classes": 3}, "2 prompts for 3 classes")])
def test_a_description_that_does_not_fit_is_refused(net, change, said):
    with pytest.raises(ValueError, match=said):
        networks.build({**net.arch, **change})
