"""The shapes world: its captions, its renderer, its checker, and the embedded FLUX that draws it."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from fastvideo.errors import UserError
from shapes.checker import aesthetic, check, detect
from shapes.evaluation import different
from shapes.prompt_files import RL_SPECS, split
from shapes.rewards import load_aesthetic, load_shapes, load_shapes_strict
from shapes.tiny_models import TEXT_LENGTH, clip_tokenizer, t5_tokenizer
from shapes.world import COLOURS, QUESTIONS, SHAPES, Spec, all_specs, caption, compatible, holds, mutate, parse, render

SHAPES_FOLDER = Path(__file__).resolve().parent.parent / "shapes"
ALL_SPECS = all_specs()


def specs_of(question: str, number: int, rng: np.random.Generator) -> list[Spec]:
    population = [spec for spec in ALL_SPECS if spec.question == question]
    return [population[i] for i in rng.integers(len(population), size=number)]


def test_captions_round_trip_over_the_whole_grammar():
    captions = [caption(spec) for spec in ALL_SPECS]
    assert [parse(text) for text in captions] == ALL_SPECS
    assert len(set(captions)) == len(captions) == 18 + 36 + 306 + 1224
    assert {spec.question for spec in ALL_SPECS} == set(QUESTIONS)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red circle.",
        "red circle",
        "a pink circle",
        "four red circles",
        "two red circle",
        "a red circle beside a blue square",
        "a red circles",
    ],
)
def test_text_outside_the_grammar_is_an_error_that_names_it(text):
    with pytest.raises(UserError, match="is not in the shapes grammar") as error:
        parse(text)
    assert repr(text) in str(error.value)


def test_one_object_named_twice_is_an_error():
    with pytest.raises(UserError, match="two red circles"):
        parse("a red circle and a red circle")


def test_compatible_knows_what_captions_mean():
    def same(a: str, b: str) -> bool:
        assert compatible(parse(a), parse(b)) == compatible(parse(b), parse(a))
        return compatible(parse(a), parse(b))

    assert same("a red circle and a blue square", "a blue square and a red circle")
    assert same("a red circle and a blue square", "a blue square above a red circle")
    assert same("a red circle left of a blue square", "a blue square right of a red circle")
    assert not same("a red circle left of a blue square", "a blue square left of a red circle")
    assert not same("a red circle left of a blue square", "a red circle above a blue square")
    assert not same("a red circle and a blue square", "a blue circle and a red square")
    assert not same("two red circles", "three red circles")


@pytest.mark.parametrize("question", QUESTIONS)
def test_checker_accepts_rendered_pictures_and_rejects_other_captions(question):
    rng = np.random.default_rng(1)
    specs = specs_of(question, 300, rng)
    images = render(specs, rng)
    assert images.shape == (300, 3, 32, 32) and images.dtype == np.float32 and images.min() >= 0 and images.max() <= 1
    right = check(images, specs)
    assert right["strict"].mean() >= 0.98
    assert right["soft"].mean() >= 0.98
    others = [different(spec, ALL_SPECS, rng) for spec in specs]
    assert check(images, others)["strict"].mean() <= 0.01
    assert check(images, others)["soft"].mean() <= 0.6
    mutated = check(images, [mutate(spec, rng) for spec in specs])
    assert mutated["strict"].mean() <= 0.01
    assert 0 < mutated["soft"].mean() < right["soft"].mean()


def test_checker_judges_each_part():
    rng = np.random.default_rng(2)
    image = render([parse("a red circle and a blue square")], rng, [np.array([[8, 8, 5], [22, 20, 5]])])

    def scores(text: str) -> dict[str, float]:
        return {name: values.item() for name, values in check(image, [parse(text)]).items()}

    assert set(scores("a blue square and a red circle").values()) == {1.0}
    assert scores("a red circle left of a blue square")["relation"] == 1
    wrong_side = scores("a red circle right of a blue square")
    assert wrong_side == pytest.approx(dict.fromkeys(wrong_side, 1) | {"relation": 0, "strict": 0, "soft": 0.8})
    swapped = scores("a blue circle and a red square")
    assert swapped["colour"] == swapped["shape"] == swapped["count"] == 1 and swapped["binding"] == swapped["strict"] == 0
    wrong_colour = scores("a green circle and a blue square")
    assert (wrong_colour["colour"], wrong_colour["shape"], wrong_colour["strict"]) == (0.5, 1, 0)
    too_few = scores("a red circle")
    assert (too_few["count"], too_few["strict"], too_few["well_formed"]) == (0, 0, 0)


def test_count_off_by_one_is_not_accepted():
    rng = np.random.default_rng(3)
    two, three = parse("two green squares"), parse("three green squares")
    images = render([two] * 20 + [three] * 20, rng)
    scores = check(images, [three] * 20 + [two] * 20)
    assert scores["strict"].max() == 0 and (scores["count"] < 1).all()
    assert [len(found) for found in detect(images)] == [2] * 20 + [3] * 20


def test_detections_are_where_the_objects_are():
    rng = np.random.default_rng(4)
    specs = [Spec(((colour, shape),)) for colour, shape in product(COLOURS, SHAPES)]
    layouts = [np.array([[*rng.uniform(12, 20, 2), rng.uniform(5.5, 7)]]) for _ in specs]
    for found, spec, place in zip(detect(render(specs, rng, layouts)), specs, layouts):
        assert [(d.colour, d.shape) for d in found] == list(spec.objects)
        assert np.allclose([found[0].x, found[0].y], place[0, :2], atol=0.4)
        assert found[0].area == pytest.approx(np.pi * place[0, 2] ** 2, rel=0.25)


def test_layouts_keep_the_relation_and_stay_apart():
    rng = np.random.default_rng(5)
    specs = specs_of("position", 100, rng)
    for spec, found in zip(specs, detect(render(specs, rng))):
        where = {(d.colour, d.shape): (d.x, d.y) for d in found}
        assert holds(spec.relation, *(where[thing] for thing in spec.objects))


def test_empty_and_noisy_pictures_score_nothing():
    rng = np.random.default_rng(6)
    blank = np.full((1, 3, 32, 32), 0.9, np.float32)
    noise = rng.uniform(size=(8, 3, 32, 32)).astype(np.float32)
    for images in (blank, noise):
        scores = check(images, [parse("a red circle")] * len(images))
        assert scores["strict"].max() == 0 and scores["well_formed"].max() == 0 and scores["soft"].max() <= 0.5
        assert np.isfinite(aesthetic(images)).all()


def test_other_sizes_are_an_error():
    with pytest.raises(UserError, match="3 x 16 x 32"):
        check(np.zeros((1, 3, 16, 32), np.float32), [parse("a red circle")])


def test_aesthetic_likes_large_vivid_centred_objects_on_clean_backgrounds():
    rng = np.random.default_rng(7)
    spec = parse("a red circle")
    small, large, corner = (render([spec], rng, [np.array([place])]) for place in ([16, 16, 5], [16, 16, 9], [10, 10, 9]))
    pale = 0.6 * large + 0.4 * large[:, :, :1, :1]
    dirty = np.clip(large + rng.normal(0, 0.08, large.shape), 0, 1).astype(np.float32)
    scores = aesthetic(np.concatenate([large, small, corner, pale, dirty]))
    assert scores.dtype == np.float32 and scores.min() >= 0 and scores.max() <= 1
    assert all(scores[0] > other + 0.05 for other in scores[1:])
    slightly_changed = aesthetic(np.clip(large + 1e-3, 0, 1))
    assert abs(slightly_changed.item() - scores[0]) < 0.01


def test_rewards_take_media_in_minus_one_to_one_and_rows():
    rng = np.random.default_rng(8)
    specs = specs_of("attribution", 6, rng)
    media = torch.from_numpy(render(specs, rng)) * 2 - 1
    rows = [{"prompt": caption(spec)} for spec in specs[:3]] + [{"prompt": "three purple triangles"}] * 3
    cpu = torch.device("cpu")
    assert load_shapes_strict(None, cpu)(media, rows).tolist() == [1, 1, 1, 0, 0, 0]
    soft = load_shapes(None, cpu)(media, rows)
    assert soft[:3].tolist() == [1, 1, 1] and (soft[3:] < 1).all()
    taste = load_aesthetic(None, cpu)(media, rows)
    assert taste.shape == soft.shape == (6,) and taste.dtype == soft.dtype == torch.float32


@pytest.mark.parametrize("load", [load_shapes, load_shapes_strict, load_aesthetic])
def test_rewards_of_the_world_take_no_path(load):
    with pytest.raises(UserError, match=r"takes no path.*=somewhere"):
        load("somewhere", torch.device("cpu"))


def test_prompt_files_are_what_split_gives_and_share_no_meaning():
    train, heldout = split()
    for name, specs in (("train", train), ("heldout", heldout)):
        assert (SHAPES_FOLDER / "prompts" / f"{name}.txt").read_text().splitlines() == [caption(spec) for spec in specs]
        assert set(specs) <= set(RL_SPECS)
    everything = train + heldout
    assert sum(compatible(a, b) for a, b in product(everything, everything)) == len(everything)
    assert sum(len(spec.objects) == 1 for spec in train) == 8 and sum(len(spec.objects) == 1 for spec in heldout) == 4
    assert {thing for spec in train for thing in spec.objects} == {thing for spec in RL_SPECS for thing in spec.objects}


@pytest.mark.parametrize("make", [clip_tokenizer, t5_tokenizer])
def test_tokenizers_encode_captions_and_any_other_text(make):
    tokenizer = make()
    assert tokenizer.model_max_length == TEXT_LENGTH
    ids = tokenizer([caption(spec) for spec in ALL_SPECS], padding="max_length", max_length=TEXT_LENGTH).input_ids
    assert {len(row) for row in ids} == {TEXT_LENGTH} and len({tuple(row) for row in ids}) == len(ALL_SPECS)
    assert tokenizer.unk_token_id == tokenizer.eos_token_id or tokenizer.unk_token_id not in {token for row in ids for token in row}
    for text in ("An Unseen, sentence: 42 %!", "naïve 猫 \U0001f600", "", "a red circle moving left"):
        ids = tokenizer(text).input_ids
        assert all(0 <= token < len(tokenizer) for token in ids)
    text = "some words that no caption has"
    assert "".join(tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True).split()) == "".join(text.split())


def test_embedded_flux_loads_and_draws():
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(SHAPES_FOLDER / "models" / "flux", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.tokenizer.model_max_length == pipeline.tokenizer_2.model_max_length == TEXT_LENGTH
    assert pipeline.scheduler.config.shift == 3 and not pipeline.scheduler.config.use_dynamic_shifting
    prompts = [f"a {colour} {shape}" for colour, shape in product(("red", "green", "blue", "yellow"), SHAPES)] * 4
    arguments = {"num_inference_steps": 8, "height": 32, "width": 32, "max_sequence_length": TEXT_LENGTH, "output_type": "np"}
    images = pipeline(prompts, generator=torch.Generator().manual_seed(0), **arguments).images.transpose(0, 3, 1, 2)
    scores = check(images, [parse(prompt) for prompt in prompts])
    assert images.shape == (48, 3, 32, 32)
    assert scores["well_formed"].mean() > 0.75
    assert 0.2 < scores["strict"].mean() < 0.95  # it follows its prompt, but loosely: RL has something to do


def test_pretraining_captions_are_noisy_but_most_often_right():
    from shapes.pretrain import caption_noise

    noise = caption_noise()
    assert noise.shape == (len(RL_SPECS), len(RL_SPECS)) and torch.allclose(noise.sum(1), torch.ones(len(RL_SPECS)))
    assert (noise.argmax(1) == torch.arange(len(RL_SPECS))).all()
    assert noise[0, 0] == pytest.approx((0.65 + 0.35 / 4) * (0.75 + 0.25 / 3))
