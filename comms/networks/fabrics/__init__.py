"""Fabrics: what one tier of a network can be made of: switches, rings, tori, meshes, dragonflies, links one by one."""
