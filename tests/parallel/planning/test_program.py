"""Programs: small compiled functions, lines of every form; accelerators."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from dit_jax.parallel.planning.accelerators import ACCELERATORS, accelerator, limits
from dit_jax.parallel.planning.groups import replica_groups
from dit_jax.parallel.planning.program import Collective, Program

LAYERS, ROWS, WIDTH = 5, 64, 16


@pytest.fixture(scope="module")
def mesh():
    """Two nodes, so to speak, of four devices."""
    return jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)


def compiled_text(function, *shapes):
    """The program of one device."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*shapes).compile().as_text()


@pytest.fixture(scope="module")
def program(mesh):
    """A scan whose body has one collective of every kind, and a matrix product."""

    def layer(x, w):
        y = jax.lax.all_gather(x, "b", tiled=True) @ w
        y = jax.lax.psum_scatter(y, "b", tiled=True)
        y = y + jax.lax.psum(jnp.sin(y), ("a", "b"))
        y = jax.lax.ppermute(y, "a", [(0, 1), (1, 0)])
        y = jax.lax.all_to_all(y, "b", 1, 0, tiled=True)
        return y.reshape(x.shape), None

    rows = PartitionSpec(("a", "b"))
    function = jax.shard_map(
        lambda x, w: jax.lax.scan(layer, x, w)[0],
        mesh=mesh,
        in_specs=(rows, PartitionSpec()),
        out_specs=rows,
    )
    return Program(compiled_text(function, (ROWS, WIDTH), (LAYERS, WIDTH, WIDTH)))


def test_loops_and_products_are_counted_as_often_as_they_run(program):
    assert program.num_devices == 8
    assert [loop.trip_count for loop in program.loops()] == [LAYERS]
    work = program.work()
    assert work.flops == LAYERS * 2 * (ROWS // 2) * WIDTH * WIDTH
    assert not work.unknown_loops


def test_collectives_have_the_bytes_of_the_ring_formula(program):
    found = {c.kind: c for c in program.work().collectives}
    assert {c.count for c in found.values()} == {LAYERS}
    own, gathered = ROWS * WIDTH * 4 / 8, ROWS * WIDTH * 4 / 2
    assert {kind: c.bytes_sent for kind, c in found.items()} == {
        "all-gather": gathered * 3 / 4,
        "reduce-scatter": gathered * 3 / 4,
        "all-reduce": 2 * own * 7 / 8,
        "collective-permute": own,
        "all-to-all": own * 3 / 4,
    }
    assert found["all-gather"].groups.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    total = sum(c.bytes_sent for c in found.values())
    assert program.work().bytes_sent == LAYERS * total


def test_a_convolution_and_a_nested_loop():
    def blur(x, kernel):
        convolve = functools.partial(jax.lax.conv_general_dilated, padding="SAME")
        numbers = ("NHWC", "HWIO", "NHWC")
        step = lambda x: convolve(x, kernel, (1, 1), dimension_numbers=numbers)  # noqa: E731
        inner = lambda _, x: jax.lax.fori_loop(0, 3, lambda _, x: step(x), x)  # noqa: E731
        return jax.lax.fori_loop(0, 2, inner, x)

    found = Program(compiled_text(blur, (2, 8, 8, 4), (3, 3, 4, 4))).work()
    assert found.flops == 6 * 2 * (2 * 8 * 8 * 4) * (3 * 3 * 4)


def test_a_sum_of_which_each_device_keeps_a_part_counts_as_reduce_scatter(mesh):
    def keep_own(x):
        total = jax.lax.psum(x, "b")
        return jax.lax.dynamic_slice_in_dim(total, jax.lax.axis_index("b") * 4, 4)

    specs = {"in_specs": PartitionSpec("b"), "out_specs": PartitionSpec("b")}
    function = jax.shard_map(keep_own, mesh=mesh, **specs)
    (found,) = Program(compiled_text(function, (64, 8))).work().collectives
    assert found.kind == "all-reduce" and found.bytes_sent in (384.0, 768.0)
    whole = dataclasses.replace(found, keeps_part=False)
    assert whole.bytes_sent == 2 * 16 * 8 * 4 * 3 / 4


ASYNCHRONOUS = """HloModule example, num_partitions=4

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8,4]{1,0} get-tuple-element(%p), index=1
  %gather = (f32[8,4]{1,0}, f32[32,4]{1,0}) all-gather-start(f32[8,4]{1,0} %x), channel_id=1, \
replica_groups=[1,4]<=[4], dimensions={0}
  %done = f32[32,4]{1,0} all-gather-done(%gather)
  %own = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %late = f32[32,8]{1,0} dot(%done, %x), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %sum-start = f32[8,8]{1,0} all-reduce-start(%own), replica_groups={{0,1},{2,3}}, to_apply=%add
  %sum-done = f32[8,8]{1,0} all-reduce-done(%sum-start)
  %pair = (f32[8,8]{1,0}, f32[32,8]{1,0}) tuple(%own, %late)
  %first = f32[8,8]{1,0} get-tuple-element(%pair), index=0
  ROOT %out = (s32[], f32[8,4]{1,0}) tuple(%i, %x)
}

%condition (p.1: (s32[], f32[8,4])) -> pred[] {
  %p.1 = (s32[], f32[8,4]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %n = s32[] constant(7)
  ROOT %less = pred[] compare(%i.1, %n), direction=LT
}

ENTRY %main (x.1: f32[8,4]) -> (s32[], f32[8,4]) {
  %x.1 = f32[8,4]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8,4]{1,0}) tuple(%zero, %x.1)
  ROOT %loop = (s32[], /*index=1*/f32[8,4]{1,0}) while(%start), condition=%condition, body=%body
}
"""


def test_asynchronous_forms_and_a_trip_count_from_the_condition():
    work = Program(ASYNCHRONOUS).work()
    assert work.flops == 7 * 2 * (8 * 8 * 4 + 32 * 8 * 4)
    gather, total = work.collectives
    assert (gather.kind, gather.count, gather.bytes_sent) == ("all-gather", 7, 32 * 4 * 4 * 3 / 4)
    assert (total.kind, total.group_size, total.bytes_sent) == ("all-reduce", 2, 8 * 8 * 4)


def test_dependencies_are_followed_through_tuples_and_loops():
    program = Program(ASYNCHRONOUS)
    gathers = lambda i: i.collective == "all-gather"  # noqa: E731
    assert program.depends_on("late", gathers) and program.depends_on("pair", gathers)
    assert not program.depends_on("own", gathers) and not program.depends_on("first", gathers)
    assert program.parent("late") == "body" and not program.depends_on("loop", gathers)


def test_a_loop_of_unknown_length_is_told():
    text = ASYNCHRONOUS.replace("constant(7)", "custom-call()")
    work = Program(text).work()
    assert work.unknown_loops == ("loop",) and work.flops == 2 * (8 * 8 * 4 + 32 * 8 * 4)


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("{}", [[0, 1, 2, 3]]),
        ("[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("mesh['x'=2,'y'=2] {'x'}", [[0, 2], [1, 3]]),
        ("mesh['x'=2,'y'=2], device_ids=([2,2]T(1,0)) {'x'}", [[0, 1], [2, 3]]),
        ("mesh['x'=4] {'x':(2)2}", [[0, 1], [2, 3]]),
    ],
)
def test_groups(text, groups):
    assert replica_groups(f"replica_groups={text}, dimensions={{0}}", 4).tolist() == groups


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        Program("module @jit_f {}")
    with pytest.raises(ValueError, match="different sizes"):
        replica_groups("replica_groups={{0,1},{2}}", 3)


def gather_of(groups, nbytes=8e9, kind="all-gather"):
    """A collective by hand."""
    groups = np.asarray(groups)
    return Collective(kind, "c", nbytes, "f32", groups, groups.shape[1])


def test_time_on_links_and_between_nodes():
    device = ACCELERATORS["h100"]
    within = device.seconds_of(gather_of([range(8)]))
    assert within == pytest.approx(8e9 * 7 / 8 / 450e9)
    # Two nodes of eight: half of the array crosses, shared by eight network cards.
    assert device.seconds_of(gather_of([range(16)])) == pytest.approx(
        max(8e9 * 15 / 16 / 450e9, 8e9 / 2 / 8 / 50e9)
    )
    # One device of each of two nodes: half of it by one card.
    assert device.seconds_of(gather_of([[0, 8]])) == pytest.approx(8e9 / 2 / 50e9)
    permutation = gather_of([[0, 8], [8, 0]], kind="collective-permute")
    assert device.seconds_of(permutation) == pytest.approx(8e9 / 50e9)
    found = limits(device, 989e12, 0.335e12, [gather_of([range(8)])])
    assert (found.arithmetic, found.memory) == (1.0, pytest.approx(0.1))
    assert found.bottleneck == "arithmetic" and found.in_turn == pytest.approx(1 + within)
    assert limits(device, 989e12, 0, [], "f8").arithmetic == pytest.approx(989 / 1979)
    assert accelerator("tpu_v5p").seconds_of(gather_of([range(64)])) == pytest.approx(
        8e9 * 63 / 64 / 600e9
    )


def test_an_unknown_accelerator_is_refused():
    with pytest.raises(ValueError, match="expected one of h100, h200, a100, tpu_v5p"):
        accelerator("h1000")
