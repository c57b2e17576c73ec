"""The training run, top to bottom; all stages go through it.

What a stage is made of (parameters, step, batches, validation, samples) is in `stage`. Here is what a run is made of:
a mesh, a state that is initialised or restored, a loop, and files in the workdir:

    config.json  metrics.jsonl  goodput.json  tensorboard/  checkpoints/  samples/  profile/

A run that is killed at any moment and started again goes on as if it had not been: same batches, same noise, same
losses to the bit (on the same kind of device). SIGTERM and Ctrl-C end it after the step at hand, with a checkpoint.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from types import FrameType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from sora_jax import config as configs
from sora_jax import sharding
from sora_jax.config import Config
from sora_jax.errors import UserError
from sora_jax.media import write_media
from sora_jax.record import Record
from sora_jax.runtime import compute_dtype
from sora_jax.training.checkpoint import Checkpoints, check_place
from sora_jax.training.compilations import Compilations
from sora_jax.training.files import write_text
from sora_jax.training.goodput import Goodput
from sora_jax.training.metrics import GOODPUT, Averages, LateMetrics, MetricsWriter
from sora_jax.training.notes import go_on, make_notes
from sora_jax.training.optimizer import count_parameters, make_optimizer, make_schedule
from sora_jax.training.pretrained import load_start
from sora_jax.training.profiler import Profiler, StepRange
from sora_jax.training.progress import Progress, duration, losses_by_skill
from sora_jax.training.samples import film_strips, grid
from sora_jax.training.stage import Context, MakeStage
from sora_jax.training.stages import STAGES
from sora_jax.training.state import abstract_state, init_state, make_init
from sora_jax.training.wandb_run import WandbRun, import_wandb
from sora_jax.training.watch import Clock, Window, memory

Say = Callable[[str], None]


class Summary(NamedTuple):
    """How a run ended."""

    step: int
    stopped: bool  # by a signal, before its last step
    metrics: dict[str, float]  # of the last line


def train(
    config: Config,
    workdir: epath.PathLike,
    *,
    force: bool = False,
    profile: StepRange | None = None,
    say: Say | None = None,
    make_stage: MakeStage | None = None,
) -> Summary:
    """Train as `config` says, from the newest checkpoint in `workdir` where there is one.

    `workdir` is a path or URL. `force` goes on although the workdir was made by another config or data.
    `profile` are steps to trace into WORKDIR/profile.
    `say` gets every line for people (default: stderr, with a progress bar on a terminal). `make_stage` builds something
    else than the stages that configs can name.

    Raises `UserError` when the workdir holds another config, when its checkpoints do not fit, when the data is not what
    they were trained on, and when gradients were not finite, or spikes, for `train.max_skipped` steps in a row.
    """
    clock = Clock()
    check_place(workdir)
    workdir = epath.Path(workdir)
    settings = config.train
    chief = jax.process_index() == 0
    progress = Progress(settings.steps, say, silent=not chief and say is None)
    say = progress.say
    refuse_other_config(config, workdir, force)
    if settings.wandb and chief:
        import_wandb()  # says at once that it is missing

    # ------------------------------------------------------------------------------------------------ devices and mesh
    mesh = mesh_of(config)
    dtype = compute_dtype(settings.dtype, mesh.devices.ravel().tolist())

    # ------------------------------------------------------------------------------------------------- data and model
    optimizer = make_optimizer(config.optimizer, settings.steps)
    learning_rate = make_schedule(config.optimizer, settings.steps, config.optimizer.learning_rate)
    context = Context(config, workdir, mesh, optimizer, dtype, say)
    stage = (make_stage or STAGES[settings.stage])(context)

    # -------------------------------------------------------------------------------------------------------- restore
    init = make_init(stage.make_params, optimizer)
    key = jax.random.key(settings.seed)
    shapes = abstract_state(init, key, mesh)
    checkpoints = Checkpoints(workdir / "checkpoints", keep=settings.keep, say=say)
    restored = checkpoints.restore(shapes, since=("norms",))
    if restored is None:
        start, averages = 0, Averages()
        state = init_state(init, key, mesh)
        loaded = load_start(config, shapes.params, mesh, may_differ=stage.may_start_anew, say=say)
        if loaded:
            started = {name: nnx.merge_state(own, loaded.get(name, own)) for name, own in state.params.items()}
            state = state.replace(params=started, ema=jax.tree.map(jnp.copy, started))
        if stage.kept:
            say(f"keeping {', '.join(stage.kept)} of {settings.init} as they are")
    else:
        start, averages = restored.step, Averages(restored.notes["averages"])
        go_on(stage, restored.notes, start, force=force, say=say)
        state = restored.state
        say(f"resuming {workdir} at step {start}")
    del restored
    say(
        f"{settings.stage} · {count_parameters(shapes.params) / 1e6:.2f} M parameters · {stage.describe} · "
        f"mesh {', '.join(f'{axis}={n}' for axis, n in mesh.shape.items())} · {dtype}"
    )
    if chief:
        write_text(workdir / "config.json", configs.to_json(config))
    wandb = WandbRun(settings.wandb, workdir, configs.to_dict(config)) if settings.wandb and chief else None
    writer = MetricsWriter(workdir, start, active=chief, wandb=wandb)

    # ------------------------------------------------------------------------------------------------------------ log
    window = Window(clock, stage, mesh)
    goodput = Goodput(writer.folder and writer.folder / GOODPUT, clock, start)
    extras: dict[int, dict[str, float]] = {}  # what else belongs to a step's line
    programs = Compilations()  # of the step
    last_line: dict[str, float] = {}

    def receive(step: int, values: dict[str, float]) -> None:
        """The metrics of a step, as they come in from the device."""
        in_a_row = int(values.pop("skipped_in_a_row"))
        if in_a_row:
            finite = np.isfinite(values["loss"]) and np.isfinite(values["grad_norm"])
            what = f"a spike (norm {values['grad_norm']:.3g})" if finite else "not finite"
            say(f"step {step}: gradients are {what}; skipped ({in_a_row} in a row)")
        if in_a_row >= settings.max_skipped:
            raise UserError(
                f"stopped at step {step}: gradients were {what} for {in_a_row} steps in a row; the parameters are "
                f"those before them. Lower optimizer.learning_rate ({config.optimizer.learning_rate:g}) and go on from "
                f"the last checkpoint with --force" + (", or raise optimizer.spike_sigmas" if finite else "")
            )
        averages.add(values)
        goodput.took(step, skipped=in_a_row > 0)
        progress.step(step, values["loss"])
        regular = due(step, settings.log_every)
        if regular or step in extras or step == settings.steps:
            line = averages.means() | {"learning_rate": float(learning_rate(step - 1))} | window.rates(step)
            line |= {"programs": programs.count, **(stage.gauges() if stage.gauges else {})}
            line |= extras.pop(step, {}) | memory() | {"goodput": goodput.record()}
            if regular:  # lines in between do not change what the regular ones say
                averages.clear()
            writer.write(step, line)
            progress.line(step, line)
            last_line.clear()
            last_line.update(line)

    late = LateMetrics(receive)
    profiler = Profiler(workdir / "profile", profile if chief else None, late.flush, say)

    def save(step: int) -> None:
        if stage.describe_checkpoint:
            stage.describe_checkpoint(state.ema)
        checkpoints.save(step, state, make_notes(config, stage, averages.state()))
        if stage.describe_data:
            say(f"data at step {step}: {stage.describe_data()}")
        writer.upload()

    def finish_checkpoints() -> None:
        with clock.spent_on("checkpoint"):
            checkpoints.close()

    # ----------------------------------------------------------------------------------------------------------- loop
    step = saved = start
    compiled: set[Any] = set()  # shapes of the batches seen so far; a new one is a new program
    with stop_signals(say) as stop, jax.set_mesh(mesh):
        window.begin(start)
        goodput.begin()
        try:
            while step < settings.steps:
                profiler.before(step + 1)
                with clock.spent_on("data", only_if=late.idle):
                    batch = place(next(stage.batches), mesh)
                shape = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
                if shape not in compiled:
                    late.flush()
                with clock.spent_on("dispatch" if shape in compiled else "compile"), programs:
                    state, metrics = stage.step(state, batch)
                compiled.add(shape)
                window.did(batch)
                step += 1
                profiler.after(step, metrics)
                last = step == settings.steps
                # Machines are taken away half a minute after their signal: save at once then.
                if stage.validate and due(step, settings.validate_every, last) and not stop.is_set():
                    late.flush()
                    jax.block_until_ready(metrics)  # what steps took shall not be counted as validation
                    with clock.spent_on("validation"):
                        found = jax.device_get(stage.validate(state.ema))
                    extras[step] = {f"validation_{name}": float(value) for name, value in found.items()}
                late.push(step, metrics)
                if stopping(stop, checkpoints, step) or due(step, settings.checkpoint_every) or last:
                    late.flush()  # so that the averages are those of this step
                    goodput.record()
                    with clock.spent_on("checkpoint"):
                        save(step)
                    saved = step
                # After the checkpoint: a machine that is taken away while videos are made takes nothing with it.
                if stage.sample and due(step, settings.sample_every, last) and not stop.is_set():
                    late.flush()
                    with clock.spent_on("samples"):
                        write_samples(stage.sample(state.ema), config, workdir, step, writer)
                if stop.is_set() and saved == step:
                    break
            late.flush()
        finally:
            # Whatever ended the loop, the last checkpoint is finished and the metrics are on disk.
            with ExitStack() as closing:  # from the last to the first, each although another failed
                closing.callback(writer.close)
                if step > start:
                    closing.callback(goodput.record, finished=step == settings.steps)
                closing.callback(finish_checkpoints)
                closing.callback(progress.close)
                closing.callback(stage.batches.close)
                closing.callback(profiler.close)

    # --------------------------------------------------------------------------------------------------------- finish
    if step > start:
        say(goodput.line)
    if skills := losses_by_skill(last_line):
        say(skills)
    say(
        f"{'stopped' if step < settings.steps else 'done'} at step {step}, saved at {saved}, "
        f"after {duration(clock.total)}; the step was compiled to {programs.count} program{'s' * (programs.count != 1)}"
    )
    return Summary(step, step < settings.steps, dict(last_line))


# ------------------------------------------------------------------------------------------------------------- helpers


def due(step: int, every: int, last: bool = False) -> bool:
    """Whether something that happens `every` so many steps (0: never), and at the `last`, happens now."""
    return bool(every) and (step % every == 0 or last)


def place(batch: Any, mesh: jax.sharding.Mesh) -> Any:
    """This process's rows as arrays of the whole mesh, split over its data axes."""
    where = sharding.batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(batch, where)
    return jax.tree.map(lambda local: jax.make_array_from_process_local_data(where, np.asarray(local)), batch)


def write_samples(
    videos: list[np.ndarray], config: Config, workdir: epath.Path, step: int, writer: MetricsWriter
) -> None:
    """WORKDIR/samples/STEP.mp4, all videos in a grid, and a few frames of each in TensorBoard."""
    if jax.process_index():
        return
    writer.image(step, "samples", film_strips(videos))
    record = Record(" | ".join(config.sample.prompts), config.sample.seed, f"{workdir.name} at step {step}")
    frames = grid(videos)
    path = workdir / "samples" / f"{step:07d}.{'mp4' if len(frames) > 1 else 'png'}"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_media(frames, path, record, fps=config.sample.fps)


def mesh_of(config: Config) -> jax.sharding.Mesh:
    """The mesh of a run, which must split its batches evenly."""
    mesh, batch = sharding.make_mesh(asdict(config.train.mesh)), config.train.batch_size
    shards, accumulate = mesh.shape["data"] * mesh.shape["fsdp"], config.train.accumulate
    rows = shards * accumulate
    if batch % rows:
        passes = f" in {accumulate} passes (train.accumulate)" if accumulate > 1 else ""
        raise UserError(
            f"train.batch_size {batch} cannot be split over data x fsdp = {shards} devices{passes}; "
            f"nearest: {max(round(batch / rows), 1) * rows}"
        )
    return mesh


def refuse_other_config(config: Config, workdir: epath.Path, force: bool) -> None:
    """A workdir belongs to one config, except for `configs.FREE_ON_RESUME`."""
    path = workdir / "config.json"
    if force or not path.exists():
        return
    try:
        before = configs.from_json(path.read_text())
    except ValueError as error:
        raise UserError(
            f"{path} cannot be read ({error}); give another workdir, or --force to go on in this one"
        ) from None
    changes = configs.difference(before, config, configs.FREE_ON_RESUME)
    if changes:
        raise UserError(
            f"{workdir} was made by another config ({'; '.join(changes)}); "
            "give another workdir, or --force to go on in this one"
        )


@contextmanager
def stop_signals(say: Say) -> Iterator[threading.Event]:
    """An event that SIGTERM and Ctrl-C set while the block runs; a second Ctrl-C interrupts at once.

    Only a main thread can take signals; elsewhere the event is never set. With several processes SIGTERM is left to
    JAX, which tells the others (see `stopping`).
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
        yield stop
        return

    def request(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        say(f"{signal.Signals(number).name}: finishing this step, then saving")

    before = {number: signal.signal(number, request) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stopping(stop: threading.Event, checkpoints: Checkpoints, step: int) -> bool:
    """Whether to stop after this step. Several processes have to agree, which is Orbax's business there."""
    if jax.process_count() > 1 and checkpoints.reached_preemption(step):
        stop.set()
    return stop.is_set()
