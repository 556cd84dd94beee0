from __future__ import annotations

import random as dice
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.core.dataset import SCHEMAS, Dataset, Info, Writer, encode, image_column
from tasks.core.errors import UserError
from tasks.core.method import Made
from tasks.filter import _near, _quality
from tasks.filter._text import Rules, block_list, fault, normalised, repeated_grams, repeats, symbols, unwrapped, words
from tasks.filter.cascade import SMOKE, Config, cascade

NOUNS = [
    "harbour",
    "engine",
    "valley",
    "letter",
    "teacher",
    "river",
    "market",
    "window",
    "garden",
    "soldier",
    "doctor",
    "bridge",
    "winter",
    "cousin",
    "lantern",
    "orchard",
]
VERBS = ["crosses", "repairs", "follows", "remembers", "paints", "sells", "carries", "forgets", "visits", "describes"]
ADJECTIVES = ["old", "quiet", "distant", "broken", "golden", "heavy", "narrow", "curious", "sudden", "patient"]


def sentence(rng: dice.Random, clauses: int = 5) -> str:
    return ", and ".join(
        f"the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)} {rng.choice(VERBS)} a {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
        for _ in range(clauses)
    )


def sentences(count: int, seed: int = 0) -> list[str]:
    rng = dice.Random(seed)
    return [sentence(rng) for _ in range(count)]


def dataset(
    folder: Path, texts: Sequence[str | None], images: np.ndarray | None = None, ids: Sequence[str] | None = None, shards: int = 1
) -> Dataset:
    """Rows of texts, or of images and captions; of several shards each is a folder of its own."""
    n = len(texts)
    schema = "image" if images is not None or "text" not in SCHEMAS else "text"
    none = pa.nulls(n, SCHEMAS["image"].field("image").type)
    columns = {
        "sample_id": list(ids or [f"r{at:05d}" for at in range(n)]),
        "image": none if images is None else image_column(encode(images)),
        "label": pa.nulls(n, pa.int64()),
        "caption": pa.array(texts, pa.string()),
        "split": ["train"] * n,
        "parents": pa.array([[]] * n, pa.list_(pa.string())),
        "_clean": pa.nulls(n, pa.bool_()),
    }
    table = pa.table({name: columns[name] for name in SCHEMAS[schema].names}, schema=SCHEMAS[schema])
    whole, edges = None, np.linspace(0, n, shards + 1).astype(int)
    for shard, (low, high) in enumerate(pairwise(edges)):
        with Writer(folder / f"{shard}", Info(schema, shape=images.shape[1:] if images is not None else (0, 0, 0))) as out:  # type: ignore[arg-type]
            out.write(table.slice(low, high - low))
        part = Dataset.open(folder / f"{shard}")
        whole = part if whole is None else whole + part
    assert whole is not None
    return whole


def judged(folder: Path, texts: Sequence[str | None], cfg: Config = Config(), images: np.ndarray | None = None) -> list[str]:
    data = dataset(folder, texts, images)
    return cascade(data, data.take(np.zeros(0)), cfg).rows["reason"].to_pylist()


LONG_TEXT = " ".join(f"{a} {b} {c}" for a, b, c in zip(ADJECTIVES * 2, NOUNS * 2, VERBS * 2, strict=False))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "too short"),
        ("a", "too short"),
        ("?!?!?!?!", "too short"),
        ("word " * 21, "too long"),
        ("buy now: Lorem  IPSUM dolor sit amet", "blocked words"),
        ("### @@@ %%% a cat ### @@@", "symbols"),
        ("12 34 56 78 cat 90", "symbols"),
        ("xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx yyyyyyyyyyyyyyyy", "symbols"),
        ("ha ha ha ha", "repeats itself"),
        ("one line here\none line here", "repeats itself"),
        ("First, a paragraph.\n\nThen another one.\n\nFirst, a paragraph.", "repeats itself"),
        ("\n".join(["Home of ours", "About the shop", "Our products", "All contacts", "New account", "Site map"]), "unfinished lines"),
        ("\n".join(f"The {noun} is old..." for noun in NOUNS[:6]), "unfinished lines"),
        ("\n".join(f"- The {noun} is old." for noun in NOUNS[:6]), "unfinished lines"),
    ],
)
def test_each_rule_has_its_reason(text: str, reason: str) -> None:
    rules = Rules(max_words=20) if reason == "too long" else Rules()
    assert fault(text, words(text), rules, block_list(rules.blocked)) == reason


@pytest.mark.parametrize(
    "text",
    [
        "cat",
        "a cat",
        "a photo of the digit seven",
        "A man, a plan, a canal: Panama!",
        "50% off all 20 chairs today",
        "the cat and the dog and the bird",
        "Кіт сидить на вікні.",
        "一只猫坐在窗台上看着外面的鸟儿飞来飞去",
        "नमस्ते दुनिया यह एक परीक्षण है",
        "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer\nThe slings and arrows,",
        "\n".join(f"The {noun} is old." for noun in NOUNS[:6]),
        LONG_TEXT,
    ],
)
def test_captions_prose_and_other_scripts_break_no_rule(text: str) -> None:
    assert fault(text, words(text), Rules(), block_list(("lorem ipsum",))) == ""


def test_lines_of_a_fixed_width_are_not_unfinished() -> None:
    wrapped = ["In the old harbour of the", "quiet town a soldier sells", "letters to the market.", "The doctor", "visits it"]
    assert unwrapped(wrapped) == [" ".join(wrapped[:3]), " ".join(wrapped[3:])]
    text = "\n".join(
        ["The old harbour has", *(f"the {noun} of {other}" for noun, other in zip(NOUNS[:7], ADJECTIVES, strict=False)), "town."]
    )
    assert fault(text, words(text), Rules(), None) == ""
    assert fault(text.title(), words(text), Rules(), None) == "unfinished lines"


def test_n_grams_are_asked_of_long_texts_only() -> None:
    again = "the golden harbour crosses a narrow valley " * 2
    assert fault(again, words(again), Rules(), None) == ""
    spam = LONG_TEXT + " " + again * 3
    assert fault(spam, words(spam), Rules(), None) == "repeats itself"
    top = " ".join(f"{noun} best price" for noun in NOUNS * 2)
    assert fault(top, words(top), Rules(), None) == "repeats itself"


def test_shares_agree_with_hand_counts() -> None:
    assert symbols("ab##") == 0.5
    assert symbols("plain, simple (text).") == 0
    assert repeats(["aa", "b", "aa", "aa"]) == (0.5, 4 / 7)
    assert repeated_grams(["a", "b", "c", "d", "e", "f", "a", "b", "c", "d", "e", "g"]) == 5 / 12
    assert repeated_grams(["a", "b", "c", "d", "e"]) == 0
    assert repeated_grams(["x"] * 10) == 0.9  # five words once, then gram after gram: each character once
    assert normalised("  The\tCAT \n sat ") == "the cat sat"
    assert normalised("ﬁne Ⅻ") == "fine xii"
    assert words("Don't stop: e-mail!") == ["don", "t", "stop", "e", "mail"]


def test_blocked_phrases_are_whole_words_in_any_case() -> None:
    blocked = block_list(("casino", "click here"))
    assert blocked is not None
    told = ("The Casino.", "Click, HERE!", "casinos", "here click", "")
    assert [blocked(text, words(text)) for text in told] == [True, True, False, False, False]
    assert block_list(()) is None


def test_texts_in_other_languages_fall_and_short_ones_are_not_asked(tmp_path: Path) -> None:
    texts = [
        "The old harbour is quiet in the morning and the boats are at sea.",
        "En un lugar de la Mancha, de cuyo nombre no quiero acordarme, no ha mucho tiempo.",
        "На початку було Слово, і Слово було у Бога, і Бог було Слово.",  # noqa: RUF001
        "El gato",
    ]
    assert judged(tmp_path, texts, Config(languages=("en", "uk"))) == ["", "language", "", ""]


def test_of_equal_texts_the_smallest_id_stays(tmp_path: Path) -> None:
    texts = ["A black cat.", "a  black CAT.", "a black dog.", "A BLACK cat."]
    data = dataset(tmp_path, texts, ids=["d", "b", "a", "c"])
    made = cascade(data, data)
    assert made.rows["reason"].to_pylist() == ["duplicate of another row", "", "", "duplicate of another row"]
    assert made.figures["duplicate_of_another_row"] == 2


def changed(text: str, rng: dice.Random, edits: int) -> str:
    found = text.split()
    for _ in range(edits):
        found[rng.randrange(len(found))] = rng.choice(NOUNS)
    return " ".join(found)


def test_planted_near_duplicates_are_found_and_other_texts_are_not(tmp_path: Path) -> None:
    texts, rng = sentences(400), dice.Random(1)
    copies = [changed(text, rng, 2) for text in texts[:100]]
    reasons = judged(tmp_path, [*texts, *copies])
    assert set(reasons[:400]) == {""}
    assert reasons[400:].count("near-duplicate text") >= 95
    assert judged(tmp_path / "off", [*texts, *copies], Config(near_text=None)).count("near-duplicate text") == 0


def test_the_estimated_similarity_is_jaccards() -> None:
    rng = dice.Random(0)
    texts = sentences(60)
    pairs = [(text, changed(text, rng, at % 12)) for at, text in enumerate(texts)]
    sets = [[_near.shingles(words(text), 3) for text in pair] for pair in pairs]
    true = np.array([len({*one} & {*other}) / len({*one} | {*other}) for one, other in sets])
    (_, ones), (_, others) = (_near.sketch([pair[side] for pair in sets], 5) for side in (0, 1))
    found = _near.similarity(ones, others)
    assert np.abs(found - true).max() < 0.2  # four standard errors of 100 minima
    assert abs((found - true).mean()) < 0.02
    assert found[0] == 1


def test_a_signature_depends_on_its_own_text_only() -> None:
    some = [_near.shingles(words(text), 3) for text in sentences(30)]
    keys, slots = _near.sketch(some, 0)
    alone = [_near.sketch([one], 0) for one in some]
    np.testing.assert_array_equal(keys, np.concatenate([key for key, _ in alone]))
    np.testing.assert_array_equal(slots, np.concatenate([slot for _, slot in alone]))
    assert _near.sketch(some, 1)[1].tolist() != slots.tolist()


@given(st.integers(0, 2**64 - 1), st.integers(0, 9), st.data())
def test_hashes_within_the_distance_share_a_key(value: int, distance: int, data: st.DataObject) -> None:
    flipped = data.draw(st.sets(st.integers(0, 63), max_size=distance))
    other = value ^ sum(1 << bit for bit in flipped)
    hashes = np.array([value, other], dtype=np.uint64)
    assert any(key[0] == key[1] for key in _near.image_keys(hashes, distance))


def test_the_thumbnail_is_the_mean_of_areas_and_the_hash_ignores_brightness() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 200, (5, 3, 16, 24), dtype=np.uint8)
    seen = _near.look(images)
    np.testing.assert_array_equal(seen.small, np.rint(images.reshape(5, 3, 8, 2, 8, 3).mean((3, 5))))
    np.testing.assert_array_equal(seen.hashes, _near.look(images + np.uint8(20)).hashes)
    np.testing.assert_array_equal(seen.hashes[2:3], _near.look(images[2:3]).hashes)
    assert np.bitwise_count(seen.hashes[0] ^ seen.hashes[1]) > 10
    assert _near.look(images[:, :, :5, :3]).small.shape == (5, 3, 8, 8)


def blobs(count: int, seed: int = 0) -> np.ndarray:
    """Grey images of 14 x 14 patches, 28 pixels wide."""
    patches = np.random.default_rng(seed).normal(128, 50, (count, 1, 14, 14))
    return patches.repeat(2, 2).repeat(2, 3).clip(0, 255).astype(np.uint8)


def noisy(images: np.ndarray) -> np.ndarray:
    return (images + np.random.default_rng(9).normal(0, 4, images.shape)).clip(0, 255).astype(np.uint8)


def test_of_pairs_image_and_caption_must_both_be_duplicates(tmp_path: Path) -> None:
    images, (text, other) = blobs(2), sentences(2)
    rows = [
        (images[0], text, ""),
        (images[0], text.upper(), "duplicate of another row"),
        (images[0], other, ""),
        (images[0], changed(text, dice.Random(0), 1), "near-duplicate text"),
        (images[1], text, ""),
        (noisy(images[1:])[0], text, "near-duplicate image"),
        (noisy(images[1:])[0], other, ""),
        (images[1], None, ""),
        (noisy(images[1:])[0], None, "near-duplicate image"),
        (images[1], "", "too short"),
    ]
    pixels, texts, reasons = np.stack([row[0] for row in rows]), [row[1] for row in rows], [row[2] for row in rows]
    assert judged(tmp_path / "a", texts, images=pixels) == reasons
    alone = judged(tmp_path / "b", texts, Config(same_caption=False), images=pixels)
    assert alone[1:4] == ["duplicate of another row", "near-duplicate image", "near-duplicate text"]
    assert alone[4:] == ["", *["near-duplicate image"] * 4, "too short"]


@pytest.mark.parametrize("cfg", [Config(), Config(near_image=None, near_embedding=0.995)], ids=["hash", "embedding"])
def test_planted_near_duplicates_of_images_are_found(tmp_path: Path, cfg: Config) -> None:
    images = blobs(200)
    reasons = judged(tmp_path, [None] * 260, cfg, images=np.concatenate([images, noisy(images[:60])]))
    assert reasons[:200].count("") >= 198
    assert reasons[200:].count("near-duplicate image") >= 57


def everything(folder: Path, order: np.ndarray, shards: int, cfg: Config, images: bool) -> Made:
    rng = dice.Random(0)
    texts = [*sentences(150), *[changed(text, rng, 2) for text in sentences(40)], *sentences(10), *["?? ## @@ ok"] * 5]
    pixels = np.concatenate([blobs(150), noisy(blobs(150)[:55])]) if images else None
    ids = [f"x{hash_:04d}" for hash_ in np.random.default_rng(3).permutation(len(texts))]
    pool = dataset(
        folder / "p", [texts[at] for at in order], pixels[order] if pixels is not None else None, [ids[at] for at in order], shards
    )
    reference = dataset(folder / "r", sentences(60, seed=7), blobs(60, 7) if images else None)
    return cascade(pool, reference, cfg, seed=2)


@pytest.mark.parametrize("images", [False, True], ids=["texts", "pairs"])
def test_neither_the_order_of_rows_nor_shards_decides_and_counts_add_up(tmp_path: Path, images: bool) -> None:
    cfg = Config(languages=("en",), near_embedding=0.999, clusters=4, cluster_share=0.3, quality=0.2, learn_from=80)
    order = np.arange(205)
    one = everything(tmp_path / "a", order, 1, cfg, images)
    for turn, shards in ((1, 3), (2, 5)):
        moved = np.random.default_rng(turn).permutation(order)
        other = everything(tmp_path / f"b{turn}", moved, shards, cfg, images)
        assert other.figures == one.figures
        assert other.rows.to_pylist() == one.rows.take(pa.array(moved)).to_pylist()
    assert one.rows.schema == SCHEMAS["verdicts"]
    counts = dict(one.figures)
    assert counts.pop("rows") == sum(counts.values()) == 205
    assert counts["kept"] == sum(one.rows["kept"].to_pylist())
    assert all(counts[name] for name in ("symbols", "near_duplicate_text" if not images else "near_duplicate_image", "quality"))
    reasons, scores, kept = (np.array(one.rows[name].to_pylist()) for name in ("reason", "score", "kept"))
    assert (reasons[kept] == "").all()
    assert scores.min() >= 0
    assert scores.max() <= 1
    assert scores[reasons == "symbols"].max() < scores[reasons == "quality"].min()
    assert scores[reasons == "quality"].max() <= scores[kept].min()


def test_without_a_classifier_the_score_is_the_share_of_tests_passed(tmp_path: Path) -> None:
    data = dataset(tmp_path, ["a black cat", "A black cat", "ab ##### @@@@@@"])
    made = cascade(data, data, Config(near_text=None))  # seven tests: six rules, then equal texts
    np.testing.assert_allclose(made.rows["score"].to_numpy(), [1, 6 / 7, 3 / 7], rtol=1e-6)


def test_the_classifier_drops_just_the_share_least_like_the_reference(tmp_path: Path) -> None:
    rng = dice.Random(0)
    gibberish = [" ".join("".join(rng.choices("bcdfghjklmnpqrstvwxz", k=6)) for _ in range(25)) for _ in range(50)]
    pool = dataset(tmp_path / "p", [*sentences(150), *gibberish])
    made = cascade(pool, dataset(tmp_path / "r", sentences(100, seed=5)), Config(quality=0.25))
    reasons = made.rows["reason"].to_pylist()
    assert reasons == [""] * 150 + ["quality"] * 50


def test_images_without_a_caption_are_not_asked_for_quality(tmp_path: Path) -> None:
    images = blobs(24)
    pool = dataset(tmp_path / "p", [*sentences(12), *[None] * 12], images)
    made = cascade(pool, dataset(tmp_path / "r", sentences(30, seed=5), blobs(30, 1)), Config(quality=0.5))
    reasons, scores = made.rows["reason"].to_pylist(), made.rows["score"].to_pylist()
    assert reasons[:12].count("quality") == 6
    assert reasons[12:] == [""] * 12
    assert scores[12:] == [1] * 12
    none = cascade(dataset(tmp_path / "q", [None] * 24, images), pool, Config(quality=0.5))
    assert none.figures["kept"] == 24


def test_a_text_that_is_not_there_is_short(tmp_path: Path) -> None:
    data = dataset(tmp_path, ["a black cat", None])
    assert cascade(data, data).rows["reason"].to_pylist() == ["", "too short"]
    assert cascade(data, data, Config(min_words=0, min_chars=0, languages=("en",))).figures["kept"] == 2


def test_clusters_far_from_the_reference_fall_whole(tmp_path: Path) -> None:
    rng = dice.Random(0)
    names = [
        "alpha",
        "beta",
        "gamma",
        "delta",
        "epsilon",
        "zeta",
        "eta",
        "theta",
        "iota",
        "kappa",
        "lambda",
        "mu",
        "nu",
        "xi",
        "omicron",
        "pi",
        "rho",
        "sigma",
        "tau",
    ]
    others = [" ".join(rng.choices(names, k=20)) for _ in range(60)]
    pool = dataset(tmp_path / "p", [*sentences(200), *others])
    reference = dataset(tmp_path / "r", sentences(100, seed=5))
    made = cascade(pool, reference, Config(clusters=2, cluster_share=0.3, near_text=None))
    assert made.rows["reason"].to_pylist() == [""] * 200 + ["cluster"] * 60
    spared = cascade(pool, reference, Config(clusters=2, cluster_share=0.1, near_text=None))
    assert spared.figures["cluster"] == 0


def test_clusters_fall_from_the_smallest_share_of_reference_rows_on() -> None:
    pool, reference = np.repeat([0, 1, 2, 3], [10, 20, 30, 40]), np.repeat([1, 2, 3], [1, 5, 40])
    assert _quality.strangers(pool, reference, 4, 0.1).tolist() == [True, False, False, False]
    assert _quality.strangers(pool, reference, 4, 0.5).tolist() == [True, True, False, False]
    assert _quality.strangers(pool, reference, 4, 1).tolist() == [True, True, True, False]  # 3 is more like it than the whole


def test_features_of_a_text_do_not_depend_on_the_batch() -> None:
    texts = ["", "abc", *sentences(5), "naïve café"]
    whole = _quality.grams(texts)
    for at, text in enumerate(texts):
        assert (abs(_quality.grams([text]) - whole[at]) > 0).nnz == 0
    np.testing.assert_allclose(np.asarray(whole[1].sum()), np.sqrt(4))  # four grams, each of 1 / sqrt(4)
    assert _quality.grams([]).shape[0] == 0


def test_bad_input_is_told(tmp_path: Path, tiny: Dataset) -> None:
    data = dataset(tmp_path / "a", sentences(4))
    none = data.take(np.zeros(0))
    with pytest.raises(UserError, match="no rows to judge"):
        cascade(none, data)
    with pytest.raises(UserError, match=r"none of the pool's 4 rows is left: 4 fell as 'too short'"):
        cascade(data, data, Config(min_words=1000))
    with pytest.raises(UserError, match=r"languages: 'klingon' is not known; valid: .*en, "):
        cascade(data, data, Config(languages=("klingon",)))
    with pytest.raises(UserError, match="the reference, which has no rows"):
        cascade(data, none, Config(quality=0.1))
    with pytest.raises(UserError, match="must have one shape"):
        cascade(data, tiny)
    images = dataset(tmp_path / "b", [None] * 4, blobs(4))
    with pytest.raises(UserError, match="these rows have none"):
        cascade(images, images, Config(quality=0.1))


def test_the_digits_pass(tiny: Dataset) -> None:
    pool = tiny.split("train")
    made = cascade(pool, tiny.split("reference"), Config())
    assert made.figures["kept"] >= 0.95 * len(pool)
    assert cascade(pool, tiny.split("reference"), SMOKE).figures["quality"] > 0
