"""The OCR reward: what it asks for, how it compares, and what it reads in drawn text (DejaVu fonts, from inside matplotlib)."""

import functools
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import MODEL, REPOSITORY, SMALL_RUN, metrics_of, run_script
from PIL import Image, ImageDraw, ImageFont

from fastvideo.errors import UserError
from fastvideo.rewards import load_rewards, parse_rewards, score
from fastvideo.rewards.ocr import check_rows, edit_distance, in_reading_order, load_ocr, normalise, quoted_text, similarity

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
CPU = torch.device("cpu")

# ------------------------------------------------------------------------------------------------- what is asked for and compared


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('a sign that says "OPEN"', "OPEN"),
        ("a sign that says 'Don't walk'", "Don't walk"),
        ("Bob's dogs' bowl, it says 'Rex'", "Rex"),
        ("a “Happy Birthday” banner", "Happy Birthday"),
        ("ein Schild „Eingang“", "Eingang"),
        ("une enseigne «Café»", "Café"),
        ("a mug with ‘it’s ok’ on it", "it's ok"),  # noqa: RUF001
        ('"Salt" on one jar and "Pepper" on Ann\'s', "Salt Pepper"),
        ("a poster \"Rock 'n' Roll\"", "Rock 'n' Roll"),
        ('a 12" pizza and a 14" one, "HOT"', "HOT"),  # inches
        ('a 32 " screen that says "LIVE", 20 " high', "LIVE"),
        ("a 32” screen that says “LIVE”, 20” high", "LIVE"),
        ('"24" on a 5\'10" board, "Route 66" on the other', "24 Route 66"),
        ('number 7 "Ann" and number 8"', "Ann"),
        ("le numéro 5 « Café 21 »", " Café 21 "),
        ('a sign " OPEN "', " OPEN "),
        ('写着"开门"的牌子', "开门"),
        ('he said "hello, and a sign "OPEN"', "OPEN"),  # unpaired
        ('an empty "" sign and one that says "OPEN"', "OPEN"),
        ("a 6' man with 'Rex' on his shirt", "Rex"),
    ],
)
def test_text_in_quotes(prompt, text):
    assert quoted_text(prompt) == text


@pytest.mark.parametrize(
    "prompt",
    [
        "a red circle",
        "Bob's dog and Ann's cat",
        'an empty "" sign',
        'a blank " " sign',
        'an unpaired "mark',
        'a 12" pizza',
        'a 12" pizza and a 14" one',
        "a 12” pizza and a 14” one",
        'boards of 12 " by 14 " size',
        "a 6' man and a 5'10\" one, 5'4\" apart",
    ],
)
def test_prompts_without_quoted_text_are_errors_that_name_the_first(prompt):
    rows = [{"prompt": 'it says "OPEN"'}, {"prompt": prompt}, {"prompt": "a blue square"}]
    with pytest.raises(UserError, match="but 2 of 3 prompts have none, the first of them") as error:
        check_rows(rows)
    assert str(error.value).endswith(repr(prompt))
    check_rows(rows[:1])


def test_normalisation():
    assert normalise(" Hello,\n WORLD ") == "hello,world"
    assert normalise("Café ﬁne ＡＢ！ Straße") == "cafefineab!strasse"  # noqa: RUF001
    assert normalise("“it’s” – ok") == '"it\'s"-ok'  # noqa: RUF001


def test_edit_distance_is_the_recursive_one():
    @functools.cache
    def expected(one: str, other: str) -> int:
        if not one or not other:
            return len(one) + len(other)
        keep = expected(one[1:], other[1:]) + (one[0] != other[0])
        return min(keep, expected(one[1:], other) + 1, expected(one, other[1:]) + 1)

    rng = np.random.default_rng(0)
    words = ["", "kitten", "sitting", *("".join(rng.choice(list("abc"), rng.integers(1, 9))) for _ in range(40))]
    for one in words:
        for other in words:
            assert edit_distance(one, other) == expected(one, other)
    assert edit_distance("kitten", "sitting") == 3


def test_similarity():
    assert similarity("Open now", "OPENNOW") == 1
    assert similarity("open", "0pen") == 0.75
    assert similarity("open", "open open") == 0.5  # more than was asked for costs, too
    assert similarity("open", "xyz") == 0
    assert similarity("open", "") == similarity("", "") == 0


def box(left, top, right, bottom, text):
    return [[[left, top], [right, top], [right, bottom], [left, bottom]], text, 0.9]


def test_reading_order():
    first = [box(300, 40, 500, 130, "TALL"), box(50, 75, 200, 110, "on"), box(220, 60, 290, 115, "a")]  # tops far apart, yet one line
    second = [box(40, 125, 300, 190, "next"), box(320, 120, 500, 190, "line")]
    assert in_reading_order([second[1], first[0], second[0], first[2], first[1]]) == "on a TALL next line"
    assert in_reading_order([]) == ""


# ------------------------------------------------------------------------------------------------------------------ drawn text

# fmt: off
WORDS = [
    "open", "closed", "coffee", "tea", "bread", "fresh", "fish", "market", "street", "exit", "library", "radio", "hotel", "music",
    "night", "summer", "24", "1984", "happy", "birthday", "welcome", "home", "thank", "you", "good", "morning", "stop", "sale",
]
# fmt: on
COLOURS = [("black", "white"), ("white", "black"), ("navy", "khaki"), ("yellow", "darkred"), ("red", "white"), ("white", "royalblue")]
FACES = ["DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSansMono.ttf"]


def draw(text: str, side: int = 128, size: int = 28, face: str = FACES[0], colours: tuple[str, str] = COLOURS[0]) -> Image.Image:
    """`text` in the middle of a square, its letters of `size` pixels or what fits."""
    image = Image.new("RGB", (side, side), colours[1])
    canvas = ImageDraw.Draw(image)
    while True:
        font = ImageFont.truetype(str(FONTS / face), size)
        left, top, right, bottom = canvas.multiline_textbbox((0, 0), text, font=font)
        if max(right - left, bottom - top) < 0.92 * side:
            break
        size -= 1
    canvas.multiline_text((side / 2, side / 2), text, fill=colours[0], font=font, anchor="mm", align="center", spacing=size // 3)
    return image


def to_media(images: list[Image.Image]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.array(image) for image in images])).permute(0, 3, 1, 2).float() / 127.5 - 1


def drawn_samples(count: int, side: int) -> tuple[torch.Tensor, list[dict]]:
    """Pictures of one to three words in one or two lines, of letters of side / 10 to side / 4 or what fits, and their prompts."""
    rng = np.random.default_rng(0)
    images, rows = [], []
    for _ in range(count):
        words = [[word, word.upper(), word.title()][rng.integers(3)] for word in rng.choice(WORDS, rng.integers(1, 4), replace=False)]
        broken = rng.integers(1, len(words) + 1)  # where the second line begins, if there is one
        text = "\n".join(filter(None, [" ".join(words[:broken]), " ".join(words[broken:])]))
        size = int(side * rng.uniform(0.1, 0.25))
        images.append(draw(text, side, size, FACES[rng.integers(len(FACES))], COLOURS[rng.integers(len(COLOURS))]))
        rows.append({"prompt": f'a sign that says "{" ".join(words)}"'})
    return to_media(images), rows


def spoil(media: torch.Tensor, noise: float) -> torch.Tensor:
    """Blurred by half, and noise of this standard deviation (pixels are in [-1, 1])."""
    blurred = F.interpolate(F.avg_pool2d(media, 2), scale_factor=2, mode="bilinear")
    return blurred + noise * torch.randn(media.shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def reward():
    return load_ocr(None, CPU, threads=2)


def scores_of_all_kinds(reward, count: int, side: int, noise: float) -> dict[str, torch.Tensor]:
    media, rows = drawn_samples(count, side)
    return {
        "clean": reward(media, rows),
        "noisy": reward(spoil(media, noise), rows),
        "wrong": reward(media, rows[1:] + rows[:1]),
        "empty": reward(torch.full_like(media, 0.5), rows),
    }


def check_order(scores: dict[str, torch.Tensor]) -> None:
    print({kind: f"mean {values.mean():.3f}, {(values == 1).float().mean():.0%} are 1" for kind, values in scores.items()})
    clean, noisy, wrong, empty = scores.values()
    assert (clean == 1).float().mean() >= 0.95 and clean.mean() >= 0.99
    assert (noisy <= clean).all()
    assert 0.35 < noisy.mean() < 0.9
    assert wrong.mean() < 0.25 and (wrong < clean).all()
    assert wrong.mean() > 0 and (empty == 0).all()


def test_clean_above_noisy_above_wrong_above_empty(reward):
    check_order(scores_of_all_kinds(reward, 50, 128, 0.3))


@pytest.mark.slow
@pytest.mark.parametrize(("side", "noise"), [(192, 0.6), (256, 0.9)])  # larger letters bear more
def test_the_same_of_more_and_larger_pictures(reward, side, noise):
    check_order(scores_of_all_kinds(reward, 100, side, noise))


def test_a_missing_letter_costs_its_share(reward):
    media = to_media([draw(text) for text in ("OPEN", "OPE", "OPEN\nNOW", "SHUT")])
    assert reward(media, [{"prompt": 'it says "open"'}] * 4).tolist() == pytest.approx([1, 3 / 4, 4 / 7, 0])


def test_threads_batches_dtypes_and_values_beyond_white_do_not_matter(reward):
    media, rows = to_media([draw(text, 64, 20) for text in ("OPEN", "SHUT", "OPEL")]), [{"prompt": '"OPEN"'}] * 3
    one_reader = load_ocr(None, CPU)
    one_by_one = torch.cat([one_reader(media[i : i + 1], rows[i : i + 1]) for i in range(3)])
    assert one_by_one.tolist() == [1, 0, 0.75]
    assert torch.equal(reward(media, rows), one_by_one)
    assert torch.equal(reward(media.double(), rows), one_by_one)
    assert not reward(1.5 - media / 2, rows).any()  # letters of 2 on a ground of 1, which is as white: values are clipped


def test_colours_are_in_the_readers_order(reward):
    """It takes blue, green, red, and in the other order sees nothing here."""
    media = to_media([draw("OPEN", 64, 16, colours=("#b89881", "#56c264"))])
    assert reward(media, [{"prompt": '"OPEN"'}]) == 1
    assert reward(media.flip(1), [{"prompt": '"OPEN"'}]) == 0


def test_a_clip_has_the_mean_of_its_frames(reward):
    rows = [{"prompt": '"EXIT"'}, {"prompt": '"STOP"'}]
    exit_sign, blank = to_media([draw("EXIT", 64, 20)])[0], torch.ones(3, 64, 64)
    clips = torch.stack([torch.stack([exit_sign, blank, blank, blank, exit_sign], 1), torch.stack([exit_sign] * 5, 1)])
    assert load_ocr(None, CPU, frames=3)(clips, rows)[0] == pytest.approx(2 / 3)  # the first, the middle and the last
    assert reward(clips, rows)[0] == pytest.approx(2 / 4)
    assert reward(clips[:, :, :3], rows)[0] == pytest.approx(1 / 3)  # fewer than it would take
    still = reward(clips[:, :, :1], rows)
    assert torch.equal(still, reward(clips[:, :, 0], rows)) and still[1] < 0.5


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (16, 200), (200, 16), (33, 47)])
def test_pictures_of_any_size_have_a_score(reward, size):
    media = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    scores = reward(media, [{"prompt": '"A"'}] * 2)
    assert scores.shape == (2,) and ((scores >= 0) & (scores <= 1)).all()


# ------------------------------------------------------------------------------------------------------------------- refusals


def test_wrong_options_are_errors():
    with pytest.raises(UserError, match="ocr takes no path, but was given ocr=model"):
        load_ocr("model", CPU)
    with pytest.raises(UserError, match="frames=0"):
        load_ocr(None, CPU, frames=0)
    with pytest.raises(UserError, match="threads=-1"):
        load_ocr(None, CPU, threads=-1)


def test_a_missing_package_is_an_error_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", None)
    with pytest.raises(UserError, match=r"pip install --no-deps -r requirements-ocr\.txt"):
        load_ocr(None, CPU)


def test_by_its_name_on_the_command_line():
    rewards = load_rewards(parse_rewards(["ocr,frames=2,threads=2@0.9"]), CPU)
    media = to_media([draw("STOP", 64, 20)] * 2)
    assert score(rewards, media, [{"prompt": '"Stop"'}, {"prompt": '"Stork"'}])["ocr"].tolist() == [1, 0]
    with pytest.raises(UserError, match=r"reward 'ocr' failed: .* 1 of 2 prompts .* 'a red circle'"):
        score(rewards, media, [{"prompt": '"Stop"'}, {"prompt": "a red circle"}])
    with pytest.raises(UserError, match="1 of 9 prompts have none, the first of them 'a red circle'"):  # before the first iteration
        load_rewards(parse_rewards(["ocr@0.9"]), CPU, [{"prompt": '"Stop"'}] * 8 + [{"prompt": "a red circle"}])
    media[1, 0, 5, 5] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        score(rewards, media, [{"prompt": '"Stop"'}] * 2)


# ------------------------------------------------------------------------------------------------------------------- training

# The tiny FLUX knows no letters. This driver paints the beginning of a word over its pictures, how much of it depends on their brightness.
PAINTED = f"""
import sys

import torch
import train_grpo_flux
from fastvideo.parallel import distributed

sys.path.insert(0, {str(REPOSITORY / "tests")!r})
from test_ocr_reward import draw, to_media

decode = train_grpo_flux.decode

def decode_and_paint(*arguments):
    media = decode(*arguments)
    words = ["OPEN"[: int(brightness * 1000) % 5] for brightness in media.mean((1, 2, 3))]
    return torch.minimum(media, to_media([draw(word, 64, 20) for word in words]))

train_grpo_flux.decode = decode_and_paint
distributed.run(train_grpo_flux.main)
"""


@pytest.fixture(scope="module")
def quoted_cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ocr")
    (folder / "prompts.txt").write_text('a red circle that says "OPEN"\na blue square that says "open"\n')
    flags = {"--model": MODEL, "--prompts": folder / "prompts.txt", "--output_dir": folder / "cache"}
    result = run_script(REPOSITORY / "preprocess" / "embed_flux.py", flags, log=folder / "embed")
    assert result.returncode == 0, result.stderr
    return folder / "cache"


@pytest.mark.parametrize("painted", [False, True])
def test_training(quoted_cache, tmp_path, painted):
    script = REPOSITORY / "train_grpo_flux.py"
    if painted:
        script = tmp_path / "painted.py"
        script.write_text(PAINTED)
    size = {"--height": 64, "--width": 64, "--rewards": "ocr", "--iterations": 2, "--micro_batch_size": 8}
    flags = SMALL_RUN | size | {"--model": MODEL, "--embeddings": quoted_cache, "--output_dir": tmp_path / "run"}
    result = run_script(script, flags, log=tmp_path / "train")
    assert result.returncode == 0, result.stderr
    rows = metrics_of(tmp_path / "run")
    assert len(rows) == 2 and all(np.isfinite(value) for row in rows for value in row.values())
    if painted:  # what is read reaches the loss
        assert all(0 < row["reward/ocr_mean"] < 1 and row["reward/zero_std_frac"] < 1 and row["policy/grad_norm"] > 0 for row in rows)
    else:  # no text, no reward, nothing learned, and that is counted
        assert all(row["reward/ocr_mean"] == 0 and row["reward/zero_std_frac"] == 1 and row["policy/grad_norm"] == 0 for row in rows)
