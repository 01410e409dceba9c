"""The shapes world in motion: its captions, clips, checkers, rewards and prompt files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastvideo.embeddings.prompts import read_prompts
from fastvideo.errors import UserError
from fastvideo.rewards import load_rewards, parse_rewards, score
from shapes import world
from shapes.checker import check, detect
from shapes.prompt_files import split_video
from shapes.video import FRAMES, GROWTH, MOTIONS, TRAVEL, VIDEO_SPECS, VideoSpec, caption, parse_video, render_clips, tracks
from shapes.video_checker import check_clips, fidelity, motion_quality, visual_quality
from shapes.world import RL_COLOURS, SHAPES, SIZE, render

SPECS = list(VIDEO_SPECS)
SOME = slice(None, None, 5)  # 15 of them, of every colour, shape and motion
PROMPTS = Path(__file__).resolve().parent.parent / "shapes" / "prompts"


def draw(frames: int = FRAMES, jitter: float = 0.0, specs: list[VideoSpec] = SPECS, seed: int = 0) -> np.ndarray:
    """A clip of each spec; the same seed gives the same places, shaken or not."""
    places = tracks(specs, frames, np.random.default_rng(seed), jitter)
    return render_clips(specs, places, np.random.default_rng(seed))


@pytest.fixture(scope="module")
def clean() -> np.ndarray:
    """One clean clip of each of `SPECS`: (72, 3, 9, 32, 32) in [0, 1]."""
    return draw()


# ------------------------------------------------------------------------------------------------------------ captions and clips


def test_captions_round_trip():
    captions = [caption(spec) for spec in SPECS]
    assert [parse_video(text) for text in captions] == SPECS
    assert len(set(captions)) == len(SPECS) == 4 * 3 * 6
    assert {"a red circle moving right", "a blue triangle bouncing", "a yellow square growing"} <= set(captions)
    assert parse_video("a cyan square moving up") == VideoSpec("cyan", "square", "moving up")


@pytest.mark.parametrize(
    "text", ["", "a red circle", "a red circle moving", "a pink circle bouncing", "two red circles growing", "a red circle growing."]
)
def test_text_outside_the_grammar_is_an_error_that_names_it(text):
    with pytest.raises(UserError, match="is not in the grammar of shapes in motion") as error:
        parse_video(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize("frames", [1, 5, 9, 13])
@pytest.mark.parametrize("jitter", [0.0, 2.0])
def test_objects_stay_inside(frames, jitter):
    places = tracks(SPECS * 5, frames, np.random.default_rng(1), jitter)
    assert places.shape == (360, frames, 3) and places.dtype == np.float32
    for spec, track in zip(SPECS * 5, places):
        side, up, down = np.array([world.extent(spec.shape, radius) for radius in track[:, 2]]).T
        x, y = track[:, 0], track[:, 1]
        assert min((x - side).min(), (y - up).min()) > 0.99 and max((x + side).max(), (y + down).max()) < SIZE - 0.99


@pytest.mark.parametrize("frames", [5, 9, 13])
def test_every_clip_goes_the_same_way_whatever_the_number_of_frames(frames):
    ends = {"moving left": (-TRAVEL, 0), "moving right": (TRAVEL, 0), "moving up": (0, -TRAVEL), "moving down": (0, TRAVEL)}
    for spec, track in zip(SPECS, tracks(SPECS, frames, np.random.default_rng(2))):
        moves = track - track[0]
        assert moves[-1, :2] == pytest.approx(ends.get(spec.motion, (0, 0)), abs=1e-4)
        assert track[-1, 2] / track[0, 2] == pytest.approx(GROWTH if spec.motion == "growing" else 1)
        steps = np.diff(track, axis=0)
        if spec.motion == "bouncing":
            assert moves[frames // 2] == pytest.approx([0, TRAVEL, 0], abs=1e-4)
            assert np.array_equal(np.sign(steps[:, 1]), [1] * (frames // 2) + [-1] * (frames // 2))
        else:
            assert np.allclose(steps, steps[0], atol=1e-4)


def test_jitter_is_in_pixels_and_may_differ_by_clip():
    specs = [VideoSpec("red", "circle", "growing")] * 400
    jitter = np.repeat([0.0, 0.4], 200)
    places = tracks(specs, FRAMES, np.random.default_rng(3), jitter)
    moved = (places - places.mean(1, keepdims=True))[:, :, :2]
    assert np.abs(moved[:200]).max() < 1e-4
    assert moved[200:].std() == pytest.approx(0.4 * np.sqrt(1 - 1 / FRAMES), rel=0.05)


def test_a_clip_has_one_background_and_one_tint(clean):
    assert clean.shape == (72, 3, FRAMES, SIZE, SIZE) and clean.dtype == np.float32 and clean.min() >= 0 and clean.max() <= 1
    assert (clean[:, :, :, 0, 0] == clean[:, :1, :1, 0, 0]).all()
    assert len(np.unique(clean[:, 0, 0, 0, 0])) == 72
    for clip, track in zip(clean, tracks(SPECS, FRAMES, np.random.default_rng(0))):
        x, y = track[:, :2].astype(int).T
        assert np.ptp(clip[:, np.arange(FRAMES), y, x], axis=1).max() == 0  # the object's centre has one colour in all frames


# -------------------------------------------------------------------------------------------------------------------- checkers


@pytest.mark.parametrize("frames", [5, 9, 13])
def test_clean_clips_score_high(frames):
    clips = draw(frames, seed=4)
    alignment, motion = check_clips(clips, SPECS), motion_quality(clips, SPECS)
    assert alignment["strict"].min() == 1 and alignment["soft"].min() > 0.9
    for name in MOTIONS:
        assert motion[[spec.motion == name for spec in SPECS]].mean() > 0.9, name
    assert motion.min() > 0.8
    assert visual_quality(clips).min() > 0.95
    assert fidelity(clips, clips[:, :, 0]) == pytest.approx(1, abs=1e-5)


def test_other_captions_are_not_accepted(clean):
    other_motions = [[SPECS[i - i % 6 + (i + shift) % 6] for i in range(72)] for shift in range(1, 6)]
    for specs in other_motions:
        alignment = check_clips(clean[SOME], specs[SOME])
        assert alignment["strict"].max() == 0 and alignment["soft"].max() < 0.75
        assert motion_quality(clean[SOME], specs[SOME]).max() < 0.05
    other_shapes, other_colours = ([SPECS[(i + shift) % 72] for i in range(72)] for shift in (6, 18))
    for specs in (other_shapes, other_colours):
        alignment = check_clips(clean[SOME], specs[SOME])
        assert alignment["strict"].max() == 0 and alignment["soft"].max() < 0.85
        assert np.array_equal(
            motion_quality(clean[SOME], specs[SOME]), motion_quality(clean[SOME], SPECS[SOME])
        )  # it reads the motion only


def test_jitter_lowers_motion_quality_step_by_step(clean):
    scores = [motion_quality(draw(jitter=jitter), SPECS) for jitter in (0, 0.25, 0.5, 1, 2, 4)]
    means = np.array([values.mean() for values in scores])
    assert (np.diff(means) < -0.04).all()
    assert means[0] > 0.95 and means[2] < 0.85 and means[3] < 0.6 and means[4] < 0.3
    assert check_clips(draw(jitter=1), SPECS)["strict"].mean() > 0.95  # shaky, and still what the caption says


def test_speed_counts():
    spec = VideoSpec("blue", "square", "moving right")
    places = tracks([spec], FRAMES, np.random.default_rng(5))
    scores = []
    for speed in (0, 0.25, 0.5, 0.75, 1, 1.5, 2):
        path = places.copy()
        path[:, :, 0] = 16 + (path[:, :, 0] - path[:, :, 0].mean()) * speed * 0.9
        scores.append(motion_quality(render_clips([spec], path, np.random.default_rng(5)), [spec]).item())
    assert (np.diff(scores[:5]) > 0.1).all() and scores[0] == pytest.approx(0, abs=1e-3)
    assert scores[4] > scores[5] > scores[6] > 0.3


def test_frozen_reversed_and_shuffled_clips_have_no_motion(clean):
    frozen = np.repeat(clean[:, :, :1], FRAMES, axis=2)
    assert motion_quality(frozen, SPECS).max() < 1e-3 and check_clips(frozen, SPECS)["strict"].max() == 0
    assert visual_quality(frozen).min() > 0.95  # well drawn all the same
    backwards = motion_quality(clean[:, :, ::-1], SPECS)
    bouncing = np.array([spec.motion == "bouncing" for spec in SPECS])
    assert backwards[~bouncing].max() == 0 and backwards[bouncing].min() > 0.9  # a bounce reads the same from both ends
    assert motion_quality(clean[:, :, [4, 0, 7, 2, 8, 5, 1, 6, 3]], SPECS).max() < 0.35


def test_a_lost_object_costs_motion_and_form(clean):
    clean, specs = clean[SOME], SPECS[SOME]
    blank = clean[:, :, :, :1, :1]
    scores = []
    for missing in (0, 1, 3, 5):
        lost = clean.copy()
        lost[:, :, FRAMES - missing :] = blank[:, :, FRAMES - missing :]
        scores.append([motion_quality(lost, specs).mean(), visual_quality(lost).mean(), check_clips(lost, specs)["soft"].mean()])
    assert (np.diff(scores, axis=0) < -0.04).all()
    assert scores[-1][0] < 0.1


def test_flicker_costs_visual_quality_and_alignment(clean):
    swap = dict(zip(RL_COLOURS, RL_COLOURS[1:] + RL_COLOURS[:1]))
    turn = dict(zip(SHAPES, SHAPES[1:] + SHAPES[:1]))
    colours = [VideoSpec(swap[spec.colour], spec.shape, spec.motion) for spec in SPECS]
    shapes = [VideoSpec(spec.colour, turn[spec.shape], spec.motion) for spec in SPECS]
    for others in (colours, shapes):
        flickering = clean.copy()
        flickering[:, :, ::2] = render_clips(others, tracks(SPECS, FRAMES, np.random.default_rng(0)), np.random.default_rng(0))[:, :, ::2]
        assert check_clips(flickering, SPECS)["strict"].max() == 0
        assert visual_quality(flickering).mean() < 0.3
    background = clean.copy()
    background[:, :, ::2] = np.clip(background[:, :, ::2] - 0.1, 0, 1)
    assert visual_quality(background).max() < 0.95 * visual_quality(clean).min()


def test_visual_quality_sees_grain_pallor_and_ragged_outlines(clean):
    clean = clean[SOME]
    rng = np.random.default_rng(6)
    grain = [visual_quality(np.clip(clean + rng.normal(0, size, clean.shape), 0, 1)).mean() for size in (0, 0.03, 0.06, 0.12)]
    assert (np.diff(grain) < -0.1).all()
    pale = 0.45 * clean + 0.55 * clean[:, :, :, :1, :1]
    assert visual_quality(pale).mean() < 0.9
    cut = clean.copy()
    objects = np.abs(clean - clean[:, :, :, :1, :1]).max(1) > 0.2
    cut[:, :, :, ::3] = np.where(objects[:, None, :, ::3], clean[:, :, :, :1, :1], clean[:, :, :, ::3])
    assert visual_quality(cut).max() < 0.3


def test_blank_and_noise_score_nothing():
    blank = np.full((4, 3, FRAMES, SIZE, SIZE), 0.9, np.float32)
    noise = np.random.default_rng(7).uniform(size=(16, 3, FRAMES, SIZE, SIZE)).astype(np.float32)
    for clips in (blank, noise):
        specs = SPECS[: len(clips)]
        alignment = check_clips(clips, specs)
        assert alignment["strict"].max() == 0 and alignment["soft"].max() < 0.35
        assert motion_quality(clips, specs).max() < 0.1
        assert visual_quality(clips).max() < 0.15
        assert fidelity(clips, draw(specs=specs)[:, :, 0]).max() < 0.05


def test_strict_alignment_allows_one_object_only_and_one_unrecognised_frame_in_eight():
    spec = [VideoSpec("red", "circle", "moving down")]
    for frames, accepted in ((5, 0), (9, 1)):
        clip = draw(frames, specs=spec)
        clip[:, :, 2] = clip[:, ::-1, 2]  # blue
        assert check_clips(clip, spec)["strict"] == accepted
    clip = draw(specs=spec)
    clip[:, :, 4, -6:, :5] = np.array(world.COLOURS["blue"])[:, None, None]
    assert check_clips(clip, spec)["strict"] == 0


def test_fidelity_is_low_for_another_image_and_for_a_clip_that_leaves_its_image(clean):
    first = clean[:, :, 0]
    elsewhere = draw(seed=8)[:, :, 0]  # the same objects in other places
    assert fidelity(clean, elsewhere).mean() < 0.15
    assert fidelity(clean, np.roll(first, 18, axis=0)).max() < 0.01  # another colour
    changed = np.roll(clean, 18, axis=0)
    changed[:, :, 0] = first
    assert fidelity(changed, first).max() < 0.1
    darker = clean.copy()
    darker[:, :, 1:] = np.clip(darker[:, :, 1:] - 0.1, 0, 1)
    assert 0.05 < fidelity(darker, first).mean() < 0.5
    shades = [fidelity(np.clip(clean[SOME] + error, 0, 1), first[SOME]).mean() for error in (0, 0.01, 0.03, 0.1)]
    assert (np.diff(shades) < -0.05).all()


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (2, 3, 1, 32, 32), (2, 3, 9, 32, 16), (2, 1, 9, 32, 32)])
def test_checkers_refuse_what_is_no_clip(shape):
    with pytest.raises(UserError, match=f"not {' x '.join(map(str, shape))}"):
        visual_quality(np.zeros(shape, np.float32))


# --------------------------------------------------------------------------------------------------------------------- rewards


def scores_of(names: list[str], media: torch.Tensor, rows: list[dict]) -> dict[str, torch.Tensor]:
    return score(load_rewards(parse_rewards(names), torch.device("cpu")), media, rows)


def test_rewards_take_clips_in_minus_one_to_one_and_rows(clean, tmp_path):
    names = ["shapes", "shapes_strict", "aesthetic", "motion", "visual", "fidelity"]
    rows = [{"prompt": caption(spec), "image": str(tmp_path / f"{i}.png")} for i, spec in enumerate(SPECS[:12])]
    for row, clip in zip(rows, clean):
        Image.fromarray((clip[:, 0].transpose(1, 2, 0) * 255).round().astype(np.uint8)).save(row["image"])
    scores = scores_of(names, torch.from_numpy(clean[:12]) * 2 - 1, rows)
    assert {name: values.shape for name, values in scores.items()} == dict.fromkeys(names, (12,))
    assert scores["shapes_strict"].min() == 1 and scores["shapes"].min() > 0.9
    assert scores["motion"].min() > 0.8 and scores["visual"].min() > 0.95 and scores["fidelity"].min() > 0.95
    frame_by_frame = [scores_of(["aesthetic"], torch.from_numpy(clean[:12, :, i]) * 2 - 1, rows)["aesthetic"] for i in range(FRAMES)]
    assert torch.allclose(scores["aesthetic"], torch.stack(frame_by_frame).mean(0), atol=1e-6)


def test_a_clip_of_one_frame_is_judged_as_a_picture():
    specs = world.all_specs()[:8]
    pictures = torch.from_numpy(render(specs, np.random.default_rng(9))) * 2 - 1
    rows = [{"prompt": world.caption(spec)} for spec in specs]
    names = ["shapes", "shapes_strict", "aesthetic"]
    of_pictures, of_clips = (scores_of(names, media, rows) for media in (pictures, pictures[:, :, None]))
    assert of_clips["shapes_strict"].tolist() == [1] * 8
    assert all(torch.equal(of_pictures[name], of_clips[name]) for name in names)


@pytest.mark.parametrize(
    ("name", "shape", "row", "message"),
    [
        ("motion", (1, 3, 32, 32), {}, "motion judges clips, .*, not pictures of 1 x 3 x 32 x 32"),
        ("visual", (1, 3, 32, 32), {}, "visual judges clips, .*, not pictures of 1 x 3 x 32 x 32"),
        ("fidelity", (1, 3, 32, 32), {"image": "good.png"}, "fidelity judges clips, .*, not pictures of 1 x 3 x 32 x 32"),
        ("motion", (1, 3, 9, 64, 64), {}, "with at least 2 frames, not 1 x 3 x 9 x 64 x 64"),
        ("shapes", (1, 3, 9, 64, 64), {}, "with at least 2 frames, not 1 x 3 x 9 x 64 x 64"),
        ("motion", (1, 3, 1, 32, 32), {}, "with at least 2 frames, not 1 x 3 x 1 x 32 x 32"),
        ("aesthetic", (1, 3, 9, 64, 64), {}, "pictures of 3 x 32 x 32, not 3 x 64 x 64"),
        ("motion", (1, 3, 9, 32, 32), {"prompt": "a red circle"}, "'a red circle' is not in the grammar of shapes in motion"),
        ("shapes", (1, 3, 9, 32, 32), {"prompt": "a red circle"}, "'a red circle' is not in the grammar of shapes in motion"),
        ("fidelity", (1, 3, 9, 32, 32), {}, "the prompt 'a red circle growing' has no \"image\" to compare with"),
        ("fidelity", (1, 3, 9, 32, 32), {"image": "nowhere.png"}, "the image .*nowhere.png cannot be read: .*No such file"),
        ("fidelity", (1, 3, 9, 32, 32), {"image": "broken.png"}, "the image .*broken.png cannot be read: "),
        ("fidelity", (1, 3, 9, 32, 32), {"image": "large.png"}, "the image .*large.png has 64 x 48 pixels, not 32 x 32"),
    ],
)
def test_rewards_name_wrong_inputs(tmp_path, name, shape, row, message):
    Image.new("RGB", (32, 32)).save(tmp_path / "good.png")
    Image.new("RGB", (64, 48)).save(tmp_path / "large.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "large.png").read_bytes()[:60])
    row = {"prompt": "a red circle growing"} | row
    if "image" in row:
        row["image"] = str(tmp_path / row["image"])
    with pytest.raises(UserError, match=message) as error:
        scores_of([name], torch.zeros(shape), [row])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["motion", "visual", "fidelity"])
def test_rewards_take_no_path(name):
    with pytest.raises(UserError, match=f"{name} takes no path, but was given {name}=somewhere"):
        load_rewards(parse_rewards([f"{name}=somewhere"]), torch.device("cpu"))


# ---------------------------------------------------------------------------------------------------------------- prompt files


def test_prompt_files_split_all_captions():
    train, heldout = split_video()
    for name, specs in (("train", train), ("heldout", heldout)):
        assert (PROMPTS / f"video_{name}.txt").read_text().splitlines() == [caption(spec) for spec in specs]
        assert {spec.colour for spec in specs} == set(RL_COLOURS)
        assert {spec.shape for spec in specs} == set(SHAPES) and {spec.motion for spec in specs} == set(MOTIONS)
    assert (len(train), len(heldout)) == (48, 24)
    assert sorted(map(caption, train + heldout)) == sorted(map(caption, SPECS))


@pytest.mark.parametrize(("name", "images_each"), [("train", 2), ("heldout", 1)])
def test_image_prompts_show_what_moves_and_leave_it_room(name, images_each):
    rows, report = read_prompts(PROMPTS / f"i2v_{name}.jsonl", identity=("prompt", "image"))
    captions = (PROMPTS / f"video_{name}.txt").read_text().splitlines()
    assert [row["prompt"] for row in rows] == [text for text in captions for _ in range(images_each)]
    assert report["duplicates"] == report["empty"] == [] and len({row["image"] for row in rows}) == len(rows)
    images = np.stack([np.asarray(Image.open(row["image"]), np.float32).transpose(2, 0, 1) / 255 for row in rows])
    specs = [parse_video(row["prompt"]) for row in rows]
    pictured = [world.Spec(((spec.colour, spec.shape),)) for spec in specs]
    assert check(images, pictured)["strict"].min() == 1
    for spec, [found] in zip(specs, detect(images)):
        room = {"moving left": found.x, "moving right": SIZE - found.x, "moving up": found.y}
        room |= dict.fromkeys(("moving down", "bouncing"), SIZE - found.y)
        assert room.get(spec.motion, SIZE) > TRAVEL + 3
