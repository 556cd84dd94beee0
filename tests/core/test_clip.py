"""CLIP: the classifier rebuilt and served, towers from a folder, the contrastive loss, small ones trained here."""

from __future__ import annotations

import ast
import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPImageProcessor

from tasks.core import clip, loop, networks, served
from tasks.core.errors import UserError
from tasks.core.text_to_image import quiet

CLASSES = ["a photo of a cat", "a photo of a dog"]
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


@pytest.fixture(scope="module")
def grey() -> clip.Clip:
    with quiet(), loop.seeded(0):
        return clip.small((1, 8, 8), CLASSES)


@pytest.fixture(scope="module")
def coloured() -> clip.Clip:
    with quiet(), loop.seeded(1):
        made = clip.small((3, 16, 16), CLASSES)
    made.mean, made.std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, coloured: clip.Clip) -> Path:
    """The coloured one as `transformers` keeps it."""
    place = tmp_path_factory.mktemp("clip")
    coloured.model.save_pretrained(place)
    coloured.tokenizer.save_pretrained(place)
    CLIPImageProcessor(image_mean=MEAN, image_std=STD).save_pretrained(place)
    return place


@torch.no_grad()
def classifier(of: clip.Clip, shape: tuple[int, int, int]) -> clip.ClipClassifier:
    return clip.as_net(of, clip.text_features(of, CLASSES), shape)


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


# the classifier


@torch.no_grad()
def test_logits_are_the_scaled_cosines_of_images_and_texts(grey: clip.Clip) -> None:
    net, images = classifier(grey, (1, 8, 8)), noise(3, 1, 8, 8)
    wanted = grey.model(input_ids=clip.tokens(grey, CLASSES), pixel_values=(images - 0.5) / 0.5).logits_per_image
    assert torch.allclose(net(images), wanted, atol=1e-4)
    assert torch.allclose(net.features(images).norm(dim=1), grey.scale.expand(3), rtol=1e-5)
    assert not net.training
    assert all(weights.requires_grad for weights in net.parameters())


def test_it_is_rebuilt_from_its_description_and_weights_alone(grey: clip.Clip) -> None:
    first = classifier(grey, (1, 8, 8))
    with quiet():
        second = networks.build(json.loads(json.dumps(first.arch))).eval()
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(noise(4, 1, 8, 8)), second(noise(4, 1, 8, 8)))
    assert not networks.draws(first.arch)
    assert networks.draws({"kind": "text_denoiser"})


def test_a_net_has_a_tower_of_its_own(grey: clip.Clip) -> None:
    net, before = classifier(grey, (1, 8, 8)), grey.model.visual_projection.weight.clone()
    with torch.no_grad():
        for weights in net.parameters():
            weights.zero_()
    assert torch.equal(grey.model.visual_projection.weight, before)


@torch.no_grad()
def test_grey_images_are_enlarged_and_repeated_and_each_channel_standardised(coloured: clip.Clip) -> None:
    config = coloured.model.config.vision_config
    found = clip.tower_pixels(torch.full((2, 1, 8, 10), 0.5), config, coloured.mean, coloured.std)
    assert found.shape == (2, 3, 16, 16)
    wanted = torch.tensor([(0.5 - m) / s for m, s in zip(MEAN, STD, strict=True)])
    assert torch.allclose(found[0, :, 4, 5], wanted, atol=1e-5)
    net = classifier(coloured, (1, 8, 10))
    assert net(noise(2, 1, 8, 10)).shape == (2, 2)
    assert net.arch["pixel_mean"] == pytest.approx(MEAN)
    # a step of black and white: bicubic overshoots, and is cut back to what a pixel can be
    edge = torch.zeros(1, 1, 8, 8)
    edge[..., 4:] = 1
    pixels = clip.tower_pixels(edge, config, torch.zeros(3, 1, 1), torch.ones(3, 1, 1))
    assert (pixels.min(), pixels.max()) == (0, 1)


def test_colours_do_not_fit_a_grey_tower(grey: clip.Clip) -> None:
    with pytest.raises(ValueError, match="3 channels do not fit an image tower of 1"):
        classifier(grey, (3, 8, 8))


def test_it_is_trained_by_the_shared_recipe_and_its_temperature_left_alone(grey: clip.Clip) -> None:
    net = classifier(grey, (1, 8, 8))
    images = np.zeros((8, 1, 8, 8), np.uint8)
    images[4:, :, 2:6] = 255
    labels = np.repeat([0, 1], 4)
    how = {"steps": 15, "batch": 8, "lr": 1e-3, "momentum": 0.9, "weight_decay": 0.0, "real_weight": 0.8}
    with loop.seeded(0) as generator:
        loop.fit_supervised(net, images, labels, labels < 0, generator=generator, **how)
    assert (loop.predict(net, images).argmax(1).numpy() == labels).all()
    assert net.scale == grey.scale


def test_what_travels_with_it_serves_it_without_this_package(coloured: clip.Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    net, kept = classifier(coloured, (1, 8, 8)), []
    packed = served.pack(net, ["cat", "dog"], tmp_path)
    assert packed["pip_requirements"] == [*served.NEEDS, "transformers"]
    wanted = loop.predict(net, packed["input_example"]).softmax(1).numpy()
    for name in [name for name in sys.modules if name.partition(".")[0] == "tasks"]:
        monkeypatch.setitem(sys.modules, name, None)  # to import it is an error
    monkeypatch.setattr(mlflow.models, "set_model", kept.append)
    spec = spec_from_file_location("model_entry", packed["python_model"])
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "model_entry", module)
    spec.loader.exec_module(module)
    context = SimpleNamespace(artifacts=packed["artifacts"])
    kept[0].load_context(context)
    assert np.allclose(kept[0].predict(context, packed["input_example"]), wanted, atol=1e-5)


def test_only_its_network_is_imported_from_this_package_at_the_top() -> None:
    tree = ast.parse(Path(clip.__file__).read_text(encoding="utf-8"))
    named = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert {name for name in named if name.startswith("tasks")} == {"tasks.core.networks"}


# towers from a folder


@torch.no_grad()
def test_a_folders_clip_is_the_one_that_was_saved(coloured: clip.Clip, folder: Path) -> None:
    with quiet():
        found = clip.load(str(folder))
    texts = ["a dog", *CLASSES, "a dog"]
    assert torch.allclose(clip.text_features(found, texts), clip.text_features(coloured, texts), atol=1e-6)
    images = noise(2, 3, 16, 16)
    assert torch.allclose(clip.image_features(found, images), clip.image_features(coloured, images), atol=1e-5)
    assert found.mean.flatten().tolist() == pytest.approx(MEAN)
    assert not any(weights.requires_grad for weights in found.model.parameters())


def test_what_is_no_clip_is_refused_in_a_sentence(tmp_path: Path, folder: Path, coloured: clip.Clip) -> None:
    with quiet(), loop.seeded(0):
        with pytest.raises(UserError, match=r"^pretrained: there is no folder .*nowhere; give a folder"):
            clip.load(str(tmp_path / "nowhere"))
        with pytest.raises(UserError, match=r"teacher: .* holds no CLIP that can be loaded here"):
            clip.load(str(tmp_path), setting="teacher")
        for file in folder.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        coloured.model.text_model.save_pretrained(tmp_path)  # half of one
        with pytest.raises(UserError, match="holds no CLIP that can be loaded here"):
            clip.load(str(tmp_path))


# features and the loss


@torch.no_grad()
def test_a_texts_embedding_does_not_hang_on_its_neighbours_and_a_long_one_is_cut(grey: clip.Clip) -> None:
    alone = clip.text_features(grey, ["a dog"])
    among = clip.text_features(grey, [CLASSES[0], "a dog", "a photo of a cat of a cat of a cat of a cat of a cat"])
    assert torch.allclose(among[1], alone[0], atol=1e-6)
    assert torch.allclose(among.norm(dim=1), torch.ones(3))
    assert not torch.allclose(among[0], among[1], atol=1e-2)


@torch.no_grad()
def test_embedding_in_pieces_is_embedding_at_once(grey: clip.Clip) -> None:
    images = (noise(5, 1, 8, 8) * 255).to(torch.uint8).numpy()
    found = clip.embed_images(grey, images, size=2)
    assert torch.allclose(found, clip.image_features(grey, loop.to_float(images)), atol=1e-6)
    assert clip.embed_images(grey, images[:0]).shape == (0, clip.WIDTH)


def test_the_loss_is_worked_by_hand() -> None:
    images, texts = torch.eye(2), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    # logits 2 * [[1, .6], [0, .8]]
    rows = np.log(1 + np.exp(-0.8)), np.log(1 + np.exp(-1.6))
    columns = np.log(1 + np.exp(-2.0)), np.log(1 + np.exp(-0.4))
    assert clip.contrastive_loss(images, texts, torch.tensor(2.0)).item() == pytest.approx((sum(rows) + sum(columns)) / 4)


def test_pairs_of_one_text_pull_as_if_each_of_its_images_were_right() -> None:
    images = torch.nn.functional.normalize(noise(3, 4), dim=1).requires_grad_()
    texts = torch.nn.functional.normalize(noise(2, 4), dim=1)[[0, 0, 1]]
    (plain,) = torch.autograd.grad(clip.contrastive_loss(images, texts, torch.tensor(5.0)), images)
    shared = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    logits, cross = 5.0 * images @ texts.T, torch.nn.functional.cross_entropy
    (soft,) = torch.autograd.grad((cross(logits, shared) + cross(logits.T, shared)) / 2, images)
    assert torch.allclose(plain, soft, atol=1e-6)


def test_the_temperature_is_learnt_and_bounded(grey: clip.Clip) -> None:
    assert grey.scale.item() == pytest.approx(1 / 0.07, rel=1e-3)
    before = grey.model.logit_scale.data.clone()
    grey.model.logit_scale.data.fill_(9.0)
    assert grey.scale == 100
    grey.model.logit_scale.data.copy_(before)


# small ones, trained here


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 256), st.integers(1, 256))
def test_there_are_at_most_eight_patches_on_a_side(height: int, width: int) -> None:
    patch = clip.patch_size(height, width)
    assert max(height, width) <= 8 * patch
    assert patch == 2 or max(height, width) > 4 * patch


def test_training_puts_images_beside_their_texts_and_the_same_seed_gives_the_same() -> None:
    images = np.zeros((16, 1, 8, 8), np.uint8)
    images[8:] = 200
    captions = [CLASSES[at // 8] for at in range(16)]
    made = []
    for _ in range(2):
        with quiet(), loop.seeded(3) as generator:
            one = clip.small((1, 8, 8), captions)
            losses = clip.fit_contrastive(one, images, captions, steps=15, batch=8, lr=2e-3, generator=generator)
        made.append(one)
    assert losses[-1] < losses[0]
    assert (loop.predict(classifier(one, (1, 8, 8)), images).argmax(1).numpy() == np.arange(16) // 8).all()
    assert not any(weights.requires_grad for weights in one.model.parameters())
    first, second = (of.model.state_dict() for of in made)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert one.model.logit_scale != pytest.approx(2.6592, abs=1e-4)


def test_a_learning_rate_that_is_too_large_is_told() -> None:
    with quiet(), loop.seeded(0) as generator:
        one = clip.small((1, 8, 8), CLASSES)
        with pytest.raises(UserError, match="'train clip' diverged"):
            clip.fit_contrastive(one, np.zeros((4, 1, 8, 8), np.uint8), CLASSES * 2, steps=3, batch=4, lr=1e30, generator=generator)
