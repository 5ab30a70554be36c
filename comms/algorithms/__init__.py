"""Algorithms: schedules of collectives and their outlines (room `collectives`), one family a file.

Each file offers SCHEDULES and OUTLINES: by the name of an algorithm and by operation, a function that makes the
schedule for a number of ranks, and one that makes the outline for levels (None where not all chips do alike).
"""
