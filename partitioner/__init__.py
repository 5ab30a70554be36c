"""What a chip must do: a model captured, laid out over chips, cut into stages and lowered to one Program per role.

Light to import: no torch from here.
"""
