"""The one door for users: load a model, make videos.

    pipe = Pipeline.load("world")
    video = pipe.sample("a red ball bounces on a blue floor")
    video.save("ball.mp4")

    canvas ── layout ── noise ──► denoise, step by step ──► decode, latent by latent ──► frames

The pieces are public too: `encode_text`, `velocity`, `encode`, `decode`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from inspect import signature
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Float, UInt8

from sora_jax import canvas as canvases
from sora_jax import runtime, sharding
from sora_jax.canvas import Canvas, Layout, lay_out
from sora_jax.diffusion.guidance import guided_condition
from sora_jax.diffusion.sampler import denoise, find_solver, level_schedule, schedule_table, start
from sora_jax.errors import UserError, nearest
from sora_jax.load import load_model
from sora_jax.pieces import Pieces, Progress
from sora_jax.settings import Settings, check_frames, real, refuse_other_names, whole
from sora_jax.shapes import Extent, frames_for_seconds
from sora_jax.tokens.spans import spans_to_tokens, tokens_to_spans
from sora_jax.video import Video

OUTPUTS = ("uint8", "float32", "latents")


class Made(NamedTuple):
    """What came out of one batch; `trajectory` [B, S, F, h, w, C] only where it was asked for."""

    result: np.ndarray  # frames [B, T, H, W, 3], or latents [B, F, h, w, C]
    trajectory: np.ndarray | None


class Pipeline(Pieces):
    """A model, and what turns prompts and canvases into videos with it."""

    @classmethod
    def load(
        cls,
        model: epath.PathLike = "world",
        *,
        mesh: Mesh | Mapping[str, int] | None = None,
        dtype: str = "auto",
        lora: str | Mapping[str, float] | None = None,
        lora_live: bool = False,
        offload: bool = False,
        progress: Progress | None = None,
    ) -> Pipeline:
        """`model` is the name of one that ships with the package, or path or URL of a model folder or a run's
        workdir. `mesh` spreads parameters and tokens over devices; as lengths of its axes it takes all of them:
        {"fsdp": 4, "sequence": 2}. Without, one device does it all. `dtype` is that of activations and, for a model
        folder, of parameters: "auto", "float32" or "bfloat16". `lora` names a file of low-rank adapters to merge into
        the transformer, or several with a weight each; with `lora_live` they lie beside its kernels, which stay as they
        are, and `set_lora` changes the weights. With `offload` text encoder and autoencoder lie on the host, and on the
        devices for as long as they work. `progress` is called with "load", the bytes read and those of all.

        Several processes (`jax.distributed`) may load one model over a mesh of all their devices; each then makes the
        same calls, and has the same videos."""
        runtime.enable_compile_cache()
        if mesh is not None and not isinstance(mesh, Mesh):
            mesh = sharding.make_mesh(mesh)
        adapters = {lora: 1.0} if isinstance(lora, str) else lora
        loaded = load_model(model, mesh, dtype, adapters, lora_live=lora_live, offload=offload, progress=progress)
        return cls(loaded.folder, loaded.name, dtype, mesh, adapters, loaded.live)

    def __call__(self, prompt: str | Sequence[str], **options: Any) -> Any:
        """As `sample`."""
        return self.sample(prompt, **options)

    # -------------------------------------------------------------------------------------------- sampling

    def sample(
        self,
        prompt: str | Sequence[str],
        *,
        frames: int | None = None,
        seconds: float | None = None,
        height: int | None = None,
        width: int | None = None,
        image: UInt8[np.ndarray, "H W 3"] | None = None,
        last_image: UInt8[np.ndarray, "H W 3"] | None = None,
        video: UInt8[np.ndarray, "T0 H W 3"] | None = None,
        seed: int | Sequence[int] = 0,
        num_videos: int = 1,
        **options: Any,
    ) -> Any:
        """A `Video` for a prompt; a list of them for a list of prompts, or for `num_videos` > 1 of each.

        `frames` (1 + 4k; or `seconds`), `height` and `width` default to the model's. `image` gives the first frame and
        `video` the first 1 + 4j frames. `last_image` gives the last frame, which is a clip of its own for the
        autoencoder: such a video has 1 + 1 + 4k frames. Video k of a prompt has seed `seed` + k, so every prompt starts
        at `seed`, or at its own of a list of seeds; every video is what its seed makes alone. `options` are those of
        `sample_canvases`. Raises `UserError` for anything that cannot be made as asked.
        """
        known = {*signature(Pipeline.sample).parameters, *signature(Pipeline.sample_canvases).parameters}
        refuse_other_names(options, known - {"self", "options", "drawn", "seeds"})
        prompts = list(prompt) if isinstance(prompt, Iterable) and not isinstance(prompt, str) else [prompt]
        if not all(isinstance(text, str) for text in prompts):
            raise UserError(f"a prompt is a text, not {next(text for text in prompts if not isinstance(text, str))!r}")
        if whole("num_videos", num_videos) < 1:
            raise UserError(f"num_videos must be at least 1, not {num_videos}")
        asked: Any = [seed] * len(prompts) if np.ndim(seed) == 0 else seed  # a text has no dimension either
        firsts = [whole("seed", one) for one in asked]
        if len(firsts) != len(prompts):
            raise UserError(f"{len(prompts)} prompts and {len(firsts)} seeds were given: give one each, or one in all")
        for name, pixels, axes in (
            ("image", image, "H W 3"),
            ("last_image", last_image, "H W 3"),
            ("video", video, "T H W 3"),
        ):
            if pixels is not None:
                check_frames(name, pixels, axes)
        if last_image is not None and frames is None and seconds is None:
            frames = self.folder.defaults.frames + 1
        extent = self.extent(frames, seconds, height, width)
        if image is not None and video is not None:
            raise UserError("image and video both give the beginning: name one")
        given = image[None] if image is not None else video

        def draw(text: str) -> Canvas:
            if last_image is not None:
                return self._connect(text, given, last_image[None], extent)
            return canvases.text_to_video(text, extent) if given is None else canvases.extend(text, given, extent)

        drawn = [draw(text) for text in prompts for _ in range(num_videos)]
        seeds = [first + k for first in firsts for k in range(num_videos)]
        made = self.sample_canvases(drawn, seeds=seeds, **options)
        return made[0] if isinstance(prompt, str) and num_videos == 1 else made

    def _connect(self, text: str, first: np.ndarray | None, last: np.ndarray, extent: Extent) -> Canvas:
        step, frames = self.stride.time * self.patch.time, extent.frames - len(last)
        if frames < 1 or (frames - 1) % step:
            low = len(last) + 1 + max(frames - 1, 0) // step * step
            raise UserError(
                f"{extent.frames} frames that end in a given one cannot be made: that one is a clip of its own, and "
                f"{len(last)} + 1 + {step}k frames are needed; nearest: {low} or {low + step}"
            )
        return canvases.connect(text, first, last, extent)

    def sample_canvases(
        self,
        drawn: Sequence[Canvas],
        *,
        seeds: Sequence[int],
        steps: int | None = None,
        guidance: float | None = None,
        guidance_low: float | None = None,
        solver: str | None = None,
        shift: float | None = None,
        negative_prompt: str | None = None,
        noise: Float[np.ndarray, "*B F h w C"] | None = None,
        output: str = "uint8",
        trajectory: bool = False,
        batch_size: int = 1,
        progress: Progress | None = None,
    ) -> list[Video]:
        """Videos from canvases of one layout.

        `steps`, `guidance` (1: follow the model as trained), `solver`, `shift` and `negative_prompt` default to the
        model's; `guidance_low` is that of the expert for low noise, where a model has two, and is `guidance` where only
        that is given. `noise`, in normalised latent space, replaces what the seeds draw; one for all, or one each.
        `output` is "uint8", "float32" in [0, 1], or "latents". `trajectory` keeps what each step predicts. `batch_size`
        canvases go through the model at once: with 1 a video is the same to the bit in any company; with more, up to
        rounding.
        """
        defaults, scheduler = self.folder.defaults, self.folder.scheduler
        settings = Settings(
            steps=defaults.steps if steps is None else whole("steps", steps),
            guidance=real("guidance", defaults.guidance if guidance is None else guidance),
            solver=scheduler.solver if solver is None else solver,
            shift=real("shift", scheduler.shift if shift is None else shift),
            negative_prompt=defaults.negative_prompt if negative_prompt is None else negative_prompt,
            guidance_low=guidance_low if guidance is not None or guidance_low is not None else defaults.guidance_low,
        )
        if settings.guidance_low is not None and self.folder.transformer_2 is None:
            raise UserError(f"guidance_low is for models of two experts, and {self.name} has one")
        if not defaults.takes_frames and any(span.given is not None for one in drawn for span in one.spans):
            raise UserError(f"{self.name} makes videos from text alone: it was not trained beside given frames")
        if output not in OUTPUTS:
            raise UserError(f"unknown output {output!r}: {nearest(output, OUTPUTS)}")
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, not {batch_size}")
        if not drawn:
            raise UserError("no prompt was given: name at least one")
        self.folder.tokenizer.encode(settings.negative_prompt)
        for text in (text for one in drawn for text in one.prompts):
            if not text.strip():
                raise UserError("the prompt is empty: say what the video shows")
            self.folder.tokenizer.encode(text)  # says what is wrong with a prompt before anything is made
        layout = lay_out(drawn[0], self.stride, self.patch)
        if not all(lay_out(one, self.stride, self.patch).is_like(layout) for one in drawn[1:]):
            raise UserError(
                "canvases that are sampled together have one layout, given parts included: call once for each"
            )
        channels = self.folder.autoencoder_config.z_dim
        shape = (len(drawn), sum(extent.frames for extent in layout.latents), *layout.latents[0][1:], channels)
        if noise is not None and ((noise := np.asarray(noise)).dtype != np.float32 or not np.isfinite(noise).all()):
            raise UserError(f"noise must be finite numbers in float32, and this is {noise.dtype}")
        if noise is None:
            noise = np.stack([self.noise(seed, shape[1:]) for seed in seeds])
        elif noise.shape == shape[1:]:
            noise = np.broadcast_to(noise, shape)
        elif noise.shape != shape:
            raise UserError(
                f"noise has the shape {noise.shape}; these videos need {shape[1:]}, or {shape} for one each"
            )

        chunks = range(0, len(drawn), batch_size)
        videos: list[Video] = []
        for number, i in enumerate(chunks):
            some = slice(i, i + batch_size)
            ahead = _offset(progress, number, len(chunks))
            with jax.set_mesh(self.mesh) if self.mesh is not None else contextlib.nullcontext():
                made = self._sample_rows(drawn[some], layout, noise[some], settings, output, trajectory, ahead)
            for row, (one, seed) in enumerate(zip(drawn[some], seeds[some], strict=True)):
                record = settings.record(one, int(seed), self.name, defaults.fps, self.lora)
                steps = None if made.trajectory is None else made.trajectory[row]
                result, latents = made.result[row], output == "latents"
                videos.append(
                    Video(None if latents else result, defaults.fps, record, result if latents else None, steps)
                )
        return videos

    def _sample_rows(
        self,
        drawn: Sequence[Canvas],
        layout: Layout,
        noise: Float[np.ndarray, "B F h w C"],
        settings: Settings,
        output: str,
        trajectory: bool,
        progress: Progress | None,
    ) -> Made:
        """Canvases of one layout, all in one batch."""
        # 1. the canvas as rows of tokens
        rows = len(drawn)
        clean = np.stack([self._given_latents(one, layout) for one in drawn])
        clean_tokens, noise_tokens = (
            jnp.asarray(spans_to_tokens(x, layout.latents, self.patch)) for x in (clean, noise)
        )

        # 2. the text, with and without the prompt
        condition: Any = self.condition(layout, [one.prompts for one in drawn])
        low = settings.guidance if settings.guidance_low is None else settings.guidance_low
        guided = settings.guidance != 1.0 or low != 1.0
        if guided:
            without = self.condition(layout, [(settings.negative_prompt,) * len(one.prompts) for one in drawn])
            condition = guided_condition(condition, without, jnp.full((rows,), settings.guidance, jnp.float32))

        # 3. lower the levels, a step a chunk: any number of steps shares one program, and a step outlasts its dispatch
        solver = find_solver(settings.solver)
        velocity = self._velocities[solver.whole_times, guided]
        levels = level_schedule(solver, settings.steps, settings.shift)
        schedule = schedule_table(levels, np.tile(layout.given_groups, (rows, 1)))
        first = jnp.asarray(schedule[0] > 0, jnp.float32)  # noise is taken whole, however near to 1 the first level is
        state = start(solver, clean_tokens, noise_tokens, first, condition.given, condition.level_ids)
        predicted: list[np.ndarray] = []
        for i in range(settings.steps):
            before = sharding.gather(state.tokens) if trajectory else None
            second = self._experts.is_low(float(levels[i]), whole_times=solver.whole_times)
            if guided and second:
                condition = dataclasses.replace(condition, scale=jnp.full((rows,), low, jnp.float32))
            params = self._experts.params(second)
            state = denoise(velocity, params, condition, state, schedule[i : i + 2], solver=solver)
            del params
            if before is not None:
                clean_now = _extrapolate(before, sharding.gather(state.tokens), *levels[i : i + 2].tolist())
                predicted.append(self._to_latents(clean_now, layout))
            if progress is not None:
                jax.block_until_ready(state.tokens)
                progress("denoise", i + 1, settings.steps)

        # 4. frames
        steps = np.stack(predicted, axis=1) if trajectory else None
        tokens = sharding.gather(state.tokens)
        if output == "latents":
            return Made(self._to_latents(tokens, layout), steps)
        return Made(self._decode_tokens(tokens, layout, output, progress), steps)

    def extent(
        self,
        frames: int | None = None,
        seconds: float | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> Extent:
        """The size that is asked for, in pixels, with the model's defaults for what is not said."""
        defaults = self.folder.defaults
        if seconds is not None:
            if frames is not None:
                raise UserError("frames and seconds both give the duration: name one")
            frames = frames_for_seconds(real("seconds", seconds), defaults.fps, self.stride.time * self.patch.time)
        return Extent(
            defaults.frames if frames is None else whole("frames", frames),
            defaults.height if height is None else whole("height", height),
            defaults.width if width is None else whole("width", width),
        )

    # -------------------------------------------------------------------------------------------- canvas <-> tokens

    def _given_latents(self, one: Canvas, layout: Layout) -> Float[np.ndarray, "F h w C"]:
        """Latents of the whole canvas, zeros where nothing is given."""
        channels = self.folder.autoencoder_config.z_dim
        pieces = []
        for span, extent in zip(one.spans, layout.latents, strict=True):
            latents = np.zeros((*extent, channels), np.float32)
            if span.given is not None:
                given = self.encode(span.given[None])[0]
                latents[: len(given)] = given
            pieces.append(latents)
        return np.concatenate(pieces)

    def _to_latents(self, tokens: Float[np.ndarray, "B N P"], layout: Layout) -> Float[np.ndarray, "B F h w C"]:
        return np.concatenate(tokens_to_spans(tokens, layout.latents, self.patch), axis=1)

    def _decode_tokens(
        self, tokens: Float[np.ndarray, "B N P"], layout: Layout, output: str, progress: Progress | None
    ) -> np.ndarray:
        spans = tokens_to_spans(tokens, layout.latents, self.patch)
        return np.concatenate([self.decode(span, output, progress) for span in spans], axis=1)


# ------------------------------------------------------------------------------------------------ helpers


def _offset(progress: Progress | None, number: int, chunks: int) -> Progress | None:
    """`progress` for chunk `number` of `chunks`, counting through all of them."""
    if progress is None:
        return None
    return lambda stage, done, total: progress(stage, number * total + done, chunks * total)


def _extrapolate(before: np.ndarray, after: np.ndarray, level: float, lower: float) -> np.ndarray:
    """Where the straight line through a step ends at level 0: the step's prediction of the clean tokens. What is given
    does not move, and stays."""
    return after - (before - after) / (level - lower) * lower
