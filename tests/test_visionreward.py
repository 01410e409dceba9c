"""examples/visionreward.py: a weighted sum of answers, in one process and by a server, on tiny random models that transformers can make."""

import json
import math
import socket
import time

import pytest
import torch
import torch.nn.functional as F
from conftest import FORK_SERVER, REPOSITORY, flag_list, run_in_fork, start_fork_server
from PIL import Image

from fastvideo.errors import UserError
from fastvideo.evaluation.benchmarks import parse_benchmark
from fastvideo.rewards import load_rewards, parse_rewards, score
from fastvideo.rewards.plugins import load_function

CPU = torch.device("cpu")
EXAMPLE = REPOSITORY / "examples" / "visionreward.py"
QUESTIONS = 'Does the video meet the requirements stated in the text "[[prompt]]"?\nIs it blue?\nIs the motion smooth?'
WEIGHTS = [0.5, 0.125, 2.0]
ROWS = [{"prompt": "a red circle moving right"}, {"prompt": "a blue square"}]
CHAT = (
    "{% for message in messages %}USER: {% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
load = load_function(str(EXAMPLE), "visionreward")
helpers = load.__globals__


def clips(frames: int = 53) -> torch.Tensor:
    return torch.rand(2, 3, frames, 40, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def small_tokenizer(words: str):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<image>", "<pad>", "<s>"]
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([f"{words} yes Yes no No"] * 2, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", extra_special_tokens=["<image>"])


def scatter(model: torch.nn.Module) -> torch.nn.Module:
    """Random weights that answer differently to different pictures and questions."""
    torch.manual_seed(0)
    for name, weights in model.named_parameters():
        torch.nn.init.normal_(weights, mean=float("norm" in name and "weight" in name), std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A folder of transformers' LLaVA, which shows pictures of 28 x 28 as 4 tokens, beside the questions and their weights."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = tmp_path_factory.mktemp("llava")
    tokenizer = small_tokenizer(QUESTIONS)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14, projection_dim=16
    )
    text = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=len(tokenizer))
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<image>"))
    scatter(LlavaForConditionalGeneration(config)).save_pretrained(folder)
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    )
    processor.save_pretrained(folder)
    (folder / "questions.txt").write_text(QUESTIONS)
    (folder / "weight.json").write_text(json.dumps(WEIGHTS))
    return folder


def by_hand(folder, clip: torch.Tensor, prompt: str, frames: tuple[int, ...]) -> float:
    """The weighted mean of softmax probabilities of the first word that `generate` would say, question by question."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model, processor = LlavaForConditionalGeneration.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    pictures = [Image.fromarray(((clip[:, i] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()) for i in frames]
    asked = [
        f'Does the video meet the requirements stated in the text "{prompt}"?\n',
        "Is it blue?\n",
        "Is the motion smooth?",
    ]
    total = 0.0
    for question, weight in zip(asked, WEIGHTS, strict=True):
        inputs = processor(images=pictures, text=f"USER: {'<image>' * len(pictures)}{question} ASSISTANT:", return_tensors="pt")
        said = model.generate(**inputs, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True)
        said = said.logits[0][0].double().softmax(0)
        yes, no = (
            sum(said[processor.tokenizer.convert_tokens_to_ids(word)].item() for word in words) for words in (("yes", "Yes"), ("no", "No"))
        )
        total += weight * yes / (yes + no)
    return total / 3


def reward_of(folder, *options: str) -> str:
    return f"{EXAMPLE}:visionreward={folder}," + ",".join([f"questions={folder}/questions.txt", f"weights={folder}/weight.json", *options])


def test_the_weighted_sum(llava):
    media = clips()
    (reward,) = load_rewards(parse_rewards([reward_of(llava)]), CPU, ROWS).values()
    found = score({"visionreward": reward}, media, ROWS)["visionreward"].tolist()
    expected = [by_hand(llava, clip, row["prompt"], (0, 24, 48)) for clip, row in zip(media, ROWS)]
    assert found == pytest.approx(expected, abs=1e-5)
    other = score({"visionreward": reward}, media, ROWS[::-1])["visionreward"].tolist()
    assert abs(found[0] - found[1]) > 1e-3 and abs(found[0] - other[0]) > 1e-3  # clip and prompt matter


def test_by_a_server_as_the_benchmark_asks_it(llava, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_fork_server()
    words = flag_list({"--rewards": reward_of(llava), "--port": port})
    script = REPOSITORY / "fastvideo" / "rewards" / "server.py"
    process = FORK_SERVER.Process(target=run_in_fork, args=(str(script), words, {}, str(tmp_path / "log")))
    process.start()
    try:
        deadline = time.monotonic() + 120
        while "scoring visionreward" not in ((tmp_path / "log.stdout").read_text() if (tmp_path / "log.stdout").exists() else ""):
            assert process.exitcode is None and time.monotonic() < deadline, (tmp_path / "log.stderr").read_text()
            time.sleep(0.05)
        (tmp_path / "prompts.txt").write_text("".join(row["prompt"] + "\n" for row in ROWS))
        benchmark = parse_benchmark(f"visionreward={tmp_path}/prompts.txt,server=http://127.0.0.1:{port}")
        assert benchmark.rows == ROWS
        rewards = load_rewards(parse_rewards(benchmark.rewards), CPU, benchmark.rows)
        served = score(rewards, clips(), benchmark.rows)["http.visionreward"]
    finally:
        process.kill()
        process.join()
    (reward,) = load_rewards(parse_rewards([reward_of(llava)]), CPU).values()
    assert torch.equal(served, reward(clips(), ROWS).float())


@pytest.mark.parametrize(
    ("frames", "fps", "expected"),
    [
        (53, 24, [0, 24, 48]),
        (33, 16, [0, 16, 32]),
        (9, 24, [0]),
        (1, 24, [0]),
        (49, 8, [0, 8, 16, 24, 32, 40, 48]),
        (
            20,
            2.5,
            [0, 2, 5, 7, 10, 12, 15, 17, 19],
        ),  # 7.6 s are rounded up; halves go to the earlier frame, the last second has the last frame
        (1000, 24, [24 * second for second in range(24)]),
    ],
)
def test_a_frame_of_each_second(frames, fps, expected):
    assert helpers["frames_of_seconds"](frames, fps) == expected


# --------------------------------------------------------------------------------------------------- the published model's interface

REMOTE = '''
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class SmallConfig(PretrainedConfig):
    model_type = "small_cogvlm2"

    def __init__(self, vocab_size=400, **others):
        self.vocab_size = vocab_size
        super().__init__(**others)


class SmallModel(PreTrainedModel):
    """Logits are the video's mean and the question's length, times weights of each token."""

    config_class = SmallConfig

    def __init__(self, config):
        super().__init__(config)
        self.head = torch.nn.Linear(2, config.vocab_size)
        self.post_init()

    def build_conversation_input_ids(self, tokenizer, *, query, history, images, template_version):
        assert template_version == "chat" and history == [] and len(images) == 1
        (video,) = images
        assert video.dtype == torch.uint8 and video.ndim == 4 and video.shape[0] == 3
        ids = torch.tensor(tokenizer.encode(query))
        return {
            "input_ids": ids,
            "token_type_ids": torch.zeros_like(ids),
            "attention_mask": torch.ones_like(ids),
            "images": [video.float() / 255],
        }

    def forward(self, input_ids, token_type_ids, attention_mask, images):
        assert input_ids.shape == token_type_ids.shape == attention_mask.shape and len(input_ids) == 1
        facts = torch.stack([images[0][0].mean(), torch.tensor(input_ids.shape[1] / 50)])
        return CausalLMOutput(logits=self.head(facts).expand(1, input_ids.shape[1], -1))
'''


def test_the_published_models_own_code_is_called_as_released(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = tmp_path / "model"
    folder.mkdir()
    tokenizer = small_tokenizer(QUESTIONS)
    tokenizer.save_pretrained(folder)
    (folder / "modeling_small.py").write_text(REMOTE)
    auto = {"AutoConfig": "modeling_small.SmallConfig", "AutoModelForCausalLM": "modeling_small.SmallModel"}
    (folder / "config.json").write_text(json.dumps({"model_type": "small_cogvlm2", "vocab_size": len(tokenizer), "auto_map": auto}))
    head = torch.randn(len(tokenizer), 2, generator=torch.Generator().manual_seed(1)) * 5
    from safetensors.torch import save_file

    save_file({"head.weight": head, "head.bias": torch.zeros(len(tokenizer))}, folder / "model.safetensors", {"format": "pt"})
    (folder / "questions.txt").write_text(QUESTIONS)
    (folder / "weight.json").write_text(json.dumps(WEIGHTS))

    media = clips()
    (reward,) = load_rewards(parse_rewards([reward_of(folder, "remote_code=1", "clip_fps=26")]), CPU, ROWS).values()
    expected = []
    for clip, row in zip(media, ROWS):
        mean = ((clip[:, [0, 26, 52]] + 1) * 127.5).round().mean() / 255
        total = 0.0
        for question, weight in zip(QUESTIONS.splitlines(keepends=True), WEIGHTS, strict=True):
            length = len(tokenizer.encode(question.replace("[[prompt]]", row["prompt"])))
            said = F.softmax((head @ torch.tensor([mean, length / 50])).double(), 0)
            yes, no = (
                sum(said[tokenizer.convert_tokens_to_ids(word)].item() for word in words) for words in (("yes", "Yes"), ("no", "No"))
            )
            total += weight * yes / (yes + no)
        expected.append(total / 3)
    assert reward(media, ROWS).tolist() == pytest.approx(expected, abs=1e-5)
    assert not math.isclose(*expected, rel_tol=1e-3)


def test_what_is_refused(llava, tmp_path):
    (tmp_path / "two.json").write_text("[1, 2]")
    (tmp_path / "odd.json").write_text('[1, 2, "x"]')
    for options, message in {
        f"questions={llava}/questions.txt,weights={tmp_path}/two.json": "has 3 questions, and .*two.json no list of as many",
        f"questions={llava}/questions.txt,weights={tmp_path}/odd.json": "can't be read",
        f"questions={llava}/questions.txt": "can't be read",
        "clip_fps=0": "clip_fps above 0",
        "dtype=int8": "dtype auto, float32 or bfloat16",
    }.items():
        with pytest.raises(UserError, match=message):
            load_rewards(parse_rewards([f"{EXAMPLE}:visionreward={llava},{options}"]), CPU)
    with pytest.raises(UserError, match="visionreward=FOLDER, not nowhere"):
        load_rewards(parse_rewards([f"{EXAMPLE}:visionreward=nowhere"]), CPU)
    (reward,) = load_rewards(parse_rewards([reward_of(llava)]), CPU).values()
    with pytest.raises(UserError, match="scores clips"):
        reward(torch.zeros(1, 3, 32, 32), ROWS[:1])
