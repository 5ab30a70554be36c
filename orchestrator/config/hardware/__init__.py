"""The hardware of a cluster file: chips, hosts, links and levels, and what they amount to as a Cluster."""
