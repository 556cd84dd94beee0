"""LightGen: masks, unmasking, the losses by hand, preferences, and what the rows say of themselves."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTextConfig, CLIPTextModel

from tasks.core import loop
from tasks.core.catalog import configure
from tasks.core.dataset import SCHEMAS, Dataset, decode
from tasks.core.errors import UserError
from tasks.core.text_to_image import make_tokenizer, quiet
from tasks.generate._mar import Mar, errors, fit, masked_count, noise_for, patches, pick, pictures, sample, still_masked
from tasks.generate._preference import preference_loss, tune
from tasks.generate.lightgen import SMOKE, dealt, lightgen, prompts_of

LENGTH, VALUES, LEVELS = 16, 4, 50


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def net() -> Mar:
    sizes = {"width": 16, "heads": 2, "depth": 1, "aligner": 1, "head_width": 16, "head_depth": 1}
    with loop.seeded(0):
        return Mar(LENGTH, VALUES, 8, **sizes, levels=LEVELS, bound=1.0)


@pytest.fixture
def moved(net: Mar) -> Mar:
    """A student whose head says something: at first it answers 0."""
    with torch.no_grad(), loop.seeded(1):
        for weights in net.head.parameters():
            weights.add_(0.1 * torch.randn_like(weights))
    return net


def some(n: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, text, order."""
    made = generator(3)
    order = torch.rand((n, LENGTH), generator=made).argsort(1)
    return torch.rand((n, LENGTH, VALUES), generator=made) * 2 - 1, torch.randn((n, 5, 8), generator=made), order


# tokens, masks, unmasking


def test_a_token_is_a_patch_and_tokens_make_the_picture_again():
    images = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    tokens = patches(images, 2)
    assert tokens.shape == (2, 6, 12)
    assert tokens[0, 4, :4].tolist() == [14, 15, 20, 21]  # second row of patches, second column, first channel
    assert torch.equal(pictures(tokens, (4, 6), 2), images)


def test_the_share_of_masked_tokens_follows_the_cut_normal():
    made = generator()
    shares = np.array([masked_count(1000, 0.7, made) for _ in range(2000)]) / 1000
    assert shares.min() >= 0.7
    assert shares.max() <= 1
    # half a normal of deviation .25, cut at 1.2 deviations: mean of |z| is (phi(0) - phi(1.2)) / (Phi(1.2) - 1/2)
    mean = 1 - 0.25 * (1 - math.exp(-0.72)) / math.sqrt(2 * math.pi) / (0.5 * math.erf(1.2 / math.sqrt(2)))
    assert shares.mean() == pytest.approx(mean, abs=0.008)
    assert np.mean(shares > 0.85) == pytest.approx(math.erf(0.6 / math.sqrt(2)) / math.erf(1.2 / math.sqrt(2)), abs=0.045)


def test_the_number_of_masked_tokens_is_rounded_up():
    assert {masked_count(4, 0.7, generator(seed)) for seed in range(40)} == {3, 4}


@given(length=st.integers(1, 300), steps=st.integers(1, 80))
@settings(max_examples=60, deadline=None)
def test_every_step_unmasks_something_and_the_last_one_the_rest(length: int, steps: int):
    left = still_masked(length, steps)
    assert left[-1] == 0
    assert all(now < before for before, now in zip([length, *left], left, strict=False))
    assert len(left) == min(length, steps)


def test_unmasking_follows_the_cosine():
    assert still_masked(256, 4) == [int(256 * math.cos(math.pi / 8 * step)) for step in (1, 2, 3)] + [0]


def test_drawing_fills_every_token_once(net: Mar, monkeypatch: pytest.MonkeyPatch):
    filled = torch.zeros(3, LENGTH)
    scatter = torch.Tensor.scatter

    def watched(self: torch.Tensor, dim: int, at: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        if self.shape == (3, LENGTH, VALUES):  # the tokens; what is put into the decoder is wider
            filled.scatter_add_(1, at[..., 0], torch.ones(at.shape[:2]))
        return scatter(self, dim, at, values)

    monkeypatch.setattr(torch.Tensor, "scatter", watched)
    tokens = sample(net, some(3)[1], steps=5, head_steps=3, guidance=2.0, generator=generator())
    assert torch.equal(filled, torch.ones(3, LENGTH))
    assert tokens.shape == (3, LENGTH, VALUES)
    assert float(tokens.abs().max()) <= 1


# the network


def test_masked_tokens_say_nothing_and_seen_ones_do(moved: Mar):
    tokens, text, order = some()
    text = moved.align(text)
    outputs = moved(tokens, order, 10, text)
    assert outputs.shape == (6, 10, 16)
    hidden = tokens.scatter(1, order[:, :10, None].expand(-1, -1, VALUES), 9.0)
    seen = tokens.scatter(1, order[:, 10:, None].expand(-1, -1, VALUES), 9.0)
    assert torch.equal(moved(hidden, order, 10, text), outputs)
    assert not torch.allclose(moved(seen, order, 10, text), outputs, atol=1e-3)
    assert torch.equal(moved(hidden, order, LENGTH, text), moved(seen, order, LENGTH, text))


def test_the_order_of_the_seen_tokens_does_not_matter(moved: Mar):
    tokens, text, order = some()
    other = torch.cat([order[:, :10], order[:, 10:].flip(1)], 1)
    assert torch.allclose(moved(tokens, order, 10, moved.align(text)), moved(tokens, other, 10, moved.align(text)), atol=1e-5)


def test_a_dropped_text_is_the_empty_one(moved: Mar):
    text = some()[1]
    dropped = torch.tensor([True, False] * 3)
    aligned = moved.align(text, dropped)
    assert torch.equal(aligned[dropped], moved.empty.expand(3, 5, -1))
    assert torch.equal(aligned[~dropped], moved.align(text)[~dropped])


# losses


def test_a_head_that_says_nothing_errs_by_the_noise_itself(net: Mar):
    tokens, text, order = some()
    noise, levels = noise_for(6, 10, VALUES, LEVELS, 2, generator())
    found = errors(net, tokens, order, 10, net.align(text), noise, levels)
    assert torch.allclose(found, noise.square().sum((2, 3)).mean(0), rtol=1e-5)


def test_an_error_is_that_of_each_masked_token_under_its_own_output(moved: Mar):
    tokens, text, order = some(2)
    noise, levels = noise_for(2, 3, VALUES, LEVELS, 1, generator())
    outputs, clean = moved(tokens, order, 3, moved.align(text)), pick(tokens, order[:, :3])
    by_hand = []
    for n in range(2):
        total = 0.0
        for k in range(3):
            share = moved.scheduler.alphas_cumprod[levels[0, n, k]]
            noisy = share.sqrt() * clean[n, k] + (1 - share).sqrt() * noise[0, n, k]
            guessed = moved.head(noisy[None], levels[0, n, k][None], outputs[n, k][None])[0]
            total += (guessed - noise[0, n, k]).square().sum().item()
        by_hand.append(total)
    found = errors(moved, tokens, order, 3, moved.align(text), noise, levels)
    assert found.tolist() == pytest.approx(by_hand, rel=1e-4)


def test_the_loss_of_a_student_that_says_nothing_is_one(net: Mar):
    """The mean square of the noise; the first step is taken before anything was learnt."""
    tokens, text, _ = some(64)
    how = {"batch": 64, "lr": 1e-3, "weight_decay": 0.02, "mask_min": 0.7, "text_drop": 0.1, "repeats": 4}
    with loop.seeded(0):
        _, losses = fit(net, tokens, text, torch.arange(64), steps=1, ema=0.9, generator=generator(), **how)
    assert losses[0] == pytest.approx(1, abs=0.05)


def test_the_student_learns_and_its_mean_follows(net: Mar):
    tokens, text, _ = some(8)
    how = {"batch": 8, "lr": 3e-3, "weight_decay": 0.02, "mask_min": 0.7, "text_drop": 0.1, "repeats": 2}
    before = copy.deepcopy(net)
    with loop.seeded(0):
        mean, losses = fit(net, tokens, text, torch.arange(8), steps=30, ema=0.5, generator=generator(), **how)
    assert np.mean(losses[-5:]) < 0.95 * np.mean(losses[:5])
    far, near = (sum((a - b).square().sum().item() for a, b in zip(mean.parameters(), n.parameters(), strict=True)) for n in (before, net))
    assert 0 < near < far
    assert not any(weights.requires_grad for weights in mean.parameters())


# preferences


def test_a_student_that_did_not_move_loses_log_two():
    error = torch.rand(5)
    assert float(preference_loss(error, 2 * error, error, 2 * error, 3.0)) == pytest.approx(math.log(2))


def test_the_preference_loss_by_hand():
    won, lost, won_before, lost_before = (torch.tensor([value]) for value in (1.0, 5.0, 2.0, 4.5))
    # the winner's error fell by 1, the loser's rose by .5: -log sigmoid(.4 * 1.5)
    assert float(preference_loss(won, lost, won_before, lost_before, 0.4)) == pytest.approx(math.log(1 + math.exp(-0.6)))


def test_the_preference_loss_pulls_to_winners_and_away_from_losers():
    won, lost = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    preference_loss(won, lost, torch.ones(3), torch.ones(3), 0.3).backward()
    # at no difference each pair pulls with beta / 2
    assert won.grad.tolist() == pytest.approx([0.3 / 2 / 3] * 3)
    assert lost.grad.tolist() == pytest.approx([-0.3 / 2 / 3] * 3)


TUNING = {"steps": 12, "batch": 6, "beta": 0.3, "mask_min": 0.7, "repeats": 2}


def test_tuning_starts_at_log_two_goes_down_and_leaves_the_reference(moved: Mar):
    tokens, text, _ = some()
    before = copy.deepcopy(moved).state_dict()
    with loop.seeded(0):
        tuned, losses = tune(moved, tokens, -tokens[:, None], text, kind="dpo", lr=3e-3, generator=generator(), **TUNING)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)  # the same mask, noise and levels: any other and it were not
    assert np.mean(losses[-3:]) < math.log(2) - 0.01
    assert all(torch.equal(value, before[name]) for name, value in moved.state_dict().items())
    assert not torch.equal(tuned.head.last.weight, moved.head.last.weight)


def test_plain_tuning_does_not_look_at_the_losers(moved: Mar):
    tokens, text, _ = some()
    made = []
    for losers in (-tokens[:, None], torch.zeros(6, 1, LENGTH, VALUES)):
        with loop.seeded(0):
            made.append(tune(moved, tokens, losers, text, kind="winners", lr=1e-3, generator=generator(), **TUNING)[1])
    assert made[0] == made[1]


# prompts


def test_prompts_are_the_captions_that_name_the_class_or_the_templates():
    said = ["a bold One", "someone", "", "a bold One", "one on the left", "a two"]
    assert prompts_of("one", said, ("a {}",)) == ["a bold One", "one on the left"]
    assert prompts_of("three", said, ("a {}", "the {}", "a {}")) == ["a three", "the three"]


def test_prompts_are_dealt_evenly():
    assert dealt([["a", "b"], ["c"]], 5) == ["a", "c", "b", "c", "a"]


# the whole method


def few_shots(tiny: Dataset, per_class: int = 2) -> Dataset:
    labels = tiny.labels()
    return tiny.take(np.concatenate([np.flatnonzero(labels == c)[:per_class] for c in range(10)]))


def rest(tiny: Dataset) -> Dataset:
    return tiny.split("reference")


@pytest.fixture(scope="module")
def made(tiny: Dataset):
    return lightgen(few_shots(tiny), rest(tiny), 2, SMOKE, seed=1)


def test_rows_are_children_of_shots_and_base_and_say_their_prompt(tiny: Dataset, made):
    shots, base, rows = few_shots(tiny), rest(tiny), made.rows
    assert rows.schema == SCHEMAS["image"]
    assert rows["label"].to_pylist() == [label for label in range(10) for _ in range(2)]
    assert set(map(tuple, rows["parents"].to_pylist())) == {(*shots.ids(), *base.ids())}
    assert len(set(rows["sample_id"].to_pylist())) == 20
    assert rows["sample_id"][0].as_py().startswith("lightgen-zero-00000-")
    assert rows["caption"][19].as_py() == "a photo of the digit nine"
    assert decode(rows["image"].combine_chunks().field("bytes").to_pylist(), (1, 8, 8)).std() > 0
    assert set(made.figures) == {"base_loss", "student_loss", "tuning_loss", "pixel_frechet", "pixel_frechet_teacher"}
    assert all(np.isfinite(value) for value in made.figures.values())


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(tiny: Dataset, made):
    again = lightgen(few_shots(tiny), rest(tiny), 2, SMOKE, seed=1)
    assert again.rows.equals(made.rows)
    assert (again.figures, again.curve) == (made.figures, made.curve)
    other = lightgen(few_shots(tiny), rest(tiny), 2, SMOKE, seed=2)
    assert other.rows["image"].combine_chunks() != again.rows["image"].combine_chunks()


def test_without_preferences_no_shots_are_needed(tiny: Dataset):
    off = SMOKE.model_copy(update={"dpo_steps": 0})
    found = lightgen(tiny.take(np.array([], dtype=int)), rest(tiny), 1, off)
    assert "tuning_loss" not in found.figures
    assert found.rows["parents"][0].as_py() == rest(tiny).ids()
    with pytest.raises(UserError, match="no labelled shots to prefer"):
        lightgen(tiny.take(np.array([], dtype=int)), rest(tiny), 1, SMOKE)


# a pre-trained teacher


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion's folders, tiny: 3x16x16 images, 4x8x8 latents, velocity prediction."""
    folder = tmp_path_factory.mktemp("sd")
    with quiet(), loop.seeded(0):
        tokenizer = make_tokenizer(["a photo of the digit zero"])
        ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        text = CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=16, **sizes, **ends)
        blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
        how = {"layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 16, "attention_head_dim": 2}
        UNet2DConditionModel(sample_size=8, block_out_channels=(8, 16), **blocks, **how).save_pretrained(folder / "unet")
        ends_of = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=16, **ends_of)
        vae.save_pretrained(folder / "vae")
        CLIPTextModel(text).save_pretrained(folder / "text_encoder")
        tokenizer.save_pretrained(folder / "tokenizer")
        DDPMScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear").save_pretrained(folder / "scheduler")
    return folder


def test_a_teacher_in_stable_diffusions_folders_teaches_its_latents(tiny: Dataset, stable_diffusion: Path):
    shots, told = few_shots(tiny, 1), rest(tiny)
    cfg = SMOKE.model_copy(update={"pretrained": str(stable_diffusion)})
    found = lightgen(shots, told, 1, cfg)
    assert found.rows["parents"][0].as_py() == [*shots.ids(), *told.ids()]  # it saw no base row, but was asked for what they say
    assert lightgen(shots, told.take(np.array([], dtype=int)), 1, cfg).rows["parents"][0].as_py() == shots.ids()
    assert "base_loss" not in found.figures
    assert decode(found.rows["image"].combine_chunks().field("bytes").to_pylist(), (1, 8, 8)).shape == (10, 1, 8, 8)
    with pytest.raises(UserError, match="8x8 do not fall into patches of 3"):
        lightgen(shots, told, 1, cfg.model_copy(update={"patch": 3}))


# mistakes


def test_a_class_that_nothing_shows_is_named(tiny: Dataset, stable_diffusion: Path):
    shots, base = few_shots(tiny), rest(tiny)
    without = [part.where(part.labels() != 3) for part in (shots, base)]
    with pytest.raises(UserError, match="class 'three' has no shots and no base rows"):
        lightgen(*without, 1, SMOKE)
    with pytest.raises(UserError, match="class 'three' has no shots"):
        lightgen(without[0], base, 1, SMOKE.model_copy(update={"pretrained": str(stable_diffusion)}))


def test_without_base_rows_there_is_no_teacher_to_train(tiny: Dataset):
    with pytest.raises(UserError, match="no base rows to train a teacher on"):
        lightgen(few_shots(tiny), tiny.take(np.array([], dtype=int)), 1, SMOKE)


def test_a_folder_without_components_is_refused(tiny: Dataset, tmp_path: Path):
    with pytest.raises(UserError, match="no Stable Diffusion components"):
        lightgen(few_shots(tiny), rest(tiny), 1, SMOKE.model_copy(update={"pretrained": str(tmp_path)}))


def test_a_student_that_diverges_is_reported(tiny: Dataset):
    with pytest.raises(UserError, match=r"'student' diverged.*smaller lr"):
        lightgen(few_shots(tiny), rest(tiny), 1, SMOKE.model_copy(update={"lr": 1e30, "steps": 6}))


def test_an_unknown_way_of_tuning_is_refused_with_the_valid_ones():
    with pytest.raises(UserError, match=r"tuning.*'dpo' or 'winners'"):
        configure("generate.lightgen", {"tuning": "rlhf"})
