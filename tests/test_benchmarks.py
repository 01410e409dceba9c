"""The benchmarks run, and what they count agrees with theory. Their times are for people."""

import json

import pytest
from conftest import REPOSITORY, launch, run_script

SEQUENCE_PARALLEL = REPOSITORY / "benchmarks" / "sequence_parallel.py"
ZERO = REPOSITORY / "benchmarks" / "zero.py"
STARTUP = REPOSITORY / "benchmarks" / "startup.py"
MODELS = ("flux", "hunyuan", "skyreels", "wan")


def report_of(script, *flags, processes, log) -> dict:
    result = run_script(script, *flags, processes=processes, log=log, timeout=120)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def results_of(*arguments, **options) -> list[dict]:
    return report_of(*arguments, **options)["results"]


@pytest.mark.parametrize("tokens, heads", [(512, 8), pytest.param(515, 7, marks=pytest.mark.slow)], ids=["divisible", "indivisible"])
def test_sequence_parallelism_sends_what_theory_says_and_divides_the_activations(tmp_path, tokens, heads):
    sizes = {"--tokens": tokens, "--text_tokens": 32, "--heads": heads, "--layers": 2, "--repeats": 1}
    results = results_of(SEQUENCE_PARALLEL, {"--model": MODELS}, sizes, processes=4, log=tmp_path / "log")
    rows = {(row["model"], row["sp_size"]): row for row in results}
    assert rows.keys() == {(model, sp_size) for model in MODELS for sp_size in (1, 2, 4)}
    for (model, sp_size), row in rows.items():
        text = 0 if model == "wan" else 32
        formula = 4 * heads * 32 * (sp_size - 1) / sp_size * (4 * tokens / sp_size + text)  # float32
        for direction in ("forward", "backward"):
            sent = row[f"{direction}_bytes_per_layer"]
            assert sent == row["exact_bytes_per_layer"], (model, sp_size)
            assert sent == pytest.approx(formula, rel=0.01), (model, sp_size)
        share = row["activation_bytes"] / rows[model, 1]["activation_bytes"]
        assert share <= {1: 1, 2: 0.6, 4: 0.35}[sp_size], (model, sp_size)  # the text, one in 17 tokens, is not divided


def test_sequence_parallelism_benchmark_in_bfloat16_sends_half(tmp_path):
    sizes = {"--tokens": 64, "--text_tokens": 16, "--layers": 2, "--repeats": 1, "--sp_size": 2, "--dtype": "bfloat16"}
    for row in results_of(SEQUENCE_PARALLEL, {"--model": MODELS}, sizes, processes=2, log=tmp_path / "log"):
        if row["sp_size"] == 2:
            elements = 8 * 32 / 2 * (2 * 64 + (0 if row["model"] == "wan" else 16))
            assert row["forward_bytes_per_layer"] == row["backward_bytes_per_layer"] == 2 * elements


@pytest.mark.parametrize(
    "dtype, stages", [("float32", (0, 1, 2, 3)), pytest.param("bfloat16", (1, 2, 3), marks=pytest.mark.slow)], ids=["float32", "bfloat16"]
)
def test_zero_holds_what_theory_says(tmp_path, dtype, stages):
    results = results_of(ZERO, {"--dtype": dtype}, processes=2, log=tmp_path / "log")
    assert [row["stage"] for row in results] == list(stages)
    for row in results:
        stage, number = row["stage"], row["num_parameters"]
        itemsize = 4 if dtype == "float32" else 2
        theory = {
            "parameters": itemsize * number / (2 if stage == 3 else 1),
            "gradients": 4 * number / (2 if stage >= 2 else 1),
            "optimizer": 8 * number if stage == 0 else 12 * number / 2,
        }
        more = dict.fromkeys(theory, 0)
        if stage == 2:  # the gradient that two shards divide is whole
            more["gradients"] = 4 * row["largest_parameter"]
        if stage == 1 and dtype == "bfloat16":  # the last micro-batch's, beside the sum
            more["gradients"] = 2 * number
        for kind, expected in theory.items():
            assert row[f"{kind}_theory_bytes"] == expected
            assert 0.999 * expected <= row[f"{kind}_bytes"] <= 1.05 * expected + more[kind], (stage, kind)


def test_the_network_is_read_once_and_held_once(tmp_path):
    flags = {"--processes": 2, "--heads": 8, "--layers": 6, "--directory": tmp_path}
    report = report_of(STARTUP, flags, processes=2, log=tmp_path / "log")
    size = report["network_bytes"]
    assert size > 150e6
    rows = {(row["way"], row["rank"]): row for row in report["results"]}
    assert rows.keys() == {(way, rank) for way in ("before", "after") for rank in (0, 1)}
    for reader in (rows["before", 0], rows["before", 1], rows["after", 0]):
        assert size < reader["read_bytes"] + reader["mapped_bytes"] < size + 50e6, "once, beside the libraries that a forked process maps"
        assert reader["peak_bytes"] > size
    assert rows["after", 0]["peak_bytes"] < 1.4 * size, "the network, and one of its four files once more"
    other = rows["after", 1]
    assert other["read_bytes"] + other["mapped_bytes"] < 0.02 * size
    assert other["peak_bytes"] < 0.1 * size
    assert list(tmp_path.glob("*/transformer")) == [], "its files stayed"


@pytest.mark.slow
def test_started_alone_a_benchmark_starts_its_processes():
    result = launch(SEQUENCE_PARALLEL, {"--model": "wan", "--sp_size": 2, "--tokens": 64, "--repeats": 1})
    assert result.returncode == 0, result.stderr
    assert [row["sp_size"] for row in json.loads(result.stdout.splitlines()[-1])["results"]] == [1, 2]


@pytest.mark.slow
def test_what_cannot_be_measured_is_refused_in_one_sentence():
    for script, flags, message in [
        (SEQUENCE_PARALLEL, {"--sp_size": 9}, "error: --sp_size must be from 2 to --heads, 8, not 9\n"),
        (STARTUP, {"--files": 0}, "error: --files must be at least 1, not 0\n"),
        (ZERO, {"--head_dim": 12}, "error: --head_dim must be a multiple of 8, for the three axes of rotary embeddings, not 12\n"),
    ]:
        result = launch(script, flags)
        assert (result.returncode, result.stderr) == (2, message)
