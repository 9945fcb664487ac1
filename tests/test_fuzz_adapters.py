"""Whatever an adapter's file holds, its reader gives a valid adapter or the one error that names the file."""

import json
import struct

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_fuzz import check_line, json_values, many, mutated

from lib import adapter_files, adapters
from lib.errors import UserError

PEFT_KEYS = ("lora_alpha", "r", "target_modules", "rank_pattern", "alpha_pattern", "init_lora_weights")
STATED = {"unet.r": 2, "unet.lora_alpha": 2, "unet.target_modules": ["to_q"]}


def adapter_bytes(tensors, header):
    return safetensors.torch.save(tensors, metadata=header)


VALID = adapter_bytes(
    {
        "unet.mid.to_q.lora_A.weight": torch.ones(2, 3),
        "unet.mid.to_q.lora_B.weight": torch.ones(4, 2),
        "text_encoder.text_model.q_proj.lora_A.weight": torch.ones(2, 3),
        "text_encoder.text_model.q_proj.lora_B.weight": torch.ones(4, 2),
    },
    {"format": "pt", "lora_adapter_metadata": json.dumps(STATED)},
)


def read(folder):
    """The adapter in `folder`, checked to be a whole one, or None where it was refused."""
    try:
        adapter = adapter_files.read_adapter(folder)
    except UserError as error:
        check_line(error, folder)
        return None
    assert adapter.factors
    for part, layers in adapter.factors.items():
        assert part in adapter_files.COMPONENTS
        assert 0 < float(adapter.alpha[part]) <= 1e6
        for a, b in layers.values():
            assert a.dtype == b.dtype == torch.float32
            assert 0 < a.shape[0] == b.shape[1] <= adapter.rank[part]
            assert a.isfinite().all()
            assert b.isfinite().all()
    assert len(adapters.fingerprint(adapter)) == 64
    return adapter


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "adapter"
    folder.mkdir()
    (folder / adapter_files.WEIGHTS).write_bytes(VALID)
    assert set(read(folder).factors) == {"unet", "text_encoder"}
    return folder


@many
@given(mutated([VALID]) | st.binary(max_size=200))
def test_adapter_bytes(folder, content):
    (folder / adapter_files.WEIGHTS).write_bytes(content)
    read(folder)


@st.composite
def edited_headers(draw):
    """VALID with its JSON header changed where a reader relies on it."""
    size = struct.unpack("<Q", VALID[:8])[0]
    header = json.loads(VALID[8 : 8 + size])
    key = draw(st.sampled_from(sorted(header)))
    if key == "__metadata__" or draw(st.booleans()):
        header[key] = draw(json_values)
    else:
        field = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        dtypes = "BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F4 F6_E2M3 I16 F16 BF16 I32 F32 C64 F64 I64 X"
        header[key][field] = draw(
            json_values
            | st.sampled_from(dtypes.split())
            | st.lists(st.integers(-1, 60), max_size=4)
            | st.lists(st.sampled_from([0, 1, 2**32, 2**62, 2**64]), max_size=3)
        )
    text = json.dumps(header).encode()
    return struct.pack("<Q", draw(st.just(len(text)) | st.integers(0, 2**64 - 1))) + text + VALID[8 + size :]


@many
@given(edited_headers())
def test_adapter_headers(folder, content):
    (folder / adapter_files.WEIGHTS).write_bytes(content)
    read(folder)


keys = st.builds(
    "{}{}{}{}".format,
    st.sampled_from(["unet.", "text_encoder.", "text_encoder.text_model.", "", "vae."]),
    st.sampled_from(["mid.to_q", "to_q", "h.0.self_attn.q_proj", "a"]) | st.text(max_size=6),
    st.sampled_from([".lora_A", ".lora_B", ".lora.up", ".lora.down", ".lora_down", ".alpha"]),
    st.sampled_from([".weight", ".default.weight", ".bias", ""]),
)
dtypes = st.sampled_from(
    [
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.int8,
        torch.int64,
        torch.bool,
        torch.float8_e4m3fn,
        torch.uint8,
    ]
)
tensors = st.builds(
    lambda shape, dtype, value: torch.full(shape, value).to(dtype),
    st.lists(st.sampled_from([0, 1, 2, 2, 2, 3]), max_size=3),
    dtypes,
    st.sampled_from([1.0, 1.0, 0.0, float("nan"), float("inf"), -3.0]),
)
pairs = st.builds(
    lambda layer, rank, a, b: {
        f"unet.{layer}.lora_A.weight": torch.full((rank, 3), a),
        f"unet.{layer}.lora_B.weight": torch.full((4, rank), b),
    },
    st.sampled_from(["mid.to_q", "mid.to_k"]),
    st.sampled_from([2, 2, 2, 1, 0]),
    *[st.sampled_from([1.0, 1.0, 1.0, 0.0, float("nan"), -float("inf")])] * 2,
)
header_values = st.text(max_size=30) | (
    json_values | st.fixed_dictionaries({}, optional={f"unet.{key}": json_values for key in PEFT_KEYS})
).map(json.dumps)


@many
@given(
    st.dictionaries(keys, tensors, max_size=6) | st.builds(lambda one, two: one | two, pairs, pairs | st.just({})),
    st.dictionaries(st.sampled_from(["lora_adapter_metadata", "rank", "seed"]), header_values),
)
def test_adapter_contents(folder, content, header):
    (folder / adapter_files.WEIGHTS).write_bytes(adapter_bytes(content, header))
    read(folder)


kohya_keys = st.builds(
    "{}{}{}".format,
    st.sampled_from(["lora_unet_", "lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lycoris_", "bundle_emb."]),
    st.sampled_from(["mid_block_to_q", "mid_block_to_k", "layers_0_self_attn_q_proj"]) | st.text(max_size=6),
    st.sampled_from([".lora_down.weight", ".lora_up.weight", ".alpha", ".hada_w1_a", ".dora_scale", ".diff", ""]),
)
kohya_tensors = tensors | st.builds(
    lambda shape, value: torch.full(shape, value),
    st.lists(st.sampled_from([0, 1, 1, 2, 3]), min_size=4, max_size=5),
    st.sampled_from([1.0, 0.0]),
)
kohya_layers = st.builds(
    lambda layer, rank, a, b, alpha: {
        f"lora_unet_{layer}.lora_down.weight": torch.full((rank, 3, 1, 1) if rank == 3 else (rank, 3), a),
        f"lora_unet_{layer}.lora_up.weight": torch.full((4, rank), b),
        f"lora_unet_{layer}.alpha": torch.tensor(alpha),
    },
    st.sampled_from(["mid_block_to_q", "mid_block_to_k"]),
    st.sampled_from([1, 2, 3, 0]),
    *[st.sampled_from([1.0, 1.0, 1.0, 0.0, float("nan"), -float("inf")])] * 2,
    st.sampled_from([1.0, 2.0, 0.0, float("nan"), 1e9, [1.0, 2.0], []]),
)
kohya_header = st.dictionaries(
    st.sampled_from(["ss_network_dim", "ss_seed", "modelspec.trigger_phrase", "ss_sd_model_name"]), st.text(max_size=30)
)


@many
@given(
    st.dictionaries(kohya_keys, kohya_tensors, min_size=1, max_size=6)
    | st.builds(lambda one, two: one | two, kohya_layers, kohya_layers | st.just({})),
    kohya_header,
)
def test_kohya_contents(tmp_path_factory, content, header):
    path = tmp_path_factory.getbasetemp() / "kohya.safetensors"
    path.write_bytes(adapter_bytes(content, header))
    adapter = read(path)
    if adapter:
        assert all(isinstance(value, str) for value in adapter.metadata.values())


@many
@given(
    json_values.map(lambda value: json.dumps(value).encode())
    | st.binary(max_size=60)
    | st.just(b"[" * 100_000)
    | mutated([b'{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["to_q"]}'])
    | st.fixed_dictionaries(
        {"peft_type": st.just("LORA") | json_values},
        optional=dict.fromkeys(("lora_alpha", "target_modules", "use_rslora"), json_values),
    ).map(lambda config: json.dumps(config).encode())
)
def test_adapter_config(tmp_path_factory, content):
    """The adapter_config.json of PEFT's layout."""
    folder = tmp_path_factory.getbasetemp() / "peft"
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_bytes(content)
    pair = {"to_q.lora_A.weight": torch.ones(2, 3), "to_q.lora_B.weight": torch.ones(4, 2)}
    (folder / "adapter_model.safetensors").write_bytes(adapter_bytes(pair, None))
    read(folder)
