"""The Program: its instructions, text, codec, the machine that interprets it, and the checks that prove it."""
