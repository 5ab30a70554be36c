"""Algorithms: schedules of collectives and their outlines (room `collectives`), one family a file.

Each file offers ALGORITHMS, values that say of an algorithm everything there is to know (`catalog.Algorithm`): what
makes its schedule for a number of ranks, what makes its outline for levels, what it needs of them, and its rank.
"""
