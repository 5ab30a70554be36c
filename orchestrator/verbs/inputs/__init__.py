"""Inputs of verbs: from what the command line says to clusters, jobs, plans and questions."""
