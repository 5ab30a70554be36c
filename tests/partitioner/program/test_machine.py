"""The machine issues in order, blocks at waits, and ends the same way whatever the order of events."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from partitioner.program.machine import Key, Machine, Post, Run
from partitioner.program.program import Collective, Program, Wait


def run_all(program: Program, pick) -> dict[int, list[object]]:
    """All chips, one event at a time; `pick` chooses who is next. Returns what each chip did."""
    machines = [Machine(program, chip, "step") for chip in range(program.num_chips)]
    posted: dict[Key, set[int]] = {}
    finished: set[tuple[Key, int]] = set()
    log: dict[int, list[object]] = {m.chip: [] for m in machines}
    while True:
        able = [m for m in machines if m.ready() is not None]
        arrivals = sorted((k, c) for k, who in posted.items() if who == set(k.chips) for c in who)
        arrivals = [event for event in arrivals if event not in finished]
        if not able and not arrivals:
            break
        choice = pick(len(able) + len(arrivals))
        if choice >= len(able):
            key, chip = arrivals[choice - len(able)]
            finished.add((key, chip))
            machines[chip].arrive(key)
            continue
        machine = able[choice]
        item = machine.ready()
        assert item is not None
        machine.complete(item)
        if isinstance(item, Post):
            posted.setdefault(item.key, set()).add(machine.chip)
            log[machine.chip].append((item.call, item.instruction.id))
        else:
            log[machine.chip] += [(item.call, ins.id) for ins in item.instructions]
    assert all(machine.done for machine in machines)
    return log


@given(data=st.data())
@settings(max_examples=40)
def test_every_order_of_events_executes_each_instruction_once_in_order(toy, data):
    degrees = (st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.integers(1, 2))
    program = toy(*(data.draw(d) for d in degrees))
    random = data.draw(st.randoms(use_true_random=False))
    for chip, executed in run_all(program, lambda n: random.randrange(n)).items():
        role = program.role_of(chip)
        calls = enumerate(role.schedule["step"])
        assert executed == [(i, ins.id) for i, call in calls for ins in role.body[call.body].instructions]


def test_a_wait_blocks_until_its_transfer_arrives(toy):
    machine = Machine(toy(2, 1), 1, "step")
    receive = machine.ready()
    assert isinstance(receive, Post)
    assert receive.key == Key("p2p", (0, 1), 0)
    machine.complete(receive)
    while (item := machine.ready()) is not None:
        machine.complete(item)
    assert receive.key in machine.blocked_on()
    assert "wait" in machine.position().lower()
    machine.arrive(receive.key)
    run = machine.ready()
    assert isinstance(run, Run)
    assert isinstance(run.instructions[0], Wait)


def test_posts_on_one_channel_are_numbered(toy):
    program = toy(1, 3, 1, 2)
    machine = Machine(program, 0, "step")
    keys = []
    while (item := machine.ready()) is not None:
        machine.complete(item)
        if isinstance(item, Post):
            keys.append(item.key)
            machine.arrive(item.key)
    assert machine.done
    assert [key.number for key in keys] == [0, 1, 2, 3]
    assert Counter(key.chips for key in keys) == {(0, 1): 4}


def test_local_collectives_are_part_of_a_run(toy):
    machine = Machine(toy(1, 2, 2, 2), 0, "step", is_local=lambda ins: True)
    while (item := machine.ready()) is not None:
        assert isinstance(item, Run)
        machine.complete(item)
    assert machine.done
    assert any(isinstance(i, Collective) for body in machine.role.bodies for i in body.instructions)


def test_a_machine_that_is_done_stands_at_the_end(toy):
    machine = Machine(toy(1, 40), 0, "step", is_local=lambda ins: True)
    while (item := machine.ready()) is not None:
        machine.complete(item)
    assert machine.position().endswith("at the end")
