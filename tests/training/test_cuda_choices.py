"""What is chosen for a CUDA device, asked without one."""

from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import tyro
from mixed_batch import samples
from worlds import run_world

from model.attention import varlen_attention
from training.engine import blocks, device, ops
from training.engine.config import EngineConfig, ParallelConfig
from training.flow_matching import VelocityMSE
from training.randomness import Randomness
from training.studio import Studio

LAYOUT = device.Layout(
    torch.device("cuda", 0), rank=0, world_size=1, dp_rank=0, dp_size=1, tp_rank=0, tp_size=1, cp_rank=0, cp_size=1,
    sp=False, tp_group=None, cp_group=None, dp_group=None, dp_cp_group=None, host_group=None, writers_group=None,
)  # fmt: skip


class TELinear:
    """In place of Transformer Engine's: gives (output, bias)."""

    def forward(self, x):
        return x, None


@pytest.fixture(params=[False, True], ids=["without TE", "with TE"])
def te(request, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether Transformer Engine is installed."""
    monkeypatch.setattr(ops.transformer_engine, "HAVE_TE", request.param)
    if request.param:
        monkeypatch.setattr(ops.transformer_engine, "TEColumnParallelLinear", TELinear)
        monkeypatch.setattr(ops.transformer_engine, "TERowParallelLinear", TELinear)
    return request.param


def test_linear_layers(te: bool):
    for layout in (LAYOUT, replace(LAYOUT, device=torch.device("cpu"), tp_size=2)):
        assert ops.linear_classes(layout) == (ops.Column, ops.Row)
    found = ops.linear_classes(replace(LAYOUT, tp_size=2))
    if te:
        assert [cls().forward(3) for cls in found] == [3, 3] and all(issubclass(cls, TELinear) for cls in found)
    else:
        assert found == (ops.Column, ops.Row)
    assert ops.linear_classes(replace(LAYOUT, tp_size=2), seen_by_aten=True) == (ops.Column, ops.Row)


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9), (9, 0), (10, 0)])
def test_attention(te: bool, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    choose = lambda dtype=torch.bfloat16, **kwargs: ops.choose_attention("auto", LAYOUT, dtype, **kwargs)  # noqa: E731
    expected = {7: "sdpa", 8: "flash"}.get(capability[0], "te" if te else "sdpa")
    assert choose() == expected
    assert choose(torch.float32) == "sdpa"
    assert choose(seen_by_aten=True) == ("sdpa" if expected == "te" else expected)
    assert ops.choose_attention("flash", LAYOUT, torch.float32) == "flash"


def test_an_engines_layers_can_be_made_without_transformer_engine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    made = ops.MegatronOps(LAYOUT, torch.bfloat16)
    assert made.varlen_attention is ops._cudnn_first and made.column_class is ops.Column


def test_sdpa_takes_cudnn_first(monkeypatch: pytest.MonkeyPatch):
    orders, before = [], torch._C._get_sdp_priority_order()
    monkeypatch.setattr(ops, "varlen_attention", lambda *args: orders.append(torch._C._get_sdp_priority_order()))
    ops.attention_backend("sdpa", "cuda")(None, None, None, None)
    assert orders[0][:4] == [int(backend.value) for backend in ops.SDPA_ORDER] != before[:4]
    assert torch._C._get_sdp_priority_order() == before
    assert ops.attention_backend("sdpa", "cpu") is ops.varlen_attention


def test_the_order_of_kernels_changes_no_result():
    inputs, _ = VelocityMSE().prepare(samples(), Randomness(0), 16)
    q, k, v = torch.randn(3, len(inputs.pack.joint_order), 2, 16).unbind()
    assert torch.equal(ops._cudnn_first(q, k, v, inputs.pack), varlen_attention(q, k, v, inputs.pack))


def test_selective_recomputation_refuses_attention_that_it_does_not_see():
    with pytest.raises(ValueError, match="does not see Transformer Engine's attention"):
        ops.MegatronOps(LAYOUT, torch.bfloat16, attention="te", seen_by_aten=True)


def test_selective_recomputation_knows_operators_by_their_names():
    import torch.nn.attention.varlen  # noqa: F401 - registers its operator

    pytest.importorskip("bitsandbytes")  # so do these

    for name in blocks._KEPT:
        namespace, _, operator = name.partition("::")
        assert hasattr(getattr(torch.ops, namespace), operator), name


@pytest.mark.parametrize("multiple", [1, 8, 128])
@pytest.mark.parametrize("tp, cp", [(1, 1), (4, 1), (3, 2)])
def test_every_rank_has_a_multiple_of_the_tokens_asked_for(tp: int, cp: int, multiple: int):
    layout = replace(LAYOUT, device=torch.device("cpu"), tp_size=tp, cp_size=cp, sp=tp > 1)
    found = ops.MegatronOps(layout, torch.float32, token_multiple=multiple)
    pack = VelocityMSE().prepare(samples(), Randomness(0), found.align)[0].pack
    for stream in (pack.txt_pos, pack.img_pos):
        assert len(stream) % (tp * cp * multiple) == 0 and len(stream) % 16 == 0


def test_compilation_is_for_cuda_unless_it_is_asked_for():
    assert EngineConfig().compiles("cuda") and not EngineConfig().compiles("cpu")
    assert not EngineConfig(recompute="selective").compiles("cuda") and EngineConfig(recompute="block").compiles("cuda")
    assert EngineConfig(compile=True).compiles("cpu") and not EngineConfig(compile=False).compiles("cuda")


@pytest.mark.parametrize("flags, expected", [([], None), (["--compile"], True), (["--no-compile"], False)])
def test_compilation_has_its_flag(flags: list[str], expected: bool | None):
    assert tyro.cli(EngineConfig, args=flags).compile is expected


@pytest.mark.parametrize("free, cached, where", [(9_000, 0, "cpu"), (9_000, 20_000, "cuda"), (29_000, 0, "cuda")])
def test_a_text_encoder_reads_on_the_cpu_where_the_gpu_has_no_room(free, cached, where, tmp_path, monkeypatch):
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "model.safetensors").write_bytes(bytes(10_000))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 40_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1000 + cached)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1000)
    studio = Studio(SimpleNamespace(device=torch.device("cuda", 0)), tmp_path, 4096)
    assert studio._reads_on().type == where


def patience(rank: int) -> set[timedelta]:
    """Timeouts of the process groups of an engine."""
    layout = device.start(ParallelConfig())
    groups = [torch.distributed.group.WORLD, layout.tp_group, layout.dp_group, layout.dp_cp_group]
    return {group._get_backend(torch.device("cpu")).options._timeout for group in groups}


def test_processes_wait_for_a_peer_that_saves():
    (found,) = run_world(1, patience)
    assert found == {device.PATIENCE} and device.PATIENCE >= timedelta(hours=1)
