"""The compute half of a plan: how many operations a step is, how many are executed, and how long that must take.

Counts are from the jaxprs of the programs that run. Times are arithmetic and not measurement: operations, bytes of
memory and bytes of links over the vendors' figures for a device. No step is faster than the slowest of the three; what
share of the peak it reaches (MFU) only a device can say, so the table beside them is for 40, 50 and 60 %.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from flax import nnx

from sora_jax.bench.flops import program_flops
from sora_jax.bench.programs import Program, TrainingProgram
from sora_jax.config import Config
from sora_jax.diffusion.levels import Levels, draw_levels
from sora_jax.models.autoencoder import Autoencoder
from sora_jax.models.routing import draw_through
from sora_jax.models.structure import structure_of
from sora_jax.training.adapters import complete, networks
from sora_jax.training.autoencoder_step import MODULE
from sora_jax.training.diffusion_step import DiffusionModules, diffusion_loss, index_of, read_text
from sora_jax.training.metrics import peak_flops

SHARES = (40, 50, 60)  # % of the peak


class Bandwidth(NamedTuple):
    """Bytes a second of one device: its memory, and all its links to other chips of the slice together, one way."""

    memory: float
    links: float


# Vendors' data sheets; a device of tpu7x is one of the chip's two.
BANDWIDTH = {
    "v4": Bandwidth(1.2e12, 300e9),
    "v5e": Bandwidth(0.82e12, 200e9),
    "v5p": Bandwidth(2.76e12, 600e9),
    "v6e": Bandwidth(1.64e12, 448e9),
    "tpu7x": Bandwidth(3.69e12, 600e9),
}


@dataclass(frozen=True)
class Compute:
    """Of one step, over all devices. Seconds are None where the device's figures are not known."""

    flops: float  # of the model: forward, and twice that again for what learns; recomputation is not counted
    executed_flops: float  # of the program as it is
    seconds_at_best: dict[str, float] | None  # "products", "memory", "links"
    at_mfu: dict[str, dict[str, float]] | None  # "40%": seconds_per_step, ...; reachable: by `seconds_at_best`


def training_flops(config: Config, program: TrainingProgram, platform: str) -> tuple[float, float]:
    """(of the model, executed) in a train step of the whole batch.

    The backward pass of what learns is twice its forward pass; one that only hands gradients on, under adapters, once.
    """
    modules = DiffusionModules(**{name: structure_of(build) for name, build in networks(config).items()})
    dtype = program.dtype

    def text(params: Any, kept: Any, rows: Any) -> jax.Array:
        return read_text(modules, complete(kept, params), rows, dtype)

    def loss(params: Any, kept: Any, rows: Any, levels: Levels) -> jax.Array:
        share = config.transformer.route_share
        through = draw_through(jax.random.key(0), rows.segment_ids, share) if share else None
        return diffusion_loss(modules, complete(kept, params), rows, levels, rows.tokens, dtype, through=through)

    state, kept, rows = program.state, program.kept, program.rows
    levels = jax.eval_shape(lambda rows: draw_levels(jax.random.key(0), config.levels, index_of(rows)), rows)
    # The model's are those of one device: what a mesh pads, tokens or heads that it does not divide, is not the model.
    of_text = program_flops(text, state.params, kept, rows, platform=platform)
    of_loss = program_flops(loss, state.params, kept, rows, levels, platform=platform)
    with jax.set_mesh(program.mesh):
        executed = program_flops(program.step, state, rows, kept, platform=platform)
    learns = config.train.learns
    transformer = of_loss - of_text
    return (2 if learns == "lora" else 3) * transformer + (3 if learns == "all" else 1) * of_text, executed


def autoencoder_flops(config: Config, program: TrainingProgram, platform: str) -> tuple[float, float]:
    """(of the model, executed) in a train step of the autoencoder: three times encoder and decoder, or once an encoder
    that is kept."""
    graphdef = structure_of(lambda rngs: Autoencoder(config.autoencoder, rngs=rngs))
    clips = jax.ShapeDtypeStruct(program.rows.shape, program.dtype)
    latents = jax.eval_shape(lambda p, x: nnx.merge(graphdef, p).encode(x).mean, program.state.params[MODULE], clips)

    def encode(params: Any, x: Any) -> Any:
        return nnx.merge(graphdef, params[MODULE]).encode(x).mean

    def decode(params: Any, x: Any) -> Any:
        return nnx.merge(graphdef, params[MODULE]).decode(x)

    with jax.set_mesh(program.mesh):
        of_encoder = program_flops(encode, program.state.params, clips, platform=platform)
        of_decoder = program_flops(decode, program.state.params, latents, platform=platform)
        executed = program_flops(program.step, *program.arguments, platform=platform)
    return (3 if config.reconstruction.train_encoder else 1) * of_encoder + 3 * of_decoder, executed


def sampling_flops(program: Program, platform: str) -> tuple[float, float]:
    """(of the model, executed) in a guided solver step of all rows."""
    of_model = program_flops(program.step, *program.arguments, platform=platform)
    with jax.set_mesh(program.mesh):
        return of_model, program_flops(program.step, *program.arguments, platform=platform)


def compute(
    flops: float, executed: float, devices: list[Any], kind: str, rows: int, tokens: int, traffic: Mapping[str, float]
) -> Compute:
    """`kind` is that of a TPU ("v5p"), or anything else; `traffic` has the bytes a step of one device, of "memory" and
    "links" (where these are of one kind)."""
    peak = peak_flops(devices[0].device_kind) if devices else None
    if peak is None:
        return Compute(flops, executed, None, None)
    best = {"products": executed / (peak * len(devices))}
    if kind in BANDWIDTH:
        best |= {what: amount / getattr(BANDWIDTH[kind], what) for what, amount in traffic.items()}
    chips = len(devices) / (2 if kind == "tpu7x" else 1)
    slowest = max(best.values())
    table = {}
    for share in SHARES:
        seconds = flops / (peak * len(devices) * share / 100)
        table[f"{share}%"] = {
            "seconds_per_step": seconds,
            "videos_per_second": rows / seconds,
            "tokens_per_day": 86_400 * tokens / seconds,
            "chip_hours_per_1000_steps": chips * 1000 * seconds / 3600,
            "reachable": seconds >= slowest,  # recomputation alone may forbid 60 %
        }
    return Compute(flops, executed, best, table)


# ---------------------------------------------------------------------------------------------------- what links carry

_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_COLLECTIVE = re.compile(rf"= (?P<shapes>\(?[a-z0-9]+\[[^=]*?) (?P<kind>{'|'.join(_KINDS)})(?P<start>-start)?\(")
_COMMENT = re.compile(r"/\*.*?\*/")  # "/*index=5*/" in the results of what has more than five
_CALLED = re.compile(r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_FINISHED = re.compile(r" async-(?:done|update)\(")  # calls what was started once more
_BOUND = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SHAPE = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")
_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}


def count_collectives(hlo: str) -> dict[str, dict[str, int]]:
    """Collectives that a compiled program runs, by kind: how often, and the bytes of their results on one device; in a
    loop as often as it turns.

    What goes on beside other work stands in the text of a TPU's program more than once, where it starts and, within
    fusions, where it is done: of these a channel is counted once. Other collectives may share a channel.
    """
    computations, entry = _computations(hlo)
    plain: list[tuple[str, str | None, int, int]] = []  # kind, channel, times, bytes
    fused: dict[tuple[str, str | None], tuple[int, int]] = {}  # the same, by kind and channel

    def visit(name: str, times: int, in_fusion: bool) -> None:
        for line in computations.get(name, ()):
            if match := _COLLECTIVE.search(line):
                kind, channel = match["kind"], _CHANNEL.search(line)
                if in_fusion and channel:
                    before = fused.get((kind, channel[1]), (0, 0))[0]
                    fused[kind, channel[1]] = (max(times, before), _result_bytes(match))
                else:
                    plain.append((kind, channel[1] if channel else None, times, _result_bytes(match)))
            turns = _turns(line, computations)
            if not _FINISHED.search(line):
                for called in _calls(line):
                    visit(called, times * turns, in_fusion or " fusion(" in line)

    visit(entry, 1, False)
    started = {(kind, channel) for kind, channel, _, _ in plain}
    runs = [(kind, times, size) for kind, _, times, size in plain]
    runs += [(kind, times, size) for (kind, channel), (times, size) in fused.items() if (kind, channel) not in started]
    found: dict[str, dict[str, int]] = {}
    for kind, times, size in runs:
        total = found.setdefault(kind, {"count": 0, "bytes": 0})
        total["count"] += times
        total["bytes"] += times * size
    return found


def _turns(line: str, computations: Mapping[str, list[str]]) -> int:
    """How often a loop turns, by what is written beside it or by what its condition compares the counter with; 1 for a
    line that is no loop."""
    if told := _TURNS.search(line):
        return int(told[1])
    condition = _CONDITION.search(line)
    bounds = [int(n) for text in computations.get(condition[1], ()) for n in _BOUND.findall(text)] if condition else []
    return max(bounds, default=1)


def link_bytes(collectives: Mapping[str, Mapping[str, int]]) -> float:
    """What a device sends, at least: an all-reduce is a reduce-scatter and an all-gather."""
    return float(sum((2 if kind == "all-reduce" else 1) * found["bytes"] for kind, found in collectives.items()))


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation of a program, and the name of the one that is run."""
    computations: dict[str, list[str]] = {}
    current = entry = ""
    for line in _COMMENT.sub("", hlo).splitlines():
        if header := _HEADER.match(line):
            current = header[2]
            computations[current] = []
            entry = current if header[1] else entry
        elif current:
            computations[current].append(line)
    return computations, entry


def _calls(line: str) -> Iterator[str]:
    yield from _CALLED.findall(line)
    for names in _BRANCHES.findall(line):
        yield from (name.strip().lstrip("%") for name in names.split(","))


def _result_bytes(collective: re.Match[str]) -> int:
    """Of what a collective gives. What is started gives its operands as well, before its results, and numbers that
    stand for its progress; but an all-reduce its results alone."""
    sizes = []
    for dtype, dims in _SHAPE.findall(collective["shapes"]):
        size = _SIZES.get(dtype, 8)
        for n in dims.split(","):
            size *= int(n) if n else 1
        sizes.append((size, dims))
    if collective["start"] and collective["kind"] != "all-reduce":
        arrays = [one for one in sizes if one[1]]
        sizes = arrays[len(arrays) // 2 :]
    return sum(size for size, _ in sizes)
