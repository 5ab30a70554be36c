"""Networks: links, tiers and groups of chips, from inside one chip to the whole data centre, and their state."""
