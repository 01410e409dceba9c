"""What the paper says of each of its figures and tables, and what stands for it on the tiny models: read by summary.py.

The arms are those of the bash scripts of the same names.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Panel:
    """A plot of training: the curve of a metric for each arm."""

    setting: str
    metric: str  # of metrics.jsonl
    arms: dict[str, str]  # arm -> its name in the legend
    title: str


@dataclass(frozen=True)
class Claim:
    """`metric` of `arm` is higher than that of `other` (an arm, or "base"), or differs by less than `alike`; see `Results.values`."""

    text: str
    setting: str
    metric: str
    arm: str
    other: str
    alike: float | None = None


@dataclass(frozen=True)
class Table:
    """The evaluation of arms on held-out prompts; `paper` has the paper's own numbers, a row an arm, in its own words."""

    setting: str
    rewards: tuple[str, ...]
    arms: dict[str, str]
    paper: str = ""


@dataclass(frozen=True)
class Grid:
    """What a method was tuned over: arms `grid_METHOD_VALUE` for each of its prefixes and each value, judged by `metric`."""

    setting: str
    metric: str
    methods: dict[str, str]  # prefix of the arms -> name
    values: tuple[str, ...]
    what: str


@dataclass(frozen=True)
class Experiment:
    title: str
    panels: tuple[Panel, ...] = ()
    tables: tuple[Table, ...] = ()
    grids: tuple[Grid, ...] = ()
    claims: tuple[Claim, ...] = ()


TASTE, CAPTION = "reward/aesthetic_mean", "reward/clip_mean"
PICTURES = ("aesthetic", "clip", "shapes", "geneval", "diversity.pixels")
TASTE_ARMS = {"taste": "taste", "taste_caption": "taste and caption"}
RATES = ("5e-5", "1e-4", "2e-4", "4e-4", "8e-4")
METHODS = {"grpo_": "GRPO", "ddpo_": "DDPO", "dpok_": "DPOK", "refl_": "ReFL", "dpo_": "online DPO"}

EXPERIMENTS = {
    "figure_1": Experiment(
        "Figure 1: reward curves of text-to-image models",
        panels=(
            Panel("sd", TASTE, TASTE_ARMS, "Stable Diffusion"),
            Panel("flux", TASTE, TASTE_ARMS, "FLUX"),
            Panel("hunyuan_image", TASTE, {"taste": "taste"}, "HunyuanVideo-T2I"),
        ),
        claims=(
            Claim("Stable Diffusion's HPS score rises (0.239 to 0.365)", "sd", "aesthetic", "taste", "base"),
            Claim("FLUX's HPS score rises (0.304 to 0.372)", "flux", "aesthetic", "taste", "base"),
            Claim("HunyuanVideo-T2I's HPS score rises (0.23 to 0.33)", "hunyuan_image", "aesthetic", "taste", "base"),
            Claim(
                "with the CLIP score as a second reward Stable Diffusion's HPS score ends lower",
                "sd",
                "aesthetic",
                "taste",
                "taste_caption",
            ),
            Claim("with the CLIP score as a second reward FLUX's HPS score ends lower", "flux", "aesthetic", "taste", "taste_caption"),
        ),
    ),
    "figure_2": Experiment(
        "Figure 2: reward curves of video models",
        panels=(
            Panel("hunyuan", "reward/visual_mean", {"visual_motion": "visual and motion"}, "HunyuanVideo, visual quality"),
            Panel("hunyuan", "reward/motion_mean", {"visual_motion": "visual and motion"}, "HunyuanVideo, motion quality"),
            Panel("skyreels", "reward/motion_mean", {"motion": "motion"}, "SkyReels-I2V, motion quality"),
        ),
        claims=(
            Claim("HunyuanVideo's visual quality rises (+56 %)", "hunyuan", "visual", "visual_motion", "base"),
            Claim("HunyuanVideo's motion quality rises (+181 %)", "hunyuan", "motion", "visual_motion", "base"),
            Claim("SkyReels-I2V's motion quality rises (+118 %)", "skyreels", "motion", "motion", "base"),
        ),
    ),
    "figure_3a": Experiment(
        "Figure 3 (a): binary rewards",
        panels=(
            Panel("sd", "reward/aesthetic.binary_mean", {"taste_binary": "taste above 0.65"}, "Stable Diffusion, taste"),
            Panel("sd", "reward/clip.binary_mean", {"caption_binary": "CLIP score above 0.75"}, "Stable Diffusion, caption"),
        ),
        claims=(
            Claim("a thresholded HPS score is learned", "sd", "aesthetic", "taste_binary", "base"),
            Claim("a thresholded CLIP score is learned", "sd", "clip", "caption_binary", "base"),
        ),
    ),
    "figure_3b": Experiment("Figure 3 (b): what people prefer"),
    "figure_4a": Experiment(
        "Figure 4 (a): best-of-N",
        panels=(Panel("sd", TASTE, {f"taste_16_of_{n}": f"16 of {n}" for n in (16, 64, 256)}, "Stable Diffusion"),),
        claims=(
            Claim("16 of 64 converges faster than 16 of 16", "sd", "aesthetic", "taste_16_of_64", "taste_16_of_16"),
            Claim("16 of 256 converges faster than 16 of 64", "sd", "aesthetic", "taste_16_of_256", "taste_16_of_64"),
        ),
    ),
    "figure_4b": Experiment(
        "Figure 4 (b): which transitions are trained",
        panels=(
            Panel(
                "hunyuan_image",
                TASTE,
                {
                    "first_30": "first 30 %",
                    "random_30": "random 30 %",
                    "last_40": "last 40 %",
                    "taste": "random 60 %",
                    "all_steps": "all",
                },
                "HunyuanVideo-T2I",
            ),
        ),
        claims=(
            Claim("the first 30 % do more than a random 30 %", "hunyuan_image", "end " + TASTE, "first_30", "random_30"),
            Claim("the first 30 % do more than the last 40 %", "hunyuan_image", "end " + TASTE, "first_30", "last_40"),
            Claim("all do more than the first 30 % alone", "hunyuan_image", "end " + TASTE, "all_steps", "first_30"),
            Claim("a random 60 % is as good as all", "hunyuan_image", "end " + TASTE, "taste", "all_steps", alike=0.05),
        ),
    ),
    "figure_4c": Experiment(
        "Figure 4 (c): how much noise",
        panels=(
            Panel(
                "flux",
                TASTE,
                {"taste": "0.7", "noise_less": "0.35", "noise_least": "0.15", "noise_decay": "0.7, decaying"},
                "FLUX",
            ),
        ),
        claims=(
            Claim("half the noise is worse", "flux", "end " + TASTE, "taste", "noise_less"),
            Claim("a fifth of the noise is worse still", "flux", "end " + TASTE, "noise_less", "noise_least"),
            Claim("a decay of the noise makes no difference", "flux", "end " + TASTE, "taste", "noise_decay", alike=0.05),
        ),
    ),
    "figure_5": Experiment(
        "Figure 5: DDPO on rectified flow",
        panels=(Panel("flux", TASTE, {"taste": "GRPO", "ddpo_taste": "DDPO"}, "FLUX"),),
        claims=(
            Claim("GRPO ends higher than DDPO", "flux", "end " + TASTE, "taste", "ddpo_taste"),
            Claim("DDPO diverges: its reward ends below the base model's", "flux", "aesthetic", "base", "ddpo_taste"),
        ),
    ),
    "figure_7": Experiment(
        "Figure 7: diversity before and after",
        tables=(Table("flux", ("diversity.pixels", "diversity.clip"), TASTE_ARMS),),
        claims=(Claim("after RLHF different seeds give more similar pictures", "flux", "diversity.pixels", "base", "taste"),),
    ),
    "figure_8": Experiment(
        "Figure 8: one noise for all samples of a prompt, or one each",
        panels=(
            Panel("hunyuan", "reward/visual_mean", {"visual_motion": "shared", "separate_noise": "separate"}, "visual quality"),
            Panel("hunyuan", "reward/motion_mean", {"visual_motion": "shared", "separate_noise": "separate"}, "motion quality"),
            Panel("hunyuan", "held_out/shapes_mean", {"visual_motion": "shared", "separate_noise": "separate"}, "caption, held out"),
        ),
        tables=(
            Table("hunyuan", ("visual", "motion", "shapes", "shapes_strict"), {"visual_motion": "shared", "separate_noise": "separate"}),
        ),
        claims=(
            Claim(
                "with separate noise the model hacks the reward: what is not rewarded suffers",
                "hunyuan",
                "shapes",
                "visual_motion",
                "separate_noise",
            ),
        ),
    ),
    "figure_9": Experiment(
        "Figure 9: taste alone, and taste with the caption",
        panels=(Panel("flux", "held_out/shapes_mean", TASTE_ARMS, "caption by the checker, held out"),),
        claims=(
            Claim("the HPS score alone makes pictures unnatural: here, they lose what the caption says", "flux", "shapes", "base", "taste"),
            Claim("the CLIP score beside it holds them", "flux", "shapes", "taste_caption", "taste"),
        ),
    ),
    "table_2": Experiment(
        "Table 2: Stable Diffusion",
        tables=(
            Table(
                "sd",
                PICTURES,
                TASTE_ARMS,
                "HPS-v2.1, CLIP score, Pick-a-Pic, GenEval: 0.239, 0.363, 0.202, 0.421 before; HPS alone 0.365, 0.380, 0.217, 0.521; "
                "HPS and CLIP 0.335, 0.395, 0.215, 0.522",
            ),
        ),
        claims=(
            Claim("HPS alone raises the CLIP score too", "sd", "clip", "taste", "base"),
            Claim("HPS alone raises GenEval too", "sd", "geneval", "taste", "base"),
            Claim("with the CLIP score beside it that is higher than with HPS alone", "sd", "clip", "taste_caption", "taste"),
        ),
    ),
    "table_3": Experiment(
        "Table 3: FLUX",
        tables=(
            Table(
                "flux",
                PICTURES,
                TASTE_ARMS,
                "HPS-v2.1, CLIP score, Pick-a-Pic, GenEval: 0.304, 0.405, 0.224, 0.659 before; HPS alone 0.372, 0.376, 0.230, 0.561; "
                "HPS and CLIP 0.343, 0.427, 0.228, 0.687",
            ),
        ),
        claims=(
            Claim("HPS alone lowers the CLIP score", "flux", "clip", "base", "taste"),
            Claim("HPS alone lowers GenEval", "flux", "geneval", "base", "taste"),
            Claim("with the CLIP score beside it GenEval rises", "flux", "geneval", "taste_caption", "base"),
            Claim("with the CLIP score beside it that rises", "flux", "clip", "taste_caption", "base"),
        ),
    ),
    "table_4": Experiment(
        "Table 4: methods, Stable Diffusion, one reward each",
        panels=(
            Panel("sd", TASTE, {f"{name}taste": method for name, method in METHODS.items()}, "taste"),
            Panel("sd", CAPTION, {f"{name}caption": method for name, method in METHODS.items()}, "caption"),
        ),
        tables=(
            Table(
                "sd",
                PICTURES,
                {f"{name}taste": f"{method}, taste" for name, method in METHODS.items()},
                "HPS-v2.1: base 0.239, GRPO 0.365, DDPO 0.297, ReFL 0.357, DPO 0.241",
            ),
            Table(
                "sd",
                PICTURES,
                {f"{name}caption": f"{method}, caption" for name, method in METHODS.items()},
                "CLIP score: base 0.363, GRPO 0.421, DDPO 0.381, ReFL 0.418, DPO 0.367",
            ),
        ),
        grids=tuple(
            Grid("sd", f"end {metric}", {f"{name}{arm}": method for name, method in METHODS.items()}, RATES, f"learning rate, {arm}")
            for arm, metric in (("taste", TASTE), ("caption", CAPTION))
        ),
        claims=tuple(
            Claim(f"GRPO is better than {METHODS[name]} by {reward}", "sd", metric, f"grpo_{arm}", f"{name}{arm}")
            for reward, metric, arm in (("the HPS score", "aesthetic", "taste"), ("the CLIP score", "clip", "caption"))
            for name in ("ddpo_", "refl_", "dpo_")
        ),
    ),
    "table_5": Experiment(
        "Table 5: HunyuanVideo",
        tables=(
            Table(
                "hunyuan",
                ("visual", "motion", "shapes", "shapes_strict"),
                {"visual_motion": "visual and motion"},
                "VQ, MQ, TA, VisionReward: 4.51, 1.37, 1.75, 0.124 before; 7.03, 3.85, 1.59, 0.128 after",
            ),
        ),
        claims=(
            Claim("visual quality rises", "hunyuan", "visual", "visual_motion", "base"),
            Claim("motion quality rises", "hunyuan", "motion", "visual_motion", "base"),
            Claim("text alignment, which is not trained, falls a little", "hunyuan", "shapes", "base", "visual_motion"),
        ),
    ),
}
