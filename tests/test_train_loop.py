"""The loop from outside, on a model of a few numbers: what it writes, when it saves, what it refuses, how it stops."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from counting_run import Counting, Run, config_of, stage_of
from etils import epath
from flax import nnx
from quick_compile import quick_compile

from sora_jax.config import load_config
from sora_jax.errors import UserError
from sora_jax.media import read_media
from sora_jax.models import layers
from sora_jax.training import loop
from sora_jax.training.diffusion_stage import diffusion_flops
from sora_jax.training.loop import train
from sora_jax.training.metrics import WEIGHT, Averages, LateMetrics, MetricsWriter, peak_flops
from sora_jax.training.pretrained import find_pretrained
from sora_jax.training.profiler import StepRange, parse_profile
from sora_jax.training.stage import Context, Stage
from sora_jax.training.tensorboard import EventFile


@pytest.fixture(scope="module", autouse=True)
def _quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Every run compiles the same few small programs."""
    with quick_compile(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(autouse=True)
def _one_device(monkeypatch: pytest.MonkeyPatch):
    """The loop takes every device there is; most of these tests are about one."""
    one = jax.devices()[:1]
    monkeypatch.setattr(loop.sharding, "make_mesh", lambda sizes, make=loop.sharding.make_mesh: make(sizes, one))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


# ---------------------------------------------------------------------------------------------------------------- files


def test_a_run_leaves_its_files(run: Run):
    summary = run("train.validate_every=4", "train.sample_every=3", "train.checkpoint_every=2", "train.keep=2")
    assert (summary.step, summary.stopped) == (6, False)
    assert (
        load_config("world").transformer
        == loop.configs.from_json((run.workdir / "config.json").read_text()).transformer
    )
    assert [line["step"] for line in run.lines] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in run.lines if "validation_loss" in line] == [4, 6]  # and at the end
    assert run.lines[-1]["loss"] == summary.metrics["loss"]
    for name in ("grad_norm", "learning_rate", "steps_per_second", "tokens_per_second", "data_wait", "tflops"):
        assert all(line[name] >= 0 for line in run.lines)
    assert [line["programs"] for line in run.lines] == [1] * 6, "the step was compiled once"
    for name in ("update_norm", "update_ratio", "seconds_per_step", "host_gib", "goodput"):
        assert all(line[name] > 0 for line in run.lines[1:]), name  # the first batch is all zeros
    assert run.steps == [4, 6]
    samples = sorted(path.name for path in (run.workdir / "samples").iterdir())
    assert samples == ["0000003.mp4", "0000006.mp4"]
    assert read_media(run.workdir / "samples" / samples[0]).frames.shape == (5, 32, 32, 3)  # three and a black one
    assert list((run.workdir / "tensorboard").glob("events*"))
    assert any(line.startswith("done at step 6, saved at 6") for line in run.said)


def test_lines_hold_means_since_the_line_before(run: Run, tmp_path: Path):
    run()
    every = Run(tmp_path / "every three")
    every("train.log_every=3")
    assert list(every.losses) == [3, 6]
    for last in (3, 6):
        assert every.losses[last] == pytest.approx(sum(run.losses[s] for s in range(last - 2, last + 1)) / 3, rel=1e-12)


def test_log_learning_rate_is_that_of_the_step(run: Run):
    run("optimizer.schedule=linear", "optimizer.final_fraction=0.0")
    expected = [0.01 * (1 - step / 6) for step in range(6)]
    np.testing.assert_allclose([line["learning_rate"] for line in run.lines], expected, rtol=1e-5)


# --------------------------------------------------------------------------------------------------------------- resume


def test_going_on_is_the_same_as_never_having_stopped(run: Run, tmp_path: Path):
    run("train.steps=8", "train.log_every=3", "optimizer.schedule=constant")
    halves = Run(tmp_path / "halves")
    # 4 is no multiple of 3: the mean that the line of step 6 will hold is cut in two
    halves("train.steps=4", "train.log_every=3", "optimizer.schedule=constant", "train.checkpoint_every=1")
    halves("train.steps=8", "train.log_every=3", "optimizer.schedule=constant")
    assert any("resuming" in line and "step 4" in line for line in halves.said)
    assert [halves.losses[s] for s in (3, 6, 8)] == [run.losses[s] for s in (3, 6, 8)]
    assert halves.lines[-1]["grad_norm"] == run.lines[-1]["grad_norm"]


def test_lines_past_the_restored_step_and_a_torn_one_are_dropped(run: Run):
    run("train.steps=3")
    metrics = run.workdir / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 4, "loss": 123.0}\n{"step": 5, "lo')
    run("train.steps=5")
    assert [line["step"] for line in run.lines] == [1, 2, 3, 4, 5]
    assert run.losses[4] != 123.0


def test_a_finished_run_is_left_alone(run: Run):
    run()
    before = (run.workdir / "metrics.jsonl").read_bytes()
    assert run().step == 6
    assert (run.workdir / "metrics.jsonl").read_bytes() == before


def test_another_config_is_refused_with_the_difference_unless_forced(run: Run):
    run("train.steps=2")
    with pytest.raises(UserError, match=r"^[^\n]*optimizer.b2: 0.99 -> 0.5[^\n]*--force") as error:
        run("train.steps=4", "optimizer.b2=0.5")
    assert "train.steps" not in str(error.value)
    assert run("train.steps=4", "optimizer.b2=0.5", force=True).step == 4
    assert run("train.steps=5", "optimizer.b2=0.5").step == 5  # it is the run's config now


def test_steps_and_intervals_may_change_freely(run: Run):
    run("train.steps=2")
    free = ["train.steps=4", "train.log_every=2", "train.validate_every=3", "train.keep=9", "sample.steps=3"]
    assert run(*free).step == 4


def test_parameters_of_another_shape_are_refused_by_name(run: Run):
    run("train.steps=2")

    def wider(context: Context) -> Stage:
        stage = stage_of(Counting())(context)
        linear = lambda key: layers.Linear(4, 2, ("embed", "mlp"), rngs=nnx.Rngs(params=key))  # noqa: E731
        return Stage(lambda key: {"model": nnx.split(linear(key), graph=False)[1]}, stage.step, stage.batches, "")

    with pytest.raises(UserError, match=r"model\.kernel has shape \(3, 2\), and this config makes \(4, 2\)"):
        train(config_of("train.steps=4"), run.workdir, say=run.said.append, make_stage=wider)


def test_batches_that_the_mesh_does_not_divide_are_refused(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"train.batch_size 30 cannot be split .* = 8 devices; nearest: 32"):
        run("train.batch_size=30", "train.mesh.data=4", "train.mesh.fsdp=2")


@pytest.mark.parametrize("axes", [{"data": 4, "fsdp": 2}, {"data": 2, "tensor": 2, "fsdp": 2}])
def test_a_run_goes_on_on_another_mesh(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, axes):
    run("optimizer.schedule=constant")
    moved = Run(tmp_path / "moved")
    moved("train.steps=3", "optimizer.schedule=constant")
    monkeypatch.undo()
    moved("optimizer.schedule=constant", *[f"train.mesh.{axis}={n}" for axis, n in axes.items()])
    for step in range(1, 7):
        assert moved.losses[step] == pytest.approx(run.losses[step], rel=1e-5)


# --------------------------------------------------------------------------------------------------------------- stops


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_with_a_checkpoint(run: Run, tmp_path: Path, number: signal.Signals):
    before = signal.getsignal(number)
    summary = run(batches=Counting(at={2: lambda: os.kill(os.getpid(), number)}))
    assert (summary.step, summary.stopped) == (3, True)
    assert run.steps == [3]
    assert any(number.name in line for line in run.said)
    assert signal.getsignal(number) is before
    run()
    whole = Run(tmp_path / "whole")
    whole()
    assert run.losses == whole.losses


@pytest.mark.parametrize(("every", "saved_before"), [(3, True), (0, False)])
def test_a_signal_while_videos_are_made(run: Run, every: int, saved_before: bool):
    """A machine that is taken away may not live to see the last of them: a step that is to be saved is saved before."""
    found = []

    def told(context: Context) -> Stage:
        stage = stage_of(Counting())(context)

        def sample(params: Any) -> list[np.ndarray]:
            os.kill(os.getpid(), signal.SIGTERM)
            end = time.monotonic() + 20
            while saved_before and run.steps != [3] and time.monotonic() < end:
                time.sleep(0.01)  # it is written in the background
            found.extend(run.steps)
            return stage.sample(params)

        return dataclasses.replace(stage, sample=sample)

    config = config_of("train.sample_every=3", f"train.checkpoint_every={every}")
    summary = train(config, run.workdir, say=run.said.append, make_stage=told)
    last = 3 if saved_before else 4
    assert found == ([3] if saved_before else [])
    assert (summary.step, summary.stopped, run.steps) == (last, True, [last])
    assert (run.workdir / "samples" / "0000003.mp4").exists()


# ------------------------------------------------------------------------------------------------------------- profile


def test_a_profile_leaves_a_trace_and_changes_no_loss(run: Run, tmp_path: Path):
    run()
    traced = Run(tmp_path / "traced")
    traced(profile=StepRange(3, 4))
    assert traced.losses == run.losses
    traces = list((traced.workdir / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1
    assert traces[0].stat().st_size > 1000
    assert not (run.workdir / "profile").exists()
    heads = [line.split(" ")[0:2] for line in traced.said]
    assert [head[0] for head in heads].count("traced:") == 1
    assert heads.index(["step", "2/6"]) < [head[0] for head in heads].index("traced:") < heads.index(["step", "6/6"])


def test_a_run_that_goes_on_after_its_profile_says_so(run: Run):
    run("train.steps=3")
    run(profile=StepRange(2, 3))
    assert "step 2 is past: nothing is traced" in run.said
    assert not (run.workdir / "profile").exists()


def test_a_run_that_ends_within_its_profile_still_writes_it(run: Run):
    run(batches=Counting(at={3: lambda: os.kill(os.getpid(), signal.SIGTERM)}), profile=StepRange(3, 6))
    assert len(list((run.workdir / "profile").rglob("*.xplane.pb"))) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("10", 'takes START:STEPS, say 10:5 for the steps 10 to 14, not "10"'),
        ("a:b", "takes START:STEPS"),
        ("-3:2", "takes START:STEPS"),
        ("0:2", "steps are counted from 1"),
        ("3:0", "there must be at least one"),
        ("95:10", "ends with step 104, and the run with step 100; nearest: 91:10"),
        ("3:200", "nearest: 1:100"),
    ],
)
def test_ranges_that_cannot_be_profiled_are_refused(text: str, words: str):
    with pytest.raises(UserError, match=words):
        parse_profile(text, 100)
    assert parse_profile("96:5", 100) == StepRange(96, 100)


# ------------------------------------------------------------------------------------------------------------- metrics


def test_means_over_steps_weigh_each_step_by_its_tokens():
    """A band of levels with one token in a step and three in another: the mean over four tokens."""
    averages = Averages()
    averages.add({"loss_0.05": 8.0, f"loss_0.05{WEIGHT}": 1.0, "loss_0.15": float("nan"), f"loss_0.15{WEIGHT}": 0.0})
    averages = Averages(json.loads(json.dumps(averages.state())))
    averages.add({"loss_0.05": 4.0, f"loss_0.05{WEIGHT}": 3.0, "loss_0.15": float("nan"), f"loss_0.15{WEIGHT}": 0.0})
    means = averages.means()
    assert means["loss_0.05"] == 5.0
    assert np.isnan(means["loss_0.15"])
    assert set(means) == {"loss_0.05", "loss_0.15"}


def test_devices_are_idle_when_they_have_done_all_they_were_given():
    late = LateMetrics(lambda step, values: None, delay=2)
    assert late.idle()
    late.push(1, {"loss": jax.block_until_ready(jnp.float32(1))})
    assert late.idle()

    @jax.jit
    def slow(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 300, lambda _, x: jnp.sin(x @ x), x).sum()

    late.push(2, {"loss": slow(jnp.ones((400, 400)))})
    assert not late.idle()
    late.flush()
    assert late.idle()


def test_a_run_reports_to_wandb_offline(run: Run, monkeypatch: pytest.MonkeyPatch):
    """One run there, though it is two here."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run("train.steps=3", "train.wandb=sora", "train.checkpoint_every=3")
    run("train.steps=6", "train.wandb=sora")
    folders = list((run.workdir / "wandb").glob("offline-run-*"))
    name = (run.workdir / "wandb.id").read_text()
    assert folders
    assert all(folder.name.endswith(name) for folder in folders)
    assert sum(path.stat().st_size for folder in folders for path in folder.glob("*.wandb")) > 1000


def test_a_project_without_the_package_is_refused_before_anything_is_made(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # how Python marks a package that cannot be imported
    with pytest.raises(UserError, match=r"pip install 'sora-jax\[wandb\]'"):
        run("train.wandb=sora")
    assert not run.workdir.exists()


def test_late_metrics_keep_their_order_and_their_steps():
    got: list[tuple[int, dict[str, float]]] = []
    late = LateMetrics(lambda step, values: got.append((step, values)), delay=2)
    for step in range(1, 5):
        late.push(step, {"loss": jnp.float32(step)})
        assert [s for s, _ in got] == list(range(1, step - 1))
    late.flush()
    assert got == [(s, {"loss": float(s)}) for s in range(1, 5)]


def test_averages_leave_out_what_is_nan_and_travel_as_json():
    averages = Averages()
    averages.add({"loss": 1.0, "band": float("nan")})
    averages = Averages(json.loads(json.dumps(averages.state())))
    averages.add({"loss": 4.0, "band": 7.0})
    assert averages.means() == {"loss": 2.5, "band": 7.0}
    averages.clear()
    assert averages.means() == {}


def test_metrics_of_a_remote_workdir_are_uploaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A URL is a folder that does not append: its files appear when they are uploaded."""
    store = tmp_path / "store"
    real = epath.Path
    monkeypatch.setattr(
        "sora_jax.training.metrics.epath.Path", lambda path: real(str(path).replace("gs://", f"{store}/"))
    )
    writer = MetricsWriter("gs://bucket/run", 0)
    writer.write(1, {"loss": 2.0})
    assert not (store / "bucket/run/metrics.jsonl").exists()
    writer.upload()
    writer.write(2, {"loss": float("nan")})
    writer.close()
    lines = [json.loads(line) for line in (store / "bucket/run/metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}]
    again = MetricsWriter("gs://bucket/run", 1)
    again.write(2, {"loss": 3.0})
    again.close()
    lines = [json.loads(line) for line in (store / "bucket/run/metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 3.0}]


def test_peak_flops_takes_the_nearest_name():
    assert peak_flops("TPU v5 lite") == 197e12
    assert peak_flops("TPU v5p") == 459e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("cpu") is None


def test_flops_of_the_open_models_are_those_published():
    """The blocks of Wan 2.1 1.3B at 480p, 81 frames: 32,760 tokens, 283 TFLOP; borders and text are small."""
    from sora_jax.models.text_encoder import TextEncoderConfig
    from sora_jax.models.transformer import TransformerConfig

    no_text = TextEncoderConfig(num_layers=1, d_model=1, d_ff=1, d_kv=1, num_heads=1)
    assert diffusion_flops(TransformerConfig(), no_text, 32_760, 512) == pytest.approx(283e12, rel=0.01)


def test_what_is_no_model_is_refused(tmp_path: Path):
    with pytest.raises(UserError):
        find_pretrained(str(tmp_path / "nothing"))


def test_tensorboard_reads_what_is_written(tmp_path: Path):
    """By its own framing: length, checksum, event; the second file says from which step on the first is void."""
    from tensorboardX.proto.event_pb2 import Event

    def events(path: Path) -> list[Event]:
        data, found = path.read_bytes(), []
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
        return found

    folder = tmp_path / "tensorboard"
    file = EventFile(folder)
    file.add_scalar("loss", 2.5, 7)
    file.add_image("samples", np.full((4, 6, 3), 9, np.uint8), 8)
    file.close()
    (path,) = folder.glob("events*")
    version, scalar, image = events(path)
    assert version.file_version == "brain.Event:2"
    assert (scalar.step, scalar.summary.value[0].tag, scalar.summary.value[0].simple_value) == (7, "loss", 2.5)
    assert (image.step, image.summary.value[0].image.height, image.summary.value[0].image.width) == (8, 4, 6)
    path.unlink()
    EventFile(folder, purge_step=8).close()
    (path,) = folder.glob("events*")
    assert [(event.step, event.session_log.status) for event in events(path)][1:] == [(8, 1)]
