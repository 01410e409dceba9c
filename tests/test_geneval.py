"""The geneval reward: its rules on detections, with answers worked out by hand, and its table of the shapes world, counted otherwise."""

import json
import re
from collections import defaultdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import EVALUATE, MODEL, REPOSITORY, SMALL_RUN, metrics_of, run_script
from PIL import Image

from fastvideo.errors import UserError
from fastvideo.evaluation.benchmarks import parse_benchmark
from fastvideo.rewards import load_rewards, parse_rewards, score
from fastvideo.rewards.detectors import Detection, instances, load_detector
from fastvideo.rewards.geneval import Rules, correct, load_geneval, overlap, relations
from fastvideo.rewards.geneval_colours import COLOURS, ColourNames, cut_out
from shapes.checker import check, detect
from shapes.geneval import KINDS, question, questions
from shapes.prompt_files import RL_THINGS, split
from shapes.world import RELATIONS, RL_COLOURS, SHAPES, Spec, holds, parse, render

CPU = torch.device("cpu")
QUESTIONS = REPOSITORY / "shapes" / "prompts" / "geneval.jsonl"
CLIP = REPOSITORY / "shapes" / "models" / "clip"
RULES = Rules()


def to_media(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images) * 2 - 1


# ---------------------------------------------------------------------------------------------------------------------- position


@pytest.mark.parametrize(
    ("box", "other", "expected"),
    [  # boxes of 10 x 10 but for the last ones: an offset counts beyond 2
        ((0, 0, 10, 10), (20, 0, 30, 10), {"left of"}),
        ((20, 0, 30, 10), (0, 0, 10, 10), {"right of"}),
        ((0, 0, 10, 10), (0, 20, 10, 30), {"above"}),
        ((0, 20, 10, 30), (0, 0, 10, 10), {"below"}),
        ((0, 0, 10, 10), (20, 20, 30, 30), {"left of", "above"}),  # 18 / 28.3 = 0.64, both ways
        ((0, 20, 10, 30), (20, 0, 30, 10), {"left of", "below"}),
        ((0, 0, 10, 10), (10, 20, 20, 30), {"above"}),  # 8 / 22.4 = 0.36; 18 / 22.4 = 0.80
        ((0, 0, 10, 10), (14, 20, 24, 30), {"above"}),  # 12 / 24.4 = 0.49
        ((0, 0, 10, 10), (15, 20, 25, 30), {"left of", "above"}),  # 13 / 25 = 0.52; 18 / 25
        ((0, 0, 10, 10), (0, 0, 10, 10), set()),
        ((0, 0, 10, 10), (2, 1, 12, 11), set()),  # not beyond 2
        ((0, 0, 10, 10), (3, 0, 13, 10), set()),  # 1 / 3
        ((0, 0, 10, 10), (4, 0, 14, 10), set()),  # 2 / 4 = 0.5, which is not more than a half
        ((0, 0, 10, 10), (4.2, 0, 14.2, 10), {"left of"}),  # 2.2 / 4.2 = 0.52
        ((0, 0, 10, 10), (5, 5, 15, 15), set()),  # 3 / 7.1 = 0.42, both ways
        ((0, 0, 30, 10), (19, 0, 29, 10), {"left of"}),  # widths 30 and 10: beyond 4. Centres 15 and 24: 5 / 9 = 0.56
        ((0, 0, 60, 10), (31, 0, 41, 10), set()),  # beyond 7: not even 6
    ],
)
def test_where_a_box_is_seen_from_another(box, other, expected):
    assert relations(box, other, RULES.position_threshold) == expected


def test_a_wider_threshold_takes_more_of_the_offset():
    boxes = (0, 0, 10, 10), (12, 0, 22, 10)
    assert relations(*boxes, 0.1) == {"left of"}  # 10 / 12
    assert relations(*boxes, 0.29) == {"left of"}  # 6.2 / 12
    assert relations(*boxes, 0.31) == set()  # 5.8 / 12


# ------------------------------------------------------------------------------------------------- what must, and must not, be there


def thing(name: str, certainty: float = 0.95, colour: str = "red", box: tuple = (0, 0, 10, 10)) -> Detection:
    return Detection(name, certainty, box, colour=colour)


def judged(row: dict, *found: Detection, rules: Rules = RULES) -> bool:
    return correct(row, list(found), rules, lambda objects, name: [one.colour for one in objects])


CAT = {"tag": "single_object", "include": [{"class": "cat", "count": 1}]}
TWO_CATS = {"tag": "counting", "include": [{"class": "cat", "count": 2}], "exclude": [{"class": "cat", "count": 3}]}
RED_CAT = {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}]}
RED_CATS = {"tag": "colors", "include": [{"class": "cat", "count": 2, "color": "red"}]}
CAT_LEFT_OF_DOG = {
    "tag": "position",
    "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}],
}
RED_CAT_BLUE_DOG = {
    "tag": "color_attr",
    "include": [{"class": "cat", "count": 1, "color": "red"}, {"class": "dog", "count": 1, "color": "blue"}],
}
FAR = (50, 0, 60, 10)


@pytest.mark.parametrize(
    ("row", "found", "expected"),
    [
        (CAT, [thing("cat")], True),
        (CAT, [thing("dog")], False),
        (CAT, [], False),
        (CAT, [thing("cat", 0.301)], True),
        (CAT, [thing("cat", 0.3)], False),  # above it, not at it
        (CAT, [thing("cat"), thing("cat"), thing("dog")], True),  # others may be there
        (TWO_CATS, [thing("cat"), thing("cat")], True),
        (TWO_CATS, [thing("cat")], False),
        (TWO_CATS, [thing("cat"), thing("cat"), thing("cat")], False),  # excluded
        (TWO_CATS, [thing("cat"), thing("cat"), thing("dog")], True),
        (TWO_CATS, [thing("cat"), thing("cat", 0.9)], False),  # counting wants more certain ones
        (TWO_CATS, [thing("cat"), thing("cat"), thing("cat", 0.9)], True),
        (TWO_CATS, [thing("cat"), thing("cat", 0.901)], True),
        (TWO_CATS | {"tag": "other"}, [thing("cat"), thing("cat", 0.9)], True),  # only the tag says that it is counting
        (RED_CAT, [thing("cat")], True),
        (RED_CAT, [thing("cat", colour="blue")], False),
        (RED_CAT, [thing("dog")], False),
        (RED_CAT, [thing("cat", 0.8), thing("cat", 0.9, "blue")], False),  # the most certain one is taken
        (RED_CAT, [thing("cat", 0.9), thing("cat", 0.8, "blue")], True),
        (RED_CATS, [thing("cat"), thing("cat")], True),
        (RED_CATS, [thing("cat"), thing("cat", colour="blue")], False),
        (RED_CATS, [thing("cat"), thing("cat"), thing("cat", 0.5, "blue")], True),
        (CAT_LEFT_OF_DOG, [thing("dog", box=FAR), thing("cat")], True),
        (CAT_LEFT_OF_DOG, [thing("dog"), thing("cat", box=FAR)], False),
        (CAT_LEFT_OF_DOG, [thing("cat")], False),  # nothing to be left of
        (CAT_LEFT_OF_DOG, [thing("dog", box=FAR)], False),
        (CAT_LEFT_OF_DOG, [thing("dog", box=FAR), thing("cat", 0.5), thing("cat", 0.8, box=(99, 0, 109, 10))], False),
        (RED_CAT_BLUE_DOG, [thing("cat"), thing("dog", colour="blue")], True),
        (RED_CAT_BLUE_DOG, [thing("cat", colour="blue"), thing("dog", colour="red")], False),
        (RED_CAT_BLUE_DOG, [thing("cat")], False),
        ({"tag": "x", "include": [{"class": "cat", "count": 1}], "exclude": [{"class": "dog", "count": 1}]}, [thing("cat")], True),
        (
            {"tag": "x", "include": [{"class": "cat", "count": 1}], "exclude": [{"class": "dog", "count": 1}]},
            [thing("cat"), thing("dog")],
            False,
        ),
        # detectors have other names for some of GenEval's classes
        ({"tag": "x", "include": [{"class": "tv remote", "count": 1}]}, [thing("remote")], True),
        ({"tag": "x", "include": [{"class": "couch", "count": 2}]}, [thing("sofa"), thing("couch")], True),
        ({"tag": "x", "include": [{"class": "remote", "count": 1}]}, [thing("tv remote")], False),
    ],
)
def test_what_must_be_there(row, found, expected):
    assert judged(row, *found) is expected
    assert judged(row, *found[::-1]) is expected or len({one.score for one in found}) < len(found)  # a detector's order says nothing


def test_all_pairs_of_those_taken_must_stand_so():
    row = {"tag": "x", "include": [{"class": "dog", "count": 2}, {"class": "cat", "count": 2, "position": ["left of", 0]}]}
    cats, dogs = [thing("cat"), thing("cat", box=(20, 0, 30, 10))], [thing("dog", box=FAR), thing("dog", box=(90, 0, 100, 10))]
    assert judged(row, *cats, *dogs)
    assert not judged(row, cats[0], thing("cat", box=(70, 0, 80, 10)), *dogs)  # left of one dog alone


def test_a_failed_entry_is_nothing_to_be_left_of():
    row = {"tag": "x", "include": [RED_CAT["include"][0], {"class": "dog", "count": 1, "position": ["right of", 0]}]}
    assert judged(row, thing("cat"), thing("dog", box=FAR))
    assert not judged(row, thing("cat", colour="blue"), thing("dog", box=FAR))


def test_at_most_16_of_a_class_and_none_over_a_more_certain_one():
    crowd = [thing("cat", 0.95 - i / 1000) for i in range(20)]
    many = {"tag": "x", "include": [{"class": "cat", "count": 16}], "exclude": [{"class": "cat", "count": 17}]}
    assert judged(many, *crowd)
    assert not judged(many, *crowd, rules=Rules(max_objects=17))
    assert not judged(many, *crowd, rules=Rules(max_overlap=0.99))  # all are in one place: one is left
    half = [thing("cat", 0.9), thing("cat", 0.8, box=(0, 0, 10, 21)), thing("cat", 0.7, box=(0, 11, 10, 21))]
    one = {"tag": "x", "include": [{"class": "cat", "count": 1}], "exclude": [{"class": "cat", "count": 3}]}
    assert overlap(half[0].box, half[1].box) == 121 / 242 and overlap(half[0].box, half[2].box) == 0
    assert not judged(one, *half)
    assert judged(one, *half, rules=Rules(max_overlap=0.5))  # at the limit it goes, and the third, which it covers too, stays


# ------------------------------------------------------------------------------------------------------------------------ colours


def test_an_object_is_cut_out_of_grey():
    picture = Image.fromarray(np.arange(8 * 10 * 3, dtype=np.uint8).reshape(8, 10, 3))
    pixels = np.asarray(picture)
    plain = cut_out(Detection("cat", 1, (1.4, 1.6, 4.6, 6.4)), picture)  # sides are rounded
    assert torch.equal(((plain + 1) * 127.5).round(), torch.from_numpy(pixels[2:6, 1:5].copy()).permute(2, 0, 1)[None].float())
    mask = np.zeros((8, 10), bool)
    mask[3, 2] = True
    masked = ((cut_out(Detection("cat", 1, (2, 3, 4, 5), mask), picture) + 1) * 127.5).round()[0]
    assert masked[:, 0, 0].tolist() == pixels[3, 2].tolist()
    assert (masked.flatten(1)[:, 1:] == 0x99).all()
    assert cut_out(Detection("cat", 1, (3.2, 3.2, 3.4, 9)), picture).shape == (1, 3, 6, 1)


def test_colours_are_those_whose_captions_are_nearest():
    """Against transformers' own CLIPModel and preprocessing by PIL, a caption and a colour at a time."""
    from transformers import CLIPModel, CLIPTokenizerFast

    model, tokenizer = CLIPModel.from_pretrained(CLIP).eval(), CLIPTokenizerFast.from_pretrained(CLIP)
    settings = json.loads((CLIP / "preprocessor_config.json").read_text())
    side = model.config.vision_config.image_size
    mean, std = (torch.tensor(settings[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))
    rng = np.random.default_rng(0)
    images = render([Spec(((colour, "circle"), ("yellow", "square"))) for colour in RL_COLOURS], rng)
    names, seen = ColourNames(str(CLIP), CPU), set()

    nearby = defaultdict(list)
    for colour in COLOURS:
        for text in (f"a photo of a {colour} circle", f"a photo of a {colour}-colored circle", f"a photo of a {colour} object"):
            length = model.config.text_config.max_position_embeddings
            tokens = tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            feature = model.get_text_features(**tokens).pooler_output[0].detach()
            nearby[colour].append(feature / feature.norm())

    def by_hand(crop: Image.Image) -> str:
        pixels = torch.from_numpy(np.array(crop.resize((side, side), Image.Resampling.BICUBIC))).permute(2, 0, 1) / 255
        seen = model.get_image_features(pixel_values=((pixels - mean) / std)[None]).pooler_output.detach()
        return max(nearby, key=lambda colour: F.cosine_similarity(sum(nearby[colour])[None], seen).item())

    for image in images:
        picture = Image.fromarray((image.transpose(1, 2, 0) * 255).round().astype(np.uint8))
        boxes = [(0, 0, 16, 16), (16, 0, 32, 16), (0, 16, 16, 32), (16, 16, 32, 32), (8, 8, 24, 24)]
        expected = [by_hand(picture.crop(box)) for box in boxes]
        assert names([Detection("c", 1, box) for box in boxes], "circle", picture) == expected
        seen |= set(expected)
    assert len(seen) >= 3  # they do differ


# ------------------------------------------------------------------------------------------------------- the shapes world's table


def test_the_questions_are_as_their_program_writes_them_and_ask_for_no_trained_pair():
    rows = [json.loads(line) for line in QUESTIONS.read_text().splitlines()]
    trained = split()[0]
    assert rows == questions(RL_THINGS, trained)
    pairs = {frozenset(spec.objects) for spec in trained}
    assert not any(frozenset(parse(row["prompt"]).objects) in pairs for row in rows if len(row["include"]) == 2)
    assert question("counting", parse("two red circles")) == {
        "tag": "counting",
        "include": [{"class": "circle", "count": 2}],
        "exclude": [{"class": "circle", "count": 3}],
        "prompt": "two red circles",
    }
    assert question("position", parse("a red circle above a blue square"))["include"] == [
        {"class": "square", "count": 1},
        {"class": "circle", "count": 1, "position": ["above", 0]},
    ]
    assert question("color_attr", parse("a red circle and a blue square"))["include"] == [
        {"class": "circle", "count": 1, "color": "red"},
        {"class": "square", "count": 1, "color": "blue"},
    ]


def shown(spec: Spec, row: dict, relations_of: dict[Spec, str]) -> bool:
    """Whether a picture of `spec`, which was drawn, answers the row's question: counted from what was drawn, not from the picture."""
    drawn, wanted = list(spec.objects), parse(row["prompt"])
    shapes = [shape for _, shape in drawn]
    if row["tag"] == "counting":
        return shapes.count(wanted.objects[0][1]) == len(wanted.objects)
    if row["tag"] in ("colors", "color_attr"):
        return all(one in drawn for one in wanted.objects)
    there = all(shape in shapes for _, shape in wanted.objects)
    return there and (row["tag"] != "position" or relations_of.get(spec) == (wanted.objects[0][1], wanted.relation))


def mistaken(row: dict, rng: np.random.Generator) -> list[Spec]:
    """Pictures that are wrong for a row, in the caption's respects: another colour, shape, number, place, or an object that is missing."""
    spec = parse(row["prompt"])
    things, other_shape = list(spec.objects), {shape: SHAPES[(i + 1) % 3] for i, shape in enumerate(SHAPES)}
    colour, shape = things[0]
    another = RL_COLOURS[(RL_COLOURS.index(colour) + 1 + rng.integers(3)) % 4]
    if row["tag"] == "counting":
        return [Spec(things[:1] * number) for number in (1, 2, 3)] + [Spec(((another, shape),) * len(things))]
    if len(things) == 1:
        return [Spec(((another, shape),)), Spec(((colour, other_shape[shape]),)), Spec(((another, other_shape[shape]), (colour, shape)))]
    (_, (colour_2, shape_2)) = things
    swapped = Spec(((colour_2, shape), (colour, shape_2)), spec.relation)
    if row["tag"] == "position":
        return [swapped, *(Spec(spec.objects, relation) for relation in RELATIONS), Spec((things[0],))]
    return [swapped, Spec(((another, shape), things[1])), Spec((things[0],)), Spec((things[0], things[0]))]


def test_the_table_of_each_question_is_an_independent_count():
    """Twelve rows of each kind, each of them drawn as asked, twice, and with mistakes: every sum of the table is known before."""
    rng = np.random.default_rng(0)
    benchmark = parse_benchmark(f"geneval={QUESTIONS},detector=shapes")
    assert (len(benchmark.rows), benchmark.images_per_prompt, benchmark.group, benchmark.total) == (72, 4, "tag", "groups")
    assert benchmark.rewards == ("geneval=shapes",)
    (reward,) = load_rewards(parse_rewards(benchmark.rewards), CPU, benchmark.rows).values()
    pairs = [(row, spec) for row in benchmark.rows for spec in [parse(row["prompt"])] * 2 + mistaken(row, rng)]
    specs = [spec for _, spec in pairs]
    placed = {spec: (spec.objects[0][1], spec.relation) for spec in specs if spec.relation}
    images = render(specs, rng)
    scores = reward(to_media(images), [row for row, _ in pairs])

    table, known = defaultdict(list), defaultdict(list)
    for (row, spec), value in zip(pairs, scores.tolist()):
        table[row["tag"]].append(value)
        known[row["tag"]].append(float(shown(spec, row, placed)))
    assert list(table) == list(KINDS)
    print({tag: f"{sum(values):.0f} of {len(values)}" for tag, values in table.items()})
    assert table == known
    assert {tag: sum(values) for tag, values in table.items()} == {
        "single_object": 12 * 4,  # twice as asked, in another colour, and beside another object
        "two_object": 12 * 4,  # twice as asked, with the colours swapped, and with another colour
        "counting": 12 * 4,  # twice as asked, once among the three numbers, and in another colour
        "colors": 12 * 3,
        "position": 12 * 4,  # twice as asked, with the colours swapped, and once among the four relations
        "color_attr": 12 * 2,
    }

    strict = check(images, [parse(row["prompt"]) for row, _ in pairs])["strict"].tolist()  # all of the caption, and nothing else
    right = {tag: [] for tag in table}
    for (row, spec), value, whole in zip(pairs, scores.tolist(), strict):
        assert value >= whole, (row, spec)
        if len(spec.objects) == len(parse(row["prompt"]).objects):
            right[row["tag"]].append((value, whole))
    for tag in ("colors", "color_attr"):  # which ask for the whole caption
        assert [value for value, _ in right[tag]] == [whole for _, whole in right[tag]]


def answered(row: dict, found: list) -> bool:
    """Whether what the checker sees in a picture answers the row's question, counted by hand from the caption."""
    wanted = parse(row["prompt"])
    best = {one.shape: one for one in sorted(found, key=lambda one: one.overlap) if one.shape and one.colour}  # the last of each is kept
    if row["tag"] == "counting":
        return sum(one.shape == wanted.objects[0][1] and one.colour is not None for one in found) == len(wanted.objects)
    there = all(shape in best for _, shape in wanted.objects)
    if there and row["tag"] in ("colors", "color_attr"):
        return all(best[shape].colour == colour for colour, shape in wanted.objects)
    if there and row["tag"] == "position":
        first, second = ((best[shape].x, best[shape].y) for _, shape in wanted.objects)
        return holds(wanted.relation, first, second)
    return there


def test_the_table_of_a_model_is_an_independent_count(tmp_path):
    """evaluate.py's, against the checker's own view of the pictures that it kept."""
    lines = QUESTIONS.read_text().splitlines()[::3]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    benchmark = f"geneval={tmp_path}/questions.jsonl,detector=shapes,images=2"
    flags = {"--model": MODEL, "--benchmarks": benchmark, "--num_seeds": 1, "--sampling_steps": 8, "--output_dir": tmp_path / "out"}
    result = run_script(EVALUATE, flags, "--save_pictures", log=tmp_path / "log")
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "out" / "results.json").read_text())["scores"]["base"]["geneval"]["geneval"]
    counts = defaultdict(list)
    for place, line in enumerate(lines):
        files = sorted((tmp_path / "out" / "pictures" / "base" / "geneval").glob(f"prompt{place:05d}_*.png"))
        images = np.stack([np.asarray(Image.open(file), np.float32).transpose(2, 0, 1) / 255 for file in files])
        assert len(images) == 2
        counts[json.loads(line)["tag"]] += [answered(json.loads(line), objects) for objects in detect(images)]
    shares = {tag: sum(values) / len(values) for tag, values in counts.items()}
    print(shares)
    assert {tag: group["mean"] for tag, group in found["groups"].items()} == pytest.approx(shares)
    assert found["mean"] == pytest.approx(sum(shares.values()) / 6)
    assert shares["single_object"] > shares["color_attr"] and sum(0 < share < 1 for share in shares.values()) >= 3


def test_pictures_of_what_is_no_object_are_wrong():
    rows = parse_benchmark(f"geneval={QUESTIONS},detector=shapes").rows
    reward = load_geneval("shapes", CPU, batch=5)
    noise = torch.rand(len(rows), 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert not reward(noise, rows).any() and not reward(torch.full((len(rows), 3, 32, 32), 0.8), rows).any()


def test_a_run_is_trained_by_it(tmp_path):
    """The rows' fields go with the embeddings; held out, it reports what the pictures of the last iteration get by itself."""
    embeddings = tmp_path / "cache"
    flags = {"--model": MODEL, "--prompts": QUESTIONS, "--output_dir": embeddings}
    assert run_script(REPOSITORY / "preprocess" / "embed_flux.py", flags, log=tmp_path / "embed").returncode == 0
    flags = {"--model": MODEL, "--embeddings": embeddings, "--output_dir": tmp_path / "run"} | SMALL_RUN
    flags |= {"--rewards": "geneval=shapes", "--held_out_rewards": "shapes", "--iterations": 1, "--prompts_per_iteration": 8}
    result = run_script(REPOSITORY / "train_grpo_flux.py", flags, log=tmp_path / "log")
    assert result.returncode == 0, result.stderr
    (row,) = metrics_of(tmp_path / "run")
    assert row["reward/geneval_min"] == 0 and row["reward/geneval_max"] == 1 and 0 < row["reward/geneval_mean"] < 1


# ------------------------------------------------------------------------------------------------------- transformers' detectors


def pictures(count: int, height: int, width: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for _ in range(count)]


@pytest.fixture(scope="module")
def yolos(tmp_path_factory):
    from transformers import YolosConfig, YolosForObjectDetection
    from transformers.models.yolos.image_processing_pil_yolos import YolosImageProcessorPil

    torch.manual_seed(0)
    names = {0: "cat", 1: "dog", 2: "tv"}
    config = YolosConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=[64, 64],
        patch_size=16,
        num_detection_tokens=7,
        id2label=names,
        label2id={name: i for i, name in names.items()},
    )
    folder = tmp_path_factory.mktemp("yolos")
    model = YolosForObjectDetection(config)
    for weights in model.parameters():
        torch.nn.init.normal_(weights, std=0.2)
    torch.nn.init.normal_(model.vit.embeddings.detection_tokens, std=3)  # so that they find different things
    torch.nn.init.normal_(model.vit.layernorm.weight, mean=1, std=0.1)
    model.save_pretrained(folder)
    YolosImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mask2former(tmp_path_factory):
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
    from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

    torch.manual_seed(0)
    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin = SwinConfig(image_size=64, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4, out_features=stages)
    config = Mask2FormerConfig(
        backbone_config=swin,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=9,
        id2label={0: "cat", 1: "dog"},
        label2id={"cat": 0, "dog": 1},
    )
    folder = tmp_path_factory.mktemp("mask2former")
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    Mask2FormerImageProcessorPil(size={"height": 384, "width": 384}).save_pretrained(folder)
    return folder


def test_boxes_of_a_folder(yolos):
    """Against the network's own numbers: centre, width and height as shares of the picture, and the likeliest class but "nothing"."""
    from transformers import YolosForObjectDetection
    from transformers.models.yolos.image_processing_pil_yolos import YolosImageProcessorPil

    images = pictures(3, 40, 56)
    detect = load_detector(str(yolos), CPU, None, 0, 0.3)
    found = detect(images)
    model, processor = YolosForObjectDetection.from_pretrained(yolos).eval(), YolosImageProcessorPil.from_pretrained(yolos)
    assert detect.classes == {"cat", "dog", "tv"}
    kept = 0
    for image, objects in zip(images, found, strict=True):
        with torch.no_grad():
            output = model(processor(images=image, return_tensors="pt")["pixel_values"])
        expected = []
        for logits, (x, y, width, height) in zip(output.logits[0], output.pred_boxes[0].tolist()):
            probabilities = (logits.exp() / logits.exp().sum())[:-1]
            if probabilities.max() > 0.3:
                box = ((x - width / 2) * 56, (y - height / 2) * 40, (x + width / 2) * 56, (y + height / 2) * 40)
                box = [min(max(side, 0), limit) for side, limit in zip(box, (56, 40, 56, 40))]
                expected.append((["cat", "dog", "tv"][probabilities.argmax()], probabilities.max().item(), box))
        assert [one.name for one in objects] == [name for name, _, _ in expected]
        assert [one.score for one in objects] == pytest.approx([value for _, value, _ in expected], abs=1e-5)
        assert np.allclose([one.box for one in objects], [box for _, _, box in expected], atol=1e-3)
        assert all(one.mask is None and one.colour is None for one in objects)
        kept += len(objects)
    assert 0 < kept < 21


def test_masks_of_a_folder(mask2former):
    """Against transformers' own post-processing, which is the same where pictures and network both have its 384 x 384."""
    from transformers import Mask2FormerForUniversalSegmentation
    from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

    images = pictures(2, 384, 384)
    found = load_detector(str(mask2former), CPU, None, 0, 0.0)(images)
    model = Mask2FormerForUniversalSegmentation.from_pretrained(mask2former).eval()
    processor = Mask2FormerImageProcessorPil.from_pretrained(mask2former)
    with torch.no_grad():
        output = model(**processor(images=images, return_tensors="pt"))
    sizes = [(384, 384)] * 2
    theirs = processor.post_process_instance_segmentation(output, threshold=0.0, target_sizes=sizes, return_binary_maps=True)
    for objects, other in zip(found, theirs, strict=True):
        assert len(objects) >= len(other["segments_info"]) > 0  # they have as many as queries, of 2 classes each
        for segment, mask in zip(other["segments_info"], other["segmentation"], strict=True):
            name = ["cat", "dog"][segment["label_id"]]
            same = [
                one for one in objects if one.name == name and abs(one.score - segment["score"]) < 2e-6 and (one.mask == mask.numpy()).all()
            ]
            assert same
            rows, columns = np.nonzero(mask.numpy())
            assert same[0].box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_how_large_pictures_are_shown(mask2former, monkeypatch):
    """Of 40 x 56 with a shorter side of 60 as 60 x 84, of 40 x 400 no more than 100 wide, 10 x 100; which the processor enlarges to 32s."""
    from transformers import Mask2FormerForUniversalSegmentation

    seen, forward = [], Mask2FormerForUniversalSegmentation.forward

    def watched(self, pixel_values, pixel_mask):
        seen.append((tuple(pixel_values.shape[2:]), tuple(pixel_mask[0].any(dim).sum().item() for dim in (1, 0))))
        return forward(self, pixel_values=pixel_values, pixel_mask=pixel_mask)

    monkeypatch.setattr(Mask2FormerForUniversalSegmentation, "forward", watched)
    for side, height, width in ((0, 40, 56), (60, 40, 56), (60, 40, 400)):
        (objects,) = load_detector(str(mask2former), CPU, None, side, 0.0)(pictures(1, height, width))
        assert objects[0].mask.shape == (height, width)
    assert seen == [((384, 384), (384, 384)), ((64, 96), (64, 96)), ((32, 128), (32, 128))]


def test_masks_are_enlarged_without_the_padding():
    """A network of strides of 4, a picture of 12 x 8 shown as 24 x 16 and padded to 32 x 32: the left half of it is a cat."""
    masks = torch.full((2, 8, 8), -8.0)
    masks[0, :6, :2] = 8.0
    classes = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 9.0]])
    found = instances(classes, masks, (32, 32), (24, 16), (12, 8), 0.3)
    assert found["labels"].tolist() == [0]
    assert found["boxes"].tolist() == [[0, 0, 4, 12]] and found["masks"].sum() == 48
    inside = torch.sigmoid(
        F.interpolate(F.interpolate(masks[None, :1], (32, 32), mode="bilinear")[..., :24, :16], (12, 8), mode="bilinear")
    )
    probability = np.exp(2) / (np.exp(2) + 2)
    assert found["scores"].item() == pytest.approx(probability * inside[0, 0, :, :4].mean().item(), abs=1e-5)
    assert not len(instances(classes, masks, (32, 32), (24, 16), (12, 8), 0.8)["scores"])


def test_a_folder_judges_pictures(mask2former):
    """All the way, on pictures that no longer have the network's size; colours by CLIP."""
    media = torch.rand(3, 3, 40, 56, generator=torch.Generator().manual_seed(0)) * 2 - 1
    rows = [{"prompt": "a", "tag": "single_object", "include": [{"class": "cat", "count": 1}]}] * 3
    name = f"geneval={mask2former},batch=2"
    assert score(load_rewards(parse_rewards([f"{name},threshold=0"]), CPU, rows), media, rows)["geneval"].tolist() == [1, 1, 1]
    assert score(load_rewards(parse_rewards([f"{name},threshold=0.99"]), CPU, rows), media, rows)["geneval"].tolist() == [0, 0, 0]
    colours = [rows[0] | {"include": [{"class": "cat", "count": 1, "color": colour}]} for colour in COLOURS]
    reward = load_geneval(str(mask2former), CPU, clip=str(CLIP), threshold=0)
    assert reward(media[:1].expand(10, -1, -1, -1), colours).sum() == 1  # one of the ten


# ---------------------------------------------------------------------------------------------------------- his own, and refusals

OWN = """
from fastvideo.rewards.detectors import Detection

def load_too_few(path, device):
    return lambda pictures: [[]]

def load_one_cat(path, device):
    def detect(pictures):
        return [[Detection(path or "cat", picture.getpixel((0, 0))[0] / 255, (0, 0, 4, 4))] for picture in pictures]
    return detect
"""


def test_a_detector_of_ones_own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    media = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1).expand(2, 3, 8, 8)
    rows = [{"prompt": "a cat"} | CAT] * 2
    for text, expected in (
        (f"geneval={tmp_path}/own.py:load_one_cat", [1, 0]),
        (f"geneval={tmp_path}/own.py:load_one_cat,weights=dog", [0, 0]),
    ):
        assert score(load_rewards(parse_rewards([text]), CPU, rows), media, rows)["geneval"].tolist() == expected

    with pytest.raises(UserError, match=r"own\.py:load_too_few returned 1 lists for 2 pictures"):
        score(load_rewards(parse_rewards([f"geneval={tmp_path}/own.py:load_too_few"]), CPU, rows), media, rows)


def test_the_example_of_the_page(tmp_path):
    """docs/evaluation_benchmarks.md's detector, on a network that finds a dog in dark pictures and a less certain cat in all."""

    class Network(torch.nn.Module):
        def forward(self, picture: torch.Tensor) -> torch.Tensor:
            darkness = 1 - picture.float().mean() / 255
            dog, cat = torch.tensor([[0, 0, 4, 4, 0.9, 1], [0, 0, 4, 4, 0.5, 0]])
            return torch.stack([dog * darkness, cat])

    torch.export.save(torch.export.export(Network(), (torch.zeros(8, 8, 3, dtype=torch.uint8),)), tmp_path / "network.pt2")
    page = (REPOSITORY / "docs" / "evaluation_benchmarks.md").read_text()
    (code,) = re.findall(r"```python\n(# my_detector\.py\n.*?)```", page, re.DOTALL)
    (tmp_path / "my_detector.py").write_text(code)
    media = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 8, 8)
    row = {"prompt": "a dog and a cat", "tag": "two_object", "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1}]}
    reward = load_rewards(parse_rewards([f"geneval={tmp_path}/my_detector.py:load,weights={tmp_path}/network.pt2"]), CPU, [row])
    assert score(reward, media, [row] * 2)["geneval"].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, 'it has no string as "tag"'),
        ({"tag": "colors"}, 'or no list as "include"'),
        ({"tag": "colors", "include": []}, 'or no list as "include"'),
        ({"tag": "colors", "include": [{"class": "circle"}]}, "no whole number above 0 as"),
        ({"tag": "colors", "include": [{"class": "circle", "count": True}]}, "no whole number above 0 as"),
        ({"tag": "colors", "include": [{"class": "circle", "count": 0}]}, "no whole number above 0 as"),
        ({"tag": "colors", "include": [{"class": "circle", "count": 1}], "exclude": 5}, '"exclude" is no list'),
        ({"tag": "colors", "include": ["circle"]}, "'circle' has no string as"),
        ({"tag": "colors", "include": [{"class": "dog", "count": 1}]}, "the detector does not know the class 'dog'"),
        ({"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "pink"}]}, "the colour 'pink' is none of red, green"),
        ({"tag": "x", "include": [{"class": "circle", "count": 1}], "exclude": [{"class": "dog", "count": 1}]}, "the class 'dog'"),
        ({"tag": "x", "include": [{"class": "circle", "count": 1, "position": ["left of", 0]}]}, "and the number of an earlier entry"),
        (
            {"tag": "x", "include": [{"class": "circle", "count": 1}, {"class": "square", "count": 1, "position": ["by", 0]}]},
            r"the position \['by', 0\] is not one of left of",
        ),
    ],
)
def test_rows_that_cannot_be_judged(row, message):
    rows = [{"prompt": "fine"} | {"tag": "x", "include": [{"class": "circle", "count": 1}]}, {"prompt": "bad"} | row]
    with pytest.raises(UserError, match=f"can't judge 1 of 2 prompts, the first of them 'bad': .*{message}"):
        load_rewards(parse_rewards(["geneval=shapes"]), CPU, rows)
    with pytest.raises(UserError, match=message):  # on a server rows are seen when they are scored
        load_geneval("shapes", CPU)(torch.zeros(2, 3, 32, 32), rows)


def test_what_cannot_be_loaded(tmp_path, yolos):
    (tmp_path / "config.json").write_text("{}")
    for text, message in {
        "geneval": "geneval needs a detector, written as",
        "geneval=nowhere": "there is no such folder; a detector is shapes, FILE.py:FUNCTION or a folder",
        f"geneval={QUESTIONS.parent}": "the folder has no config.json",
        f"geneval={tmp_path}": "can't be read as a detector",
        f"geneval={CLIP}": "can't be read as a detector",
        "geneval=shapes,weights=f": "which only a detector of your own",
        "geneval=shapes,batch=0": "batch and max_objects of 1 or more and side of 0 or more, not 0, 16, 0",
        f"geneval={yolos},clip=nowhere": "geneval,clip=nowhere: there is no such folder",
    }.items():
        with pytest.raises(UserError, match=message):
            load_rewards(parse_rewards([text]), CPU)
    rows = [{"prompt": "a red cat"} | RED_CAT]
    with pytest.raises(UserError, match="its colour needs clip=FOLDER, since the detector does not judge colours"):
        load_rewards(parse_rewards([f"geneval={yolos}"]), CPU, rows)
    with pytest.raises(UserError, match="geneval scores pictures"):
        load_geneval("shapes", CPU)(torch.zeros(1, 3, 5, 32, 32), rows)
