"""Planning: from a cluster, a job and perhaps a plan to a checked Program."""
