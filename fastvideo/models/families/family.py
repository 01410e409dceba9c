"""What a model is, once for all that ask: which classes and files, what is cached, how its pipeline is called, how large it is."""

from dataclasses import dataclass, field
from typing import Literal

Use = Literal["training", "embedding", "evaluation"]


@dataclass(frozen=True)
class Part:
    """A network: its class in diffusers or transformers, and the settings of a config.json that are not the class's defaults.

    published: of the real model, as its config.json has them. tiny: for pictures of 32 px; a text encoder's vocabulary is its tokenizer's.
    tokenizer: of a tiny text encoder, a folder in shapes/models.
    """

    class_name: str
    published: dict
    tiny: dict
    tokenizer: str | None = None


@dataclass(frozen=True)
class Size:
    """What is trained at full size: shapes of one sample's latents and media, and flags of the script that are not its defaults."""

    latents: tuple[int, ...]
    media: tuple[int, ...]
    flags: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """The facts of a model that is trained by train_grpo_NAME.py.

    title: in docs/models.md. pipeline: class in diffusers. scheduler: class and settings of the folder's.
    sampling: the settings of a run that change its samples, by the name of their flag: what the pipeline's call names them (None: it has no
    such argument), and training's default (None: the sample_size of the VAE).
    cached: shapes of a prompt's embeddings, as published. parameters: of the published network. full_size: by the names of the benchmarks.
    parallelize: the module of fastvideo/parallel/networks that shares a sample's tokens; None: they are not shared.
    length_limit: the tokenizer whose model_max_length bounds max_sequence_length. text_before: tokens in front of those that it counts.
    channels: how many of the VAE's latents the network is given, as a factor. packed: it predicts as many, 2 x 2 latents as one token.
    from_images: a prompt has a first frame.
    """

    title: str
    pipeline: str
    network: Part
    vae: Part
    text_encoders: tuple[Part, ...]
    scheduler: tuple[str, dict]
    sampling: dict[str, tuple[str | None, float | None]]
    cached: dict[str, tuple[int, ...]]
    parameters: int
    full_size: dict[str, Size]
    parallelize: str | None = None
    length_limit: str = "tokenizer"
    text_before: int = 0
    channels: int = 1
    packed: bool = False
    from_images: bool = False

    @property
    def network_folder(self) -> str:
        return "unet" if self.network.class_name.startswith("UNet") else "transformer"

    @property
    def encoders(self) -> dict[str, Part]:
        """Folder -> text encoder; that of its tokenizer has the same number."""
        return {f"text_encoder{f'_{i}' * (i > 1)}": part for i, part in enumerate(self.text_encoders, 1)}

    def parts(self, use: Use) -> dict[str, str | None]:
        """Folder -> class of its weights, or None: tokenizers and the scheduler, which is settings alone."""
        encoders = {name: part.class_name for name, part in self.encoders.items()}
        text = encoders | {name.replace("text_encoder", "tokenizer"): None for name in encoders} | {"scheduler": None}
        networks = {self.network_folder: self.network.class_name, "vae": self.vae.class_name}
        if use == "evaluation":
            return networks | text
        if use == "embedding":
            return text | ({"vae": self.vae.class_name} if self.from_images else {})
        return networks | ({"scheduler": None} if self.network_folder == "unet" else {})
