import threading

import pytest
import torch

from orchestrator.runners.executing.mailbox import (
    Mailbox,
    Missing,
    batch_key,
    marks_key,
    state_key,
    value_key,
)


def test_keys_of_different_things_differ():
    keys = [
        value_key("w"),
        batch_key(0, 0, "w"),
        state_key(0, "w"),
        marks_key(0),
        batch_key(1, 0, "w"),
        batch_key(0, 1, "w"),
    ]
    assert len(set(keys)) == len(keys)


def test_a_tensor_waits_for_who_asks():
    box = Mailbox(patience_s=20)
    box.put(1, value_key("w"), torch.ones(2))
    assert torch.equal(box.take(1, value_key("w")), torch.ones(2))
    assert box.items == {}


def test_who_asks_waits_for_the_tensor_of_its_epoch():
    box = Mailbox(patience_s=20)
    box.put(1, value_key("w"), torch.zeros(1))
    late = threading.Thread(target=box.put, args=(2, value_key("w"), torch.ones(1)))
    late.start()
    assert box.take(2, value_key("w")).item() == 1.0
    late.join()


def test_what_never_comes_is_named():
    with pytest.raises(Missing, match="value:w"):
        Mailbox(patience_s=0.01).take(0, value_key("w"))
