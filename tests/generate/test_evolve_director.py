"""EvolveDirector: the budget, the verdicts, evolution, and the whole method offline. Its prompts: `test_director.py`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPImageProcessor, CLIPTextConfig, CLIPTextModel, GPT2Config, GPT2LMHeadModel

from tasks.core import clip, loop
from tasks.core.dataset import SCHEMAS, Dataset
from tasks.core.errors import UserError
from tasks.core.text_to_image import build, make_tokenizer, quiet
from tasks.generate._director import LanguageModel, Rules
from tasks.generate._prompts import Vocabulary
from tasks.generate._student import Pair, Student
from tasks.generate._teachers import Purse, WordScore, by_score, compare
from tasks.generate.evolve_director import SMOKE, Config, evolve, evolve_director
from tests.conftest import NAMES

PROMPTS = ["a bold cat left", "a thin cat left", "a bold dog left", "a thin dog right"]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def flat(prompts: list[str], value: int) -> np.ndarray:
    return np.full((len(prompts), 1, 2, 2), value, dtype=np.uint8)


class Asked:
    """A teacher that draws one shade and counts its pictures."""

    def __init__(self, shade: int) -> None:
        self.shade, self.drawn = shade, 0

    def __call__(self, prompts: list[str]) -> np.ndarray:
        self.drawn += len(prompts)
        return flat(prompts, self.shade)


def bright(prompts: list[str], images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).mean(1)


# the judge and the budget


def test_what_the_judge_sees_first_is_drawn_and_undone() -> None:
    judge = by_score(bright, 0.0)
    found = compare(judge, ["a"] * 50, flat(["a"] * 50, 9), flat(["a"] * 50, 1), rng())
    assert found == ["first"] * 50
    assert compare(by_score(bright, 8.0), ["a"], flat(["a"], 9), flat(["a"], 1), rng()) == ["tie"]


def test_a_judge_that_always_says_a_favours_nobody() -> None:
    n = 4000
    found = compare(lambda prompts, *_: ["A"] * len(prompts), ["a"] * n, flat(["a"] * n, 9), flat(["a"] * n, 1), rng())
    assert abs(found.count("first") / n - 0.5) < 0.03
    assert found.count("first") + found.count("second") == n


@given(st.integers(1, 3), st.integers(1, 30), st.lists(st.integers(0, 12), max_size=6))
def test_no_more_calls_are_spent_than_there_are_and_each_teachers_picture_is_one(number: int, calls: int, asked: list[int]) -> None:
    teachers = [Asked(shade) for shade in range(number)]
    purse = Purse(teachers, calls)
    stored = []
    for n in asked:
        stored += purse.ask(["a"] * n, by_score(bright, 0.0), rng())
        assert purse.spent == sum(teacher.drawn for teacher in teachers) == number * len(stored) <= calls
    assert len(stored) == min(sum(asked), calls // number)


def test_the_knock_outs_winner_alone_is_stored_but_all_pictures_are_counted() -> None:
    purse = Purse([Asked(3), Asked(9), Asked(5)], 100)
    found = purse.ask(["a cat", "a dog"], by_score(bright, 0.0), rng())
    assert [(text, int(image.max()), at) for text, image, at in found] == [("a cat", 9, 1), ("a dog", 9, 1)]
    assert purse.spent == 6


def test_the_small_judge_tells_words_apart_and_noise_from_pictures(tiny: Dataset) -> None:
    rows = tiny.split("train")
    names = [f"a {NAMES[label]}" for label in rows.labels()]
    vocabulary = Vocabulary(NAMES, names)
    with loop.seeded(0) as generator:
        score = WordScore(vocabulary, rows.images(), names, steps=80, generator=generator)
    test = tiny.split("test")
    right, wrong = ([f"a {NAMES[(label + more) % 10]}" for label in test.labels()] for more in (0, 1))
    assert np.mean(score(right, test.images()) > score(wrong, test.images())) > 0.9
    noise = rng().integers(0, 256, (100, 1, 8, 8), dtype=np.uint8)
    assert score(right, test.images()).mean() > score(right, noise).mean()


# evolution


def step(verdicts: dict[int, str], **own: object) -> tuple[list[str], list[str], dict[str, float]]:
    pairs = [Pair(text, np.zeros((1, 2, 2), dtype=np.uint8), 0) for text in PROMPTS]
    how = {"expand": 3, "delete": True, "mutation": 0.0, "floor": 0, "room": 10, **own}
    kept, wanted, done = evolve(pairs, verdicts, Rules(Vocabulary(["cat", "dog"], PROMPTS), 1), set(PROMPTS), **how, rng=rng())
    return [pair.prompt for pair in kept], wanted, done


def test_a_better_teacher_keeps_and_expands_an_equal_student_deletes_and_no_verdict_changes_nothing() -> None:
    kept, wanted, done = step({0: "teacher", 1: "student", 2: ""})
    assert kept == [PROMPTS[0], *PROMPTS[2:]]
    assert done == {"expanded": 1, "deleted": 1, "mutated": 0}
    assert wanted
    assert not set(wanted[1:]) & set(PROMPTS)


def test_deletion_stops_at_the_floor_and_can_be_left_out() -> None:
    everything = dict.fromkeys(range(4), "student")
    assert len(step(everything, floor=3)[0]) == 3
    assert len(step(everything, delete=False)[0]) == 4
    assert step(everything)[0] == []


def test_mutation_adds_one_prompt_for_a_deleted_one_within_the_room() -> None:
    _, wanted, done = step(dict.fromkeys(range(4), "student"), mutation=1.0, room=2, floor=2)
    assert len(wanted) == 2 == done["mutated"]
    assert len(set(wanted)) == 2
    assert len(step({0: "teacher", 3: "teacher"}, room=1)[1]) == 1


# the student


def test_the_student_draws_with_averaged_weights_and_trains_on_with_its_own() -> None:
    with quiet(), loop.seeded(0) as generator:
        model = build((1, 8, 8), PROMPTS, channels=8, prediction="v_prediction")
        how = {"lr": 1e-2, "weight_decay": 0.03, "warm_up": 1, "ema": 0.5, "batch": 2, "prompt_dropout": 0.5, "guidance": 1.0}
        student = Student(model, **how, sampling_steps=2, generator=generator)
        start = [weights.detach().clone() for weights in student.weights]
        student.train([Pair(text, np.full((1, 8, 8), 200, dtype=np.uint8), 0) for text in PROMPTS], 3)
        own = [weights.detach().clone() for weights in student.weights]
        pictures = student.draw(PROMPTS)
    assert pictures.shape == (4, 1, 8, 8)
    assert pictures.dtype == np.uint8
    assert any(not torch.equal(now, then) for now, then in zip(own, start, strict=True))
    assert all(torch.equal(now, then) for now, then in zip(student.weights, own, strict=True))
    assert any(not torch.equal(now, mean) for now, mean in zip(own, student.average.shadow_params, strict=True))


# the whole method


def parts(tiny: Dataset) -> tuple[Dataset, Dataset]:
    return tiny.split("reference"), tiny.split("validation")


@pytest.fixture(scope="module")
def made(tiny: Dataset):
    return evolve_director(*parts(tiny), 2, SMOKE, seed=1)


def test_rows_are_children_of_all_that_trained_teachers_and_judge(tiny: Dataset, made) -> None:
    shots, base = parts(tiny)
    assert made.rows.schema == SCHEMAS["image"]
    assert made.rows["label"].to_pylist() == [label for label in range(10) for _ in range(2)]
    assert set(map(tuple, made.rows["parents"].to_pylist())) == {(*shots.ids(), *base.ids())}
    assert len(set(made.rows["sample_id"].to_pylist())) == 20
    assert made.rows["caption"][0].as_py() == "a photo of the digit zero"


def test_figures_and_curve_say_what_was_done(made) -> None:
    assert made.figures["calls"] <= SMOKE.calls
    assert made.figures["calls"] % SMOKE.teachers == 0
    assert [row["step"] for row in made.curve] == [2, 4, 6]
    assert {"calls", "pairs", "loss", "judged", "student_share", "expanded", "deleted", "mutated"} <= set(made.curve[0])
    assert made.figures["judged"] == sum(row.get("judged", 0) for row in made.curve)
    assert 0 <= made.figures["student_share"] <= 1


def test_the_same_seed_gives_the_same_bytes(tiny: Dataset, made) -> None:
    again = evolve_director(*parts(tiny), 2, SMOKE, seed=1)
    assert again.rows.equals(made.rows)
    assert (again.figures, again.curve) == (made.figures, made.curve)


# models from folders


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher in Stable Diffusion's layout, a language model and a CLIP, tiny and untrained."""
    folder = tmp_path_factory.mktemp("models")
    texts = [f"a {light} photo of a {name}" for name in NAMES for light in ("dark", "light")]
    with quiet(), loop.seeded(0):
        tokenizer = make_tokenizer(texts)
        ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        text = CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=16, **small, **ends)
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=16,
            attention_head_dim=2,
        )
        unet.save_pretrained(folder / "sd" / "unet")
        CLIPTextModel(text).save_pretrained(folder / "sd" / "text_encoder")
        tokenizer.save_pretrained(folder / "sd" / "tokenizer")
        DDPMScheduler(prediction_type="epsilon").save_pretrained(folder / "sd" / "scheduler")
        tokenizer.save_pretrained(folder / "gpt2")
        GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=32)).save_pretrained(
            folder / "gpt2"
        )
        found = clip.small((1, 8, 8), texts)
        found.model.save_pretrained(folder / "clip")
        found.tokenizer.save_pretrained(folder / "clip")
        CLIPImageProcessor(image_mean=[0.5], image_std=[0.5]).save_pretrained(folder / "clip")
    return folder


def test_teachers_a_start_and_a_judge_from_folders_run_on_words_of_their_own(tiny: Dataset, saved: Path) -> None:
    shots, base = parts(tiny)
    own = {"pretrained": (str(saved / "sd"),) * 2, "judge": str(saved / "clip"), "student": str(saved / "sd")}
    cfg = SMOKE.model_copy(update={**own, "attributes": (("dark", "light"),), "drawn": ("a light photo of a two",)})
    made = evolve_director(shots, base, 1, cfg)
    assert set(map(tuple, made.rows["parents"].to_pylist())) == {tuple(shots.ids())}
    captions = made.rows["caption"].to_pylist()
    assert captions[2] == "a light photo of a two"
    assert captions[3] in ("a dark photo of a three", "a light photo of a three")
    assert made.figures["judged"] > 0


def test_a_language_model_that_writes_nonsense_changes_nothing(tiny: Dataset, saved: Path) -> None:
    cfg = SMOKE.model_copy(update={"language_model": str(saved / "gpt2"), "rounds": 2, "calls": 20, "teachers": 1})
    made = evolve_director(*parts(tiny), 1, cfg)
    assert {name: made.figures[name] for name in ("judged", "expanded", "deleted", "mutated", "calls", "pairs")} == {
        "judged": 1,
        "expanded": 0,
        "deleted": 0,
        "mutated": 0,
        "calls": 5,
        "pairs": 5,
    }


def test_a_language_model_answers_the_same_to_the_same_seed(saved: Path) -> None:
    with quiet():
        model = LanguageModel(str(saved / "gpt2"), longest=8)
        with loop.seeded(3):
            first = model.answer("a dark photo")
        with loop.seeded(3):
            assert model.answer("a dark photo") == first


# mistakes


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"pretrained": ("/nowhere/at/all",)}, "no folder"),
        ({"judge": "/nowhere/at/all"}, "judge: there is no folder"),
        ({"language_model": "/nowhere/at/all"}, "language_model: there is no folder"),
        ({"attributes": (("a", "b"),)}, "attributes are words for pre-trained teachers"),
        ({"calls": 1}, "1 calls do not reach for one picture of each of 2 teachers"),
    ],
)
def test_settings_that_cannot_be_met_are_named(tiny: Dataset, own: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        evolve_director(*parts(tiny), 1, SMOKE.model_copy(update=own))


def test_a_class_of_which_nothing_is_there_is_named(tiny: Dataset) -> None:
    shots, base = (part.where(part.labels() != 3) for part in parts(tiny))
    with pytest.raises(UserError, match="class 'three' is in no prompt"):
        evolve_director(shots, base, 1, SMOKE)


def test_without_base_rows_there_is_nothing_to_train_a_teacher_on(tiny: Dataset) -> None:
    with pytest.raises(UserError, match="no base rows to train a teacher on"):
        evolve_director(tiny.split("reference"), tiny.take(np.array([], dtype=int)), 1, SMOKE)


def test_a_folder_without_a_language_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no causal language model"), quiet():
        LanguageModel(str(tmp_path))


def test_the_settings_can_be_written_in_yaml() -> None:
    assert Config(attributes=[["a", "b"]], pretrained=["x"]).pretrained == ("x",)
