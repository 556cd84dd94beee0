"""CLIP adapted by LoRA: what is trained, how images are mixed, the weights of the loss, what is gone on from, what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPImageProcessor

from tasks.core import clip, loop, networks
from tasks.core.dataset import Dataset, Writer
from tasks.core.errors import UserError
from tasks.core.text_to_image import quiet
from tasks.train import clip_lora as own

QUICK = own.SMOKE
PROMPTS = ["a photo of a zero", "a photo of a one"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny: Dataset) -> Path:
    """A small CLIP of random weights, as `transformers` keeps it."""
    place = tmp_path_factory.mktemp("clip")
    with quiet(), loop.seeded(0):
        made = clip.small((1, 8, 8), [f"a photo of a {name}" for name in tiny.info.classes])
        made.model.save_pretrained(place)
        made.tokenizer.save_pretrained(place)
        CLIPImageProcessor(image_mean=[0.3], image_std=[0.4]).save_pretrained(place)
    return place


@pytest.fixture
def towers() -> clip.Clip:
    with quiet(), loop.seeded(0):
        return clip.small((1, 8, 8), PROMPTS)


def half_synthetic(tiny: Dataset, place: Path) -> Dataset:
    """40 rows, the last 20 with parents."""
    rows = tiny.split("train").take(np.arange(40))
    table = pa.concat_tables([pq.read_table(file) for file in sorted(tiny.parts[0].folder.glob("part-*.parquet"))]).slice(0, 40)
    parents = pa.array([[]] * 20 + [["d00000"]] * 20, pa.list_(pa.string()))
    with Writer(place, rows.info) as out:
        out.write(table.set_column(table.schema.names.index("parents"), "parents", parents))
    return Dataset.open(place)


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


# LoRA


def test_a_lora_is_on_queries_and_values_of_both_towers_and_all_else_is_frozen(towers: clip.Clip) -> None:
    with quiet(), loop.seeded(0):
        own.add_lora(towers.model, rank=3, alpha=6, dropout=0.1)
    named = {name: values for name, values in towers.model.named_parameters() if values.requires_grad}
    layers = {name.partition(".lora_")[0] for name in named}
    both = [f"{tower}_model.encoder.layers.{at}.self_attn" for tower in ("text", "vision") for at in (0, 1)]
    assert layers == {f"{attention}.{part}_proj" for attention in both for part in "qv"}
    assert {values.shape[0] for name, values in named.items() if "lora_A" in name} == {3}


@torch.no_grad()
def test_a_merged_lora_answers_as_it_did_beside_the_weights(towers: clip.Clip) -> None:
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = clip.image_features(towers, images)
    with quiet(), loop.seeded(0):
        wrapped = own.add_lora(towers.model, rank=3, alpha=6, dropout=0.1)
        assert torch.equal(clip.image_features(towers, images), plain)
        for values in towers.model.parameters():
            if values.requires_grad:
                values.add_(0.05 * torch.randn_like(values))
        towers.model.eval()
        beside = clip.image_features(towers, images)
        towers.model = own.merged(wrapped)
    assert not torch.allclose(beside, plain, atol=1e-3)
    assert torch.allclose(clip.image_features(towers, images), beside, atol=1e-5)
    assert not any("lora" in name for name in towers.model.state_dict())


def test_only_queries_and_values_move_and_the_head_is_the_adapted_towers_words(tiny: Dataset, folder: Path) -> None:
    cfg = QUICK.model_copy(update={"pretrained": str(folder), "lr": 1e-2})
    net = own.clip_lora(tiny.split("train"), cfg)
    with quiet(), torch.no_grad():
        first = clip.load(str(folder))
        said = clip.text_features(first, [f"a photo of a {name}" for name in tiny.info.classes])
        before = weights(clip.as_net(first, said, (1, 8, 8)))
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"head.weight"} | {
        f"tower.vision_model.encoder.layers.{at}.self_attn.{part}_proj.weight" for at in (0, 1) for part in "qv"
    }
    assert torch.allclose(net.head.weight.norm(dim=1), torch.ones(10), atol=1e-5)
    assert all(values.requires_grad for values in net.parameters())


# CutMix and MixUp


def test_mixup_is_worked_by_hand() -> None:
    images = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
    mixed, told = own.mixup(images, torch.eye(2), 0.75, torch.tensor([1, 0]))
    assert mixed.flatten().tolist() == [0.25, 0.75]
    assert told.tolist() == [[0.75, 0.25], [0.25, 0.75]]


def test_cutmix_is_worked_by_hand() -> None:
    images = torch.stack([torch.zeros(1, 8, 8), torch.ones(1, 8, 8)])
    mixed, told = own.cutmix(images, torch.eye(2), 0.75, (4, 4), torch.tensor([1, 0]))  # half of a box's side is 2
    assert mixed[0, 0, 2:6, 2:6].eq(1).all()
    assert mixed[0].sum() == 16
    assert told.tolist() == [[0.75, 0.25], [0.25, 0.75]]
    mixed, told = own.cutmix(images, torch.eye(2), 0.75, (0, 7), torch.tensor([1, 0]))  # cut off at two borders
    assert mixed[0].sum() == 2 * 3
    assert told[0].tolist() == pytest.approx([1 - 6 / 64, 6 / 64])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 3), st.integers(1, 12), st.integers(1, 12))
def test_mixed_targets_are_the_share_of_pixels_that_came_from_each(seed: int, channels: int, height: int, width: int) -> None:
    # each image is its class's number everywhere: so its mean is the mean class
    labels = torch.tensor([0, 1, 2, 3])
    images = labels[:, None, None, None].float().expand(-1, channels, height, width)
    mixed, told = own.mix(images, F.one_hot(labels).float(), torch.Generator().manual_seed(seed))
    assert torch.allclose(mixed.mean((1, 2, 3)), told @ labels.float(), atol=1e-4)
    assert torch.allclose(told.sum(1), torch.ones(4))


# the loss


def test_the_loss_weighs_the_mean_of_each_batch_whatever_their_rows() -> None:
    images = np.zeros((13, 1, 2, 2), np.uint8)
    images[10:] = 255  # three synthetic rows, white
    labels, synthetic = np.zeros(13, np.int64), np.arange(13) >= 10
    bias = nn.Parameter(torch.zeros(()))

    def logits(seen: Tensor) -> Tensor:  # cross-entropy of class 0 is log(1 + e^x): x = 0 for black, 1 for white
        return torch.stack([torch.zeros(len(seen)), seen.mean((1, 2, 3)) + bias], 1)

    how = {"classes": 2, "steps": 1, "batch": 4, "lr": 1e-9, "weight_decay": 0.0, "mix_share": 0.0}
    black, white = np.log(2), np.log(1 + np.e)
    for weight in (0.8, 0.3):
        found = own.adapt(logits, [bias], images, labels, synthetic, real_weight=weight, generator=torch.Generator(), **how)
        assert found == pytest.approx([weight * black + (1 - weight) * white], rel=1e-5)
    alone = own.adapt(logits, [bias], images[10:], labels[10:], synthetic[10:], real_weight=0.8, generator=torch.Generator(), **how)
    assert alone[0] == pytest.approx(white, rel=1e-5)


def test_rows_of_a_class_apart_are_learnt(tiny: Dataset) -> None:
    rows = tiny.split("train")
    rows = rows.take(np.flatnonzero(np.isin(rows.labels(), [0, 1])))
    two = Dataset(rows.parts, type(rows.info)(**{**rows.info.__dict__, "absent": tiny.info.classes[2:]}))
    net = own.clip_lora(two, own.Config(clip_steps=15, steps=10, batch=16, rank=4))
    assert (loop.predict(net, two.images()).argmax(1).numpy() == two.labels()).mean() > 0.95
    assert net.arch["classes"] == 10


def test_synthetic_rows_count_by_their_weight(tiny: Dataset, folder: Path, tmp_path: Path) -> None:
    data = half_synthetic(tiny, tmp_path / "half")
    cfg = QUICK.model_copy(update={"pretrained": str(folder), "lr": 1e-2})
    nets = [own.clip_lora(data, cfg.model_copy(update={"real_weight": weight})) for weight in (0.8, 0.8, 0.2)]
    first, again, other = (weights(net)["head.weight"] for net in nets)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# going on


def test_it_goes_on_from_its_own_result_and_leaves_it_as_it_was(tiny: Dataset, folder: Path) -> None:
    data = tiny.split("train")
    first = own.clip_lora(data, QUICK.model_copy(update={"pretrained": str(folder)}))
    before = weights(first)
    second = own.clip_lora(data, QUICK.model_copy(update={"lr": 1e-2}), start=first)
    assert all(torch.equal(value, before[name]) for name, value in first.state_dict().items())
    assert second.state_dict().keys() == before.keys()
    assert not torch.equal(second.head.weight, before["head.weight"])
    queries = [net.tower.vision_model.encoder.layers[0].self_attn.q_proj.weight for net in (first, second)]
    assert not torch.equal(*queries)
    assert torch.equal(second.tower.visual_projection.weight, first.tower.visual_projection.weight)
    assert all(values.requires_grad for values in second.parameters())


# mistakes


def test_another_kind_of_start_is_refused(tiny: Dataset) -> None:
    with loop.seeded(0):
        other = networks.convnet((1, 8, 8), 10, widths=(4,), hidden=4, mean=0.3, std=0.3)
    with pytest.raises(UserError, match="goes on from a model of kind clip only, not 'convnet'"):
        own.clip_lora(tiny.split("train"), QUICK, start=other)


def test_what_cannot_be_trained_on_or_loaded_is_named(tiny: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no row of the data has a label"):
        own.clip_lora(tiny.without_labels(), QUICK)
    with pytest.raises(UserError, match=r"pretrained: there is no folder .*nowhere"):
        own.clip_lora(tiny.split("train"), QUICK.model_copy(update={"pretrained": str(tmp_path / "nowhere")}))
    with pytest.raises(UserError, match=r"diverged.* set a smaller lr than 1e\+30"):
        own.clip_lora(tiny.split("train"), QUICK.model_copy(update={"lr": 1e30}))


def test_images_with_more_channels_than_the_tower_are_refused(tiny: Dataset, folder: Path, tmp_path: Path) -> None:
    from tests.claims.samples import dataset

    grey = tiny.split("reference")
    colour = dataset(np.repeat(grey.images(), 3, axis=1), grey.labels(), tiny.info.classes)
    with pytest.raises(UserError, match="takes images of 1 channels; the data has 3"):
        own.clip_lora(colour, QUICK.model_copy(update={"pretrained": str(folder)}))
