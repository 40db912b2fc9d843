"""Predictions, on programs compiled for an H100 and on lines of every form, by hand.

`programs/gathers.hlo`: on 4 devices a scan of 3 layers, x [64, 256] and w [3, 256, 256] on each:
q = x w, attention of 4 heads of 64 to the gathered keys [256, 4, 64], x + gelu(y w); a layer
gathers the next one's keys. `programs/precisions.hlo`: a float8 product, float32 ones of default
precision and of the highest.
"""

from pathlib import Path

import pytest

from dit_jax.parallel.planning.accelerators import accelerator
from dit_jax.parallel.planning.program import Program
from dit_jax.parallel.planning.schedule import predict

H100 = accelerator("h100")
LAYERS, ROWS, KEYS, WIDTH = 3, 64, 256, 256


def program(name):
    return Program((Path(__file__).parent / "programs" / f"{name}.hlo").read_text())


@pytest.fixture(scope="module")
def gathers():
    return predict(program("gathers"), H100)


def kernels(schedule, kind):
    return [kernel for kernel in schedule.kernels if kernel.kind == kind]


def test_kernels_are_told_by_kind_and_counted_as_often_as_they_run(gathers):
    assert {kernel.count for kernel in gathers.kernels} == {1, LAYERS}
    products = kernels(gathers, "cuBLASLt bf16")
    assert [kernel.flops for kernel in products] == [2 * ROWS * WIDTH * WIDTH] * 2
    (attention,) = kernels(gathers, "cuDNN attention")
    assert attention.flops == 4 * ROWS * KEYS * WIDTH and attention.count == LAYERS
    assert kernels(gathers, "copy") and kernels(gathers, "loop fusion")
    totals = gathers.by_kind()["cuBLASLt bf16"]
    assert (totals["places"], totals["count"]) == (2, 2 * LAYERS)
    assert totals["flops"] == LAYERS * 4 * ROWS * WIDTH * WIDTH


def test_bytes_are_what_a_kernel_needs(gathers):
    rows, weights = 2 * ROWS * WIDTH, 2 * WIDTH * WIDTH
    assert [k.nbytes for k in kernels(gathers, "cuBLASLt bf16")] == [2 * rows + weights] * 2
    (attention,) = kernels(gathers, "cuDNN attention")  # queries, results, keys, values
    assert attention.nbytes == 2 * rows + 2 * 2 * KEYS * WIDTH
    # Of all layers' float32 weights one is read, and written in bfloat16; and two indices.
    converted = next(k for k in gathers.kernels if k.result == "bf16[1,256,256]")
    assert converted.nbytes == pytest.approx(4 * WIDTH**2 + weights, abs=16)


def test_times_are_the_longer_of_arithmetic_and_memory(gathers):
    (attention,) = kernels(gathers, "cuDNN attention")
    assert attention.bound == "memory"
    assert attention.seconds == attention.nbytes / 3.35e12 > attention.flops / 989e12
    assert gathers.seconds == pytest.approx(gathers.kernel_seconds + gathers.exposed_seconds)
    launches = sum(kernel.count for kernel in gathers.kernels)
    assert gathers.launches == launches
    assert gathers.lengthening(1.0) == pytest.approx(launches - gathers.kernel_seconds)


def test_products_beside_a_gather(gathers):
    inside, before = gathers.communication
    assert (inside.count, before.count) == (LAYERS, 1)
    sent = 3 / 4 * KEYS * WIDTH * 2
    assert inside.collective.bytes_sent == before.collective.bytes_sent == sent
    # Two products and an attention of a layer stand beside the next one's; none beside the first.
    layer = [k for k in gathers.kernels if k.is_product]
    assert inside.products == 3 and not inside.is_synchronous
    assert inside.product_seconds == pytest.approx(sum(k.seconds for k in layer))
    assert inside.exposed == 0.0
    assert before.products == 0 and before.product_seconds == 0.0
    assert before.exposed == pytest.approx(sent / 450e9 - before.other_seconds)


def test_precisions_have_their_units():
    found = predict(program("precisions"), H100)
    (fp8,) = kernels(found, "cuBLASLt f8")
    assert fp8.flops == 2 * 512 * 256 * 256
    (tf32,) = kernels(found, "cuBLASLt tf32")  # two products with one weight, merged by XLA
    (exact,) = kernels(found, "cuBLASLt f32")
    assert (tf32.flops, exact.flops) == (2 * 1024 * 256 * 128, 2 * 512 * 256 * 128)
    assert tf32.bound == "memory" and exact.seconds == exact.flops / 66.9e12
    (transposed,) = kernels(found, "transpose")  # a float8 weight stored [in, out]
    assert transposed.nbytes == 2 * 256 * 256
    a100 = predict(program("precisions"), accelerator("a100"))
    assert kernels(a100, "cuBLASLt f8")[0].seconds > fp8.seconds  # no unit of its own


LINES = """HloModule hand, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%scattered (whole: f32[8,1024]) -> f32[1024] {
  %whole = f32[8,1024]{1,0} parameter(0)
  ROOT %rs = f32[1,1024]{1,0} reduce-scatter(%whole), replica_groups={{0,1,2,3,4,5,6,7}}, \
dimensions={0}, to_apply=%add
}

%updated (state: bf16[28,64,64], new: bf16[64,64], i: s32[]) -> bf16[28,64,64] {
  %state = bf16[28,64,64]{2,1,0} parameter(0)
  %new = bf16[64,64]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  %row = bf16[1,64,64]{2,1,0} bitcast(%new)
  ROOT %dus = bf16[28,64,64]{2,1,0} dynamic-update-slice(%state, %row, %i, %zero, %zero)
}

%rounded (x: f32[64,64]) -> bf16[64,64] {
  %x = f32[64,64]{1,0} parameter(0)
  ROOT %half = bf16[64,64]{1,0} convert(%x)
}

%summed (y: f32[64,64]) -> f32[64] {
  %y = f32[64,64]{1,0} parameter(0)
  %nought = f32[] constant(0)
  ROOT %rows = f32[64]{0} reduce(%y, %nought), dimensions={1}, to_apply=%add
}

%small (p: s32[]) -> f32[64] {
  %p = s32[] parameter(0)
  ROOT %s = f32[64]{0} custom-call(%p), custom_call_target="small_one"
}

%large (q: s32[]) -> f32[64] {
  %q = s32[] parameter(0)
  ROOT %l = f32[64]{0} custom-call(%q), custom_call_target="large_one"
}

%first_block (r: s32[]) -> f32[64] {
  %r = s32[] parameter(0)
  ROOT %first = f32[64]{0} custom-call(%r), custom_call_target="one"
}

%all_blocks (t: s32[]) -> f32[64] {
  %t = s32[] parameter(0)
  %u = f32[4096]{0} custom-call(%t), custom_call_target="many"
  ROOT %every = f32[64]{0} custom-call(%u), custom_call_target="the rest"
}

ENTRY %main (x0: f32[64,64], state0: bf16[28,64,64], i0: s32[], g: f32[8,1024]) -> f32[64] {
  %x0 = f32[64,64]{1,0} parameter(0)
  %state0 = bf16[28,64,64]{2,1,0} parameter(1)
  %i0 = s32[] parameter(2)
  %g = f32[8,1024]{1,0} parameter(3)
  %start = ((f32[8,1024]), f32[1,1024]) async-start(%g), calls=%scattered
  %half0 = bf16[64,64]{1,0} fusion(%x0), kind=kLoop, calls=%rounded
  %kept = bf16[28,64,64]{2,1,0} fusion(%state0, %half0, %i0), kind=kLoop, calls=%updated
  %done = f32[1,1024]{1,0} async-done(%start)
  %all = f32[8,1024]{1,0} all-reduce-start(%g), replica_groups={}, to_apply=%add, \
backend_config={"collective_backend_config":{"is_sync":true}}
  %copied = f32[64,64]{0,1} copy(%x0)
  %all2 = f32[8,1024]{1,0} all-reduce-done(%all)
  %sugar = ((f32[8,1024]), f32[1,1024]) reduce-scatter-start(%g), \
replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, to_apply=%add
  %halved = bf16[64,64]{1,0} fusion(%x0), kind=kLoop, calls=%rounded
  %sugared = f32[1,1024] reduce-scatter-done(%sugar)
  %choice = f32[64]{0} conditional(%i0, %i0, %i0), branch_computations={%small, %large}
  %cached = f32[64]{0} conditional(%i0, %i0, %i0), \
branch_computations={%all_blocks, %first_block}, \
metadata={op_name="jit(f)/while/body/step_cache/cond"}
  ROOT %out = f32[64]{0} fusion(%x0), kind=kInput, calls=%summed
}
"""


def test_lines_of_every_form():
    found = predict(Program(LINES), H100)
    by_name = {kernel.name: kernel for kernel in found.kernels}
    assert by_name["half0"].kind == "convert" and by_name["half0"].nbytes == 64 * 64 * 6
    # Of the state only the row is written, in place.
    assert by_name["kept"].kind == "copy" and by_name["kept"].nbytes == 2 * 2 * 64 * 64 + 4
    assert by_name["copied"].kind == "copy" and by_name["copied"].nbytes == 2 * 4 * 64 * 64
    assert by_name["out"].kind == "reduction" and by_name["out"].nbytes == 4 * (64 * 64 + 64)
    assert ("s" in by_name) != ("l" in by_name)  # one branch
    scattered, summed, sugared = found.communication
    assert sugared.collective.bytes_sent == scattered.collective.bytes_sent
    assert sugared.other_seconds == by_name["halved"].seconds and not sugared.is_synchronous
    assert not any(kernel.kind.endswith(("-start", "-done")) for kernel in found.kernels)
    assert (scattered.collective.kind, summed.collective.kind) == ("reduce-scatter", "all-reduce")
    assert scattered.collective.bytes_sent == 7 / 8 * 4 * 8 * 1024
    assert not scattered.is_synchronous and summed.is_synchronous
    beside = by_name["half0"].seconds + by_name["kept"].seconds
    assert scattered.other_seconds == pytest.approx(beside)
    assert scattered.exposed == pytest.approx(scattered.seconds - beside)
    assert summed.exposed == summed.seconds and summed.products == 0


def test_of_a_step_cache_both_branches_count_in_the_share_that_is_stated():
    whole, shared = (predict(Program(LINES, share), H100) for share in (1.0, 0.25))
    counts = {kernel.name: kernel.count for kernel in shared.kernels}
    assert (counts["u"], counts["every"], counts["first"]) == (0.25, 0.25, 0.75)
    assert counts["half0"] == 1 and ("s" in counts) != ("l" in counts)  # no step cache's
    times = {k.name: k.seconds for s in (whole, shared) for k in s.kernels}
    saved = 0.75 * (times["u"] + times["every"] - times["first"])
    assert shared.seconds == pytest.approx(whole.seconds - saved)
    assert "first" not in {kernel.name for kernel in whole.kernels}


def test_a_program_without_an_order_is_refused():
    with pytest.raises(ValueError, match="not scheduled"):
        predict(Program(LINES.replace(", is_scheduled=true", "")), H100)


def test_loops_of_unknown_length_are_named():
    text = (Path(__file__).parent / "programs" / "gathers.hlo").read_text()
    text = text.replace('"known_trip_count":{"n":"3"}', '"known":{}')
    found = predict(Program(text.replace("constant(3)", "constant({...})")), H100)
    assert len(found.unknown_loops) == 1
    assert {kernel.count for kernel in found.kernels} == {1}
