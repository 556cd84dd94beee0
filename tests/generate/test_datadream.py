"""DataDream: LoRA, the components on disk, and what the rows say of themselves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.utils import logging as diffusers_log
from transformers import CLIPTextConfig, CLIPTextModel
from transformers.utils import logging as transformers_log

from tasks.core import loop
from tasks.core.catalog import configure
from tasks.core.dataset import SCHEMAS, Dataset, decode
from tasks.core.denoise import denoise, draw, guided, load, prompt
from tasks.core.errors import UserError
from tasks.core.text_to_image import Diffuser, build, make_tokenizer, quiet
from tasks.generate.datadream import SMOKE, Config, add_lora, choose_lora, datadream, nearest, remove_lora

TINY = Config(base_steps=6, lora_steps=4, sampling_steps=2, batch=4, channels=8, rank=2)
PROMPTS = ["a photo of a cat", "a photo of a dog"]


@pytest.fixture
def model() -> Diffuser:
    with quiet(), loop.seeded(0):
        return build((1, 8, 8), PROMPTS, channels=8, prediction="v_prediction")


def weights_of(part: torch.nn.Module) -> dict[str, bytes]:
    """Weights by name as it was before a LoRA wrapped the layer."""
    named = {name.replace(".base_layer", ""): value for name, value in part.state_dict().items() if "lora_" not in name}
    return {name: value.numpy().tobytes() for name, value in named.items()}


@torch.no_grad()
def parts(model: Diffuser) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    noisy = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    return noisy, torch.tensor(50), model.conditions(model.tokens(PROMPTS)), model.conditions(model.tokens([""]))


def few_shots(tiny: Dataset, per_class: int = 2) -> Dataset:
    labels = tiny.labels()
    return tiny.take(np.concatenate([np.flatnonzero(labels == c)[:per_class] for c in range(10)]))


def rest(tiny: Dataset) -> Dataset:
    return tiny.split("reference")


# LoRA


def test_training_a_lora_changes_its_own_weights_and_no_other(model):
    before = weights_of(model.unet), weights_of(model.text)
    images = np.arange(4 * 64, dtype=np.uint8).reshape(4, 1, 8, 8)
    with quiet(), loop.seeded(0) as generator:
        lora = add_lora(model, "first", rank=2, alpha=2, everywhere=True)
        start = [weights.detach().clone() for weights in lora]
        how = {"steps": 3, "batch": 2, "lr": 1e-2, "weight_decay": 0.0, "prompt_dropout": 0.0, "generator": generator, "what": "t"}
        losses = denoise(model, images, model.tokens(PROMPTS * 2), lora, **how)
    assert len(losses) == 3
    assert np.isfinite(losses).all()
    moved = [not torch.equal(now, then) for now, then in zip(lora, start, strict=True)]
    assert np.mean(moved) > 0.9
    assert (weights_of(model.unet), weights_of(model.text)) == before


def test_a_fresh_lora_changes_nothing_and_a_removed_one_leaves_nothing(model):
    noisy, level, conditions, empty = parts(model)
    plain = guided(model, noisy, level, conditions, empty, 2.0)
    with quiet(), loop.seeded(0):
        lora = add_lora(model, "first", rank=2, alpha=2, everywhere=True)
        assert torch.allclose(guided(model, noisy, level, conditions, empty, 2.0), plain, atol=1e-6)
        with torch.no_grad():
            for weights in lora:
                weights.add_(0.1)
        assert not torch.allclose(guided(model, noisy, level, conditions, empty, 2.0), plain, atol=1e-3)
        remove_lora(model, "first")
        assert torch.allclose(guided(model, noisy, level, conditions, empty, 2.0), plain, atol=1e-6)
        assert len(add_lora(model, "second", rank=2, alpha=2, everywhere=True)) == len(lora)


def test_a_lora_on_attention_alone_leaves_the_convolutions(model):
    with quiet(), loop.seeded(0):
        add_lora(model, "narrow", rank=2, alpha=2, everywhere=False)
    wrapped = {name.partition(".lora_")[0].rpartition("attn")[2] for name in model.unet.state_dict() if "lora_" in name}
    assert wrapped == {f"{at}.{layer}" for at in (1, 2) for layer in ("to_q", "to_k", "to_v", "to_out.0")}
    assert any("q_proj.lora_A" in name for name in model.text.state_dict())


@torch.no_grad()
def test_of_several_loras_the_chosen_one_acts_alone(model):
    noisy, level, conditions, empty = parts(model)
    alone = {}
    with quiet(), loop.seeded(0):
        for name in ("first", "second"):
            for weights in add_lora(model, name, rank=2, alpha=2, everywhere=True):
                weights.add_(0.05 * torch.randn_like(weights))
            alone[name] = guided(model, noisy, level, conditions, empty, 2.0), model.conditions(model.tokens(PROMPTS))
        assert not torch.allclose(alone["first"][0], alone["second"][0], atol=1e-3)
        for name in ("first", "second", "first"):
            choose_lora(model, name)
            assert torch.allclose(guided(model, noisy, level, conditions, empty, 2.0), alone[name][0], atol=1e-6)
            assert torch.allclose(model.conditions(model.tokens(PROMPTS)), alone[name][1], atol=1e-6)


# the whole method


@pytest.fixture(scope="module")
def shared_lora(tiny):
    return datadream(few_shots(tiny), rest(tiny), 3, TINY, seed=1)


def test_one_lora_for_all_makes_every_sample_a_child_of_all_shots_and_of_the_base(tiny, shared_lora):
    shots, base = few_shots(tiny), rest(tiny)
    rows = shared_lora.rows
    assert rows.schema == SCHEMAS["image"]
    assert rows["label"].to_pylist() == [label for label in range(10) for _ in range(3)]
    assert set(map(tuple, rows["parents"].to_pylist())) == {(*shots.ids(), *base.ids())}
    assert len(set(rows["sample_id"].to_pylist())) == 30
    assert rows["sample_id"][0].as_py().startswith("datadream-zero-00000-")
    assert rows["caption"][29].as_py() == "a photo of a nine"
    assert rows["_clean"].null_count == 30
    assert decode(rows["image"].combine_chunks().field("bytes").to_pylist(), (1, 8, 8)).std() > 0


def test_a_lora_of_its_own_makes_a_sample_the_child_of_its_classs_shots_alone(tiny):
    shots = few_shots(tiny)
    assert SMOKE.variant == "cls"
    made = datadream(shots, rest(tiny), 2, SMOKE.model_copy(update={"domain": "inked"}))
    own = dict(zip(shots.ids(), shots.labels(), strict=True))
    for row in made.rows.to_pylist():
        of_shots = [parent for parent in row["parents"] if parent in own]
        assert [own[parent] for parent in of_shots] == [row["label"]] * 2
        assert len(row["parents"]) == len(of_shots) + len(rest(tiny))
    assert made.rows["caption"][0].as_py() == "a inked photo of a zero"
    assert [point["step"] for point in made.curve] == [4.0 + 3 * k for k in range(11)]


def test_a_row_that_is_both_shot_and_base_is_named_once(tiny):
    shots = few_shots(tiny)
    made = datadream(shots, shots, 1, TINY)
    assert made.rows["parents"][0].as_py() == shots.ids()


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(tiny, shared_lora):
    again = datadream(few_shots(tiny), rest(tiny), 3, TINY, seed=1)
    assert again.rows.equals(shared_lora.rows)
    assert (again.figures, again.curve) == (shared_lora.figures, shared_lora.curve)
    other = datadream(few_shots(tiny), rest(tiny), 3, TINY, seed=2)
    assert not set(other.rows["sample_id"].to_pylist()) & set(again.rows["sample_id"].to_pylist())
    assert other.rows["image"].combine_chunks() != again.rows["image"].combine_chunks()


def test_figures_compare_the_samples_with_those_of_the_base_alone(shared_lora):
    assert set(shared_lora.figures) == {"base_loss", "adapted_loss", "pixel_frechet", "pixel_frechet_unadapted"}
    assert all(np.isfinite(value) and value > 0 for value in shared_lora.figures.values())


# several guidances and numbers of steps


def test_the_nearest_samples_are_chosen_and_of_equals_the_first():
    black, white = np.zeros((3, 1, 2, 2), np.uint8), np.full((3, 1, 2, 2), 255, np.uint8)
    hows = [{"guidance": w, "steps": 6} for w in (1.0, 1.5, 3.0)]
    best, figures = nearest([white, black, black], hows, black)
    assert best == 1
    assert figures == {
        "pixel_frechet_guidance_1_steps_6": pytest.approx(4),
        "pixel_frechet_guidance_1.5_steps_6": pytest.approx(0),
        "pixel_frechet_guidance_3_steps_6": pytest.approx(0),
        "guidance": 1.5,
        "sampling_steps": 6.0,
    }


def test_of_several_settings_the_nearest_draws_what_it_draws_alone(tiny, shared_lora):
    several = TINY.model_copy(update={"guidance": (1.0, 2.0, 1.0), "sampling_steps": (3, 2)})
    made = datadream(few_shots(tiny), rest(tiny), 3, several, seed=1)
    tried = {(w, k): made.figures[f"pixel_frechet_guidance_{w}_steps_{k}"] for w in (1, 2) for k in (3, 2)}
    assert len(made.figures) == 6 + len(tried)
    chosen = min(tried, key=lambda pair: tried[pair])
    assert (made.figures["guidance"], made.figures["sampling_steps"]) == chosen
    assert made.figures["pixel_frechet"] == pytest.approx(tried[chosen])
    assert tried[2, 2] == pytest.approx(shared_lora.figures["pixel_frechet"])
    alone = TINY.model_copy(update={"guidance": float(chosen[0]), "sampling_steps": chosen[1]})
    again = datadream(few_shots(tiny), rest(tiny), 3, alone, seed=1)
    assert again.rows["image"].equals(made.rows["image"])
    assert set(again.figures.items()) <= set(made.figures.items())


def only(shots: Dataset, *labels: int) -> Dataset:
    """The shots of these classes; the others are absent."""
    absent = tuple(name for at, name in enumerate(shots.info.classes) if at not in labels)
    rows = shots.where(np.isin(shots.labels(), labels))
    return replace(rows, info=replace(rows.info, absent=absent))


def test_loras_of_their_own_are_kept_until_one_setting_is_chosen_for_all(tiny):
    made = datadream(only(few_shots(tiny), 2, 5), rest(tiny), 2, SMOKE.model_copy(update={"guidance": (1.0, 3.0)}))
    assert made.rows["label"].to_pylist() == [2, 2, 5, 5]
    tried = {w: made.figures[f"pixel_frechet_guidance_{w}_steps_2"] for w in (1, 3)}
    assert made.figures["guidance"] == min(tried, key=lambda w: tried[w])


def test_settings_of_one_number_are_what_they_were():
    assert configure("generate.datadream", {"guidance": 2, "sampling_steps": 6}) == Config()
    assert Config(guidance=[1, 2]).guidance == (1.0, 2.0)
    assert Config().model_dump()["guidance"] == 2.0


@pytest.mark.parametrize("bad", [0.5, [], [1, 0]])
def test_guidance_below_one_is_refused(bad):
    with pytest.raises(UserError, match=r"'guidance' is .*must be 1 or more"):
        configure("generate.datadream", {"guidance": bad})


def test_one_shot_is_too_few_to_choose_by(tiny):
    with pytest.raises(UserError, match="chosen by distance to the shots"):
        datadream(only(few_shots(tiny, 1), 0), rest(tiny), 2, TINY.model_copy(update={"guidance": (1.0, 2.0)}))


def test_nothing_global_is_left_changed(tiny, capfd):
    transformers_log.set_verbosity_info()
    state, threads, numpy_state = torch.get_rng_state(), torch.get_num_threads(), np.random.get_state()[1].tolist()
    before = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in (diffusers_log, transformers_log)]
    try:
        datadream(few_shots(tiny), rest(tiny), 1, TINY)
        assert [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in (diffusers_log, transformers_log)] == before
    finally:
        transformers_log.set_verbosity_warning()
    assert torch.equal(torch.get_rng_state(), state)
    assert np.random.get_state()[1].tolist() == numpy_state
    assert torch.get_num_threads() == threads
    assert capfd.readouterr() == ("", "")


# a pre-trained model


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory) -> Path:
    """Stable Diffusion's folders, tiny: 3x16x16 images, 4x8x8 latents, velocity prediction."""
    folder = tmp_path_factory.mktemp("sd")
    with quiet(), loop.seeded(0):
        tokenizer = make_tokenizer([prompt("", "zero"), prompt("", "one")])
        ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        text = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            **ends,
        )
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=16,
            attention_head_dim=2,
        )
        ends_of = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=16, **ends_of)
        unet.save_pretrained(folder / "unet")
        vae.save_pretrained(folder / "vae")
        CLIPTextModel(text).save_pretrained(folder / "text_encoder")
        tokenizer.save_pretrained(folder / "tokenizer")
        DDPMScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear").save_pretrained(folder / "scheduler")
    return folder


def test_stable_diffusions_folders_load_and_run_through_the_same_code(tiny, stable_diffusion):
    shots = few_shots(tiny)
    made = datadream(shots, rest(tiny), 2, TINY.model_copy(update={"pretrained": str(stable_diffusion)}))
    assert made.rows.num_rows == 20
    assert made.rows["parents"][0].as_py() == shots.ids()  # its training data is not ours: no base rows among the parents
    assert "base_loss" not in made.figures
    images = decode(made.rows["image"].combine_chunks().field("bytes").to_pylist(), (1, 8, 8))
    assert images.shape == (20, 1, 8, 8)
    assert images.std() > 0


def test_loaded_components_are_the_saved_ones_and_images_pass_through_the_latents(stable_diffusion):
    with quiet():
        model = load(str(stable_diffusion), (1, 12, 12))
        saved = UNet2DConditionModel.from_pretrained(stable_diffusion / "unet")
    assert weights_of(model.unet) == weights_of(saved)
    assert model.tokenizer.tokenize("zero") == ["zero</w>"]
    assert model.latent_shape() == (4, 8, 8)
    latents = model.to_latents(np.zeros((2, 1, 12, 12), np.uint8), torch.Generator().manual_seed(0))
    assert latents.shape == (2, 4, 8, 8)
    assert model.to_images(latents).shape == (2, 1, 12, 12)
    assert draw(model, ["a photo of a zero"], guidance=2.0, steps=2, generator=torch.Generator().manual_seed(0)).shape == (1, 1, 12, 12)


def test_the_vaes_latents_are_scaled_as_its_config_says(stable_diffusion):
    with quiet():
        model = load(str(stable_diffusion), (3, 16, 16))
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 16, 16), dtype=np.uint8)
    found = model.to_latents(images, torch.Generator().manual_seed(4))
    with torch.no_grad():
        posterior = model.vae.encode(torch.from_numpy(images).float() / 127.5 - 1).latent_dist
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    assert torch.allclose(found, 0.18215 * (posterior.mean + posterior.std * noise), atol=1e-4)


# mistakes


def test_a_class_without_shots_is_named(tiny):
    shots = few_shots(tiny)
    with pytest.raises(UserError, match="class 'three' has no shots"):
        datadream(shots.where(shots.labels() != 3), rest(tiny), 1, TINY)


def test_an_unknown_variant_is_refused_with_the_valid_ones():
    with pytest.raises(UserError, match=r"variant.*'dset' or 'cls'"):
        configure("generate.datadream", {"variant": "both"})


def test_a_pretrained_folder_that_is_not_there_is_named(tiny, tmp_path):
    with pytest.raises(UserError, match=r"no folder .*nowhere"):
        datadream(few_shots(tiny), rest(tiny), 1, TINY.model_copy(update={"pretrained": str(tmp_path / "nowhere")}))


def test_a_folder_without_components_is_refused(tiny, tmp_path):
    with pytest.raises(UserError, match="no Stable Diffusion components"):
        datadream(few_shots(tiny), rest(tiny), 1, TINY.model_copy(update={"pretrained": str(tmp_path)}))


def test_without_base_rows_there_is_no_generator_to_adapt(tiny):
    with pytest.raises(UserError, match="no base rows"):
        datadream(few_shots(tiny), tiny.take(np.array([], dtype=int)), 1, TINY)
