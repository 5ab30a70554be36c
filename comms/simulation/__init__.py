"""Full fidelity: every chip and every message, wires shared max-min fairly, in compiled loops."""
