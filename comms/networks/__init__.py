"""Networks: links, tiers, groups and orders of chips, from one chip to the whole data centre, and their state."""
