"""A run saved on one number of processes, at one ZeRO stage, goes on at any other as if nothing had happened."""

import json
import shutil
import sys
from collections import defaultdict
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import largest_difference, metrics_of, run_script, weights_of
from safetensors.torch import load_file, save_file

from fastvideo.files import crc32
from fastvideo.runs.integrity import checksum

# ------------------------------------------------------------------------------------------------------ a tiny module, all layouts

LAYOUTS = {  # name -> (ZeRO stage, dtype, offload)
    **{f"stage{stage}": (stage, "float32", False) for stage in range(4)},
    **{f"stage{stage}_offload": (stage, "float32", True) for stage in range(1, 4)},
    **{f"stage{stage}_bfloat16": (stage, "bfloat16", False) for stage in range(1, 4)},
    **{f"stage{stage}_bfloat16_offload": (stage, "bfloat16", True) for stage in range(1, 4)},
}
SCOPES = {"quick": ((1, 2), [name for name in LAYOUTS if "offload" not in name]), "all": ((1, 2, 4), list(LAYOUTS))}
UPDATES_BEFORE, UPDATES_AFTER = 20, 2


class Odd(torch.nn.Module):
    """Parameters of sizes that no number of processes divides, one smaller than that number, some of them frozen."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        torch.manual_seed(0)
        self.scale = torch.nn.Parameter(torch.randn(1))
        self.one = torch.nn.Linear(7, 11)
        self.frozen = torch.nn.Linear(11, 11).requires_grad_(False)
        self.two = torch.nn.Linear(11, 5)
        self.to(dtype)
        self.dtype = dtype

    def forward(self, x):
        return self.scale * self.two(self.frozen(self.one(x)).tanh())


def start(layout: str):
    """A fresh engine and EMA."""
    import deepspeed

    from fastvideo.parallel import zero
    from fastvideo.parallel.ema import EMA

    stage, dtype, offload = LAYOUTS[layout]
    initialize = deepspeed.initialize

    def shard_everything(config, **arguments):
        """Not even the smallest tensor is kept whole at stage 3, and there are several shards a process."""
        config["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "sub_group_size": 30}
        return initialize(config=config, **arguments)

    settings = {"weight_decay": 0.1, "max_grad_norm": 0.5, "micro_batch_size": 1, "accumulation_steps": 1}
    dtype = getattr(torch, dtype)
    deepspeed.initialize = shard_everything
    try:
        engine = zero.initialize(
            Odd(dtype),
            stage=stage,
            offload=offload,
            dtype=dtype,
            learning_rate=0.002,
            lr_multiplier=lambda update: (update + 1) / 10,
            **settings,
        )
    finally:
        deepspeed.initialize = initialize
    return engine, EMA(engine, decay=0.5)


def update(engine, ema, updates: range) -> None:
    """The same data on every process, so that the number of processes changes no gradient."""
    from fastvideo.parallel import zero
    from fastvideo.parallel.distributed import keyed_generator

    for index in updates:
        x = torch.randn(3, 7, generator=keyed_generator(0, "x", index)).to(engine.module.dtype)
        zero.backward_and_step(engine, engine(x).float().square().mean())
        ema.update()


def check_fragments(engine, layout: str) -> None:
    """The shards of a fresh engine hold the module's parameters, each trainable element once (at stage 0, once on each process)."""
    from fastvideo.parallel import shards
    from fastvideo.parallel.distributed import all_gather_object

    expected = {name: parameter.detach().float().flatten() for name, parameter in Odd(engine.module.dtype).named_parameters()}
    fragments = shards.fragments(engine)
    masters = shards.master_shards(engine)
    for shard, parts in zip(masters, fragments, strict=True):
        for name, start, offset, count in parts:
            assert count > 0
            assert shard.view(-1)[offset : offset + count].equal(expected[name][start : start + count]), (layout, name)
    trainable = {name for name in expected if not name.startswith("frozen")}
    assert shards.parameter_shapes(engine) == {
        name: list(dict(Odd(engine.module.dtype).named_parameters())[name].shape) for name in trainable
    }
    covered = defaultdict(list)
    own = [fragment for parts in fragments for fragment in parts]
    for name, start, _, count in own if LAYOUTS[layout][0] == 0 else [f for fs in all_gather_object(own) for f in fs]:
        covered[name] += range(start, start + count)
    assert {name: sorted(elements) for name, elements in covered.items()} == {name: list(range(len(expected[name]))) for name in trainable}
    assert LAYOUTS[layout][0] != 3 or len(masters) > 1


def sources(scope: str, world: int, layout: str) -> list[tuple[int, str]]:
    """What goes on at this layout: a checkpoint of this very layout, and of another one for each number of processes."""
    worlds, layouts = SCOPES[scope]
    same_dtype = [name for name in layouts if LAYOUTS[name][1] == LAYOUTS[layout][1]]
    next_one = same_dtype.index(layout) + 1
    return [(world, layout), *((saved, same_dtype[(next_one + index) % len(same_dtype)]) for index, saved in enumerate(worlds))]


def main(folder: Path, scope: str, phase: str) -> None:
    """On each process: save a checkpoint at every layout in the middle of training, or go on from those at `sources`."""
    from fastvideo.parallel import distributed
    from fastvideo.runs import checkpoint

    ranks = distributed.init(timeout_minutes=1)
    last = UPDATES_BEFORE + UPDATES_AFTER
    for layout in SCOPES[scope][1]:
        run = folder / f"{ranks.world_size}_{layout}"
        if phase == "save":
            engine, ema = start(layout)
            check_fragments(engine, layout)
            update(engine, ema, range(UPDATES_BEFORE))
            checkpoint.save(engine, ema, run, UPDATES_BEFORE, 2, ranks)
            update(engine, ema, range(UPDATES_BEFORE, last))
            checkpoint.save(engine, ema, run, last, 2, ranks)
        else:
            for world, saved_layout in sources(scope, ranks.world_size, layout):
                engine, ema = start(layout)
                source = folder / f"{world}_{saved_layout}"
                assert checkpoint.load(engine, ema, iteration(source, UPDATES_BEFORE)) == UPDATES_BEFORE
                update(engine, ema, range(UPDATES_BEFORE, last))
                checkpoint.save(engine, ema, folder / f"{run.name}_from_{source.name}", last, 2, ranks)


def iteration(run: Path, number: int) -> Path:
    return run / "checkpoints" / f"iteration_{number:06d}"


def whole(checkpoint: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors put together: {KIND/NAME: tensor of its shape}."""
    shapes = json.loads((checkpoint / "state.json").read_text())["parameters"]
    pieces = defaultdict(dict)
    for path in checkpoint.glob("*.safetensors"):
        for key, values in load_file(path).items():
            tensor, start = key.rsplit("/", 1)
            pieces[tensor][int(start)] = values
    return {tensor: torch.cat([by[i] for i in sorted(by)]).view(shapes[tensor.split("/")[1]]) for tensor, by in pieces.items()}


def relative_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(((one[name] - other[name]).abs().max() / other[name].abs().max()).item() for name in other)


@pytest.mark.parametrize("scope", ["quick", pytest.param("all", marks=pytest.mark.slow)])
def test_all_layouts_of_a_tiny_module(tmp_path, scope):
    """What goes on at a layout is the run that it was saved from: in the weights, Adam's averages and the EMA."""
    worlds, layouts = SCOPES[scope]
    for phase, world in product(("save", "resume"), worlds):
        result = run_script(Path(__file__), tmp_path, scope, phase, processes=world, log=tmp_path / f"{phase}_{world}")
        assert result.returncode == 0, result.stderr
    last = UPDATES_BEFORE + UPDATES_AFTER
    differences = {}
    for world, layout in product(worlds, layouts):
        for source in ("{}_{}".format(*source) for source in sources(scope, world, layout)):
            resumed = whole(iteration(tmp_path / f"{world}_{layout}_from_{source}", last))
            differences[f"{world}_{layout}", source] = relative_difference(resumed, whole(iteration(tmp_path / source, last)))
    assert not {pair: difference for pair, difference in differences.items() if difference > (0 if pair[0] == pair[1] else 1e-5)}


# ---------------------------------------------------------------------------------------------------------------- a training run

RUN = {"--prompts_per_iteration": 4, "--num_generations": 2, "--iterations": 4, "--lr_warmup_steps": 20}
LORA = {"--lora_rank": 4, "--learning_rate": 1e-3}
S0, S1, S2, S3 = ({"--zero_stage": stage} for stage in range(4))
CASES = [  # saved on so many processes with these flags, resumed on so many with these
    (2, S2, 1, S2),
    (2, S2, 4, S3),
    (2, S2 | LORA, 1, S3 | LORA),
    (2, S2, 2, S2 | {"--sp_size": 2}),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [
            (2, S2, 4, S2),
            (2, S2, 2, S3),
            (2, S3, 1, S0),
            (2, S3, 1, S3),
            (2, S3, 4, S3),
            (2, S3, 2, S3 | {"--sp_size": 2}),
            (2, S3, 2, S1),
            (1, S0, 2, S3),
            (2, S2 | LORA, 4, S1 | LORA),
            (2, S2 | {"--sp_size": 2}, 4, S3 | {"--sp_size": 2}),
        ]
    ),
]


@pytest.fixture(scope="module")
def uninterrupted(train, tmp_path_factory):
    """Function from a layout to a run of 4 iterations with checkpoints after 2 and 4. Not to be changed."""
    runs = {}

    def run_at(processes: int, flags: dict) -> Path:
        key = (processes, *flags.items())
        if key not in runs:
            runs[key] = tmp_path_factory.mktemp("runs") / "uninterrupted"
            train(runs[key], RUN, flags, processes=processes)
        return runs[key]

    return run_at


def copy_at_iteration_2(run: Path, copy: Path) -> None:
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "export")
    shutil.rmtree(iteration(copy, 4))
    (copy / "checkpoints" / "latest").write_text("iteration_000002")


@pytest.mark.parametrize(
    ("saved_processes", "saved_flags", "processes", "flags"),
    CASES,
    ids=lambda value: str(value) if isinstance(value, int) else "-".join(f"{name[2:]}_{v}" for name, v in value.items()),
)
def test_run_goes_on_at_another_layout(train, uninterrupted, tmp_path, saved_processes, saved_flags, processes, flags):
    expected, run = uninterrupted(saved_processes, saved_flags), tmp_path / "run"
    copy_at_iteration_2(expected, run)
    train(run, RUN, flags, processes=processes)
    rows, expected_rows = metrics_of(run), metrics_of(expected)
    assert rows[:2] == expected_rows[:2] and len(rows) == len(expected_rows) == 4
    for row, expected_row in zip(rows[2:], expected_rows[2:]):
        for name in ("reward/aesthetic_mean", "policy/grad_norm", "policy/lr"):
            assert row[name] == pytest.approx(expected_row[name], rel=1e-5), (row["iteration"], name)
    exported = weights_of(run / "export" / "transformer")
    assert largest_difference(exported, weights_of(expected / "export" / "transformer")) < 1e-5
    assert relative_difference(whole(iteration(run, 4)), whole(iteration(expected, 4))) < 1e-4
    assert largest_difference(whole(iteration(run, 2)), whole(iteration(run, 4))) > 1e-4  # it did move


def test_lora_checkpoint_holds_the_adapter_alone(uninterrupted):
    checkpoint = iteration(uninterrupted(2, S2 | LORA), 4)
    state, tensors = json.loads((checkpoint / "state.json").read_text()), whole(checkpoint)
    assert all("lora_" in name for name in state["parameters"])
    assert tensors.keys() == {f"{kind}/{name}" for kind in ("weight", "exp_avg", "exp_avg_sq", "ema") for name in state["parameters"]}
    assert sum(file["size"] for file in state["files"].values()) < 1.2 * sum(tensor.nbytes for tensor in tensors.values())


# ------------------------------------------------------------------------------------------------------------------------ refused


def test_checkpoint_that_lacks_something_is_refused(train, uninterrupted, tmp_path):
    """What sizes and checksums do not show: a part of a tensor that is in no file, a file that is none, a format from before."""
    run = tmp_path / "run"
    copy_at_iteration_2(uninterrupted(2, S2), run)
    checkpoint = iteration(run, 2)
    state, shard_file = json.loads((checkpoint / "state.json").read_text()), checkpoint / "shard_00001.safetensors"
    shard = load_file(shard_file)

    def refusal() -> str:
        result = train(run, RUN, S2, check=False)
        assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
        return next(line for line in result.stderr.splitlines() if line.startswith("error: "))

    lost = next(key for key in shard if key.startswith("ema/"))
    _, name, start = lost.split("/")
    save_file({key: values for key, values in shard.items() if key != lost}, shard_file)
    write_state(checkpoint, state)
    end = int(start) + len(shard[lost])
    assert f"iteration_000002 is damaged: elements {start} to {end} of ema {name} are in no file" in refusal()

    shard_file.write_bytes(b"\xff" * state["files"][shard_file.name]["size"])
    write_state(checkpoint, state)
    assert "iteration_000002 is damaged: " in refusal()

    shapes = state["parameters"]
    write_state(checkpoint, state | {"parameters": shapes | {name: [3, 3]}})
    assert f"iteration_000002 is of another model: the shape of {name} is [3, 3] there and {shapes[name]} here" in refusal()

    write_state(checkpoint, {key: value for key, value in state.items() if key != "updates"})
    assert "its updates is no int" in refusal()
    (checkpoint / "state.json").write_text(json.dumps({key: value for key, value in state.items() if key != "crc32"}))
    assert "is damaged, or of an earlier version: it does not have its checksum" in refusal()


def write_state(checkpoint: Path, state: dict) -> None:
    """With the sizes and checksums that the files have now."""
    files = {path.name: {"size": path.stat().st_size, "crc32": crc32(path)} for path in checkpoint.glob("shard_*")}
    state = state | {"files": files}
    (checkpoint / "state.json").write_text(json.dumps(state | {"crc32": checksum(state)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
