"""Flat buffers: every parameter lies in exactly one, alone in its place, with others of its kind."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partitioner.layout.parallel_plan import Plan
from partitioner.layout.param_cuts import ParamCut
from partitioner.lowering.buckets import Param
from partitioner.lowering.flat_buffers import FlatGroup, Kept, make_groups
from partitioner.lowering.role_builder import RoleBuilder, SegmentPool
from partitioner.program.program import TensorKind, TensorSpec

STATES = Kept(2, masters=True, whole=False)


@st.composite
def param_lists(draw: st.DrawFn) -> list[Param]:
    count = draw(st.integers(1, 12))
    shapes = st.lists(st.integers(1, 7), min_size=1, max_size=2).map(tuple)
    return [
        Param(
            name=f"p{index}",
            spec=TensorSpec(draw(shapes), draw(st.sampled_from(["f32", "bf16"]))),
            cut=draw(st.sampled_from([None, ParamCut(0, (8,))])),
            sections=(),
            tied=draw(st.sampled_from([(), (0, 1)])),
            unit=draw(st.integers(0, 4)),
            is_frozen=draw(st.booleans()),
            group=draw(st.integers(0, 1)),
            apart=draw(st.sampled_from([None, "p0"])),
        )
        for index in range(count)
    ]


def grouped(
    params: list[Param], dp: int, zero: int, bucket: int, kept: Kept = STATES, tp: int = 2
) -> tuple[RoleBuilder, tuple[FlatGroup, ...]]:
    role = RoleBuilder(0, SegmentPool())
    return role, make_groups(role, params, Plan(dp=dp, tp=tp, zero=zero, bucket_bytes=bucket), kept)


cases = given(param_lists(), st.integers(1, 5), st.sampled_from([0, 1]), st.sampled_from([1, 64, 10**6]))


@cases
def test_every_parameter_is_in_one_group_with_others_of_its_kind(
    params: list[Param], dp: int, zero: int, bucket: int
) -> None:
    _, groups = grouped(params, dp, zero, bucket)
    assert Counter(p for g in groups for p in g.params) == Counter(params)
    for group in groups:
        kinds = {(p.is_frozen, p.group, p.apart, p.tied, p.cut is None, p.spec.dtype) for p in group.params}
        assert len(kinds) == 1
        assert group.group == group.params[0].group
        assert group.ready == min(p.unit for p in group.params)


@cases
def test_views_lie_end_to_end_and_padding_is_less_than_a_shard_each(
    params: list[Param], dp: int, zero: int, bucket: int
) -> None:
    role, groups = grouped(params, dp, zero, bucket)
    for group in groups:
        members = sorted(group.params, key=lambda p: p.spec.numel % 2)  # even lengths at even places
        views = [role.tensors[role.by_name[p.name]] for p in members]
        ends = [v.offset + v.spec.numel for v in views]
        assert [v.offset for v in views] == [0, *ends[:-1]]
        assert {v.base for v in views} == {group.flat}
        assert 0 <= role.spec(group.flat).numel - ends[-1] < (dp if zero else 1)


@cases
def test_shards_cover_the_buffer_exactly(params: list[Param], dp: int, zero: int, bucket: int) -> None:
    role, groups = grouped(params, dp, zero, bucket)
    for group in groups:
        if group.params[0].is_frozen:
            assert group.grad == group.flat == group.update
            continue
        shards = dp if zero else 1
        assert (
            role.spec(group.grad_shard).numel * shards
            == role.spec(group.flat).numel
            == role.spec(group.grad).numel
        )
        assert (
            role.spec(group.update).numel
            == role.spec(group.param_shard).numel
            == role.spec(group.grad_shard).numel
        )


@cases
def test_low_precision_is_updated_in_full_precision(
    params: list[Param], dp: int, zero: int, bucket: int
) -> None:
    role, groups = grouped(params, dp, zero, bucket)
    trained = [g for g in groups if not g.params[0].is_frozen]
    assert all(role.spec(g.update).dtype == role.spec(g.grad).dtype == "f32" for g in trained)
    masters = [t for t in role.tensors if t.kind is TensorKind.MASTER]
    assert len(masters) == sum(g.params[0].spec.dtype == "bf16" for g in trained)
    assert all(role.tensors[role.by_name[m.source]].kind is TensorKind.FLAT for m in masters)


@cases
def test_without_masters_parameters_are_stepped_on_as_they_are(
    params: list[Param], dp: int, zero: int, bucket: int
) -> None:
    role, groups = grouped(params, dp, zero, bucket, replace(STATES, masters=False))
    assert not any(t.kind is TensorKind.MASTER for t in role.tensors)
    for group in groups:
        assert (
            role.spec(group.update).dtype == group.params[0].spec.dtype and group.update == group.param_shard
        )
    states = [t.spec.dtype for t in role.tensors if t.kind is TensorKind.STATE]
    assert states == [g.params[0].spec.dtype for g in groups if not g.params[0].is_frozen]


@cases
def test_buckets_close_as_soon_as_they_are_full_and_follow_the_backward(
    params: list[Param], dp: int, zero: int, bucket: int
) -> None:
    _, groups = grouped(params, dp, zero, bucket)
    for group in groups:
        assert sum(p.spec.nbytes for p in group.params[:-1]) < bucket
        units, names = [p.unit for p in group.params], [p.name for p in group.params]
        if group.tied:  # by name, so that all stages that share them agree
            assert names == sorted(names)
        else:
            assert units == sorted(units, reverse=True)


@cases
def test_what_must_be_whole_lies_in_one_shard_and_is_gathered_where_it_is_cut(
    params: list[Param], dp: int, zero: int, bucket: int
) -> None:
    role, groups = grouped(params, dp, zero, bucket, replace(STATES, whole=True), tp=3)
    assert Counter(p for g in groups for p in g.params) == Counter(params)
    for group in groups:
        views = [role.tensors[role.by_name[p.name]] for p in group.params]
        shard = role.spec(group.flat).numel // (dp if zero else 1)
        assert [v.offset for v in views] == [i * shard for i in range(len(views))]
        assert shard - max(v.spec.numel for v in views) in ({0, 1} if len(views) > 1 else {0})
        assert len(views) == 1 or shard % 2 == 0
        is_gathered = not group.replicated and not group.params[0].is_frozen
        assert [role.spec(t).numel for t in group.gathered] == [3 * shard, 3 * shard] * is_gathered
    found = [t.spec.shape for t in role.tensors if t.kind is TensorKind.STATE]
    trained = [g for g in groups if not g.params[0].is_frozen]
    assert found == [(2, role.spec(g.update).numel * (1 if g.replicated else 3)) for g in trained]


def test_a_large_bucket_makes_one_group_per_kind_and_a_small_one_a_group_per_parameter() -> None:
    params = [Param(f"p{i}", TensorSpec((4, 4), "f32"), None, (), (), i, False, 0, None) for i in range(5)]
    assert len(grouped(params, 2, 0, 10**9)[1]) == 1
    assert len(grouped(params, 2, 0, 1)[1]) == 5
    assert [g.ready for g in grouped(params, 2, 0, 1)[1]] == [4, 3, 2, 1, 0]


@pytest.mark.parametrize("states", [0, 2])
def test_optimizer_state_is_accounted_for_by_elements(states: int) -> None:
    params = [Param("p", TensorSpec((6, 5), "f32"), None, (), (), 0, False, 0, None)]
    role, _ = grouped(params, 3, 1, 1, replace(STATES, states=states))
    found = [t.spec.shape for t in role.tensors if t.kind is TensorKind.STATE]
    assert found == ([(states, 10)] if states else [])
