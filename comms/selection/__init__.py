"""Selection: which algorithm a collective takes, and how long: by closed form, or by comparing at full fidelity.

Read `question` (what is asked and answered), `collective` (the way to an answer), `choice` (by closed form),
`comparison` (candidates within a budget), `full_collective` (every message moved).
"""
