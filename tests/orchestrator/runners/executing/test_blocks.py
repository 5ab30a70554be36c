import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.runners.executing.blocks import HEAD, NAME, BlockPool, BlockReader, can_read, write_proof


def read(block: int, nbytes: int) -> bytes:
    return BlockReader().bytes_of(os.getpid(), block, nbytes).tobytes()


@given(st.lists(st.tuples(st.integers(0, 300_000), st.booleans()), max_size=12))
@settings(max_examples=30)
def test_a_block_is_used_again_only_after_it_was_read(actions):
    pool = BlockPool()
    unread: list[tuple[int, bytes]] = []
    for number, (nbytes, then_read) in enumerate(actions):
        content = bytes([number + 1]) * nbytes
        block = pool.put(memoryview(content))
        assert block is not None
        assert block not in [b for b, _ in unread]
        unread.append((block, content))
        if then_read:
            first, expected = unread.pop(0)
            assert read(first, len(expected)) == expected
    assert all(read(block, len(content)) == content for block, content in unread)
    pool.close()


def test_one_block_serves_messages_that_are_read_in_turn():
    pool = BlockPool()
    blocks = set()
    for number in range(50):
        block = pool.put(memoryview(bytes([number]) * 100_000))
        assert block is not None
        blocks.add(block)
        read(block, 100_000)
    pool.close()
    assert len(blocks) == 1


def test_a_full_pool_says_so_and_makes_room_from_blocks_that_were_read():
    pool = BlockPool(limit_bytes=300_000)
    small = [pool.put(memoryview(bytes(60_000))) for _ in range(4)]
    assert None not in small
    assert pool.put(memoryview(bytes(200_000))) is None
    for block in small:
        assert block is not None
        read(block, 60_000)
    assert pool.put(memoryview(bytes(200_000))) is not None
    pool.close()
    assert pool.nbytes == 0


def test_a_proof_is_read_only_where_it_was_written():
    proof = b"p" * 16
    block = write_proof(proof)
    assert can_read(os.getpid(), block, proof)
    assert not can_read(os.getpid(), block, b"q" * 16)
    assert not can_read(2**22 + 1, block, proof)
    assert not can_read(os.getpid(), None, proof)
    assert block is not None
    os.close(block)


def test_a_block_of_an_odd_length_does_not_touch_its_head():
    pool = BlockPool()
    content = memoryview(bytes(range(256)) * 3 + b"x")
    block = pool.put(content)
    assert block is not None
    assert os.pread(block, len(content), HEAD) == content
    pool.close()


def test_what_is_read_in_place_is_not_written_to_until_nobody_has_it():
    pool, reader = BlockPool(), BlockReader()
    first = pool.put(memoryview(b"a" * 100_000))
    assert first is not None
    held = torch.from_numpy(reader.bytes_of(os.getpid(), first, 100_000)).view(100, 1000)
    part = held[1:3]
    del held
    second = pool.put(memoryview(b"b" * 100_000))
    assert second is not None and second != first
    assert bytes(part.reshape(-1).tolist()) == b"a" * 2000
    del part
    assert pool.put(memoryview(b"c" * 100_000)) == first
    assert reader.bytes_of(os.getpid(), first, 100_000).tobytes() == b"c" * 100_000
    pool.close()


def test_blocks_are_files_of_ours_that_cannot_shrink_and_hold_what_is_asked_for(tmp_path):
    reader = BlockReader()
    loose = os.memfd_create(NAME)
    os.ftruncate(loose, HEAD + 100_000)
    other = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT)
    pool = BlockPool()
    own = pool.put(memoryview(bytes(70_000)))
    assert own is not None
    for number, nbytes, said in (
        (loose, 10, "may shrink"), (other, 10, "that is none"), (own, 1 << 20, "less than"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            reader.bytes_of(os.getpid(), number, nbytes)
    with pytest.raises(FileNotFoundError):
        reader.bytes_of(2**22 + 1, own, 10)
    os.close(loose)
    os.close(other)
    pool.close()


def test_a_number_that_is_given_to_another_block_is_that_block():
    pool, reader = BlockPool(limit_bytes=1 << 17), BlockReader()
    first = pool.put(memoryview(b"a" * 60_000))
    assert first is not None and reader.bytes_of(os.getpid(), first, 1).tobytes() == b"a"
    second = pool.put(memoryview(b"b" * 120_000))  # there is room for one of them: the first is closed
    assert second == first
    assert reader.bytes_of(os.getpid(), second, 120_000).tobytes() == b"b" * 120_000
    pool.close()
