"""What a stage of training is, as the loop sees it: parameters, a step, batches, a validation and samples."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh

from sora_jax.config import Config
from sora_jax.sharding import DataPart, data_part
from sora_jax.training.metrics import WEIGHT
from sora_jax.training.state import TrainState

Videos = list[np.ndarray]  # uint8 [T, H, W, 3] each


@runtime_checkable
class Batches(Protocol):
    """An endless iterator that can say where it is and be put there again; `state` fits into JSON."""

    def __next__(self) -> Any: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Context:
    """What a stage is built from."""

    config: Config
    workdir: epath.Path
    mesh: Mesh
    optimizer: optax.GradientTransformation
    dtype: jnp.dtype
    say: Callable[[str], None]

    @property
    def part(self) -> DataPart:
        """Which slice of a batch is made by this process."""
        return data_part(self.mesh)

    @property
    def local_rows(self) -> int:
        """Of a batch, how many are made by this process."""
        return self.config.train.batch_size // self.part.parts


class Work(NamedTuple):
    """What a step does, or steps do in the mean."""

    tokens: float
    flops: float  # forward and backward, by formula; 0 = not known


@dataclass(frozen=True)
class Stage:
    """`batches` yield numpy trees, whose first axis is this process's rows; `step` takes them as arrays of the mesh."""

    make_params: Callable[[jax.Array], Mapping[str, Any]]
    step: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]
    batches: Batches
    describe: str  # of a batch, for people
    tokens_per_step: int = 0
    flops_per_step: float = 0.0  # forward and backward, by formula; 0 = not known
    work: Callable[[Any], Work] | None = None  # of a batch, where they differ; else it is as the two above say
    validate: Callable[[Any], dict[str, jax.Array]] | None = None  # of params, usually the average
    sample: Callable[[Any], Videos] | None = None
    kept: Collection[str] = ()  # modules that do not learn, and are as in `train.init`
    may_start_anew: Collection[str] = ()  # parts of a module that need not have the shapes of those in `train.init`
    gauges: Callable[[], Mapping[str, float]] | None = None  # of the data, for the metrics
    describe_data: Callable[[], str] | None = None  # what it has given and left out so far, for people
    describe_checkpoint: Callable[[Any], None] | None = None  # of the averages, before each checkpoint
    data: Sequence[Mapping[str, Any]] = ()  # what the batches are made from, one entry a source, as JSON: see `notes`


MakeStage = Callable[[Context], Stage]


def mean_over(
    validate: Callable[..., dict[str, jax.Array]], batches: list[Any]
) -> Callable[[Any], dict[str, jax.Array]]:
    """The mean of what `validate` finds in each of the batches. What comes with a weight (`WEIGHT`) counts so much, and
    not at all where it is NaN."""

    def mean(params: Any) -> dict[str, jax.Array]:
        found = [validate(params, batch) for batch in batches]
        means: dict[str, jax.Array] = {}
        for name in found[0]:
            if name.endswith(WEIGHT):
                continue
            values = jnp.stack([each[name] for each in found])
            if name + WEIGHT in found[0]:
                weights = jnp.stack([each[name + WEIGHT] for each in found])
                means[name] = jnp.where(weights > 0, values * weights, 0.0).sum() / weights.sum()
            else:
                means[name] = jnp.mean(values)
        return means

    return mean
