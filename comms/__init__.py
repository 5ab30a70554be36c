"""What links cost: units, links, networks and the collectives on them. Pure numbers: no torch, no ray."""
