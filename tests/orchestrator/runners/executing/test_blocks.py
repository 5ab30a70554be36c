import os

from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.runners.executing.blocks import HEAD, BlockPool, BlockReader, can_read, write_proof


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
