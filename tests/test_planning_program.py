"""Reading compiled programs: collectives with their bytes and axes, and the cycles of parts."""

import pytest

from crosscoder_jax.planning.program import Program

TEXT = """HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p: f32[4]) -> s32[] {
  ROOT %count = s32[] fusion(%p), kind=kLoop
}

%body (s: (s32[], f32[4])) -> (s32[], f32[4]) {
  %f = s32[]{:T(128)} fusion(%x), calls=%fused, metadata={op_name="jit(step)/jvp(selection)/while/body/sum"}, backend_config={"estimated_cycles":"100"}
  %r = s32[]{:T(128)} all-reduce(%f), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}, to_apply=%add
}

%condition (s: (s32[], f32[4])) -> pred[] {
  ROOT %less = pred[] compare(%a, %b), direction=LT
}

%dead (p: f32[4]) -> f32[] {
  %d = f32[8,4]{1,0} fusion(%p), metadata={op_name="jit(step)/jvp(aux_k)/cond/dot_general"}, backend_config={"estimated_cycles":"70"}
}

%alive (p: f32[4]) -> f32[] {
  %z = f32[] constant(0), backend_config={"estimated_cycles":"1"}
}

ENTRY %main (p: f32[8,4]) -> f32[8,4] {
  %encode = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) fusion(%p), metadata={op_name="jit(step)/ij,jk->ik/dot_general"}, backend_config={"estimated_cycles":"1000"}
  %sum.1 = f32[8,4]{1,0:T(8,128)} all-reduce(%e), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %sum.2 = (bf16[8,4]{1,0:T(8,128)(2,1)}, f32[4]{0}) all-reduce-start(%a, %b), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add
  %sum.3 = f32[2]{0} all-reduce(%a), replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_0'}, to_apply=%add
  %g = (f32[2,4]{1,0}, f32[8,4]{1,0}) all-gather-start(%a), replica_groups=[2,4]<=[8], dimensions={0}
  %p.1 = pred[3]{0} collective-permute(%a), source_target_pairs={{0,4},{4,0}}
  %while.1 = (s32[], f32[4]) while(%t), condition=%condition, body=%body
  %c = f32[] conditional(%i, %t, %u), branch_computations={%alive, %dead}
  ROOT %out = f32[8,4] fusion(%c), metadata={op_name="jit(step)/update/add"}, backend_config={"estimated_cycles":"30"}
}
"""  # noqa: E501 - as XLA writes it


@pytest.fixture
def program():
    return Program(TEXT, (2, 4), loop_passes=9)


def test_every_collective_is_found_with_its_bytes_and_axes(program):
    found = [(one.kind, one.num_bytes, one.axes, one.group_size) for one in program.collectives()]
    # Devices are numbered along the latents first: 0 to 3 share their part of the batch.
    assert found == [
        ("all-reduce", 128, ("latent",), 4),  # 8 * 4 float32
        ("all-gather", 128, ("latent",), 4),  # what the operand of 2 * 4 becomes
        ("all-reduce", 8 * 4 * 2 + 4 * 4, ("data",), 2),
        (
            "all-reduce",
            8,
            ("latent",),
            4,
        ),  # device_ids 0 4 1 5 2 6 3 7 as 4 x 2, a column of which is 0 1 2 3
        ("all-reduce", 4, ("data", "latent"), 8),
        ("collective-permute", 3, ("data",), 2),
    ]
    assert program.collectives()[2].largest == "bf16[8,4]"


def test_collectives_in_loops_are_told(program):
    assert [(one.num_bytes, one.passes) for one in program.collectives() if one.passes > 1] == [(4, 9)]


COUNTED = """HloModule jit_step

%body (s: (s32[], f32[4])) -> (s32[], f32[4]) {
  %f = f32[4]{0} fusion(%x), metadata={op_name="jit(step)/while/body/dot_general"}, backend_config={"estimated_cycles":"100"}
  %r = f32[4]{0} all-reduce(%f), replica_groups={{0,1}}, to_apply=%add
}

%condition (s: (s32[], f32[4])) -> pred[] {
  %four = s32[]{:T(128)} constant(4)
  %s = (s32[]{:T(128)}, f32[4]{0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %four), direction=LT
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %while.1 = (s32[], f32[4]) while(%t), condition=%condition, body=%body
  ROOT %out = f32[4] fusion(%c), metadata={op_name="jit(step)/update/add"}, backend_config={"estimated_cycles":"50"}
}
"""  # noqa: E501 - as XLA for TPU writes it, without "known_trip_count"


def test_loops_that_count_are_counted_and_what_one_pass_leaves_out_is_told():
    program = Program(COUNTED, (2, 1), loop_passes=9)
    assert program.cycles(["dot_general", "update"]) == {"dot_general": 400, "update": 50}
    assert [(one.num_bytes, one.passes) for one in program.collectives()] == [(16, 4)]
    # XLA's own estimate has one pass: 150 cycles in place of 450.
    assert program.repetition == pytest.approx(3)


def test_a_loop_whose_end_depends_on_the_data_is_no_repetition(program):
    assert program.repetition == pytest.approx(1)


def test_cycles_are_summed_by_part_with_the_passes_of_loops_and_the_costlier_branch(program):
    parts = ("selection", "aux_k", "update", "dot_general")
    assert program.cycles(parts) == {"dot_general": 1000, "selection": 9 * 100, "aux_k": 70, "update": 30}


def test_what_lies_in_no_part_is_told_as_other(program):
    assert program.cycles(("selection",)) == {"selection": 900, "other": 1000 + 70 + 30}


def test_a_loop_that_says_how_often_it_runs_is_believed():
    text = TEXT.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"31"}}')
    assert Program(text, (2, 4), loop_passes=9).cycles(("selection",))["selection"] == 3100


def test_a_program_without_collectives_or_cycles_has_none():
    text = "ENTRY %main (p: f32[2]) -> f32[2] {\n  ROOT %r = f32[2]{0} add(%p, %p)\n}\n"
    program = Program(text, (1, 1))
    assert program.collectives() == []
    assert program.cycles(("selection",)) == {}


def test_groups_that_are_not_understood_leave_the_axes_open():
    text = TEXT.replace("replica_groups={{0,1,2,3},{4,5,6,7}}", "replica_groups=unheard-of")
    assert next(one.axes for one in Program(text, (2, 4)).collectives()) == ()
