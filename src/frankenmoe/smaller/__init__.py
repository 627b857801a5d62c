"""Makes an MoE smaller: takes experts out, and finds those that matter least."""
