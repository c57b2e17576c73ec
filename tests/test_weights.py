"""Model folders: what `diffusers` writes loads with nothing left over, what we write has its names, damage is named.

`fixtures/layout.json` holds the names and shapes that `diffusers` and `transformers` write, `fixtures/layout.npz` what
their models compute with the weights that `seeded` makes of these names and shapes (see `record_layout.py`).
Files are written and read here by the `safetensors` package, which the code under test does not use.
"""

import dataclasses
import json
import zlib
from pathlib import Path
from typing import ClassVar

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.numpy import load_file, safe_open, save_file

from sora_jax.errors import UserError
from sora_jax.models.tokenizer import ByteTokenizer
from sora_jax.shapes import Condition, Extent
from sora_jax.sharding import make_mesh
from sora_jax.tokens.patchify import patchify, token_positions, unpatchify
from sora_jax.weights.component import load_component, save_component
from sora_jax.weights.defaults import SamplingDefaults, SchedulerDefaults
from sora_jax.weights.files import parse_json
from sora_jax.weights.layout import FAMILIES, load_folder, save_folder
from sora_jax.weights.umt5 import TEXT_ENCODER
from sora_jax.weights.wan import AUTOENCODER, TRANSFORMER

RECORDED = json.loads((Path(__file__).parent / "fixtures" / "layout.json").read_text())
WEIGHTS = {family.folder: f"{family.folder}/{family.stem}.safetensors" for family in FAMILIES}


COMPUTED = np.load(Path(__file__).parent / "fixtures" / "layout.npz")


def seeded(name: str, shape: list[int]) -> np.ndarray:
    """The weights that `record_layout.py` ran the other implementation with."""
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    return (values / np.sqrt(max(1, np.prod(shape[1:])))).astype(np.float32)


def write_recorded(folder: Path, form: str) -> None:
    for name, content in RECORDED[form].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".json"):
            (folder / name).write_text(json.dumps(content))
        else:
            save_file({key: seeded(key, shape) for key, shape in content.items()}, folder / name)


@pytest.fixture(scope="module", params=list(RECORDED))
def form(request):
    return request.param


@pytest.fixture(scope="module")
def recorded(form, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded")
    write_recorded(folder, form)
    return folder


@pytest.fixture(scope="module")
def model(recorded):
    return load_folder(recorded)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    return Path(save_folder(tmp_path_factory.mktemp("saved") / "model", model, card="# A model\n"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    write_recorded(folder, "2.2")
    return load_folder(folder)


@pytest.fixture
def text_encoder(tmp_path):
    """The folder of a component to do damage to, its tensors, and a function that loads it."""
    write_recorded(tmp_path, "2.1")
    return tmp_path / "text_encoder", load_file(tmp_path / WEIGHTS["text_encoder"])


# --- both directions -----------------------------------------------------------------------------------------------


def test_every_tensor_survives_loading_and_saving(recorded, saved):
    for path in WEIGHTS.values():
        before, after = load_file(recorded / path), load_file(saved / path)
        assert after.keys() == before.keys()
        for name, tensor in before.items():
            np.testing.assert_array_equal(after[name], tensor, err_msg=name)
        with safe_open(saved / path, framework="np") as file:
            assert file.metadata() == {"format": "pt"}  # what transformers asks for


def test_what_we_write_of_configs_is_what_they_wrote(form, saved):
    ours_to_say = {"_diffusers_version", "dropout_rate", "is_encoder_decoder"}  # we have no dropout and no decoder
    for name, theirs in RECORDED[form].items():
        if name.endswith(".json") and not name.startswith("tokenizer"):
            ours = json.loads((saved / name).read_text())
            assert {key: ours[key] for key in ours.keys() & theirs.keys() - ours_to_say} == {
                key: theirs[key] for key in ours.keys() & theirs.keys() - ours_to_say
            }
            assert ours.keys() - theirs.keys() <= {"pad_token_id", "tie_word_embeddings"}


def test_saved_folder_loads_as_what_was_saved(model, saved):
    again = load_folder(saved)
    for field in dataclasses.fields(model):
        if field.name in ("transformer", "autoencoder", "text_encoder"):
            a, b = getattr(model, field.name), getattr(again, field.name)
            assert jax.tree.structure(a) == jax.tree.structure(b)
            assert jax.tree.all(jax.tree.map(np.array_equal, a, b))
        elif field.name != "path":
            assert getattr(model, field.name) == getattr(again, field.name)
    assert (saved / "README.md").read_text() == "# A model\n"


def run(family, config, params):
    module = nnx.eval_shape(lambda: family.module(config, rngs=nnx.Rngs(0)))
    return nnx.merge(nnx.split(module, graph=False)[0], params)


def channels_last(x: np.ndarray) -> jax.Array:
    return jnp.asarray(np.moveaxis(x, 1, -1))


def test_autoencoder_computes_what_theirs_does(form, model):
    """Every weight is where it belongs, by what comes of it: rows of the table that are swapped show only here."""
    video, latents = (channels_last(COMPUTED[f"{form}/{name}"]) for name in ("video", "latents"))
    autoencoder = run(AUTOENCODER, model.autoencoder_config, model.autoencoder)
    with jax.default_matmul_precision("highest"):
        posterior, decoded = jax.jit(autoencoder.encode)(video), jax.jit(autoencoder.decode)(latents)
    for name, found in (("mean", posterior.mean), ("logvar", posterior.logvar), ("decoded", decoded)):
        np.testing.assert_allclose(found, channels_last(COMPUTED[f"{form}/{name}"]), atol=1e-5, err_msg=name)


def test_text_encoder_and_transformer_compute_what_theirs_do(small):
    ids = jnp.asarray(COMPUTED["2.2/token_ids"], jnp.int32)
    text_encoder = run(TEXT_ENCODER, small.text_encoder_config, small.text_encoder)
    transformer = run(TRANSFORMER, small.transformer_config, small.transformer)
    noisy, patch = channels_last(COMPUTED["2.2/noisy"]), small.transformer_config.patch
    one = jnp.ones((1, 8), jnp.int32)
    with jax.default_matmul_precision("highest"):
        text = jax.jit(text_encoder.__call__)(ids, jnp.ones_like(ids))
        condition = Condition(
            positions=jnp.asarray(token_positions(Extent(2, 2, 2)))[None],
            segment_ids=one,
            prompt_ids=one,
            level_ids=0 * one,
            given=one == 0,
            text=text,
            text_ids=jnp.ones_like(ids),
        )
        velocity = jax.jit(transformer.__call__)(patchify(noisy, patch), jnp.full((1, 1), 437.0), condition)
    np.testing.assert_allclose(text, COMPUTED["2.2/text"], atol=1e-5)
    expected = channels_last(COMPUTED["2.2/velocity"])
    np.testing.assert_allclose(unpatchify(velocity, Extent(2, 4, 4), patch), expected, atol=1e-5)


def test_tables_name_everything_once():
    for family in FAMILIES:
        rows = family.table(family.read_config(RECORDED["2.2"][f"{family.folder}/config.json"]))
        assert len({row.ours for row in rows}) == len({row.theirs for row in rows}) == len(rows)


# --- dtypes, shards, devices ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_narrow_weights_are_widened_exactly_or_kept(text_encoder, dtype):
    folder, tensors = text_encoder
    narrow = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    save_file(narrow, folder / "model.safetensors")
    _, wide = load_component(folder, TEXT_ENCODER)
    assert wide["embed"].get_value().dtype == jnp.float32
    np.testing.assert_array_equal(wide["embed"].get_value(), narrow["shared.weight"].astype(np.float32))
    _, kept = load_component(folder, TEXT_ENCODER, dtype=None)
    assert kept["embed"].get_value().dtype == dtype


def test_what_a_family_keeps_wide_is_float32_at_any_dtype(tiny_model):
    _, params = load_component(tiny_model / "transformer", TRANSFORMER, dtype=jnp.bfloat16)
    dtypes = {".".join(map(str, path)): leaf.get_value().dtype for path, leaf in nnx.to_flat_state(params)}
    wide = {name for name, dtype in dtypes.items() if dtype == jnp.float32}
    assert {"blocks.modulation", "blocks.self_attn.q_norm.scale", "time_embed.in_proj.kernel"} <= wide
    assert {"blocks.ffn.in_proj.kernel", "head.kernel", "time_proj.kernel"} <= dtypes.keys() - wide


def test_saving_as_bfloat16_rounds_to_nearest_even(text_encoder, tmp_path):
    folder, tensors = text_encoder
    tensors["encoder.final_layer_norm.weight"][:3] = [1 + 2**-8, 1 + 3 * 2**-8, 1.0]  # both halfway between two
    save_file(tensors, folder / "model.safetensors")
    save_component(tmp_path / "out", TEXT_ENCODER, *load_component(folder, TEXT_ENCODER), dtype="bfloat16")
    found = load_file(tmp_path / "out" / "model.safetensors")["encoder.final_layer_norm.weight"]
    assert found.dtype == jnp.bfloat16
    assert found[:3].astype(np.float32).tolist() == [1.0, 1 + 2**-6, 1.0]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_shards_load_as_one_file_does(text_encoder):
    folder, tensors = text_encoder
    _, whole = load_component(folder, TEXT_ENCODER)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {f"model-0000{k + 1}-of-00003.safetensors": names[k::3] for k in range(3)}
    for shard, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, folder / shard)
    index = {"metadata": {}, "weight_map": {key: shard for shard, keys in shards.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    _, params = load_component(folder, TEXT_ENCODER)
    assert jax.tree.all(jax.tree.map(np.array_equal, params, whole))

    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00003\.safetensors is missing, one of 3 shards"):
        load_component(folder, TEXT_ENCODER)


def test_parameters_are_placed_on_the_mesh(text_encoder):
    _, params = load_component(text_encoder[0], TEXT_ENCODER, mesh=make_mesh())
    kernel = params["blocks"]["gate"]["kernel"].get_value()  # layers, embed, mlp
    assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor")


def test_a_tensor_stored_twice_must_be_the_same(text_encoder):
    """Some files repeat the embedding under its name inside the encoder."""
    folder, tensors = text_encoder
    again = tensors["shared.weight"].copy()
    save_file(tensors | {"encoder.embed_tokens.weight": again}, folder / "model.safetensors")
    load_component(folder, TEXT_ENCODER)
    again[3, 3] += 1
    save_file(tensors | {"encoder.embed_tokens.weight": again}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r'"encoder\.embed_tokens\.weight" differs from "shared\.weight"'):
        load_component(folder, TEXT_ENCODER)


# --- damage --------------------------------------------------------------------------------------------------------

WO = "encoder.block.1.layer.1.DenseReluDense.wo.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop(WO), rf'lacks tensor "{WO}"$'),
        (lambda t: [t.pop(WO), t.pop("shared.weight")], rf'lacks tensors "shared\.weight", "{WO}"$'),
        (
            lambda t: t.update({f"lm_head.{i:02d}": t[WO] for i in range(12)}),
            r'unexpected tensors "lm_head\.00", .*"lm_head\.09" and 2 more$',
        ),
        (lambda t: t.update({"lm_head.weight": t[WO]}), r'unexpected tensor "lm_head\.weight"$'),
        (
            lambda t: t.update({WO: t[WO].T.copy()}),
            rf'"{WO}" has the wrong shape: expected \[12, 20\], found \[20, 12\]$',
        ),
        (lambda t: t.update({WO: t[WO].astype(np.float64)}), rf'"{WO}" has dtype F64; known: F32, F16, BF16$'),
    ],
)
def test_wrong_tensors_are_named(text_encoder, damage, message):
    folder, tensors = text_encoder
    damage(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=message) as error:
        load_component(folder, TEXT_ENCODER)
    assert str(folder / "model.safetensors") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_cut_anywhere_is_refused(text_encoder):
    folder, tensors = text_encoder
    path = folder / "model.safetensors"
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for size in (0, 5, 8, header - 1):
        path.write_bytes(data[:size])
        with pytest.raises(
            UserError, match=r"model\.safetensors is not a safetensors file, or is cut off in its header"
        ):
            load_component(folder, TEXT_ENCODER)
    for size in (header, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(UserError, match="is cut off: tensor") as error:
            load_component(folder, TEXT_ENCODER)
        assert any(f'"{name}"' in str(error.value) for name in tensors)
        assert f"the file has {size}" in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "Git LFS pointer"),
        ((20).to_bytes(8, "little") + b'{"a":{"shape":[1]}} ', "header is damaged"),
        ((2).to_bytes(8, "little") + b"[]", "header is damaged"),
        *(
            (len(header).to_bytes(8, "little") + header, "header is damaged")
            for header in (
                b'{"a":{"dtype":"F32","shape":"ab","data_offsets":[0,4]}}',
                b'{"a":{"dtype":"F32","shape":["b"],"data_offsets":[0,4]}}',
                b'{"a":{"dtype":"F32","shape":[1.5],"data_offsets":[0,4]}}',
                b'{"a":{"dtype":"F32","shape":[1],"data_offsets":["0","4"]}}',
            )
        ),
        (b"PK\x03\x04" + b"\0" * 4 + b"\xff" * 90, "not a safetensors file"),
    ],
)
def test_other_files_are_refused(text_encoder, content, message):
    folder, _ = text_encoder
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_component(folder, TEXT_ENCODER)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", {"_class_name": "FluxPipeline"}, 'describes a "FluxPipeline"; known: WanPipeline'),
        ("model_index.json", {"vae": ["diffusers", "AutoencoderKL"]}, 'has "AutoencoderKL" as vae'),
        ("model_index.json", {"vae": ["AutoencoderKLWan"]}, "as vae, not AutoencoderKLWan"),
        ("model_index.json", {"transformer_2": 3}, 'has "3" as transformer_2'),
        (
            "model_index.json",
            {"transformer_2": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": "high"},
            r"boundary_ratio must lie in \[0, 1\], not 'high'",
        ),
        ("tokenizer/tokenizer_config.json", {"model_max_length": "many"}, "wrong type|must be a number >= 1"),
        ("scheduler/scheduler_config.json", {"flow_shift": "far"}, "value of the wrong type.*'far'"),
        ("transformer/config.json", {"patch_size": "abc"}, "patch_size must be three whole numbers > 0, not 'abc'"),
        (
            "model_index.json",
            {"transformer_2": ["diffusers", "WanTransformer3DModel"]},
            "boundary_ratio, .* one is missing",
        ),
        ("model_index.json", {"transformer_2": ["diffusers", "QwenTransformer"]}, '"QwenTransformer" as transformer_2'),
        (
            "tokenizer/tokenizer_config.json",
            {"tokenizer_class": "T5Tokenizer"},
            r"tokenizer\.json, its pieces, is missing",
        ),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, 'scheduler "DDIMScheduler" is not'),
        (
            "scheduler/scheduler_config.json",
            {"prediction_type": "epsilon"},
            "prediction_type 'epsilon' is not supported",
        ),
        ("scheduler/scheduler_config.json", {"use_flow_sigmas": None}, "use_flow_sigmas False is not supported"),
        ("transformer/config.json", {"image_dim": 1280}, "image_dim 1280 is not supported"),
        (
            "transformer/config.json",
            {"num_layer": 3},
            'unknown transformer config key "num_layer": did you mean "num_l',
        ),
        ("transformer/config.json", {"ffn_dim": None}, 'lacks "ffn_dim"'),
        ("vae/config.json", {"dim_mult": 3}, "value of the wrong type"),
        ("transformer/config.json", {"_class_name": "FluxTransformer"}, 'describes a "FluxTransformer"'),
        ("transformer/config.json", {"ffn_dim": 24}, r"expected \[24, 12\], found \[20, 12\]"),
        ("text_encoder/config.json", {"num_layers": 3}, r'lacks tensors "encoder\.block\.2\.layer\.0'),
        ("sora_jax.json", {"guidence": 3}, 'unknown key "guidence": did you mean "guidance"'),
    ],
)
def test_unsupported_folders_are_refused(tmp_path, file, changes, message):
    write_recorded(tmp_path, "2.1")
    values = json.loads((tmp_path / file).read_text()) if (tmp_path / file).exists() else {}
    values = {key: value for key, value in (values | changes).items() if value is not None or key == "image_dim"}
    (tmp_path / file).write_text(json.dumps(values))
    with pytest.raises(UserError, match=message) as error:
        load_folder(tmp_path)
    assert str(tmp_path / file).removesuffix("config.json") in str(error.value)


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"is not a model folder: it has no model_index\.json"):
        load_folder(tmp_path)
    write_recorded(tmp_path, "2.1")
    (tmp_path / "vae" / "config.json").write_text('{"base_dim": 4,')
    with pytest.raises(UserError, match=r"vae/config\.json is not JSON"):
        load_folder(tmp_path)
    (tmp_path / "vae" / "config.json").unlink()
    with pytest.raises(UserError, match=r"vae/config\.json is missing"):
        load_folder(tmp_path)


def test_an_index_of_shards_that_lists_none_is_refused(text_encoder):
    folder, _ = text_encoder
    (folder / "model.safetensors").unlink()
    for listed in ({}, {"weight_map": []}, {"weight_map": {WO: 3}}):
        (folder / "model.safetensors.index.json").write_text(json.dumps(listed))
        with pytest.raises(UserError, match=r"index\.json has no weight_map of tensors to files"):
            load_component(folder, TEXT_ENCODER)


@dataclasses.dataclass(frozen=True)
class Sizes:
    width: int = 8
    eps: float = 1e-6
    name: str = ""


@pytest.mark.parametrize(
    "values", [{"width": "8"}, {"width": 8.0}, {"width": True}, {"width": None}, {"eps": "small"}, {"name": 3}]
)
def test_a_value_of_the_wrong_type_is_named(tmp_path, values):
    (tmp_path / "config.json").write_text(json.dumps({"width": 16, "eps": 1} | values))
    with pytest.raises(UserError, match=rf"wrong type: {next(iter(values))} is .*, not of type (int|float|str)$"):
        parse_json(epath.Path(tmp_path / "config.json"), lambda found: Sizes(**found))
    (tmp_path / "config.json").write_text(json.dumps({"width": 16, "eps": 1}))
    assert parse_json(epath.Path(tmp_path / "config.json"), lambda found: Sizes(**found)) == Sizes(16, 1)


def test_components_that_do_not_fit_each_other_are_refused(model):
    wider = dataclasses.replace(model.text_encoder_config, d_model=16)
    with pytest.raises(UserError, match="reads text of width 12, the text encoder makes 16"):
        dataclasses.replace(model, text_encoder_config=wider)


# --- saving --------------------------------------------------------------------------------------------------------


def test_sampling_defaults_travel_with_the_folder(small, tmp_path):
    defaults = SamplingDefaults("world-1", 17, 64, 64, 8.0, 24, 4.0, "blurry", {"licence": "Apache-2.0", "psnr": 33.5})
    told = dataclasses.replace(
        small, defaults=defaults, scheduler=SchedulerDefaults("euler", 2.5), tokenizer=ByteTokenizer(96)
    )
    again = load_folder(save_folder(tmp_path / "model", told))
    assert (again.defaults, again.scheduler, again.tokenizer) == (defaults, told.scheduler, told.tokenizer)


def test_a_folder_that_is_there_is_kept_unless_asked(small, tmp_path):
    path = save_folder(tmp_path / "model", small)
    with pytest.raises(UserError, match="model exists: choose another name, or ask to overwrite it"):
        save_folder(path, small)
    save_folder(path, dataclasses.replace(small, defaults=SamplingDefaults(steps=7)), overwrite=True)
    assert load_folder(path).defaults.steps == 7
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is not a folder written by this command"):
        save_folder(tmp_path / "home", small, overwrite=True)
    assert sorted(child.name for child in tmp_path.iterdir()) == ["home", "model"]


@pytest.mark.parametrize("there", [False, True])
def test_an_interrupted_save_leaves_what_was_there(small, tmp_path, monkeypatch, there):
    if there:
        save_folder(tmp_path / "model", small)

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(SchedulerDefaults, "to_dict", interrupt)  # after gigabytes of weights
    with pytest.raises(KeyboardInterrupt):
        save_folder(tmp_path / "model", small, overwrite=True)
    assert [child.name for child in tmp_path.iterdir()] == ["model"] * there
    if there:
        load_folder(tmp_path / "model")


class Bucket(MemoryFileSystem):
    """An object store in memory, under the name that `gs://` paths are looked up by."""

    protocol = ("gcs", "gs")
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("gs://", "memory://"))


def test_folders_may_lie_in_an_object_store(small, monkeypatch):
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    path = save_folder("gs://bucket/models/small", small)
    again = load_folder("gs://bucket/models/small")
    assert jax.tree.all(jax.tree.map(np.array_equal, again.autoencoder, small.autoencoder))
    with pytest.raises(UserError, match="gs://bucket/models/small exists"):
        save_folder(path, small)

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(SchedulerDefaults, "to_dict", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_folder(path, small, overwrite=True)
    with pytest.raises(UserError, match="is not a model folder"):  # half-written, and known to be
        load_folder(path)


def test_requests_that_cannot_be_met_write_nothing(small, tmp_path):
    with pytest.raises(UserError, match='cannot be saved as "float61": did you mean "bfloat16"'):
        save_folder(tmp_path / "model", small, dtype="float61")
    with pytest.raises(ValueError, match=r"not the parameters of the UMT5EncoderModel config: .*embed"):
        save_folder(
            tmp_path / "model",
            dataclasses.replace(
                small, text_encoder_config=dataclasses.replace(small.text_encoder_config, vocab_size=400)
            ),
        )
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        save_folder(tmp_path / "file" / "model", small)
    assert [child.name for child in tmp_path.iterdir()] == ["file"]
